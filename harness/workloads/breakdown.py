"""What the time of one denoising step consists of, and what sparse attention can save of it at most.

Columns, milliseconds of one forward (medians):
    step_ms_attention, dense_step_ms_attention   self-attention, as the session saw it, in the sparse and dense forward
    limit_ms, limit_speedup                      a forward whose attention costs nothing (it returns v): the limit
    step_ms_linear                               all linear layers, in a forward of that kind; not of compiled blocks
    step_ms_PHASE                                routing, statistics, exact, tail, order of the sparse attention: those
                                                 of one layer's q, k and v alone, times the sparse layers
    step_ms_layout                               the rest of the sparse layers' attention: copies, waiting, glue
and predicted_s, dense_predicted_s, predicted_speedup: denoising of a whole sample from these times, the model's steps,
dense steps and branches of guidance; text encoder and decoder are not in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn

from harness.hook import Session
from harness.phases import Apart, durations
from harness.timing import elapsed_ms, interleave, now, speedup
from harness.workloads import Run

MB = 2**20


@dataclass
class Forward:
    """One kind of forward of a model; it remembers what each call's session saw. settings: of the session."""

    model: Any
    prompt: str
    settings: dict[str, Any]
    sessions: list[Session] = field(default_factory=list, init=False)

    def __call__(self, at: Any) -> Tensor:
        session = Session(self.model.transformer, self.model.family, **self.settings)
        session.step = at.step
        self.sessions.append(session)
        with session:
            return self.model.forward(at.latents, at.timestep, self.prompt)

    def report(self) -> dict[str, Any]:
        """What all calls so far did together, as columns of a record, without times."""
        reports = [session.report() for session in self.sessions]
        total = {name: sum(r[name] for r in reports) for name in ("forwards", "sparse_calls", "dense_calls")}
        sparse = [r for r in reports if r["sparse_calls"]]
        means = {name: sum(r[name] for r in rs) / len(rs) if rs else 1.0
                 for name, rs in (("density_realised", sparse), ("exact_fraction", reports))}  # fmt: skip
        engine = sparse[0]["engine"] if sparse else None
        return {"layers": reports[0]["layers"], **total, **means, "engine": engine}

    def attention_ms(self, last: int) -> float:
        """Median milliseconds of self-attention in the last calls."""
        return median(session.report()["attention_ms"] for session in self.sessions[-last:])


class Breakdown:
    """Takes the sparse forward apart; dense and sparse have run before, so that nothing here pays for a first call."""

    def __init__(self, model: Any, run: Run, dense: Forward, sparse: Forward, at: Any):
        self.model, self.run, self.dense, self.sparse = model, run, dense, sparse
        self.counts = sparse.sessions[0].report()
        self.layer = self.counts["layers"] // 2
        self.limit = Forward(model, run.prompt, {"dense": lambda q, k, v: v, "observe": self._keep})
        self.kept: tuple[Any, ...] | None = None
        self.linear_ms = self._linear_ms(at)
        self.phases = self._phases() if self.counts["sparse_calls"] else {}
        self.limit.settings.pop("observe")

    def _linear_ms(self, at: Any) -> float | None:
        """None for compiled blocks, where a linear layer is no call of its own."""
        if getattr(self.model, "compile", False):
            self.limit(at)
            return None
        with timed_linears(self.model.transformer) as spans:
            self.limit(at)
        return elapsed_ms(spans)

    def _keep(self, session: Session, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if layer == self.layer:
            self.kept = (*(x.clone() for x in (q, k, v)), session.grid)  # compiled code uses their memory again

    def _phases(self) -> dict[str, float]:
        """Milliseconds of each phase in one layer; nothing for a method of one's own that says less of itself."""
        method, (q, k, v, grid), in_order = self.run.method, self.kept, {}
        if self.sparse.sessions[0].permutation is not None:  # the model carries the order: no layer pays for it
            permutation = method.order(q, k, grid)
            q, k, v = (x.index_select(2, permutation) for x in (q, k, v))
            in_order = {"in_order": True}
        method(q, k, v, grid=grid, **in_order)
        if getattr(method, "last", None) is None:
            return {}
        apart = Apart.of(method, q, k, v, grid, **in_order)
        found = durations(interleave(apart.callables(), self.run.device, None))
        self.kept = None
        return found

    def columns(self, samples: dict[str, list[float]]) -> dict[str, Any]:
        """samples: milliseconds of "dense", "sparse" and "limit" forwards, by round."""
        rounds, layers = len(samples["limit"]), self.counts["layers"]
        dense, sparse, limit = (median(samples[name][:rounds]) for name in ("dense", "sparse", "limit"))
        dense_attention, attention = (f.attention_ms(len(samples["dense"])) for f in (self.dense, self.sparse))
        of_sparse = {f"step_ms_{name}": ms * self.counts["sparse_calls"] for name, ms in self.phases.items()}
        kept_dense = self.counts["dense_calls"] * dense_attention / layers
        layout = {"step_ms_layout": attention - kept_dense - sum(of_sparse.values())} if of_sparse else {}
        return {
            "dense_step_ms_attention": dense_attention,
            "step_ms_attention": attention,
            "step_ms_dense_layers": kept_dense,
            "step_ms_linear": self.linear_ms,
            **of_sparse,
            **layout,
            "limit_ms": limit,
            "limit_speedup": speedup(samples["dense"][:rounds], samples["limit"])["speedup"],
            "phase_layer": self.layer,
            "tokens": self.model.tokens,
            "weights_mb": sum(p.nbytes for p in self.model.transformer.parameters()) / MB,
            **self._prediction(dense, sparse),
        }

    def _prediction(self, dense: float, sparse: float) -> dict[str, float]:
        model, branches = self.model, getattr(self.model, "branches", 2 if self.model.guidance > 1 else 1)
        both = model.steps * dense, model.dense_steps * dense + (model.steps - model.dense_steps) * sparse
        names = "dense_predicted_s", "predicted_s"
        found = {name: branches * ms / 1e3 for name, ms in zip(names, both, strict=True)}
        return found | {"predicted_speedup": both[0] / both[1]}


@contextmanager
def timed_linears(root: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Collects (start, end) of every call of a linear layer below `root` inside the block."""
    spans: list[tuple[Any, Any]] = []
    started: list[Any] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        started.append(now(args[0].is_cuda))

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        spans.append((started.pop(), now(output.is_cuda)))

    linears = [module for module in root.modules() if isinstance(module, nn.Linear)]
    hooks = [h for m in linears for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()
