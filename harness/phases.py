"""One sparse call taken apart into phases that can be timed: order, routing, exact part, statistics, tail.

Every engine's exact part is its `attend` with tail "drop" on the same map; what its whole `attend` takes beyond that
are statistics and tail together, by difference. An engine that knows better may offer a third function beside
`refuses` and `attend`,

    phases(q, k, v, block_map, tail, scale) -> dict[str, Callable[[], None]]

with one callable for each phase, in the order of a call, each of which does that phase alone on buffers made
beforehand. Their names are free; "statistics", "exact" and "tail" are known to the roofline, and "exact" must be the
exact part, since TFLOP/s are counted from it.

A phase alone finds nothing of the one before it in the L2 cache, so the phases may add up to more than the call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any

from torch import Tensor

from pisa import BlockMap, Blocks, Grid, SparseAttention, Tail, engines
from pisa.orders import inverse

WHOLE = "attend"  # timed for the difference alone
REST = "statistics_and_tail"


@dataclass(frozen=True)
class Apart:
    """A call of `method` on tensors `[B, H, L, D]`, which it has just made once; q, k, v are in its token order."""

    method: SparseAttention
    raw: tuple[Tensor, Tensor, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    permutation: Tensor | None
    blocks: Blocks
    block_map: BlockMap
    engine: ModuleType

    @classmethod
    def of(
        cls, method: SparseAttention, q: Tensor, k: Tensor, v: Tensor, grid: Grid, in_order: bool = False
    ) -> "Apart":
        """in_order: as in the call of the method."""
        permutation, raw = None if in_order else method.order(q, k, grid), (q, k, v)
        if permutation is not None:
            q, k, v = (x.index_select(2, permutation) for x in raw)
        blocks, block_map = method.blocks(q, k, grid), method.last.block_map
        engine = engines.choose(method.last.engine, q, block_map, method.tail)
        return cls(method, raw, q, k, v, permutation, blocks, block_map, engine)

    def in_order(self, o: Tensor) -> Tensor:
        """An output of the call, in the order of `q`."""
        return o if self.permutation is None else o.index_select(2, self.permutation)

    def reorder(self) -> None:
        """What the order costs: three tensors there, one of the same size back."""
        for x in self.raw:
            x.index_select(2, self.permutation)
        self.raw[0].index_select(2, inverse(self.permutation))

    def attend(self, tail: Tail) -> Any:
        return self.engine.attend(self.q, self.k, self.v, self.block_map, tail, None)

    def callables(self) -> dict[str, Callable[[], Any]]:
        """What has to be timed, by name; `durations` makes phases of the times."""
        method = self.method
        found = {} if self.permutation is None else {"order": self.reorder}
        found["routing"] = lambda: method.routing(self.q, self.k, self.v, self.blocks)
        if hasattr(self.engine, "phases"):
            return found | self.engine.phases(self.q, self.k, self.v, self.block_map, method.tail, None)
        found["exact"] = lambda: self.attend(Tail("drop"))
        return found if method.tail.name == "drop" else {**found, WHOLE: lambda: self.attend(method.tail)}


def durations(samples: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of each phase, from the samples of `callables`; the difference is taken round by round."""
    phases = {name: median(ms) for name, ms in samples.items() if name != WHOLE}
    if WHOLE in samples:
        pairs = zip(samples[WHOLE], samples["exact"], strict=True)
        phases[REST] = median(whole - exact for whole, exact in pairs)
    return phases
