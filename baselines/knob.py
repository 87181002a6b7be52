"""One knob for all: how a routing with a knob of its own (p, tau, a window, a width) is asked for a density.

Turned up, each of these knobs only adds blocks. So a routing says, for every block, the value of its knob from which on
the block is exact: its `levels`. The paper's rule is then one comparison with the knob, and a wanted density is the
level that as many blocks do not exceed. Nothing is searched for, and scores are computed once.
Shapes: Nl lists of key blocks, one for each run of blocks.shared query blocks; Nk key blocks.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from pisa import BlockMap, Blocks, Grid
from pisa.routing import check_density, kept_blocks


class Graded(Protocol):
    """A routing whose blocks enter one after the other. Called, it applies its own knob."""

    def levels(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        """The knob's value from which on a block is exact, `[B, H, Nl, Nk]` fp32; -inf: always."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap: ...


@dataclass(frozen=True)
class AtDensity:
    """`routing` with its own knob turned, call by call, so that the call has this density.

    One value of the knob holds for all heads and lists of a sample, so that they share the budget as the method has it;
    the samples of a batch do not see each other. Of the blocks that enter at that very value as many are taken as the
    budget has left, spread evenly over heads and lists: the density is met to a block whatever the knob's steps. It is
    exceeded only where what a method always keeps is more (its -inf levels), or one block for each list is.
    Raises ValueError for a density outside (0, 1].
    """

    routing: "Graded | Static"
    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        if isinstance(self.routing, Static):
            return static_map(self.routing, self.density, blocks, *q.shape[:2], q.device)
        return to_map(lowest(self.routing.levels(q, k, v, blocks), self.density), blocks)


class Static(ABC):
    """A routing that looks at positions alone. One map for all heads, kept for each cut of the tokens.

    A subclass is a frozen dataclass, since it is part of a cache's key.
    """

    @abstractmethod
    def positions(self, blocks: Blocks, grid: Grid) -> Tensor:
        """`levels` of a knob whose own value is 1, `[Nl, Nk]` fp32 on the CPU; text is seen to elsewhere."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        return static_map(self, None, blocks, *q.shape[:2], q.device)


@lru_cache(maxsize=32)
def static_map(
    routing: Static, density: float | None, blocks: Blocks, batch: int, heads: int, device: torch.device
) -> BlockMap:
    """The map of a static routing, at its own knob or at a density. Do not write to it. Raises ValueError."""
    if blocks.grid is None:
        raise ValueError(f"{routing} needs to know where the tokens sit: pass grid=Grid(frames, height, width).")
    levels = always_text(routing.positions(blocks, blocks.grid), blocks)[None]  # [1, Nl, Nk]
    mask = levels <= 1 if density is None else lowest(levels, density)
    return to_map(mask[:, None].to(device).expand(batch, heads, -1, -1), blocks)


def lowest(levels: Tensor, density: float) -> Tensor:
    """True for the lowest `density` of each `levels[s]`, `[S, ..., Nk]`, for every -inf and the first of each list."""
    first = levels.argmin(-1, keepdim=True)  # of equal ones the first, on every device
    sets = levels.scatter(-1, first, -torch.inf).flatten(1)  # [S, M]
    count = kept_blocks(density, sets.shape[1])
    last = sets.kthvalue(count, keepdim=True).values  # [S, 1]
    below, ties = sets < last, sets == last
    left, number = count - below.sum(-1, keepdim=True), ties.cumsum(-1)  # number: 1, 2, ... of the ties
    # Evenly: as number goes up to all of the ties, number * left // all goes up to left, each step at one of them.
    all_ties = number[:, -1:].clamp(min=1)  # there are none among NaN
    taken = ties & (number * left // all_ties > (number - 1) * left // all_ties)
    return (below | taken | (sets == -torch.inf)).view_as(levels)


def to_map(mask: Tensor, blocks: Blocks) -> BlockMap:
    """The map of `mask` `[B, H, Nl, Nk]`, True where exact."""
    lists = BlockMap.from_mask(mask, blocks)
    if blocks.shared == 1:
        return lists
    each = (x.repeat_interleave(blocks.shared, 2)[:, :, : blocks.n_q] for x in (lists.counts, lists.indices))
    counts, indices = (x.contiguous() for x in each)
    return BlockMap(counts, indices, blocks.size, blocks.q_len, blocks.k_len, lists.uniform, blocks.shared)


def always_text(levels: Tensor, blocks: Blocks, keys: bool = True, rows: bool = True) -> Tensor:
    """`levels` `[..., Nl, Nk]`, -inf for the key blocks (keys) and in the lists (rows) that hold a text token."""
    columns, queries = blocks.text_key_blocks(), blocks.text_query_blocks()
    if keys:
        levels[..., columns] = -torch.inf
    if rows:
        levels[..., queries.start // blocks.shared : -(-queries.stop // blocks.shared), :] = -torch.inf
    return levels


def check_share(name: str, value: float) -> None:
    """Raises ValueError when `value` is no share of the mass."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}: it is a share of what a row of scores holds.")


def nats(p: float) -> float:
    """-log(1 - p): a share of the mass as a knob that still tells apart shares next to 1."""
    return math.inf if p >= 1 else -math.log1p(-p)


def nats_before(log_mass: Tensor) -> Tensor:
    """`nats` of the share of its list that the blocks before it hold, best first, `[..., Nk]`; the best has 0.

    log_mass: logarithm of what each block holds, up to a constant of the list. Of equal blocks the first is better.
    """
    order, rest = _rest(log_mass)
    return torch.empty_like(rest).scatter_(-1, order, rest[..., :1] - rest)


def nats_up_to(log_mass: Tensor) -> Tensor:
    """`nats` of the share that a block and the better ones hold, as `nats_before`; the worst has infinity."""
    order, rest = _rest(log_mass)
    worse = torch.nn.functional.pad(rest[..., 1:], (0, 1), value=-torch.inf)
    return torch.empty_like(rest).scatter_(-1, order, rest[..., :1] - worse)


def _rest(log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks from best to worst, and the logarithm of what each and all worse ones hold."""
    ranked = log_mass.sort(dim=-1, descending=True, stable=True)
    return ranked.indices, ranked.values.flip(-1).logcumsumexp(-1).flip(-1)
