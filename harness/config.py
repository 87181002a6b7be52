"""From words on the command line to checked, resolved cells. Hydra composes; planning many cells stays fast.

`python -m harness sweep sparsity=0.5,0.75 method=pisa` becomes: expand comma lists into single-valued override lists,
compose once per choice of config files (60 to 100 ms each), set plain values on copies, resolve interpolations.
"""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from harness.errors import InputError

AXES = ("order", "routing", "tail")
OUR_PACKAGES = ("pisa.", "baselines.", "harness.")


def conf_dir() -> Path:
    """conf/ beside the packages in a checkout, inside harness/ when installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def options(group: str, config_dirs: Iterable[Path] = ()) -> list[str]:
    """The option names of a config group, from file names alone (no Hydra)."""
    found = {p.stem for root in (conf_dir(), *config_dirs) for p in (Path(root) / group).glob("*.yaml")}
    return sorted(found)


def near(word: str, words: Iterable[str]) -> str:
    """' Did you mean ...?' or nothing."""
    match = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


@dataclass(frozen=True)
class Composed:
    """One cell's resolved config and the option chosen for every config group."""

    config: dict[str, Any]
    choices: dict[str, str]


@dataclass(eq=False)  # two composers are never the same one; the cache below asks for its identity
class Composer:
    """Expands, composes and checks overrides against conf/ and the user's own config folders."""

    config_dirs: tuple[Path, ...] = ()
    _bases: dict[tuple[tuple[str, ...], str | None], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from hydra._internal.hydra import Hydra
        from hydra._internal.utils import create_config_search_path
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser

        for folder in self.config_dirs:
            if not folder.is_dir():
                raise InputError(
                    f"--config-dir {folder} is not a folder: name the folder that holds your method/*.yaml."
                )
        search_path = create_config_search_path(str(conf_dir()))
        for folder in self.config_dirs:
            search_path.prepend("user", f"file://{folder.resolve()}", "schema")
        GlobalHydra.instance().clear()
        self.hydra = Hydra.create_main_hydra2("harness", search_path)
        self.parser = OverridesParser.create(config_loader=self.hydra.config_loader)

    def options(self, group: str) -> list[str]:
        return options(group, self.config_dirs)

    def experiment(self, overrides: list[str], default: str) -> list[str]:
        """The overrides of `experiment=NAME` (conf/experiment/NAME.yaml), the user's own in their place or behind."""
        name = next((o.split("=", 1)[1] for o in overrides if o.startswith("experiment=")), default)
        self._check_option("experiment", name)
        own = [o for o in overrides if not o.startswith("experiment=")]
        given = {o.split("=", 1)[0].lstrip("+~") for o in own}
        roots = (*self.config_dirs, conf_dir())
        path = next(p for root in roots if (p := Path(root) / "experiment" / f"{name}.yaml").exists())
        lines = yaml.safe_load(path.read_text()) or {}
        return [f"{key}={value}" for key, value in lines.items() if key not in given] + own

    def expand(self, overrides: list[str]) -> list[tuple[tuple[str, str], ...]]:
        """The cells of a sweep, in order, each a list of (key, value text).

        Shape, seed and prompt vary slowest, so that all methods of one sample run one after the other.
        """
        axes: dict[str, list[str]] = {}
        for parsed in self._parse(overrides):
            if parsed.is_sweep_override():
                if parsed.is_interval_sweep():
                    raise InputError(
                        f"{parsed.input_line!r} cannot be enumerated: list the values, a=1,2,3 or a=range(3)."
                    )
                values = list(dict.fromkeys(parsed.sweep_string_iterator()))
            else:
                values = [parsed.get_value_element_as_str()]
            axes[parsed.get_key_element()] = values
        slow_first = sorted(axes, key=lambda key: key not in ("shape", "seed", "prompt"))
        return list(itertools.product(*([(key, v) for v in axes[key]] for key in slow_first)))

    def _parse(self, overrides: list[str]) -> list[Any]:
        from hydra.errors import HydraException

        for text in overrides:
            key, eq, value = text.partition("=")
            if not eq:
                hint = near(text, ("sweep", "plot", "list", "doctor", "bench", "score"))
                raise InputError(f"{text!r} is not key=value.{hint} If it follows a comma: no spaces around commas.")
            if value.strip() in ("", "[]") or value.endswith(",") or ",," in value:
                raise InputError(f"{text!r} has an empty value: write {key}=a,b without gaps, or leave {key} out.")
        try:
            return self.parser.parse_overrides(overrides)
        except HydraException as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"could not read the override: {first} (no spaces around commas; quote special text)"
            ) from error

    def _check_option(self, group: str, name: str) -> None:
        known = self.options(group)
        if name not in known:
            raise InputError(
                f"No {group.split('/')[-1]} {name!r} in conf/{group}.{near(name, known)} "
                f"Known: {', '.join(known)} (`python -m harness list`)."
            )

    def compose(self, cell: Iterable[tuple[str, str]], order: str | None = None) -> Composed:
        """Composes and resolves one cell. Raises InputError naming the near miss for an unknown option or key.

        order: what `method/order=model` stands for; None is what the model's config says.
        """
        from omegaconf import OmegaConf

        cell = list(cell)
        groups = [(k, v) for k, v in cell if self.options(k.split("@")[0].lstrip("+~"))]
        base, choices = self._base(tuple(f"{k}={v}" for k, v in groups), order)
        config = copy.deepcopy(base)
        for key, text in cell:
            if (key, text) not in groups:
                self._set(config, key, text)
        resolve_density(config)
        resolved = OmegaConf.to_container(config, resolve=True)
        if choices["method"] == "dense":  # its axes are there so that axis overrides parse beside other methods
            resolved["method"] = {k: v for k, v in resolved["method"].items() if k not in AXES}
        return Composed(resolved, choices)

    def _base(self, overrides: tuple[str, ...], order: str | None) -> tuple[Any, dict[str, str]]:
        """The composition of one choice of files, cached; `method/order=model` becomes the model's own order."""
        if (overrides, order) not in self._bases:
            config, choices = self._load(overrides)
            if choices.get("method/order") == "model":
                rest = [o for o in overrides if not o.startswith("method/order=")]
                config, choices = self._load((*rest, f"method/order={order or config.model.order}"))
            self._bases[overrides, order] = config, choices
        return self._bases[overrides, order]

    def _load(self, overrides: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
        from hydra.errors import HydraException
        from hydra.types import RunMode
        from omegaconf import OmegaConf, open_dict

        for text in overrides:
            self._check_option(*text.split("=", 1))
        try:
            config = self.hydra.compose_config(
                "config", list(overrides), run_mode=RunMode.RUN, from_shell=False, with_log_configuration=False
            )
        except HydraException as error:
            raise InputError(f"could not compose {' '.join(overrides)}: {' '.join(str(error).split())}") from error
        choices = {k: v for k, v in config.hydra.runtime.choices.items() if not k.startswith("hydra/")}
        with open_dict(config):
            del config["hydra"]
        for axis in AXES:
            if not OmegaConf.is_dict(config.method.get(axis)):
                raise InputError(
                    f"method {choices['method']!r} does not name its {axis}: "
                    f"add `{axis}: ...` to the defaults list of its config file."
                )
        return config, choices

    def _set(self, config: Any, key: str, text: str) -> None:
        from omegaconf import OmegaConf

        name = key.lstrip("+")
        axis = name.split(".")
        if len(axis) == 2 and axis[0] == "method" and axis[1] in AXES:
            raise InputError(f"{key}={text} would replace the whole {axis[1]}: write method/{axis[1]}={text}.")
        if not key.startswith("+") and OmegaConf.select(config, name, default=_MISSING) is _MISSING:
            known = flat_keys(config)
            raise InputError(
                f"there is no setting {name!r}.{near(name, known)} `python -m harness sweep --help` lists them."
            )
        OmegaConf.update(config, name, self._value(f"{name}={text}"), force_add=key.startswith("+"))

    @lru_cache(maxsize=4096)  # noqa: B019  one composer lives as long as the process
    def _value(self, text: str) -> Any:
        return self.parser.parse_override(text).value()


_MISSING = object()


def flat_keys(config: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config."""
    keys = []
    for key in config:
        node = config._get_node(key)
        name = f"{prefix}{key}"
        keys += [name, *flat_keys(node, f"{name}.")] if hasattr(node, "keys") else [name]
    return keys


def resolve_density(config: Any) -> None:
    """density = 1 - sparsity, once, here."""
    sparsity = config.sparsity
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise InputError(
            f"sparsity must be in [0, 1), got {sparsity}: it is the fraction of key blocks not computed exactly. "
            "For dense attention use method=dense."
        )
    config.density = round(1 - sparsity, 12)


def check_targets(node: Any, allow: str | None, where: str = "method") -> None:
    """Only classes of this project, or of the package that the user names with allow=, are ever built."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if (
            target is not None
            and not target.startswith(OUR_PACKAGES)
            and not (allow and target.startswith(f"{allow}."))
        ):
            raise InputError(
                f"{where} names the class {target!r}: add allow={target.split('.')[0]} to run code of that package."
            )
        for key, value in node.items():
            check_targets(value, allow, f"{where}.{key}")


def build(node: dict[str, Any], allow: str | None = None, where: str = "method", **extra: Any) -> Any:
    """The object that a config node describes. Raises InputError when it cannot be had or refuses its settings."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check_targets(node, allow, where)
    try:
        return instantiate(node, **extra)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise InputError(f"{where} cannot be built: {' '.join(str(cause).split())}") from error
