"""Everything about a cell that can be seen to be wrong before any work starts, each fault in one sentence."""

from collections.abc import Iterable
from typing import Any

from harness import environment
from harness.config import Composed, build
from harness.errors import InputError


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
        ask_engine(engine, probe(device, model.dtype), getattr(method, "tail", "drop"))


def ask_engine(name: str, q: Any, tail: Any) -> None:
    """Raises ValueError with the engine's own reason when it cannot run tensors like `q` `[1, 1, 64, 64]` here."""
    import torch

    from pisa import BlockMap, Blocks, Tail, engines

    whole = BlockMap.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device), Blocks(64, 64, 64))
    engines.choose(name, q, whole, Tail.of(tail))


def build_model(config: dict[str, Any], device: str) -> Any:
    """The model adapter of a config; cheap, weights are loaded when first used."""
    return build(config["model"], config["allow"], where="model", device=device)


def prompt_of(config: dict[str, Any], model: Any) -> str | None:
    return config["prompt"] if config["prompt"] is not None else model.prompt(config["seed"])
