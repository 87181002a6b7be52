"""DraftAttention (arXiv 2505.14708): a draft of the attention map at low resolution picks the blocks.

Order tile_8x16: a patch of 8 x 16 tokens of one frame is one block of 128. Routing Draft, tail drop. In that order the
paper's pooled frames are the block means, so the draft costs one small product. Where 8 x 16 does not divide the frame
the tiles at its edges are cut, and blocks no longer are patches; the official code refuses such frames.
"""

from dataclasses import dataclass

from torch import Tensor

from baselines.knob import always_text, lowest, to_map
from pisa import BlockMap, Blocks
from pisa.routing import centroid_scores, check_density


@dataclass(frozen=True)
class Draft:
    """The best `density` of softmax_j(s qbar_i . kbar_j), all query blocks of a head ranked together.

    So each head has this density, and its rows differ: a peaked one has few blocks, a flat one many, or none at a low
    density. A row that would have none keeps its best (the paper does not say; text would save it there). Text keys and
    text rows are always exact, and are counted in the density. Raises ValueError for a density outside (0, 1].
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        draft = centroid_scores(q, k, v, blocks).log_softmax(-1)  # ranks as the softmax does, without its underflow
        heads = always_text(-draft, blocks).flatten(0, 1)  # [B * H, Nl, Nk]
        return to_map(lowest(heads, self.density).view_as(draft), blocks)
