"""One threshold for a head, on the softmax of pooled patches."""

import pytest
import torch

from baselines.draft import Draft
from pisa import Blocks, Grid
from pisa.orders import Tile2D
from tests.pisa.cases import normal


def test_the_pooled_frames_of_the_paper_pick_the_blocks(seed):
    """Average pooling of 2 x 4 patches, softmax, and the entries above one value for each head."""
    grid, density = Grid(3, 4, 8), 0.4
    q, k = (normal(2, 2, grid.tokens, 32) for _ in range(2))
    permutation = Tile2D(2, 4)(q, k, grid)
    moved = [x[:, :, permutation] for x in (q, k)]
    mask = Draft(density)(*moved, moved[1], Blocks(8, grid.tokens, grid.tokens, grid)).validate().to_mask()

    def pooled(x):  # [B, H, patches, D], frame by frame, strip by strip
        patches = x.unflatten(2, (3, 4, 8)).unflatten(4, (2, 4)).unflatten(3, (2, 2))  # B H F h 2 w 4 D, read below
        return patches.mean((4, 6)).flatten(2, 4)

    draft = (pooled(q) @ pooled(k).mT * 32**-0.5).softmax(-1)
    for head, kept in zip(draft.flatten(0, 1), mask.flatten(0, 1), strict=True):
        best = torch.zeros_like(kept).scatter(-1, head.argmax(-1, keepdim=True), True)
        assert kept.sum() == int(density * kept.numel())
        assert head[kept & ~best].min() > head[~kept].max()  # a row's best may be below the threshold


def test_every_head_has_the_density_and_its_rows_differ(seed):
    q, k = normal(1, 2, 256, 32), normal(1, 2, 256, 32)
    q[:, :, :128] *= 0.1  # flat rows: every entry is about 1 / 16
    q[:, :, 128:] *= 1000  # peaked rows: one entry is about 1
    counts = Draft(0.5)(q, k, k, Blocks(16, 256, 256)).counts.double()
    assert (counts.mean(-1) == 8).all()
    assert (counts[..., :8] >= 10).all() and (counts[..., 8:] <= 6).all()
    few = Draft(1 / 16)(q, k, k, Blocks(16, 256, 256)).counts
    assert (few == 1).all()  # by the threshold alone the flat rows would have none


@pytest.mark.parametrize("text_first", [True, False])
def test_text_is_exact_and_inside_the_density(text_first, seed):
    grid = Grid(4, 8, 8, text=16, text_first=text_first)
    q = normal(1, 2, grid.tokens, 32)
    block_map = Draft(0.5)(q, q, q, Blocks(16, 272, 272, grid))
    text, mask = (0 if text_first else 16), block_map.to_mask()
    assert mask[..., text].all() and mask[:, :, text].all()
    assert block_map.density() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("density", [0, 1.5])
def test_impossible_densities_are_refused(density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        Draft(density)
