"""One forward from the same noisy latents: error of the prediction and time. Cheap, and sharper than whole samples,
since errors of earlier steps do not move the input."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.hook import Session
from harness.metrics import tensor_errors
from harness.timing import interleave, peak_memory, quantiles, speedup
from harness.workloads import Run


@dataclass(frozen=True)
class Step:
    """at: denoising steps of the dense run whose input is taken. repeats: timed pairs of dense and sparse forwards."""

    at: tuple[int, ...] = (1, 4, 6)
    repeats: int = 2

    def reference(self, model: Any, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Inputs, timesteps and dense predictions at the steps `at` of one dense sample."""
        check_steps(self.at, model.steps)
        kept: dict[str, Tensor] = {}
        session = Session(model.transformer, model.family, dense=run.dense, scheduler=model.scheduler)

        def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if session.step in self.at and session.branch == 0:
                kept[f"input_{session.step}"] = kwargs["hidden_states"].detach().cpu().clone()
                kept[f"time_{session.step}"] = kwargs["timestep"].detach().float().cpu().clone()
                kept[f"output_{session.step}"] = output[0].detach().float().cpu().clone()

        hook = model.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            with session:
                model.generate(run.prompt, run.seed)
        finally:
            hook.remove()
        return {"density_realised": 1.0, "exact_fraction": 1.0}, kept

    @torch.no_grad()
    def measure(self, model: Any, run: Run, reference: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"dense": run.dense, "dense_steps": model.dense_steps, "dense_layers": model.dense_layers}
        dense = Session(model.transformer, model.family, **settings)
        sparse = Session(model.transformer, model.family, method=run.method, **settings)

        def forward(session: Session, step: int) -> Tensor:
            session.step = step
            with session:
                return model.forward(reference[f"input_{step}"], reference[f"time_{step}"].item(), run.prompt)

        errors, dense_ms, sparse_ms = [], [], []
        with peak_memory(run.device) as memory:
            for step in self.at:
                found = tensor_errors(forward(sparse, step).float().cpu(), reference[f"output_{step}"])
                errors.append({"step": step, **found})
        columns = sparse.report()
        if self.repeats:
            columns |= memory
        else:
            del columns["attention_ms"]
        if model.weights != "random":  # with untrained weights every method looks perfect
            columns |= {"sites": errors, **mean_errors(errors)}
        if run.method is not None and self.repeats:
            for step in self.at:
                peers = {"dense": lambda s=step: forward(dense, s), "sparse": lambda s=step: forward(sparse, s)}
                samples = interleave(peers, run.device, self.repeats)
                dense_ms += samples["dense"]
                sparse_ms += samples["sparse"]
            columns |= {**quantiles(sparse_ms), **speedup(dense_ms, sparse_ms)}
        return columns, {}


def mean_errors(errors: list[dict[str, Any]]) -> dict[str, float]:
    """The columns rel_l1, rel_l2 and cosine as means over the sites."""
    return {name: sum(e[name] for e in errors) / len(errors) for name in ("rel_l1", "rel_l2", "cosine")}


def check_steps(at: tuple[int, ...], steps: int) -> None:
    """Raises ValueError when a step to look at does not exist."""
    if not at or min(at) < 0 or max(at) >= steps:
        raise ValueError(
            f"workload.at={list(at)} must name steps from 0 to {steps - 1}: the model takes {steps} steps."
        )
