"""The cudnn engine: the block-sparse attention of nvidia-cudnn-frontend for the exact part, our tail behind it.

Its Hopper kernels take counts that differ, strided views and any length of keys: they load tiles by TMA, which puts
zeros where the keys end, and they never read an index beyond its count. They are compiled once per dtype, head_dim and
block size, not per length, and a call waits for nothing.
"""

import torch
from torch import Tensor

from ..blocks import BlockMap, Blocks
from ..tail import Tail
from . import peers


def refuses(q: Tensor, block_map: BlockMap, tail: Tail) -> str | None:
    """The first reason why not, with what to do about it; None where it runs."""
    requirement = "nvidia-cudnn-frontend[cutedsl]>=1.32"
    return peers.refuses(q, block_map, tail, "cudnn.block_sparse_attention", requirement)


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of `pisa.engines`."""
    return peers.attend(exact, q, k, v, block_map, tail, scale)


def exact(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, scale: float) -> tuple[Tensor, Tensor]:
    """o `[B, H, Lq, D]` and lse `[B, H, Lq]` over the key blocks of the map."""
    from cudnn.block_sparse_attention import block_sparse_attention_forward  # an optional extra

    q_len, k_len, size = q.shape[2], k.shape[2], block_map.block_size
    if size == 64 and q_len % 64:  # it asks for whole blocks of 64 queries, though not of 128
        q = torch.nn.functional.pad(q, (0, 0, 0, -q_len % 64))
    lengths = Blocks(size, q_len, k_len).lengths(k_len, k.device).to(torch.int32) if k_len % size else None
    o, lse = block_sparse_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_map.indices.contiguous(),
        block_sizes=lengths,
        q2k_block_nums=block_map.counts.contiguous(),
        sparse_block_size=size,
        softmax_scale=scale,
        layout="bshd",
    )
    return o.transpose(1, 2)[:, :, :q_len], lse[:, :, :q_len]
