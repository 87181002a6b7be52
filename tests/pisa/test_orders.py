"""Orders are permutations that put one tile after the other and leave text alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pisa import Grid
from pisa.orders import Raster, Tile2D, Tile3D, inverse, named

grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.booleans())
edges = st.integers(1, 4)
orders = st.builds(Tile2D, edges, edges) | st.builds(Tile3D, edges, edges, edges)
NOTHING = torch.empty(1, 1, 0, 32)


@given(grids, orders)
def test_order_and_inverse_give_every_token_back(grid, order):
    permutation = order(NOTHING, NOTHING, grid)
    tokens = torch.arange(grid.tokens)
    assert torch.equal(permutation.sort().values, tokens)
    assert torch.equal(tokens[permutation][inverse(permutation)], tokens)


@given(grids, orders)
def test_text_stays_in_place(grid, order):
    permutation = order(NOTHING, NOTHING, grid)
    text = slice(0, grid.text) if grid.text_first else slice(grid.video, None)
    assert torch.equal(permutation[text], torch.arange(grid.tokens)[text])


@given(grids, orders)
def test_tokens_of_a_tile_are_neighbours_in_raster_order(grid, order):
    """Walk the tiles with python loops: the order must visit exactly the same tokens."""
    dt, dh, dw = (
        (1, order.height, order.width) if isinstance(order, Tile2D) else (order.frames, order.height, order.width)
    )
    walk = [
        (t * grid.height + h) * grid.width + w
        for t0 in range(0, grid.frames, dt)
        for h0 in range(0, grid.height, dh)
        for w0 in range(0, grid.width, dw)
        for t in range(t0, min(t0 + dt, grid.frames))
        for h in range(h0, min(h0 + dh, grid.height))
        for w in range(w0, min(w0 + dw, grid.width))
    ]
    permutation = order(NOTHING, NOTHING, grid).tolist()
    first = grid.text if grid.text_first else 0
    assert [x - first for x in permutation[first : first + grid.video]] == walk


def test_static_orders_are_made_once():
    grid = Grid(2, 4, 4)
    assert Tile3D()(NOTHING, NOTHING, grid) is Tile3D()(NOTHING, NOTHING, grid)


def test_raster_moves_nothing():
    assert Raster()(NOTHING, NOTHING, Grid(2, 4, 4)) is None


def test_orders_by_name():
    assert named("raster") == Raster()
    assert named("tile_2d", (4, 8)) == Tile2D(4, 8)
    assert named("tile_3d", (2, 4, 8)) == Tile3D(2, 4, 8)
    with pytest.raises(ValueError, match="Did you mean 'tile_3d'"):
        named("tile3d")
    with pytest.raises(ValueError, match="at least 1"):
        Tile2D(0, 8)(NOTHING, NOTHING, Grid(1, 8, 8))
