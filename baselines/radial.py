"""Radial Attention (arXiv 2506.19852): a static mask whose density halves each time the distance in frames doubles.

Order raster, routing Radial, tail drop. Near frames see each other whole; further away a query sees the band around its
own place in the frame, at half the width for twice the distance; when the band is thinner than a block, only every
second, fourth, ... frame. All keys of the first frame are kept as a sink. One mask for all heads, layers and steps.
Positions are those of raster order: with another order the mask means nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from baselines.knob import Static
from pisa import Blocks, Grid

THIN = 128  # tokens: a band thinner than this loses frames instead; the same for every block size


@dataclass(frozen=True)
class Radial(Static):
    """A band |row - column| <= W(d) between the tokens of two frames at distance d, cut into blocks.

    With n tokens in a frame, L the power of two above n, g = bit_length(d): W(0) = n, W(1) = near * n, further away
    W(d) = max(block, decay * L / 2^g). Frames with L / 2^g < 128 are kept when 128 / (L / 2^g) divides d. A block is
    kept when more than 0.6 of the columns that the band touches in it are covered in more than a third of its rows.
    near: 1 in the official code now, 0.5 in that of the paper's numbers. sink: all keys of the first frame (Wan).
    width: scales both W(d) and L, and with them the mask from the block's own diagonal (0) to everything; 1 is the
    paper, whose decay alone stops mattering at densities of about a quarter.
    Text, a short last block and the block itself are always exact. Where frames end inside blocks the official code
    loses a few (the last, partial block of a pair of frames); these are kept here. Raises ValueError without a grid.
    """

    decay: float = 0.2
    near: float = 1.0
    sink: bool = True
    width: float = 1.0

    def __post_init__(self) -> None:
        if min(self.decay, self.near, self.width) <= 0:
            raise ValueError(f"decay, near and width must be positive, got {self}.")

    def positions(self, blocks: Blocks, grid: Grid) -> Tensor:
        n, rows, columns = grid.height * grid.width, blocks.size * blocks.shared, blocks.size
        before = grid.text if grid.text_first else 0
        levels = torch.full((-(-blocks.q_len // rows), blocks.n_k), torch.inf)
        for i in range(grid.frames):
            for j in range(grid.frames):
                (a, top), (b, left) = divmod(before + i * n, rows), divmod(before + j * n, columns)
                band = least_band(n, top, left, rows, columns)  # of the blocks that hold tokens of frames i and j
                found = band / self.half_width(abs(i - j), n, columns)
                found = found.clamp(min=least_width(abs(i - j), n)) / self.width
                if self.sink and j == 0:
                    found = torch.where(band.isfinite(), -torch.inf, torch.inf)
                region = levels[a : a + band.shape[0], b : b + band.shape[1]]
                torch.minimum(region, found, out=region)
        own = torch.arange(blocks.n_k)
        levels[own // blocks.shared, own] = -torch.inf
        if blocks.k_len % columns:
            levels[-1], levels[:, -1] = -torch.inf, -torch.inf
        return levels

    def half_width(self, d: int, n: int, block: int) -> float:
        """W(d) at width 1, in tokens."""
        if d < 2:
            return n if d == 0 else n * self.near
        return max(block, self.decay * 2 ** (n.bit_length() - d.bit_length()))


def least_width(d: int, n: int) -> float:
    """The least `width` at which frames at distance d > 0 are not thinned out; 0 for d = 0.

    Kept are the d that m divides, m the largest power of two up to 128 / (width * L / 2^g), and all where that is 1.
    The largest power of two in d is t; so m must be at most t, and width * L / 2^g above 128 / (2 t).
    """
    if d == 0:
        return 0.0
    t = d & -d
    return THIN / (2 * t) / 2 ** (n.bit_length() - d.bit_length()) * (1 + 1e-6)  # above, not at


@lru_cache(maxsize=1024)
def least_band(n: int, top: int, left: int, rows: int, columns: int) -> Tensor:
    """The least half-width with which the band between two frames of n tokens keeps each block, `[., .]` fp32.

    top, left: where the frames start inside their first blocks of rows x columns tokens. Infinite where none does.
    """
    row = torch.arange(-top, n, rows)[:, None, None]  # first row of each block, in tokens of the frame
    column = torch.arange(-left, n, columns)[:, None] + torch.arange(columns)  # [blocks, columns]
    inside = (column >= 0) & (column < n)

    def kept(w: Tensor) -> Tensor:
        first = torch.maximum(row.clamp(min=0), column - w)
        last = torch.minimum((row + rows).clamp(max=n), column + w + 1)
        covered = (last - first).clamp(min=0) * inside  # rows of the block that the band holds in each column
        return 5 * (3 * covered > rows).sum(-1) > 3 * (covered > 0).sum(-1)

    low, high = (torch.full((row.shape[0], column.shape[0], 1), x) for x in (-1, n))  # not kept at low, kept at high
    for _ in range(n.bit_length() + 1):
        middle = (low + high) // 2
        enough = kept(middle)[..., None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(kept(torch.full_like(high, n)), high[..., 0].float(), torch.inf)
