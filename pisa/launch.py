"""Launchers of the kernels that routing and engines share: grids, strides, tiles, and where Triton kernels run at all.

Nothing here asks the device for a number, nothing is tuned at run time, and lengths are run-time arguments.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .blocks import BlockMap, Blocks

HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
GROUP = 64  # key blocks in a step of the tail, as there; the means are padded to whole groups
PROGRAMS = 264  # of statistics, two per multiprocessor of a large GPU; each leaves one D x D fp32 sum
EMULATE = False  # tests set it: run the kernels in Triton's interpreter, too slow for any other use
MOST_KEY_BLOCKS = 8192  # a row of scores lives in the registers of one program
MEANS_TILE = {"BLOCKS": 4, "num_warps": 1}  # key blocks of a program
PER_MULTIPROCESSOR = 3  # programs of select; their scores should stay in the L2 cache, 30 MB for 1200 key blocks


def kernels_run_on(x: Tensor) -> bool:
    """Whether Triton kernels can work on x: NVIDIA GPUs from sm_80 on, or the interpreter where EMULATE asks for it."""
    if not has_triton():
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return EMULATE
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None  # it exists on Linux alone


def can_route(q: Tensor, blocks: Blocks, covariance: bool) -> bool:
    """Whether the launchers below take these inputs; otherwise routing is torch's business."""
    if not kernels_run_on(q) or q.shape[3] not in HEAD_DIMS or blocks.size not in BLOCK_SIZES:
        return False
    if q.is_cuda:  # fp32 tiles of keys, values and H_j do not fit together
        return blocks.n_k <= MOST_KEY_BLOCKS and not (covariance and q.dtype == torch.float32)
    return blocks.n_k <= MOST_KEY_BLOCKS and q.dtype != torch.bfloat16  # which the interpreter multiplies wrongly


def means(k: Tensor, block: int) -> Tensor:
    """Block means of k `[B, H, L, D]`: `[B * H, N, D]` fp32."""
    from .kernels.routing import means_kernel

    B, H, k_len, dim = k.shape
    n_k = -(-k_len // block)
    kbar = k.new_empty(B * H, n_k, dim, dtype=torch.float32)
    with on_device_of(k):
        means_kernel[(-(-n_k // MEANS_TILE["BLOCKS"]), B * H)](
            k, kbar, *k.stride()[:3], H, k_len, n_k, HEAD_DIM=dim, BLOCK=block, **MEANS_TILE
        )
    return kbar


def deviations(k: Tensor, v: Tensor, slope: Tensor, block: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Block means of k `[B * H, N, D]` and log(|H_j - Hbar|_F + epsilon) `[B * H, N]`, fp32; slope as in `Summary`."""
    from .kernels.routing import deviations_kernel

    B, H, k_len, dim = k.shape
    n_k = -(-k_len // block)
    kbar = k.new_empty(B * H, n_k, dim, dtype=torch.float32)
    bias = k.new_empty(B * H, n_k, dtype=torch.float32)
    per_program = -(-n_k * B * H // (2 * multiprocessors(k)))
    with on_device_of(k):
        deviations_kernel[(-(-n_k // per_program), B * H)](
            k, v, slope, kbar, bias, *k.stride()[:3], *v.stride()[:3], H, k_len, n_k, per_program, epsilon,
            HEAD_DIM=dim, BLOCK=block, num_warps=8, num_stages=1 if block == 128 else 2,
        )  # fmt: skip
    return kbar, bias


def select(
    q: Tensor, kbar: Tensor, bias: Tensor | None, block: int, count: int, text: slice, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best key blocks of each query block: counts `[B, H, Nq]` and indices `[B, H, Nq, count]`, ascending,
    and the same as bits, see `selection`.

    kbar `[B * H, Nk, D]`, bias `[B * H, Nk]`: as above, bias is optional. text: key blocks that are always among them.
    Of equal scores the lowest block first.
    """
    from .kernels.routing import select_kernel

    B, H, q_len, dim = q.shape
    n_q, n_k = -(-q_len // block), kbar.shape[1]
    counts = q.new_empty(B, H, n_q, dtype=torch.int32)
    indices = q.new_empty(B, H, n_q, count, dtype=torch.int32)
    bits = q.new_empty(B, H, n_q, words(n_k), dtype=torch.int32)
    tile = tile_for(n_k)
    n_tiles = B * H * -(-n_q // tile["ROWS"])
    programs = min(n_tiles, PER_MULTIPROCESSOR * multiprocessors(q))
    scores = q.new_empty(programs, tile["ROWS"], -(-n_k // 32) * 32, dtype=torch.float32)
    with on_device_of(q):
        select_kernel[(programs,)](
            q, kbar, bias, scores, counts, indices, bits, *q.stride()[:3],
            H, q_len, n_q, n_k, n_tiles, words(n_k), count, text.start, text.stop, scale,
            HEAD_DIM=dim, BLOCK=block, BIAS=bias is not None, **tile, **early(q),
        )  # fmt: skip
    return counts, indices, bits


def tile_for(n_k: int) -> dict[str, int]:
    """Query blocks x key blocks in a tile of scores, rows that are searched at a time, their padded width, and warps.

    A lane holds at most 64 scores. Only the width follows the length, by powers of two: few recompilations. Registers
    are for PER_MULTIPROCESSOR programs at once: while one waits for its queries, another searches.
    """
    width = max(128, 1 << (n_k - 1).bit_length())
    tile = {"ROWS": 16, "COLUMNS": 64, "STEP": min(16, 8192 // width), "WIDTH": width, "FLIP": first_axes_first()}
    return {**tile, "num_warps": 4, "num_stages": 2, "maxnreg": 168}


@cache
def first_axes_first() -> bool:
    """Which axes Triton spreads threads over, see pisa/kernels/routing.py."""
    return tuple(map(int, version("triton").split(".")[:2])) < (3, 7)


def multiprocessors(x: Tensor) -> int:
    """One in the interpreter, so that every program has several tiles."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def bits_of(block_map: BlockMap) -> Tensor:
    """The map as bits `[B, H, Nq, words(Nk)]`: bit j % 32 of word j // 32, set where block j is exact or absent."""
    if block_map.bits is not None:
        return block_map.bits
    return selection(block_map.counts.contiguous(), block_map.indices.contiguous(), block_map.n_k)


def words(n_k: int) -> int:
    """Words of 32 bits for whole groups of key blocks."""
    return 2 * -(-n_k // GROUP)


def selection(counts: Tensor, indices: Tensor, n_k: int) -> Tensor:
    """`bits_of` a map that has none."""
    from .kernels.statistics import selection_kernel

    n_words = words(n_k)
    bits = torch.empty(*counts.shape, n_words, dtype=torch.int32, device=counts.device)
    selection_kernel[(counts.numel(),)](counts, indices, bits, indices.shape[-1], n_words, n_k, CHUNK=32, num_warps=1)
    return bits


@dataclass(frozen=True)
class Summary:
    """What a tail needs of the keys and values of one call. A routing that reads them makes it on the way."""

    kbar: Tensor  # block means, [B * H, whole groups, D] in k's dtype, zeros behind the last block
    vbar: Tensor
    slope: Tensor | None  # sum_j H_j / Lk, [B * H, D, D] in k's dtype
    source: tuple[ReferenceType, ReferenceType]  # k and v

    def serves(self, k: Tensor, v: Tensor, first_order: bool) -> bool:
        """Whether it was made of these very tensors. Who changes them in place in between must drop the map."""
        return self.source[0]() is k and self.source[1]() is v and (self.slope is not None or not first_order)


def summary_of(block_map: BlockMap, k: Tensor, v: Tensor, first_order: bool) -> Summary:
    """The summary that the map brought along, or a new one."""
    brought = block_map.summary
    if brought is not None and brought.serves(k, v, first_order):
        return brought
    return summarise(k, v, block_map.block_size, first_order)


def summarise(k: Tensor, v: Tensor, block: int, first_order: bool, kbar_fp32: Tensor | None = None) -> Summary:
    """One pass over k and v `[B, H, Lk, D]`. kbar_fp32 `[B * H, Nk, D]`: filled with unrounded block means."""
    from .kernels.statistics import slope_kernel, statistics_kernel

    B, H, k_len, dim = k.shape
    n = GROUP * -(-k_len // (block * GROUP))
    kbar, vbar = k.new_empty(2, B * H, n, dim)
    per_program = -(-n * B * H // PROGRAMS)
    programs = -(-n // per_program)
    slopes = k.new_empty(B * H, programs, dim, dim, dtype=torch.float32) if first_order else None
    slope = k.new_empty(B * H, dim, dim) if first_order else None
    with on_device_of(k):
        statistics_kernel[(programs, B * H)](
            k, v, kbar, vbar, kbar_fp32, slopes, *k.stride()[:3], *v.stride()[:3], H, k_len, n, per_program,
            HEAD_DIM=dim, BLOCK=block, FIRST_ORDER=first_order, ROWS=64, num_warps=8, num_stages=3,
        )  # fmt: skip
        if first_order:
            slope_kernel[(dim * dim // 256, B * H)](
                slopes, slope, programs, 1 / k_len, SIZE=dim * dim, CHUNK=256, PARTS=16, num_warps=4,
                **early(k),
            )  # fmt: skip
    return Summary(kbar, vbar, slope, (ref(k), ref(v)))


def early(x: Tensor) -> dict[str, bool]:
    """Arguments of a kernel that may be launched while the one in front of it still runs, from Hopper on: some
    microseconds less between two kernels. It has to wait for the results itself."""
    can = capability_of(x) >= (9, 0)
    return {"EARLY": can, "launch_pdl": True} if can else {"EARLY": False}


def capability_of(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)


def on_device_of(q: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be q's."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()
