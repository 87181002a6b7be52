"""Attention alone on q, k, v captured from the model: error against float64 dense attention, and time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.hook import Session
from harness.metrics import tensor_errors
from harness.timing import interleave, peak_memory, quantiles, speedup
from harness.workloads import Run
from harness.workloads.step import check_steps, mean_errors
from pisa import Grid


@dataclass(frozen=True)
class Operator:
    """at, layers: denoising steps and transformer blocks to capture. truth_rows: query rows, spread evenly, whose
    float64 output is the truth. repeats: timed rounds of dense and sparse on every site."""

    at: tuple[int, ...] = (1, 4, 6)
    layers: tuple[int, ...] = (1, 3, 5, 7)
    truth_rows: int = 512
    repeats: int = 5

    def reference(self, model: Any, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """q, k, v of every site `[B, H, L, D]`, its grid, and the truth on chosen rows `[B, H, rows, D]` float64."""
        kept = self._capture(model, run)
        for site in sites(kept):
            q, k, v = (kept[f"{site}.{name}"].to(run.device) for name in "qkv")
            kept[f"{site}.truth"] = dense_rows(q, k, v, self.rows(q)).cpu()
        return {"density_realised": 1.0, "exact_fraction": 1.0}, kept

    def rows(self, q: Tensor) -> Tensor:
        return torch.linspace(0, q.shape[2] - 1, min(self.truth_rows, q.shape[2]), device=q.device).round().long()

    def _capture(self, model: Any, run: Run) -> dict[str, Tensor]:
        check_steps(self.at, model.steps)
        kept: dict[str, Tensor] = {}

        def keep(session: Session, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            if session.step in self.at and layer in self.layers and session.branch == 0:
                site, grid = f"step{session.step}.layer{layer}", session.grid
                kept.update(
                    {f"{site}.{n}": x.detach().cpu().contiguous() for n, x in zip("qkv", (q, k, v), strict=True)}
                )
                kept[f"{site}.grid"] = torch.tensor([grid.frames, grid.height, grid.width, grid.text, grid.text_first])

        with Session(model.transformer, model.family, dense=run.dense, scheduler=model.scheduler, observe=keep):
            model.generate(run.prompt, run.seed)
        if len(sites(kept)) != len(self.at) * len(self.layers):
            raise ValueError(f"workload.layers={list(self.layers)} names a layer that this model does not have.")
        return kept

    @torch.no_grad()
    def measure(self, model: Any, run: Run, reference: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        errors, dense_ms, sparse_ms, peak = [], [], [], 0.0
        for site in sites(reference):
            q, k, v = (reference[f"{site}.{name}"].to(run.device) for name in "qkv")
            frames, height, width, text, first = reference[f"{site}.grid"].tolist()
            grid = Grid(frames, height, width, text, bool(first))
            attend = run.dense if run.method is None else run.method
            with peak_memory(run.device) as memory:
                o = attend(q, k, v, grid=grid)
            peak = max(peak, memory["peak_memory_mb"])
            found = tensor_errors(o[:, :, self.rows(q)].double().cpu(), reference[f"{site}.truth"])
            errors.append({"site": site, **found})
            if run.method is None or not self.repeats:
                continue
            peers = {
                "dense": lambda q=q, k=k, v=v: run.dense(q, k, v),
                "sparse": lambda q=q, k=k, v=v, grid=grid: run.method(q, k, v, grid=grid),
            }
            samples = interleave(peers, run.device, self.repeats)
            dense_ms += samples["dense"]
            sparse_ms += samples["sparse"]
        columns = {"sites": errors, "peak_memory_mb": peak, **mean_errors(errors)}
        if run.method is not None:
            columns["engine"] = run.method.last.engine
            columns["density_realised"] = columns["exact_fraction"] = run.method.last.density
        return {**columns, **quantiles(sparse_ms), **speedup(dense_ms, sparse_ms)}, {}


def sites(kept: dict[str, Tensor]) -> list[str]:
    """The names of the captured calls."""
    return sorted(name.removesuffix(".q") for name in kept if name.endswith(".q"))


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, chunk: int = 64) -> Tensor:
    """Float64 dense attention of some query rows, `[B, H, rows, D]`."""
    k, v = k.double(), v.double()
    out = []
    for some in rows.split(chunk):
        logits = q[:, :, some].double() @ k.mT * q.shape[-1] ** -0.5  # [B, H, chunk, L]
        out.append(logits.softmax(-1) @ v)
    return torch.cat(out, 2)
