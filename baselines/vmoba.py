"""VMoBA (arXiv 2506.23858) for query blocks: a linear gate between block means, thresholded. Order tile_3d, tail drop.

Not VMoBA in full. The paper gates every query by itself, and its chunks are in turn runs of frames, columns of space
and cubes of both from layer to layer; here all queries of a block share the mean of their gates, and a chunk is a block
of the order, with tile_3d the cube. What is kept is the rule by which it differs from a top-p: no softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.knob import always_text, check_share, to_map
from pisa import BlockMap, Blocks
from pisa.routing import centroid_scores

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class VMoBA:
    """Own block and the best others until they hold `tau` of the gates (paper, threshold selection, by query and head).

    The gates of a row, qbar_i . kbar_j, are scaled to [0, 1]; shares are of their sum. The block that reaches tau is
    kept, and at least one beside the own. text_keys_exact, text_rows_dense: as of `pisa.routing.TopK`.
    Raises ValueError for tau outside (0, 1].
    """

    tau: float = 0.25
    text_keys_exact: bool = False
    text_rows_dense: bool = False

    def __post_init__(self) -> None:
        check_share("tau", self.tau)

    def levels(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        gate = centroid_scores(q, k, v, blocks)  # a scale and a shift change nothing below
        low, high = gate.amin(-1, keepdim=True), gate.amax(-1, keepdim=True)
        gate = (gate - low) / (high - low).clamp(min=TINY)  # equal gates hold nothing, and all come in at once
        own = own_blocks(blocks, q.device)  # [Nl, Nk]
        own_first = gate.masked_fill(own, torch.inf)
        ranked = own_first.sort(dim=-1, descending=True, stable=True).indices
        share = gate.gather(-1, ranked)
        before = share.cumsum(-1) - share  # the gates of the better blocks
        levels = torch.empty_like(gate).scatter_(-1, ranked, before / share.sum(-1, keepdim=True).clamp(min=TINY))
        best = gate.masked_fill(own, -torch.inf).argmax(-1, keepdim=True)
        levels.scatter_(-1, best, -torch.inf).masked_fill_(own, -torch.inf)
        return always_text(levels, blocks, self.text_keys_exact, self.text_rows_dense)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        return to_map(self.levels(q, k, v, blocks) < self.tau, blocks)


def own_blocks(blocks: Blocks, device: torch.device) -> Tensor:
    """True where a list of query blocks and a key block hold the same place in the sequence, `[Nl, Nk]`."""
    lists = torch.arange(-(-blocks.n_q // blocks.shared), device=device)
    return lists[:, None] == torch.arange(blocks.n_k, device=device) // blocks.shared
