"""The experiment as one loop: plan cells, skip those that have a record, measure the rest, store each at once.

Read `sweep` first. A cell is one fully resolved config; its dense reference is a cell too, shared by all methods that
start from the same noise. Records are the only memory: kill a sweep, run it again, and it goes on where it was.
"""

import copy
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import environment
from harness.config import AXES, Composed, Composer, build
from harness.errors import InputError
from harness.progress import Progress
from harness.records import Records, finite, key_of

RUN_CONTROL = {"tracker", "out", "dry_run", "force", "retry_failed", "on_error", "noise_floor", "allow", "device"}
EXIT_SOME_FAILED = 3


@dataclass(frozen=True)
class Cell:
    """One thing to measure. `reference` is the cell it is compared with, None for the reference itself."""

    config: dict[str, Any]
    choices: dict[str, str]
    role: str  # reference | noise_floor | method
    key: str
    variant: str | None = None
    reference: "Cell | None" = None

    @property
    def label(self) -> str:
        name = self.variant or self.choices["method"]
        detail = "" if self.role != "method" else f" {self.choices['method/tail']} {self.choices['method/order']}"
        sparsity = f" sparsity={self.config['sparsity']:g}" if self.role == "method" else ""
        return f"{self.config_name} {name}{detail}{sparsity} seed={self.config['seed']}"

    @property
    def config_name(self) -> str:
        return f"{self.choices['model']}/{self.choices['workload']}"


def sweep(words: list[str], composer: Composer, default_experiment: str = "main") -> int:
    """Runs a sweep from command-line words; returns the exit code (0, or 3 when a cell has no result)."""
    overrides = composer.experiment(words, default_experiment)
    cells = plan(overrides, composer)
    settings = cells[0].config
    store = Records(Path(settings["out"]))
    store.check_writable()
    todo = [cell for cell in cells if wanted(cell, store, settings)]
    if settings["dry_run"]:
        list_cells(cells, todo)
        return 0
    tracker = build(settings["tracker"], where="tracker")
    bench, started = Bench(Path(settings["out"]), settings["device"], settings["allow"]), time.monotonic()
    with Progress(len(cells), len(cells) - len(todo)) as progress:
        try:
            for cell in todo:
                progress.start(cell.label)
                record = bench.measure(cell, store)
                store.save(record)
                progress.done(cell.label, record)
                if record["status"] != "ok" and settings["on_error"] == "stop":
                    break
        except KeyboardInterrupt:
            progress.say("stopped; nothing is lost. Run the same command again to go on.")
            return 130
    results = [r for cell in cells if (r := store.load(cell.key))]
    show(results, Path(settings["out"]), settings, composer, tracker, overrides, redraw=bool(todo))
    progress.say(f"{len(todo)} measured, {len(cells) - len(todo)} already there, {time.monotonic() - started:.0f} s")
    return 0 if all(r["status"] == "ok" for r in results) and len(results) == len(cells) else EXIT_SOME_FAILED


def plan(overrides: list[str], composer: Composer) -> list[Cell]:
    """All cells of a sweep in running order: for each sample the reference, the noise floor, then the methods.

    Raises one InputError with every distinct fault of every cell, before anything runs.
    """
    composed, faults = [], []
    for words in composer.expand(overrides):
        try:
            composed.append(composer.compose(words))
        except InputError as error:
            faults += error.sentences
    faults += check(composed)
    if faults:
        raise InputError(*dict.fromkeys(faults))
    cells: dict[str, Cell] = {}
    floors: set[str] = set()
    for one in composed:
        reference = make_cell(dense_config(one), {**one.choices, "method": "dense"}, "reference")
        wanted_floor = reference.key in floors or len(floors) < one.config["noise_floor"]
        family = [reference]
        if wanted_floor:
            floors.add(reference.key)
            family += noise_floor(reference, one)
        if one.choices["method"] != "dense":
            family.append(make_cell(one.config, one.choices, "method", reference=reference))
        for cell in family:
            cells.setdefault(cell.key, cell)
    return list(cells.values())


def make_cell(config: dict[str, Any], choices: dict[str, str], role: str, **more: Any) -> Cell:
    """A cell and its key: everything that could change the answer, and nothing else."""
    device = environment.choose_device(config["device"])
    model = build_model(config, device)
    ignored = RUN_CONTROL | {"metrics"} if role == "reference" else RUN_CONTROL
    relevant = {k: v for k, v in config.items() if k not in ignored}
    weights = getattr(model, "weights_file", None)
    identity = {
        "config": {**relevant, "workload": {k: v for k, v in config["workload"].items() if k != "keep_frames"}},
        "role": role,
        "variant": more.get("variant"),
        "prompt": prompt_of(config, model),
        "code": environment.code_digest(),
        "weights": environment.file_digest(weights) if weights else None,
        "machine": environment.machine(device),
    }
    return Cell(config, choices, role, key_of(identity), **more)


def dense_config(one: Composed) -> dict[str, Any]:
    """The config of the dense reference: all that concerns sparse methods set to what does nothing."""
    config = copy.deepcopy(one.config)
    config["method"] = {"_target_": "baselines.dense.Dense", "kernel": config["dense_kernel"]}
    config["sparsity"], config["density"], config["engine"] = 0.0, 1.0, "auto"
    config["model"] |= {"dense_steps": 0, "dense_layers": 0, "order": "raster"}
    return config


def noise_floor(reference: Cell, one: Composed) -> list[Cell]:
    """Dense once more, and dense by another exact kernel: differences that mean nothing."""
    cells = []
    for variant, kernel in (("dense again", one.config["dense_kernel"]), ("dense sdpa_math", "sdpa_math")):
        config = copy.deepcopy(reference.config)
        config["method"]["kernel"] = kernel
        cells.append(make_cell(config, reference.choices, "noise_floor", variant=variant, reference=reference))
    return cells


def build_model(config: dict[str, Any], device: str) -> Any:
    """The model adapter of a config; cheap, weights are loaded when first used."""
    return build(config["model"], config["allow"], where="model", device=device)


def prompt_of(config: dict[str, Any], model: Any) -> str | None:
    return config["prompt"] if config["prompt"] is not None else model.prompt(config["seed"])


def check(composed: Iterable[Composed]) -> list[str]:
    """One sentence for every distinct fault that can be seen without running anything."""
    faults: dict[str, None] = {}
    for one in composed:
        try:
            check_one(one)
        except InputError as error:
            faults |= dict.fromkeys(error.sentences)
        except (ValueError, TypeError) as error:
            faults[str(error)] = None
    return list(faults)


def check_one(one: Composed) -> None:
    from baselines.dense import Dense

    config = one.config
    if isinstance(config["seed"], bool) or not isinstance(config["seed"], int) or config["seed"] < 0:
        raise InputError(f"seed must be a whole number from 0 on, got {config['seed']!r}.")
    if config["on_error"] not in ("continue", "stop"):
        raise InputError(f"on_error must be continue or stop, got {config['on_error']!r}.")
    device = environment.choose_device(config["device"])
    model = build_model(config, device)
    model.check()
    if one.choices["model"] == "synthetic" and one.choices["workload"] != "operator":
        raise InputError("model=synthetic is only q, k, v: use it with workload=operator.")
    if config["prompt"] is not None and hasattr(model, "check_prompt"):
        model.check_prompt(config["prompt"])
    build(config["workload"], where="workload")
    build(config["metrics"], where="metrics")
    Dense(config["dense_kernel"]).resolve(probe(device, model.dtype))
    if one.choices["method"] != "dense":
        check_method(config, model, device)


def probe(device: str, dtype: str) -> Any:
    """A tensor `[1, 1, 64, 64]` to ask kernels and engines with."""
    import torch

    return torch.zeros(1, 1, 64, 64, device=device, dtype=getattr(torch, dtype))


def check_method(config: dict[str, Any], model: Any, device: str) -> None:
    """Builds the method and asks its engine, so that an unfit one shows before the sweep."""
    method = build(config["method"], config["allow"])
    size = config["method"].get("block_size", 64)
    if not isinstance(size, int) or not 1 <= size <= model.tokens:
        raise InputError(f"method.block_size must be from 1 to the {model.tokens} tokens of the model, got {size!r}.")
    engine = config["method"].get("engine", "auto")
    if engine != "auto":
        import torch

        from pisa import BlockMap, Blocks, Tail, engines

        q = probe(device, model.dtype)
        whole = BlockMap.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), Blocks(64, 64, 64))
        engines.choose(engine, q, whole, getattr(method, "tail", Tail.of("drop")))


def wanted(cell: Cell, store: Records, settings: dict[str, Any]) -> bool:
    """Whether a cell must be measured: it has no record, or a failed one that is to be tried again, or force."""
    if settings["force"] or (record := store.load(cell.key)) is None:
        return True
    if cell.role == "reference" and record["status"] == "ok" and not product_path(store, cell.key).exists():
        return True
    return settings["retry_failed"] and record["status"] != "ok"


def product_path(store: Records, key: str) -> Path:
    """Tensors that belong to a record: the reference's, or a sample's frames."""
    return store.folder.parent / "tensors" / f"{key}.safetensors"


class Bench:
    """Builds what cells need, keeps the last model and reference at hand, and turns every outcome into a record."""

    def __init__(self, out: Path, device: str, allow: str | None):
        self.out, self.device, self.allow = out, environment.choose_device(device), allow
        self._models: dict[str, Any] = {}
        self._reference: tuple[str, Any] = ("", None)
        self._warm: set[str] = set()

    def measure(self, cell: Cell, store: Records) -> dict[str, Any]:
        """The cell's record, also when it fails: status refused, out_of_memory or failed, with one sentence."""
        record = self.describe(cell)
        try:
            return record | {"status": "ok", "reason": ""} | {k: finite(v) for k, v in self._run(cell, store).items()}
        except Exception as error:  # every failure becomes a record, and the sweep goes on
            if isinstance(error, InputError):  # a full disk ends the sweep, with nothing lost
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = (
                f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(last.filename).name}:{last.lineno})"
            )
            return record | {"status": status_of(error), "reason": reason}

    def describe(self, cell: Cell) -> dict[str, Any]:
        """The columns that are known before anything runs."""
        config, choices = cell.config, cell.choices
        model = self._model(config)
        method = cell.role == "method"
        return {
            "key": cell.key,
            "status": "failed",
            "reason": "",
            "role": cell.role,
            "variant": cell.variant,
            "protocol": config["metrics"]["protocol"],
            "model": choices["model"],
            "weights": model.weights,
            "workload": choices["workload"],
            "method": choices["method"],
            **{axis: choices[f"method/{axis}"] if method else None for axis in AXES},
            "block_size": config["method"].get("block_size"),
            "sparsity": config["sparsity"],
            "density": config["density"],
            "dense_steps": config["model"]["dense_steps"],
            "dense_layers": config["model"]["dense_layers"],
            "steps": config["model"].get("steps"),
            "guidance": config["model"].get("guidance"),
            "seed": config["seed"],
            "prompt": prompt_of(config, model),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **environment.capture(self.device),
            "config": config,
        }

    def _model(self, config: dict[str, Any]) -> Any:
        """One adapter for every model that differs in more than its warm-up."""
        shared = {k: v for k, v in config["model"].items() if k not in ("dense_steps", "dense_layers", "order")}
        name = repr(shared)
        if name not in self._models:
            self._models = {name: build_model(config, self.device)}  # the one before is let go
        model = self._models[name]
        for key in ("dense_steps", "dense_layers"):
            setattr(model, key, config["model"][key])
        return model

    def _run(self, cell: Cell, store: Records) -> dict[str, Any]:
        from baselines.dense import Dense
        from harness.workloads import Run

        config, model = cell.config, self._model(cell.config)
        workload = build(config["workload"], where="workload")
        kernel = config["method"]["kernel"] if cell.role != "method" else config["dense_kernel"]
        run = Run(
            method=build(config["method"], self.allow) if cell.role == "method" else None,
            dense=Dense(kernel),
            seed=config["seed"],
            prompt=prompt_of(config, model),
            device=self.device,
            metrics=build(config["metrics"], where="metrics"),
        )
        columns: dict[str, Any] = {"dense_kernel": run.dense.resolve(probe(self.device, model.dtype))}
        self._warm_up(cell, model, run)
        if cell.role == "reference":
            measured, tensors = workload.reference(model, run)
        else:
            measured, tensors = workload.measure(model, run, self._load_reference(cell, store))
            columns |= self._against_dense(cell, store, measured)
        columns |= measured
        if tensors:
            columns["frames_path"] = self._keep(product_path(store, cell.key), tensors, "frames" in tensors)
        return columns

    def _warm_up(self, cell: Cell, model: Any, run: Any) -> None:
        if cell.choices["workload"] != "generate":
            return  # the other workloads warm up themselves, in turn with dense
        from harness.workloads.generate import warm_up

        name = repr((run.method, run.dense, self._model(cell.config).dtype))
        if name not in self._warm:
            warm_up(model, run)
            self._warm.add(name)

    def _load_reference(self, cell: Cell, store: Records) -> dict[str, Any]:
        from safetensors.torch import load_file

        key = cell.reference.key
        if self._reference[0] != key:
            path = product_path(store, key)
            if not path.exists():
                raise ValueError("its dense reference has no result: see that record for the reason")
            self._reference = (key, load_file(path))
        return self._reference[1]

    @staticmethod
    def _against_dense(cell: Cell, store: Records, measured: dict[str, Any]) -> dict[str, Any]:
        """Speed-up of a whole sample over the dense one of the same seed; other workloads time both in turn."""
        dense = (store.load(cell.reference.key) or {}).get("latency_ms_median")
        if cell.role != "method" or "speedup" in measured or not dense or not measured.get("latency_ms_median"):
            return {}
        return {"dense_latency_ms_median": dense, "speedup": dense / measured["latency_ms_median"]}

    @staticmethod
    def _keep(path: Path, tensors: dict[str, Any], has_frames: bool) -> str | None:
        from safetensors.torch import save

        from harness.records import write_atomically

        write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}))
        return path.relative_to(path.parent.parent).as_posix() if has_frames else None


def status_of(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out_of_memory"
    return "refused" if isinstance(error, (ValueError, TypeError)) else "failed"


def list_cells(cells: list[Cell], todo: list[Cell]) -> None:
    """The plan, a line each."""
    waiting = {cell.key for cell in todo}
    for cell in cells:
        print(f"{'measure' if cell.key in waiting else 'have   '}  {cell.key}  {cell.label}")
    print(f"{len(cells)} cells: {len(todo)} to measure, {len(cells) - len(todo)} have a record.")


def show(
    results: list[dict[str, Any]],
    out: Path,
    settings: dict[str, Any],
    composer: Composer,
    tracker: Any,
    overrides: list[str],
    redraw: bool,
) -> None:
    """The views of a sweep, all made from its records: tables, plots, videos, tracker."""
    import pandas as pd

    from harness.tables import print_tables
    from harness.views import draw

    records = pd.DataFrame(results)
    media = draw(records, out, composer) if redraw or not (out / "tables.md").exists() else []
    print_tables(records)
    if redraw:
        spec = {"overrides": overrides, **{k: settings[k] for k in ("model", "workload", "metrics")}}
        folder = tracker.log(records, out, key_of({"overrides": overrides}), spec, media)
        if folder:
            print(f"Weights & Biases run in {folder} (send it with `wandb sync {folder}`)")
    print(f"Records, tables and plots are in {out}/")
