"""XAttention (arXiv 2503.16428): antidiagonal sums as scores, top-p. Order raster, routing XAttention, tail drop.

Every stride x stride tile of the matrix of logits is judged by the sum along its antidiagonal, which meets every query
and every key of the tile once: one product of length stride * D instead of stride^2 of length D.
Differences from the official code: it pads keys with zeros that take part in the softmax, and always keeps block 0
because unused list entries point there; here padding weighs nothing and block 0 is a block like any other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.knob import always_text, check_share, nats, nats_before, to_map
from pisa import BlockMap, Blocks
from pisa.routing import scale_of

CHUNK = 1 << 24  # elements of the strided attention map at a time


@dataclass(frozen=True)
class XAttention:
    """The smallest set of key blocks with at least `tau` of the antidiagonal softmax.

    stride: 8 for video, 16 for text in the paper; it must divide the block size. text_keys_exact, text_rows_dense: as
    of `pisa.routing.TopK`; the paper leaves text to the scores. Raises ValueError for tau, and for a stride that does
    not fit when it is called.
    """

    tau: float = 0.9
    stride: int = 8
    text_keys_exact: bool = False
    text_rows_dense: bool = False

    def __post_init__(self) -> None:
        check_share("tau", self.tau)

    def levels(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        log_mass = antidiagonal_mass(q, k, blocks, self.stride).clamp(min=torch.finfo(torch.float32).tiny).log()
        return always_text(nats_before(log_mass), blocks, self.text_keys_exact, self.text_rows_dense)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        return to_map(self.levels(q, k, v, blocks) < nats(self.tau), blocks)


def antidiagonal_mass(q: Tensor, k: Tensor, blocks: Blocks, stride: int) -> Tensor:
    """Attention mass of each pair of blocks by its antidiagonals, `[B, H, Nl, Nk]` fp32.

    Logit of query group j and key group i, `stride` tokens each: s / stride * sum_r q[j, stride - 1 - r] . k[i, r];
    softmax over all key groups; sum over the groups of both blocks. Zeros fill a group that is not whole.
    """
    if stride < 1 or blocks.size % stride:
        raise ValueError(f"stride must divide the block size {blocks.size}, got {stride}: take a smaller power of two.")
    queries = grouped(q, stride, blocks.size * blocks.shared).flip(3).flatten(3)  # [B, H, groups, stride * D]
    keys = grouped(k, stride, blocks.size).flatten(3)
    keys_real, queries_real = (
        torch.arange(0, x.shape[2] * stride, stride, device=q.device) < length
        for x, length in ((keys, blocks.k_len), (queries, blocks.q_len))
    )
    per_list = blocks.size * blocks.shared // stride
    lists = max(1, CHUNK // (q.shape[0] * q.shape[1] * keys.shape[2] * per_list))
    mass = []
    for rows, real in zip(queries.split(lists * per_list, 2), queries_real.split(lists * per_list), strict=True):
        logits = (rows @ keys.mT).float() * (scale_of(q, blocks) / stride)  # [B, H, groups, groups of keys]
        p = logits.masked_fill_(~keys_real, -torch.inf).softmax(-1) * real[:, None]
        mass.append(p.unflatten(-1, (blocks.n_k, -1)).sum(-1).unflatten(2, (-1, per_list)).sum(3))
    return torch.cat(mass, 2)


def grouped(x: Tensor, stride: int, whole: int) -> Tensor:
    """`[B, H, L, D]` to `[B, H, groups, stride, D]`, with zeros up to a multiple of `whole` tokens."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % whole)).unflatten(2, (-1, stride))
