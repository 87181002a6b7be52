"""Piecewise sparse attention (PISA, arXiv 2602.01077): the public call, and the three choices that make a method.

A sparse attention is an order (which tokens share a block), a routing (which key blocks a query block computes
exactly) and a tail (what happens to the other blocks). An engine executes what they decide and changes none of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch
from torch import Tensor

from . import engines
from .blocks import BlockMap, Blocks, Grid
from .orders import Raster, inverse
from .routing import RandomTopK, TopK
from .tail import Tail

HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUTINGS = {
    "centroid": lambda density: TopK(density),
    "covariance": lambda density: TopK(density, score="covariance"),
    "random": lambda density: RandomTopK(density),
}

Order = Callable[[Tensor, Tensor, Grid | None], Tensor | None]
Routing = Callable[[Tensor, Tensor, Tensor, Blocks], BlockMap]


def piecewise_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float = 0.125,
    block_size: int = 64,
    block_q: int | None = None,
    tail: str | Tail = "hybrid",
    routing: str | Routing = "centroid",
    scale: float | None = None,
    engine: str = "auto",
    return_lse: bool = False,
    check_finite: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with the best key blocks exact and the others by a Taylor expansion (PISA, Alg. 1).

    q: `[B, H, Lq, D]`; k, v: `[B, H, Lk, D]`; one dtype of fp32, fp16, bf16; D in 32, 64, 96, 128; any strides and
    lengths from one block on. density: fraction of key blocks computed exactly, in (0, 1]; 1 is dense attention.
    block_q: queries that share a list of key blocks, a multiple of block_size; block_size unless given.
    tail: "drop", "zeroth", "blockwise_first" or "hybrid". routing: "centroid", "covariance", "random", or a callable
    `(q, k, v, blocks) -> BlockMap`, which then decides the density itself. scale: 1 / sqrt(D) unless given.
    check_finite: refuse NaN and infinity, at the price of one synchronisation. Inference only.
    Returns `[B, H, Lq, D]` in q's dtype, with return_lse also the natural-log normaliser `[B, H, Lq]` in fp32.
    Raises ValueError (shapes, values, names) or TypeError (dtype), with what to do about it.
    """
    check_inputs(q, k, v, block_size, scale)
    shared = blocks_sharing(block_q, block_size)
    if check_finite:
        refuse_non_finite(q, k, v)
    if isinstance(routing, str):
        routing = named_routing(routing, density)
    blocks = Blocks(block_size, q.shape[2], k.shape[2], scale=scale, shared=shared, tail=Tail.of(tail).name)
    o, lse = attend(q, k, v, routing(q, k, v, blocks), tail, scale, engine)
    return (o, lse) if return_lse else o


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    tail: str | Tail = "hybrid",
    scale: float | None = None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, Lq, D]` and its log-normaliser `[B, H, Lq]` fp32 for a map that is already known.

    With tail "drop" the blocks outside the map are never read into the result. The map is trusted: call
    `block_map.validate()` on one that you made yourself.
    """
    return execute(q, k, v, block_map, Tail.of(tail), scale, engine)[:2]


@dataclass(frozen=True)
class Routed:
    """What the last call of a `SparseAttention` decided; records are filled from it."""

    block_map: BlockMap
    engine: str

    @property
    def density(self) -> float:
        """Realised density. Synchronises, so it is computed when asked for and not before."""
        return self.block_map.density()


@dataclass
class SparseAttention:
    """A method: order x routing x tail, executed by an engine. `last` holds the decisions of the last call.

    Inside torch.compile the engine is one opaque operator, without a graph break, and `last` is not kept.

    order: `(q, k, grid) -> permutation [L] | None` (pisa.orders). routing: `(q, k, v, blocks) -> BlockMap`
    (pisa.routing). tail: a `Tail` or its name. block_size: tokens per block of queries and of keys. block_q: queries
    that share a list of key blocks, a multiple of block_size (None): coarser, and faster on Hopper.
    """

    order: Order = field(default_factory=Raster)
    routing: Routing = field(default_factory=TopK)
    tail: str | Tail = "hybrid"
    engine: str = "auto"
    block_size: int = 64
    block_q: int | None = None
    last: Routed | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.tail = Tail.of(self.tail)
        blocks_sharing(self.block_q, self.block_size)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid | None = None,
        scale: float | None = None,
        in_order: bool = False,
    ) -> Tensor:
        """`[B, H, L, D]` in and out, tokens in the model's own order; scale: 1 / sqrt(D) unless given.

        grid: where the tokens sit; needed by every order but raster. in_order: the tokens come, and go, in the order of
        this method already. Raises as `piecewise_sparse_attention`.
        """
        check_inputs(q, k, v, self.block_size, scale)
        check_grid(grid, q, k, self.order)
        permutation = None if in_order else self.order(q, k, grid)
        if permutation is not None:
            q, k, v = (x.index_select(2, permutation) for x in (q, k, v))
        block_map = self.routing(q, k, v, replace(self.blocks(q, k, grid, scale), tail=self.tail.name))
        o, _, engine = execute(q, k, v, block_map, self.tail, scale, self.engine)
        if not torch.compiler.is_compiling():
            self.last = Routed(replace(block_map, bits=None, summary=None), engine)
        return o if permutation is None else o.index_select(2, inverse(permutation))

    def blocks(self, q: Tensor, k: Tensor, grid: Grid | None = None, scale: float | None = None) -> Blocks:
        """How this method cuts q and k, for a routing that prepares no tail."""
        shared = blocks_sharing(self.block_q, self.block_size)
        return Blocks(self.block_size, q.shape[2], k.shape[2], grid, scale, shared)


def execute(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float | None, engine: str
) -> tuple[Tensor, Tensor, str]:
    """Output, log-normaliser and the name of the engine that ran."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        m = block_map
        decided = m.block_size, m.q_len, m.k_len, m.uniform, m.shared, tail.name, scale, engine
        return *attend_operator(q, k, v, m.counts, m.indices, *decided), engine
    chosen = engines.choose(engine, q, block_map, tail)
    return *chosen.attend(q, k, v, block_map, tail, scale), engines.name_of(chosen)


@torch.library.custom_op("pisa::attend", mutates_args=())
def attend_operator(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, block_size: int, q_len: int, k_len: int,
    uniform: bool, shared: int, tail: str, scale: float, engine: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`execute` as torch.compile sees it: tensors and numbers in, two tensors of known strides out."""
    block_map = BlockMap(counts, indices, block_size, q_len, k_len, uniform, shared)
    o, lse, _ = execute(q, k, v, block_map, Tail(tail), scale, engine)
    like, like_lse = attend_operator_result(q)
    same = o.stride() == like.stride() and lse.stride() == like_lse.stride()
    return (o, lse) if same else (like.copy_(o), like_lse.copy_(lse))


@attend_operator.register_fake
def attend_operator_result(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def named_routing(name: str, density: float) -> Routing:
    if name not in ROUTINGS:
        near = get_close_matches(name, ROUTINGS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"No routing '{name}'.{hint} Allowed: {', '.join(ROUTINGS)}, or a callable.")
    return ROUTINGS[name](density)


def blocks_sharing(block_q: int | None, block_size: int) -> int:
    """Query blocks that share a list. Raises ValueError."""
    if block_q is None:
        return 1
    if block_q < block_size or block_q % block_size:
        raise ValueError(f"block_q must be a multiple of block_size ({block_size}), got {block_q}: take {block_size}.")
    return block_q // block_size


def check_inputs(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float | None) -> None:
    """Everything that can be checked without asking the device. Raises ValueError or TypeError in one sentence."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [B, H, L, D], got {shapes}: move heads and head_dim to their own axes.")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {shapes}.")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in B, H and D, got {shapes}: repeat grouped key heads first.")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"head_dim must be one of {HEAD_DIMS}, got {q.shape[3]}: pad q, k, v with zeros and pass scale."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(
            f"q, k and v must share one dtype of float32, float16, bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}: cast."
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}: move them.")
    if not 1 <= block_size <= min(q.shape[2], k.shape[2]):
        raise ValueError(
            f"block_size must be in [1, {min(q.shape[2], k.shape[2])}], the number of tokens, got {block_size}: "
            "use a smaller block, or dense attention for so few tokens."
        )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}: leave it out for 1 / sqrt(D).")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("This is inference only and an input requires grad: call it under torch.no_grad().")


def check_grid(grid: Grid | None, q: Tensor, k: Tensor, order: Order) -> None:
    if grid is None:
        if not isinstance(order, Raster):
            raise ValueError(
                f"order {order} needs to know where the tokens sit: pass grid=Grid(frames, height, width)."
            )
    elif not grid.tokens == q.shape[2] == k.shape[2]:
        raise ValueError(
            f"The grid {grid} has {grid.tokens} tokens, but q has {q.shape[2]} and k has {k.shape[2]}: "
            "count the text tokens in, and trim padding."
        )


def refuse_non_finite(*tensors: Tensor) -> None:
    sums = [x.sum(dtype=torch.float32) for x in tensors]  # cheap; a finite sum means finite elements
    if not torch.stack(sums).sum().isfinite() and not all(x.isfinite().all() for x in tensors):
        raise ValueError("q, k or v holds NaN or infinity: find the layer that made it, or pass check_finite=False.")
