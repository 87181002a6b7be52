"""The Triton engine: launchers and tile choice for the kernels of pisa/kernels. NVIDIA GPUs from sm_80 on.

A call is three launches and a few small torch operations: the map as bits, block statistics, attention; `drop` is one.
Nothing asks the device for a number, nothing is tuned at run time, and lengths are run-time arguments.
Without CUDA it runs when named and TRITON_INTERPRET=1 is set: far too slow to use, right enough to test.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..blocks import BlockMap
from ..tail import Tail

TAILS = ("drop", "zeroth", "hybrid")  # numbered as in pisa/kernels/attend.py
HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
GROUP = 64  # key blocks in a step of the tail, as there; the means are padded to whole groups
PROGRAMS = 264  # of statistics, two per multiprocessor of a large GPU; each leaves one D x D fp32 sum


def refuses(q: Tensor, block_map: BlockMap, tail: Tail) -> str | None:
    """The first reason why not, with what to do about it; None where it runs."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is None:
        return "it needs the package triton: install it, or use engine eager"
    if not q.is_cuda and not interpreted:
        return f"it needs a CUDA GPU, and q is on {q.device.type}: use engine eager"
    if q.is_cuda and (capability := capability_of(q)) < (8, 0):
        return f"it needs compute capability 8.0 or higher, this GPU has {'%d.%d' % capability}: use engine eager"
    if tail.name not in TAILS:
        return f"it has no tail {tail.name} (it has {', '.join(TAILS)}): use engine eager"
    if q.shape[3] not in HEAD_DIMS:
        return (
            f"head_dim must be one of {HEAD_DIMS}, got {q.shape[3]}: pad with zeros and pass scale, or use engine eager"
        )
    if block_map.block_size not in BLOCK_SIZES:
        return f"block_size must be one of {BLOCK_SIZES}, got {block_map.block_size}: use engine eager"
    if q.dtype == torch.bfloat16 and interpreted:
        return "Triton's interpreter multiplies bfloat16 wrongly: use float16, float32 or engine eager"
    if q.dtype == torch.float32 and not interpreted:
        return "exact float32 products bypass the tensor cores: use bfloat16, float16 or engine eager"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of `pisa.engines`. o has q's strides where q is dense in memory."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    everything_is_exact = block_map.uniform and block_map.indices.shape[-1] == block_map.n_k
    tail = Tail("drop") if everything_is_exact else tail
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with on_device_of(q):
        launch = on_hopper if hopper_takes(q, k, v, block_map) else anywhere
        launch(q, k, v, block_map, tail, scale, o, lse)
    return o, lse


def anywhere(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float, o: Tensor, lse: Tensor
) -> None:
    """The portable kernel: o and lse are written."""
    from ..kernels.attend import attend_kernel  # here, because triton exists on Linux alone

    B, H, q_len, dim = q.shape
    counts, indices, n_groups = block_map.counts.contiguous(), block_map.indices.contiguous(), groups(block_map)
    bits = kbar = vbar = slope = None
    if tail.name != "drop":
        bits = selection(counts, indices, 2 * n_groups, block_map.n_k)
        kbar, vbar, slope = statistics(k, v, block_map.block_size, GROUP * n_groups, tail.name == "hybrid")
    attend_kernel[(counts.shape[2], B * H)](
        q, k, v, counts, indices, bits, kbar, vbar, slope, o, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        H, q_len, k.shape[2], indices.shape[-1], n_groups, scale,
        HEAD_DIM=dim, BLOCK=block_map.block_size, TAIL=TAILS.index(tail.name),
        **tile_for(capability_of(q), dim, block_map.block_size),
    )  # fmt: skip


def on_hopper(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float, o: Tensor, lse: Tensor
) -> None:
    """The kernel for compute capability 9.0: o and lse are written."""
    from ..kernels.hopper import attend_kernel

    B, H, q_len, dim = q.shape
    counts, indices, n_groups = block_map.counts.contiguous(), block_map.indices.contiguous(), groups(block_map)
    bits, kbar, vbar, slope = counts, k, v, k  # a dropped tail reads none of them
    if tail.name == "drop":
        n_groups = 0
    else:
        bits = selection(counts, indices, 2 * n_groups, block_map.n_k)
        first_order = tail.name == "hybrid"
        kbar, vbar, slope = statistics(k, v, GROUP, GROUP * n_groups, first_order, 1 / k.shape[2], q.dtype)
        slope = slope if first_order else kbar
    attend_kernel[(counts.shape[2], B * H)](
        *(tiles(x) for x in (q, o, k, v, kbar, vbar, slope)), counts, indices, bits, lse,
        H, q_len, k.shape[2], indices.shape[-1], n_groups, scale,
        HEAD_DIM=dim, TAIL=TAILS.index(tail.name), STAGES=3, num_warps=4, maxnreg=128,
    )  # fmt: skip


def hopper_takes(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap) -> bool:
    """Whether `on_hopper` runs; TMA wants rows at multiples of 16 bytes."""
    return (
        capability_of(q)[0] == 9
        and block_map.block_size == GROUP
        and q.shape[3] in (64, 128)
        and all(x.stride(3) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
        and all(stride > 0 and stride % 8 == 0 for x in (q, k, v) for stride in x.stride()[:3])
        and has_gluon()
    )


@cache
def has_gluon() -> bool:
    return find_spec("triton.experimental.gluon.nvidia") is not None


def tiles(x: Tensor) -> "TensorDescriptor":  # noqa: F821
    """A TMA descriptor of x `[B, H, L, D]` or `[B * H, L, D]` for tiles of 64 x D."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x = x if x.ndim == 4 else x[None]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, GROUP, x.shape[3]], layout)


def groups(block_map: BlockMap) -> int:
    """Steps of the tail."""
    return -(-block_map.n_k // GROUP)


def selection(counts: Tensor, indices: Tensor, n_words: int, n_k: int) -> Tensor:
    """The map as bits `[B, H, Nq, n_words]` int32."""
    from ..kernels.statistics import selection_kernel

    bits = torch.empty(*counts.shape, n_words, dtype=torch.int32, device=counts.device)
    selection_kernel[(counts.numel(),)](counts, indices, bits, indices.shape[-1], n_words, n_k, CHUNK=32, num_warps=1)
    return bits


def statistics(
    k: Tensor, v: Tensor, block: int, n: int, first_order: bool, factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Block means of k and v, `[B * H, n, D]` with zeros from Nk on, and factor sum_j H_j `[B * H, D, D]` or None."""
    from ..kernels.statistics import slope_kernel, statistics_kernel

    B, H, k_len, dim = k.shape
    kbar, vbar = k.new_empty(2, B * H, n, dim)
    per_program = -(-n * B * H // PROGRAMS)
    programs = -(-n // per_program)
    slopes = k.new_empty(B * H, programs, dim, dim, dtype=torch.float32) if first_order else None
    statistics_kernel[(programs, B * H)](
        k, v, kbar, vbar, slopes, *k.stride()[:3], *v.stride()[:3], H, k_len, n, per_program,
        HEAD_DIM=dim, BLOCK=block, FIRST_ORDER=first_order, ROWS=64, num_warps=8, num_stages=3,
    )  # fmt: skip
    if not first_order:
        return kbar, vbar, None
    slope = k.new_empty(B * H, dim, dim, dtype=dtype)
    slope_kernel[(dim * dim // 256, B * H)](
        slopes, slope, programs, factor, SIZE=dim * dim, CHUNK=256, PARTS=16, num_warps=4
    )
    return kbar, vbar, slope


def tile_for(capability: tuple[int, int], head_dim: int, block_size: int) -> dict[str, int]:
    """Warps and pipeline stages of the attention kernel; the tile itself is block_size x block_size.

    Chosen so that every kernel compiles within the shared memory of its GPU, and with two programs per multiprocessor
    on 9.0. Only the interpreter has run these kernels so far, and it ignores both: no number here is measured.
    """
    few_registers = capability[0] in (8, 12) and head_dim == 128  # sums and operands both live in registers there
    wide = block_size == 128 or (few_registers and block_size == 64)
    return {"num_warps": 8 if wide else 4, "num_stages": 2 if few_registers else 3}


def capability_of(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)


def on_device_of(q: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be q's."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()
