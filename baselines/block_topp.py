"""Block top-p: the fewest key blocks whose softmax mass reaches p. Order raster, routing TopP, tail drop.

No paper's own: the rule that XAttention and SVG2 share, on the plainest of scores, those of PISA. Where block_topk
gives every row as many blocks, this one gives flat rows and heads more and peaked ones fewer, at the same density.
"""

from dataclasses import dataclass

from torch import Tensor

from baselines.knob import always_text, check_share, nats, nats_before, to_map
from pisa import BlockMap, Blocks
from pisa.routing import centroid_scores


@dataclass(frozen=True)
class TopP:
    """The smallest set of key blocks with at least `p` of the softmax over n_j exp(s qbar_i . kbar_j).

    n_j: tokens of block j, which matters for a short last one. The block that crosses p is in the set.
    text_keys_exact, text_rows_dense: as of `pisa.routing.TopK`. Raises ValueError for p outside (0, 1].
    """

    p: float = 0.9
    text_keys_exact: bool = False
    text_rows_dense: bool = False

    def __post_init__(self) -> None:
        check_share("p", self.p)

    def levels(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        log_mass = centroid_scores(q, k, v, blocks) + blocks.lengths(blocks.k_len, k.device).log()
        return always_text(nats_before(log_mass), blocks, self.text_keys_exact, self.text_rows_dense)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        return to_map(self.levels(q, k, v, blocks) < nats(self.p), blocks)
