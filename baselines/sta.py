"""Sliding Tile Attention (arXiv 2502.04507): each tile of space and time sees a window of whole tiles around it.

Order tile_sta: tiles of 6 x 8 x 8 = 384 tokens, six blocks of 64. Routing SlidingTile, tail drop. The paper searches a
window for every step, layer and head of one model at one resolution; here all heads have one window, its proportions
from the config. Grids that the tile does not divide have smaller tiles at the far edges (the official code refuses
them), and a block that holds tokens of two tiles sees what either of them sees.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.knob import Static
from pisa import Blocks, Grid


@dataclass(frozen=True)
class SlidingTile(Static):
    """The key tiles within a window of `window` tiles (frames, height, width), shifted where it would leave the grid.

    tile: its edges in tokens, those of the order. Windows are odd, or at least the whole axis. As a knob, the window
    is scaled on all three axes at once. Text keys and text rows are exact. Raises ValueError for tiles and windows
    that cannot be, and without a grid.
    """

    tile: tuple[int, int, int] = (6, 8, 8)
    window: tuple[int, int, int] = (3, 3, 3)

    def __post_init__(self) -> None:
        for name in ("tile", "window"):
            edges = tuple(getattr(self, name))
            if len(edges) != 3 or min(edges) < 1:
                raise ValueError(f"{name} must be three numbers from 1 on (frames, height, width), got {list(edges)}.")
            object.__setattr__(self, name, edges)  # lists, as configs have them, could not be keys of a cache

    def positions(self, blocks: Blocks, grid: Grid) -> Tensor:
        sizes = grid.frames, grid.height, grid.width
        tiles = [-(-size // edge) for size, edge in zip(sizes, self.tile, strict=True)]
        for window, n in zip(self.window, tiles, strict=True):
            if window % 2 == 0 and window < n:
                raise ValueError(f"A window must be odd or span its axis of {n} tiles, got {window}: it has no centre.")
        axes = [reach(n) / window for n, window in zip(tiles, self.window, strict=True)]
        place = torch.unravel_index(torch.arange(tiles[0] * tiles[1] * tiles[2]), tiles)  # of every tile on each axis
        needed = torch.stack([axis[x[:, None], x] for axis, x in zip(axes, place, strict=True)]).amax(0)  # [T, T]
        edges = [edge_lengths(*pair) for pair in zip(sizes, self.tile, strict=True)]
        tokens = edges[0][place[0]] * edges[1][place[1]] * edges[2][place[2]]  # in each tile
        tile_of = torch.arange(len(tokens)).repeat_interleave(tokens)  # of each video token, in the order of the tiles
        lowest_queries = least_over(needed, *held(tile_of, blocks.size * blocks.shared, blocks.q_len, grid))
        return least_over(lowest_queries.mT, *held(tile_of, blocks.size, blocks.k_len, grid)).mT.contiguous()


def reach(n: int) -> Tensor:
    """Tiles that the window of tile a must have to hold tile b, on an axis of n: `[n, n]` fp32.

    The window of 2 h + 1 tiles around a is centred on a moved into [h, n - 1 - h]; n tiles always do.
    """
    a, b = torch.arange(n)[:, None], torch.arange(n)
    least = torch.full((n, n), float(n))
    for h in reversed(range((n + 1) // 2)):
        least[(a.clamp(h, n - 1 - h) - b).abs() <= h] = 2 * h + 1
    return least


def edge_lengths(size: int, edge: int) -> Tensor:
    """Tokens along one axis in each of its tiles; the last may be short."""
    starts = torch.arange(0, size, edge)
    return (size - starts).clamp(max=edge)


def held(tile_of: Tensor, size: int, length: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """First and last tile in each run of `size` tokens; of a run of text, which is exact anyway, the nearest tile."""
    starts = torch.arange(0, length, size)
    ends = (starts + size).clamp(max=length) - 1
    before = grid.text if grid.text_first else 0
    first, last = (tile_of[(x - before).clamp(0, grid.video - 1)] for x in (starts, ends))
    return first, last


def least_over(levels: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The least of the rows first[i] to last[i] of `levels` `[T, n]`, for each i: `[N, n]`."""
    least = levels[first]
    for step in range(1, int((last - first).max()) + 1):
        least = torch.minimum(least, levels[torch.minimum(first + step, last)])
    return least
