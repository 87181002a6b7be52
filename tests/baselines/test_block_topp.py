"""The fewest blocks that hold p, by rows that differ."""

import pytest
import torch

from baselines.block_topp import TopP
from pisa import Blocks, Grid
from tests.pisa.cases import normal


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("k_len", [128, 120])
def test_each_row_has_the_fewest_blocks_that_hold_p(p, k_len, seed):
    """By hand in float64: blocks of 16, the last of 8 tokens counts half."""
    q, k = normal(2, 2, 64, 32), normal(2, 2, k_len, 32)
    block_map = TopP(p)(q, k, k, Blocks(16, 64, k_len)).validate()
    qbar = torch.stack([x.mean(2) for x in q.double().split(16, 2)], 2)
    kbar = torch.stack([x.mean(2) for x in k.double().split(16, 2)], 2)
    size = torch.tensor([x.shape[2] for x in k.split(16, 2)], device=q.device)
    mass = (qbar @ kbar.mT * 32**-0.5).exp() * size
    mass = mass / mass.sum(-1, keepdim=True)
    mask = block_map.to_mask()
    held = (mass * mask).sum(-1)
    assert (held >= p - 1e-6).all()
    assert (held - mass.masked_fill(~mask, torch.inf).amin(-1) < p + 1e-6).all()  # one fewer would not
    assert (mass.masked_fill(~mask, torch.inf).amin(-1) >= mass.masked_fill(mask, 0).amax(-1)).all()


def test_p_of_1_keeps_blocks_of_next_to_no_mass(seed):
    q, k = 50 * normal(1, 1, 32, 32), 50 * normal(1, 1, 64, 32)
    assert TopP(1.0)(q, k, k, Blocks(8, 32, 64)).density() == 1


def test_text_is_as_in_top_k(seed):
    grid = Grid(2, 8, 4, text=12)
    q = normal(1, 2, 76, 32)
    mask = TopP(0.2, text_keys_exact=True, text_rows_dense=True)(q, q, q, Blocks(8, 76, 76, grid)).to_mask()
    assert mask[..., 8:].all() and mask[:, :, 8:].all() and not mask[:, :, :8, :8].all()


@pytest.mark.parametrize("p", [0, 1.1, float("nan")])
def test_p_that_is_no_share_is_refused(p):
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\]"):
        TopP(p)
