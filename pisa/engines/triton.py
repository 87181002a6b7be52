"""The Triton engine: launchers and tile choice for the kernels of pisa/kernels. NVIDIA GPUs from sm_80 on.

A call is at most four launches: the map as bits and block statistics (two), unless the routing made them on the way,
and attention; `drop` is one. On Hopper attention is pisa/kernels/hopper.py, where its tiles can be loaded by TMA.
Nothing asks the device for a number, nothing is tuned at run time, and lengths are run-time arguments.
Without CUDA it runs when named and TRITON_INTERPRET=1 is set: far too slow to use, right enough to test.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..blocks import BlockMap
from ..launch import BLOCK_SIZES, GROUP, HEAD_DIMS, bits_of, capability_of, early, on_device_of, summary_of
from ..tail import Tail

TAILS = ("drop", "zeroth", "hybrid")  # numbered as in pisa/kernels/attend.py
# On Hopper, by the query blocks that share a list. The registers are those of all warps until they divide them anew.
HOPPER_TILE = {
    1: {"SHARED": 1, "STAGES": 3, "num_warps": 4, "maxnreg": 128},  # two programs per multiprocessor
    2: {"SHARED": 2, "STAGES": 4, "num_warps": 4, "maxnreg": 168},  # one
}


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
    tail = Tail("drop") if block_map.known_full else tail
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
        bits, summary = bits_of(block_map), summary_of(block_map, k, v, tail.name == "hybrid")
        kbar, vbar, slope = summary.kbar, summary.vbar, summary.slope
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
        bits, summary = bits_of(block_map), summary_of(block_map, k, v, tail.name == "hybrid")
        kbar, vbar, slope = summary.kbar, summary.vbar, summary.slope if tail.name == "hybrid" else summary.kbar
    shared, n_q = block_map.shared, counts.shape[2]
    attend_kernel[(-(-n_q // shared), B * H)](
        *(tiles(x) for x in (q, o, k, v, kbar, vbar, slope)), counts, indices, bits, lse,
        H, n_q, q_len, k.shape[2], indices.shape[-1], n_groups, scale,
        HEAD_DIM=dim, TAIL=TAILS.index(tail.name), **HOPPER_TILE[shared], **early(q),
    )  # fmt: skip


def hopper_takes(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap) -> bool:
    """Whether `on_hopper` runs; TMA wants rows at multiples of 16 bytes."""
    return (
        capability_of(q)[0] == 9
        and block_map.block_size == GROUP
        and block_map.shared in HOPPER_TILE
        and q.shape[3] in (64, 128)
        and all(x.stride(3) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
        and all(stride > 0 and stride % 8 == 0 for x in (q, k, v) for stride in x.stride()[:3])
        and has_gluon()
    )


@cache
def has_gluon() -> bool:
    return find_spec("triton.experimental.gluon.nvidia") is not None


def tiles(x: Tensor) -> "TensorDescriptor":  # noqa: F821
    """A TMA descriptor of x `[B, H, L, D]` or `[B * H, L, D]` for tiles of 64 tokens."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x = x if x.ndim == 4 else x[None]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, GROUP, x.shape[3]], layout)


def groups(block_map: BlockMap) -> int:
    """Steps of the tail."""
    return -(-block_map.n_k // GROUP)


def tile_for(capability: tuple[int, int], head_dim: int, block_size: int) -> dict[str, int]:
    """Warps and pipeline stages of the attention kernel; the tile itself is block_size x block_size.

    Chosen so that every kernel compiles within the shared memory of its GPU, and with two programs per multiprocessor
    on 9.0, where they were timed on an H100. No other GPU has run these kernels yet.
    """
    few_registers = capability[0] in (8, 12) and head_dim == 128  # sums and operands both live in registers there
    wide = block_size == 128 or (few_registers and block_size == 64)
    return {"num_warps": 8 if wide else 4, "num_stages": 2 if few_registers else 3}
