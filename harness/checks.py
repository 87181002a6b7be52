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
    if one.choices.get("shape") and one.choices["model"] != "synthetic":
        raise InputError(
            f"shape= sets the sizes of model=synthetic, got model={one.choices['model']}: leave shape out, or leave "
            "the model to `bench kernel`."
        )
    device = environment.choose_device(config["device"])
    model = build_model(config, device)
    model.check()
    if hasattr(model, "qkv") != (one.choices["workload"] == "kernel"):
        raise InputError(
            f"workload=kernel and model=synthetic (only q, k, v) go together, got workload={one.choices['workload']} "
            f"and model={one.choices['model']}: `python -m harness bench kernel` sets both."
        )
    if config["prompt"] is not None and hasattr(model, "check_prompt"):
        model.check_prompt(config["prompt"])
    build(config["workload"], where="workload")
    build(config["metrics"], where="metrics")
    Dense(config["dense_kernel"]).resolve(probe(device, model.dtype))
    if one.choices["method"] != "dense":
        check_method(config, model, device)


def without_refused_engines(composed: list[Composed]) -> tuple[list[Composed], list[str]]:
    """A sweep over several engines goes on without those that cannot run here: what is left, and why the others went.

    An engine asked for alone stays, and so does an unknown name: `check` then refuses the sweep.
    """
    from pisa.engines import ENGINES

    if len({one.config["method"].get("engine") for one in composed if one.choices["method"] != "dense"}) < 2:
        return composed, []
    kept, reasons = [], {}
    for one in composed:
        try:
            if one.choices["method"] != "dense" and one.config["method"].get("engine") in ENGINES:
                device = environment.choose_device(one.config["device"])
                check_engine(one.config, build(one.config["method"], one.config["allow"]),
                             build_model(one.config, device), device)  # fmt: skip
            kept.append(one)
        except InputError:
            kept.append(one)  # another fault, which `check` tells
        except ValueError as error:
            reasons[f"left out: {error}"] = None
    if not any(one.choices["method"] != "dense" for one in kept):
        return composed, []
    return kept, list(reasons)


def probe(device: str, dtype: str, head_dim: int = 64, tokens: int = 64) -> Any:
    """A tensor `[1, 1, tokens, head_dim]` to ask kernels and engines with."""
    import torch

    return torch.zeros(1, 1, tokens, head_dim, device=device, dtype=getattr(torch, dtype))


def check_method(config: dict[str, Any], model: Any, device: str) -> None:
    """Builds the method and asks its engine, so that an unfit one shows before the sweep."""
    method = build(config["method"], config["allow"])
    size = config["method"].get("block_size", 64)
    if not isinstance(size, int) or not 1 <= size <= model.tokens:
        raise InputError(f"method.block_size must be from 1 to the {model.tokens} tokens of the model, got {size!r}.")
    if config["method"].get("engine", "auto") != "auto":
        check_engine(config, method, model, device)


def check_engine(config: dict[str, Any], method: Any, model: Any, device: str) -> None:
    """Asks the method's engine with tensors like the model's. Raises ValueError."""
    size = config["method"].get("block_size", 64)
    q = probe(device, model.dtype, getattr(model, "head_dim", 64), size)
    ask_engine(config["method"]["engine"], q, getattr(method, "tail", "drop"))


def ask_engine(name: str, q: Any, tail: Any) -> None:
    """Raises ValueError with the engine's own reason when it cannot run one block like `q` `[1, 1, block, D]` here."""
    import torch

    from pisa import BlockMap, Blocks, Tail, engines

    size = q.shape[2]
    whole = BlockMap.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device), Blocks(size, size, size))
    engines.choose(name, q, whole, Tail.of(tail))


def build_model(config: dict[str, Any], device: str) -> Any:
    """The model adapter of a config; cheap, weights are loaded when first used."""
    return build(config["model"], config["allow"], where="model", device=device)


def prompt_of(config: dict[str, Any], model: Any) -> str | None:
    return config["prompt"] if config["prompt"] is not None else model.prompt(config["seed"])
