"""The fa4 engine: the block-sparse attention of flash-attn-4 for the exact part, our tail behind it.

Its Hopper kernel takes counts that differ, strided views and any length of queries and keys: it loads tiles by TMA,
which puts zeros where the keys end, and masks the last block of a row's list, which is where a short one stands. It is
compiled once per dtype, head_dim and block size, not per length, and a call waits for nothing.
"""

import torch
from torch import Tensor

from ..blocks import BlockMap
from ..tail import Tail
from . import peers


def refuses(q: Tensor, block_map: BlockMap, tail: Tail) -> str | None:
    """The first reason why not, with what to do about it; None where it runs."""
    return peers.refuses(q, block_map, tail, "flash_attn.cute", "flash-attn-4>=4.0.0b36")


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of `pisa.engines`."""
    return peers.attend(exact, q, k, v, block_map, tail, scale)


def exact(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, scale: float) -> tuple[Tensor, Tensor]:
    """o `[B, H, Lq, D]` and lse `[B, H, Lq]` over the key blocks of the map."""
    from flash_attn.cute import flash_attn_func  # an optional extra
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    counts, indices = block_map.counts.contiguous(), block_map.indices.contiguous()
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),  # no block needs a mask other than the end of the keys
        mask_block_idx=indices,
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(block_map.block_size, block_map.block_size),  # chooses the tile
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = flash_attn_func(q, k, v, softmax_scale=scale, block_sparse_tensors=blocks, return_lse=True)
    return o.transpose(1, 2), lse
