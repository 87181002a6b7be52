"""What the engines share that borrow a kernel for the exact part (cudnn, fa4): refusals, and the tail behind it.

The borrowed kernel leaves the output over the exact keys and its log-sum-exp; our own kernels make the statistics and
merge the tail into both. Hopper only: the other GPUs have no borrowed kernel for blocks of 64.
"""

from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch
from torch import Tensor

from ..blocks import BlockMap
from ..launch import bits_of, capability_of, on_device_of, summary_of
from ..tail import Tail
from .triton import TAILS

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
# Of the tail kernel: rows of queries, key blocks at a time. The fastest of nine on an H100 at three lengths.
TILE = {"ROWS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3}

Exact = Callable[[Tensor, Tensor, Tensor, BlockMap, float], tuple[Tensor, Tensor]]


def refuses(q: Tensor, block_map: BlockMap, tail: Tail, module: str, requirement: str) -> str | None:
    """The first reason why not, with what to do about it; `requirement` is what pip installs to have `module`."""
    if not q.is_cuda:
        return f"it needs a CUDA GPU, and q is on {q.device.type}: use engine eager"
    if (capability := capability_of(q))[0] != 9:
        return f"it needs compute capability 9.x, this GPU has {'%d.%d' % capability}: use engine triton or eager"
    if not installed(module):
        return f"it needs a package: pip install '{requirement}', or use engine triton or eager"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {q.dtype}: cast, or use engine eager"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, got {q.shape[3]}: use engine triton or eager"
    if block_map.block_size not in BLOCK_SIZES:
        return f"block_size must be one of {BLOCK_SIZES}, got {block_map.block_size}: use engine triton or eager"
    if tail.name not in TAILS:
        return f"it has no tail {tail.name} (it has {', '.join(TAILS)}): use engine eager"
    return None


@cache
def installed(module: str) -> bool:
    """Whether `package.module` is there, without importing the package, which takes seconds."""
    package = find_spec(module.partition(".")[0])
    return package is not None and PathFinder.find_spec(module, package.submodule_search_locations) is not None


def attend(
    exact: Exact, q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The contract of `pisa.engines`, given `exact(q, k, v, block_map, scale)`, which is that with tail drop.

    Both results of `exact` are overwritten. o lies in memory as `[B, Lq, H, D]`, as projections take it.
    """
    q, k, v = (aligned(x) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with on_device_of(q):
        o, lse = exact(q, k, v, block_map, scale)
        if tail.name != "drop" and not block_map.known_full:
            add_tail_(o, lse, q, k, v, block_map, tail, scale)
    return o, lse


def aligned(x: Tensor) -> Tensor:
    """`x`, copied unless all its rows start at multiples of 16 bytes (and x itself of 128), as TMA loads want them."""
    step = 16 // x.element_size()
    fits = x.stride(3) == 1 and all(stride > 0 and stride % step == 0 for stride in x.stride()[:3])
    return x if fits and x.data_ptr() % 128 == 0 else x.clone(memory_format=torch.contiguous_format)


def add_tail_(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float
) -> None:
    """Merges the tail into o `[B, H, Lq, D]` and lse `[B, H, Lq]`, which hold the exact part."""
    from ..kernels.tail import tail_kernel  # here, because triton exists on Linux alone

    B, H, q_len, dim = q.shape
    k_len, size, first_order = k.shape[2], block_map.block_size, tail.name == "hybrid"
    bits, summary = bits_of(block_map), summary_of(block_map, k, v, first_order)
    tail_kernel[(-(-q_len // TILE["ROWS"]), B * H)](
        q, bits, summary.kbar, summary.vbar, summary.slope, o, lse,
        *q.stride()[:3], *o.stride()[:3], lse.stride(1),
        H, q_len, k_len, bits.shape[2], summary.kbar.shape[1], scale,
        HEAD_DIM=dim, BLOCK=size, FIRST_ORDER=first_order, **TILE,
    )  # fmt: skip
