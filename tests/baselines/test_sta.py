"""Windows of tiles: as many as the paper counts, and the same ones."""

import pytest
import torch

from baselines.knob import AtDensity
from baselines.sta import SlidingTile, reach
from pisa import Blocks, Grid
from pisa.orders import Tile3D
from tests.pisa.cases import normal


@pytest.mark.parametrize(
    ("window", "tiles"),
    [((3, 1, 10), 30), ((1, 5, 7), 35), ((3, 3, 3), 27), ((1, 6, 5), 30), ((1, 3, 10), 30), ((3, 6, 1), 18)],
)
def test_windows_of_the_paper_on_wan(window, tiles):
    """18 x 48 x 80 is 3 x 6 x 10 tiles; each sees exactly the product of the window, at the borders too."""
    grid = Grid(18, 48, 80)
    mask = SlidingTile(window=window).positions(Blocks(384, grid.tokens, grid.tokens, grid), grid) <= 1
    assert mask.shape == (180, 180) and mask.sum(1).eq(tiles).all()
    small = SlidingTile(window=window).positions(Blocks(64, grid.tokens, grid.tokens, grid), grid) <= 1
    assert torch.equal(small, mask.repeat_interleave(6, 0).repeat_interleave(6, 1))  # six blocks to a tile


def sees(a: int, b: int, n: int, window: int) -> bool:
    """The rule on one axis: the centre moves inwards where the window would leave the axis."""
    half = window // 2
    centre = max(min(a, n - 1 - half), half)
    return abs(centre - b) <= half


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_reach_is_the_least_window(n):
    for window in [w for w in range(1, n + 3) if w % 2 or w >= n]:
        found = reach(n) <= window
        assert found.tolist() == [[sees(a, b, n, window) for b in range(n)] for a in range(n)]


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("size", [8, 12])
def test_tokens_see_the_window_of_their_tile(size, text_first, seed):
    """Tiles of 2 x 2 x 3 cut at the far edges, text, blocks of several tiles: a block sees what its tokens see."""
    grid, tile, window = Grid(5, 6, 10, text=11, text_first=text_first), (2, 2, 3), (1, 3, 3)
    q = normal(1, 1, grid.tokens, 32)
    mask = SlidingTile(tile, window)(q, q, q, Blocks(size, grid.tokens, grid.tokens, grid)).validate().to_mask()[0, 0]
    order = Tile3D(*tile)(q, q, grid).tolist()
    before = grid.text if text_first else 0
    tiles = [-(-n // edge) for n, edge in zip((5, 6, 10), tile, strict=True)]

    def tile_of(token):
        t, h, w = (token - before) // 60, (token - before) // 10 % 6, (token - before) % 10
        return t // tile[0], h // tile[1], w // tile[2]

    held = [order[i : i + size] for i in range(0, len(order), size)]
    is_text = [any(not 0 <= x - before < grid.video for x in block) for block in held]
    places = [{tile_of(x) for x in block if 0 <= x - before < grid.video} for block in held]

    def near(a, b):
        return all(sees(*pair) for pair in zip(a, b, tiles, window, strict=True))

    for i, row in enumerate(mask.tolist()):
        for j, found in enumerate(row):
            assert found == (is_text[i] or is_text[j] or any(near(a, b) for a in places[i] for b in places[j]))


def test_a_density_scales_the_window(seed):
    grid = Grid(12, 32, 32)
    blocks = Blocks(384, grid.tokens, grid.tokens, grid)  # 2 x 4 x 4 tiles
    q = normal(1, 1, grid.tokens, 32)
    native = SlidingTile(window=(1, 3, 3))
    block_map = AtDensity(native, 9 / 32)(q, q, q, blocks)
    assert torch.equal(block_map.to_mask(), native(q, q, q, blocks).to_mask())
    for density in (0.1, 0.4, 0.9):
        assert AtDensity(native, density)(q, q, q, blocks).density() == pytest.approx(density, abs=1e-3)


def test_what_cannot_be_is_refused(seed):
    with pytest.raises(ValueError, match="tile must be three numbers from 1 on"):
        SlidingTile(tile=(8, 8))
    with pytest.raises(ValueError, match="window must be three numbers from 1 on"):
        SlidingTile(window=(0, 3, 3))
    q, grid = normal(1, 1, 24 * 16 * 16, 32), Grid(24, 16, 16)
    with pytest.raises(ValueError, match="must be odd or span its axis of 4 tiles, got 2"):
        SlidingTile(window=(2, 1, 1))(q, q, q, Blocks(64, q.shape[2], q.shape[2], grid))
    assert SlidingTile([6, 8, 8], [1, 1, 1]) == SlidingTile(window=(1, 1, 1))  # as lists of a config
