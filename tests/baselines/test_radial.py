"""The mask of the paper, block by block, and how many blocks the official code keeps."""

import pytest
import torch

from baselines import radial
from baselines.knob import AtDensity
from baselines.radial import Radial
from pisa import Blocks, Grid
from tests.pisa.cases import normal


def kept(grid: Grid, size: int, **settings) -> torch.Tensor:
    """The mask `[N, N]` of whole blocks, all that the official code has."""
    blocks = Blocks(size, grid.tokens, grid.tokens, grid)
    mask = Radial(**settings).positions(blocks, grid) <= 1
    text, whole = blocks.text_key_blocks(), grid.tokens // size
    mask[text], mask[:, text] = True, True
    return mask[:whole, :whole]


@pytest.mark.parametrize(
    ("grid", "size", "settings", "count"),
    [
        (Grid(18, 48, 80), 128, {"near": 0.5}, 76_798),  # of 291,600: 0.7366324, published in the project's issues
        (Grid(18, 48, 80), 128, {}, round(291_600 * (1 - 0.7128669))),
        (Grid(18, 48, 80), 128, {"decay": 0.05}, round(291_600 * (1 - 0.7128669))),  # below 0.2 nothing changes
        (Grid(18, 48, 80), 128, {"decay": 0.8}, round(291_600 * (1 - 0.6231550))),
        (Grid(18, 48, 80), 128, {"decay": 1.0}, round(291_600 * (1 - 0.5690809))),
        (Grid(18, 48, 80), 64, {}, round(1_166_400 * (1 - 0.7392250))),
        (Grid(30, 48, 80, text=256), 128, {"decay": 0.95, "sink": False}, round(813_604 * (1 - 0.7221548))),
        (Grid(30, 48, 80, text=256), 128, {"decay": 0.5, "sink": False}, round(813_604 * (1 - 0.7750060))),
    ],
)
def test_as_many_blocks_as_the_official_code(grid, size, settings, count):
    assert kept(grid, size, **settings).sum().item() == count


def test_the_official_code_loses_the_last_block_of_a_pair_of_frames(monkeypatch):
    """With that loss, its number for 480 x 832 x 81 comes out (0.6613, frames of 1,560 tokens); without it, more."""
    grid, whole = Grid(21, 30, 52), radial.least_band

    def losing(n, top, left, rows, columns):
        band = whole(n, top, left, rows, columns).clone()
        band[-(-n // rows) :], band[:, -(-n // columns) :] = torch.inf, torch.inf
        return band

    ours = kept(grid, 128)
    monkeypatch.setattr(radial, "least_band", losing)
    theirs = kept(grid, 128)
    assert 1 - theirs.float().mean().item() == pytest.approx(0.6613, abs=5e-5)
    assert (ours | theirs).equal(ours) and 0 < (ours & ~theirs).sum() < 0.01 * ours.sum()


def by_tokens(grid: Grid, size: int, decay: float, near: float, sink: bool, width: float = 1.0) -> torch.Tensor:
    """The definition, from a mask of tokens for every pair of frames, `[N, N]`."""
    n, first = grid.height * grid.width, grid.text if grid.text_first else 0
    line = torch.arange(n)
    blocks = -(-grid.tokens // size)
    mask = torch.eye(blocks, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            d, g = abs(i - j), abs(i - j).bit_length()
            thickness = width * 2.0 ** (n.bit_length() - g)
            m = 1
            while 2 * m * thickness <= 128:
                m *= 2
            half = width * (n if d == 0 else near * n if d == 1 else max(size, decay * 2.0 ** (n.bit_length() - g)))
            on = (line[:, None] - line).abs() <= half
            if d % m:
                on[:] = False
            if sink and j == 0:
                on[:] = True
            whole = torch.zeros(blocks * size, blocks * size)
            whole[first + i * n :, first + j * n :][:n, :n] = on.float()
            share = whole.unflatten(0, (-1, size)).unflatten(2, (-1, size)).mean(1)  # [N, N, columns]
            touched, covered = (share > 0).sum(-1), (share > 1 / 3).sum(-1)
            mask |= covered > 0.6 * touched
    if grid.tokens % size:
        mask[-1], mask[:, -1] = True, True
    return mask


@pytest.mark.parametrize(
    ("grid", "settings", "width"),
    [
        (Grid(9, 8, 8), {"decay": 0.2, "near": 1.0, "sink": True}, 1),
        (Grid(9, 6, 7), {"decay": 1.0, "near": 0.5, "sink": False}, 1),  # frames of 42 tokens
        (Grid(12, 5, 5, text=9), {"decay": 0.9, "near": 1.0, "sink": True}, 1),
        (Grid(6, 10, 13, text=21, text_first=True), {"decay": 0.6, "near": 0.5, "sink": False}, 1),
        (Grid(7, 12, 12), {"decay": 0.2, "near": 1.0, "sink": False}, 0.5),
        (Grid(7, 12, 12), {"decay": 0.7, "near": 1.0, "sink": False}, 2),
    ],
)
def test_it_is_the_mask_of_tokens_cut_into_blocks(grid, settings, width):
    blocks = Blocks(16, grid.tokens, grid.tokens, grid)
    mask = Radial(**settings, width=width).positions(blocks, grid) <= 1
    assert torch.equal(mask, by_tokens(grid, 16, **settings, width=width))
    assert 0 < mask.float().mean() < 1


def test_the_width_reaches_every_density_above_the_sink():
    grid = Grid(16, 16, 16)
    blocks = Blocks(64, 4096, 4096, grid)
    masks = [Radial(width=w).positions(blocks, grid) <= 1 for w in (0.01, 0.1, 0.5, 1, 4, 99)]
    densities = [mask.float().mean().item() for mask in masks]
    assert densities == sorted(densities)
    assert densities[0] < 0.08 and densities[-1] == 1
    q = normal(1, 1, 4096, 32)
    for density in (0.125, 0.3, 0.7):
        block_map = AtDensity(Radial(), density)(q, q, q, blocks)
        assert block_map.density() == pytest.approx(density, abs=1e-3)


def test_query_blocks_that_share_a_list(seed):
    grid = Grid(5, 8, 8, text=5)
    q = normal(1, 2, grid.tokens, 32)
    shared = Radial()(q, q, q, Blocks(8, grid.tokens, grid.tokens, grid, shared=2)).validate()
    assert shared.shared == 2
    own = torch.arange(shared.n_k)
    assert shared.to_mask()[0, 0, own, own].all()


@pytest.mark.parametrize("wrong", ["decay", "near", "width"])
def test_what_cannot_be_is_refused(wrong, seed):
    with pytest.raises(ValueError, match="decay, near and width must be positive"):
        Radial(**{wrong: 0})
    q = normal(1, 1, 64, 32)
    with pytest.raises(ValueError, match="needs to know where the tokens sit"):
        Radial()(q, q, q, Blocks(16, 64, 64))
