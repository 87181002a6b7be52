"""SpargeAttn (arXiv 2502.18137): block means choose, unless a block is too unlike itself to have a mean. Order raster,
routing SpargeAttn, tail drop.

The selection alone: INT8 and FP8 products and the second test inside the kernel (which skips P V of a block far below
the running maximum; its default threshold skips next to nothing) are not reproduced, so errors here are those of the
choice of blocks. Blocks of the paper are 128 queries x 64 keys: block_size 64 with block_q 128. Its Hopper kernel has
64 x 128: block_q 64 with key_blocks 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.knob import always_text, nats, nats_up_to, to_map
from pisa import BlockMap, Blocks
from pisa.routing import kept_blocks, scale_of

RULES = ("top_k", "cdf")


@dataclass(frozen=True)
class SpargeAttn:
    """Rows of softmax_j(s qbar_i . kbar_j), and every block whose tokens differ too much.

    rule: "top_k" keeps the best fraction `keep` of the key blocks; "cdf" the best blocks as long as they hold no more
    than `keep` of the mass, the block that crosses it is left out. Both keep at least one.
    similarity: a block has no mean to go by when |mean of its unit vectors|^2 is not above this (keys less their common
    mean): a query block then sees all keys, a key block is seen by all, on top of the rule. That is never so below 0,
    as in the official top-k call. key_blocks: key blocks that are judged and kept together. sink: key block 0 is exact.
    text_keys_exact, text_rows_dense: as of `pisa.routing.TopK`; the paper treats text as any token.
    A short last block is judged by its own tokens; the official code keeps it always, from 0 / 0 in its padding.
    Raises ValueError for an unknown rule or a keep outside (0, 1].
    """

    rule: str = "top_k"
    keep: float = 0.5
    similarity: float = -0.1
    key_blocks: int = 1
    sink: bool = False
    text_keys_exact: bool = False
    text_rows_dense: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"No rule '{self.rule}' in SpargeAttn. Allowed: {', '.join(RULES)}.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}: 1 is dense.")
        if self.key_blocks < 1:
            raise ValueError(f"key_blocks must be at least 1, got {self.key_blocks}.")

    def levels(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        rows = Blocks(blocks.size * blocks.shared, blocks.q_len, blocks.q_len)
        columns = Blocks(blocks.size * self.key_blocks, blocks.k_len, blocks.k_len)
        scores = rows.mean(q) * scale_of(q, blocks) @ columns.mean(k).mT  # [B, H, Nl, columns]
        alone_q = similarity(q, rows) <= self.similarity  # [B, H, Nl]
        alone_k = similarity(k - k.mean(2, keepdim=True), columns) <= self.similarity
        scores = scores.masked_fill(alone_k[:, :, None], -torch.inf)
        levels = nats_up_to(scores) if self.rule == "cdf" else ranks(scores)
        levels.scatter_(-1, scores.argmax(-1, keepdim=True), -torch.inf)
        levels.masked_fill_(alone_q[..., None] | alone_k[:, :, None], -torch.inf)
        if self.sink:
            levels[..., 0] = -torch.inf
        levels = levels.repeat_interleave(self.key_blocks, -1)[..., : blocks.n_k]
        return always_text(levels, blocks, self.text_keys_exact, self.text_rows_dense)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        columns = -(-blocks.n_k // self.key_blocks)
        knob = nats(self.keep) if self.rule == "cdf" else kept_blocks(self.keep, columns)
        return to_map(self.levels(q, k, v, blocks) <= knob, blocks)


def similarity(x: Tensor, blocks: Blocks) -> Tensor:
    """How much alike the tokens of each block are, `[B, H, N]` fp32 in [0, 1]: the mean cosine over all pairs of them.

    It is the squared length of the mean unit vector, so no Gram matrix is needed.
    """
    return blocks.mean(torch.nn.functional.normalize(x.float(), dim=-1)).square().sum(-1)


def ranks(scores: Tensor) -> Tensor:
    """1 for the best of each list, 2 for the next, `[..., N]` fp32; of equal blocks the first is better."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    number = torch.arange(1.0, scores.shape[-1] + 1, device=scores.device)
    return torch.empty_like(scores).scatter_(-1, order, number.expand_as(scores))
