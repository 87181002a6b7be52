"""A whole sample: the same prompt and noise, dense and sparse; end-to-end time, and quality of the decoded frames."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from harness.hook import Session
from harness.metrics import tensor_errors
from harness.timing import Clock, peak_memory, quantiles
from harness.workloads import Run


@dataclass(frozen=True)
class Generate:
    """keep_frames: keep every sample's frames (fp16), not only those of the dense reference.
    timed: record times and memory; false where several sweeps share a machine and times would mean nothing."""

    keep_frames: bool = True
    timed: bool = True

    def reference(self, model: Any, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        columns, latents = self._sample(model, run)
        return columns, {"latents": latents.cpu(), "frames": model.decode(latents).cpu()}

    def measure(self, model: Any, run: Run, reference: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        columns, latents = self._sample(model, run)
        if model.weights == "random":
            return columns, {}  # near-uniform attention: every method looks perfect, nothing would be measured
        frames = model.decode(latents).cpu()
        columns |= asdict(run.metrics(reference["frames"], frames))
        columns |= tensor_errors(latents.cpu(), reference["latents"])
        return columns, {"frames": frames.half()} if self.keep_frames else {}

    def _sample(self, model: Any, run: Run) -> tuple[dict[str, Any], Tensor]:
        session = Session(
            model.transformer,
            model.family,
            method=run.method,
            dense=run.dense,
            scheduler=model.scheduler,
            dense_steps=model.dense_steps,
            dense_layers=model.dense_layers,
        )
        with session, peak_memory(run.device) as memory:
            latents: list[Tensor] = []
            total_ms = Clock(run.device)(lambda: latents.append(model.generate(run.prompt, run.seed)))
        report = session.report()
        attention_ms = report.pop("attention_ms")
        if self.timed:
            report |= {**quantiles([total_ms]), **memory, "attention_ms": attention_ms}
            report["attention_share"] = attention_ms / total_ms
        return report, latents[0]


def warm_up(model: Any, run: Run) -> None:
    """One untimed forward, so that no sample pays for first calls (allocations, compilation, library handles)."""
    with Session(model.transformer, model.family, method=run.method, dense=run.dense, dense_layers=1), torch.no_grad():
        model.forward(model.noise(0), 500.0, run.prompt)
