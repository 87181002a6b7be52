"""One forward from the same noisy latents: error of the prediction and time. Cheap, and sharper than whole samples,
since errors of earlier steps do not move the input. Of random weights, which have no prediction to lose, only time."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.hook import Session
from harness.metrics import tensor_errors
from harness.timing import interleave, peak_memory, quantiles, speedup
from harness.workloads import Run
from harness.workloads.breakdown import Breakdown, Forward

MIDDLE = 500.0  # of the noise schedule: the timestep of random weights, whose forward takes as long at any


class Input(NamedTuple):
    """What the transformer is given at a denoising step."""

    step: int
    latents: Tensor
    timestep: float


@dataclass(frozen=True)
class Step:
    """at: denoising steps of the dense run whose input is taken; random weights take noise, once, as of the first
    sparse step. repeats: timed rounds, dense and sparse in turn. breakdown: also what the time consists of
    (harness.workloads.breakdown)."""

    at: tuple[int, ...] = (1, 4, 6)
    repeats: int = 2
    breakdown: bool = False

    def reference(self, model: Any, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Inputs, timesteps and dense predictions at the steps `at` of one dense sample; nothing of random weights."""
        columns = {"density_realised": 1.0, "exact_fraction": 1.0}
        if model.weights == "random":
            return columns, {}
        check_steps(self.at, model.steps)
        kept: dict[str, Tensor] = {}
        session = Session(model.transformer, model.family, dense=run.dense, scheduler=model.scheduler)

        def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if session.step in self.at and session.branch == 0:
                kept[f"input_{session.step}"] = kwargs["hidden_states"].detach().cpu().clone()
                kept[f"time_{session.step}"] = kwargs["timestep"].detach().float().cpu().flatten()[:1].clone()
                kept[f"output_{session.step}"] = output[0].detach().float().cpu().clone()

        hook = model.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            with session:
                model.generate(run.prompt, run.seed)
        finally:
            hook.remove()
        return columns, kept

    def inputs(self, model: Any, run: Run, reference: dict[str, Tensor]) -> list[Input]:
        if model.weights == "random":
            return [Input(model.dense_steps, model.noise(run.seed).to(run.device), MIDDLE)]
        return [Input(s, reference[f"input_{s}"].to(run.device), reference[f"time_{s}"].item()) for s in self.at]

    @torch.no_grad()
    def measure(self, model: Any, run: Run, reference: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"dense": run.dense, "dense_steps": model.dense_steps, "dense_layers": model.dense_layers}
        dense, sparse = (Forward(model, run.prompt, settings | {"method": m}) for m in (None, run.method))
        inputs = self.inputs(model, run, reference)
        model.transformer  # noqa: B018  built before, since its weights are no memory of the forward
        with peak_memory(run.device) as memory:
            predictions = [sparse(at).float().cpu() for at in inputs]
        columns = sparse.report()
        if model.weights != "random":  # with untrained weights every method looks perfect
            pairs = zip(inputs, predictions, strict=True)
            errors = [{"step": at.step, **tensor_errors(o, reference[f"output_{at.step}"])} for at, o in pairs]
            columns |= {"sites": errors, **mean_errors(errors)}
        if not self.repeats:
            return columns, {}
        columns |= memory
        if run.method is not None:
            columns |= self._times(model, run, inputs, dense, sparse)
        return columns, {}

    def _times(self, model: Any, run: Run, inputs: list[Input], dense: Forward, sparse: Forward) -> dict[str, Any]:
        """Columns of latency; both have been warmed up before the first round."""
        with peak_memory(run.device) as memory:
            dense(inputs[0])
        parts = Breakdown(model, run, dense, sparse, inputs[0]) if self.breakdown else None
        samples: dict[str, list[float]] = {"dense": [], "sparse": []}
        for at in inputs:
            peers = {"dense": partial(dense, at), "sparse": partial(sparse, at)}
            peers |= {"limit": partial(parts.limit, at)} if parts and at is inputs[0] else {}
            for name, ms in interleave(peers, run.device, self.repeats, warmup=0).items():
                samples.setdefault(name, []).extend(ms)
        columns = {**quantiles(samples["sparse"]), **speedup(samples["dense"], samples["sparse"])}
        columns |= {"dense_peak_memory_mb": memory["peak_memory_mb"]}
        columns |= {"attention_ms": sparse.attention_ms(len(samples["sparse"]))}
        return columns | (parts.columns(samples) if parts else {})


def mean_errors(errors: list[dict[str, Any]]) -> dict[str, float]:
    """The columns rel_l1, rel_l2 and cosine as means over the sites."""
    return {name: sum(e[name] for e in errors) / len(errors) for name in ("rel_l1", "rel_l2", "cosine")}


def check_steps(at: tuple[int, ...], steps: int) -> None:
    """Raises ValueError when a step to look at does not exist."""
    if not at or min(at) < 0 or max(at) >= steps:
        raise ValueError(
            f"workload.at={list(at)} must name steps from 0 to {steps - 1}: the model takes {steps} steps."
        )
