"""A density is met to a block, by one knob for a sample, whatever the knob's steps; mass next to 1 keeps its order."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.knob import AtDensity, Static, always_text, lowest, nats, nats_before, nats_up_to, static_map
from pisa import Blocks, Grid
from pisa.routing import kept_blocks
from tests.pisa.cases import normal


@dataclass(frozen=True)
class Given:
    """Levels that the test wrote down."""

    values: torch.Tensor

    def levels(self, q, k, v, blocks):
        return self.values[: len(q)].clone()


def routed(levels: torch.Tensor, density: float, shared: int = 1):
    samples, heads, lists, n_k = levels.shape
    q, k = normal(samples, heads, lists * shared * 4, 32), normal(samples, heads, n_k * 4, 32)
    blocks = Blocks(4, q.shape[2], k.shape[2], shared=shared)
    return AtDensity(Given(levels.to(q.device)), density)(q, k, k, blocks).validate()


@given(st.floats(0.01, 1), st.integers(0, 2**31 - 1), st.sampled_from([2, 50]))
def test_the_density_is_met_to_a_block_with_and_without_ties(density, seed, steps):
    torch.manual_seed(seed)
    levels = (torch.rand(2, 3, 7, 11) * steps).floor() / steps
    mask = routed(levels, density).to_mask().cpu()
    least = 3 * 7  # one for each list
    assert (mask.flatten(1).sum(1) == max(least, kept_blocks(density, 3 * 7 * 11))).all()
    for sample, kept in zip(levels, mask, strict=True):  # nothing that is left out is lower than what is in
        beside_first = kept.scatter(-1, sample.argmin(-1, keepdim=True), False)
        if beside_first.any():
            assert sample[beside_first].max() <= sample[~kept].min() if (~kept).any() else True


def test_heads_share_the_budget_and_samples_do_not(seed):
    levels = torch.rand(2, 2, 8, 8)
    levels[:, 1] += 1  # the second head needs a higher knob throughout
    block_map = routed(levels, 0.25)
    per_head = block_map.counts.double().mean(-1).cpu() / 8
    assert (per_head[:, 0] > 0.37).all() and (per_head[:, 1] == 1 / 8).all()  # 1 / 8: one block for each list
    other = levels.clone()
    other[1] *= 5
    assert torch.equal(routed(other, 0.25).to_mask()[0], block_map.to_mask()[0])


def test_ties_are_spread_evenly_over_heads_and_lists():
    mask = routed(torch.zeros(1, 4, 16, 16), 0.5).to_mask()[0].cpu().double()
    assert mask.mean() == 0.5
    assert (mask.mean((1, 2)) - 0.5).abs().max() < 0.01
    assert (mask.mean(2) - 0.5).abs().max() < 0.08  # a list of 16: within one block


def test_what_is_always_kept_may_exceed_the_density():
    levels = torch.rand(1, 1, 8, 8)
    levels[..., :4] = -torch.inf
    mask = routed(levels, 0.25).to_mask()
    assert mask[..., :4].all() and not mask[..., 4:].any()


def test_shared_lists(seed):
    block_map = routed(torch.rand(1, 2, 4, 9), 0.4, shared=3)
    assert block_map.shared == 3 and block_map.counts.shape == (1, 2, 12)


@pytest.mark.parametrize("text_first", [True, False])
def test_text_keys_and_rows(text_first):
    grid = Grid(1, 4, 10, text=12, text_first=text_first)  # 52 tokens in blocks of 4; lists of two
    levels = always_text(torch.zeros(7, 13), Blocks(4, 52, 52, grid, shared=2), keys=True, rows=True)
    text_keys, text_rows = (slice(0, 3), slice(0, 2)) if text_first else (slice(10, 13), slice(5, 7))
    expected = torch.zeros(7, 13)
    expected[:, text_keys] = expected[text_rows] = -torch.inf
    assert torch.equal(levels, expected)
    assert not always_text(torch.zeros(7, 13), Blocks(4, 52, 52, Grid(1, 4, 13), shared=2)).any()


@given(st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=20), st.floats(0.01, 0.999))
def test_the_fewest_blocks_that_hold_p(logits, p):
    mass = torch.tensor(logits).double().softmax(-1)
    ranked = mass.sort(descending=True, stable=True)
    before = ranked.values.cumsum(-1) - ranked.values
    clear = (before - p).abs().min() > 1e-6 and (before + ranked.values - p).abs().min() > 1e-6
    found, up_to = nats_before(torch.tensor(logits)), nats_up_to(torch.tensor(logits))
    assert (found >= 0).all() and found.min() == 0
    if clear:
        assert torch.equal(found[ranked.indices] < nats(p), before < p)
        assert torch.equal(up_to[ranked.indices] <= nats(p), before + ranked.values <= p)


def test_mass_that_fp32_sums_would_lose_still_has_an_order():
    """A row whose best block holds all but 1e-20: a running sum is 1 from the second block on."""
    levels = nats_before(torch.tensor([100.0, 50.0, 40.0, 30.0, -torch.inf]))
    assert (levels.diff() > 5).all()
    assert (levels[:4] < nats(1)).all() and math.isinf(nats(1.0))


@dataclass(frozen=True)
class Diagonal(Static):
    def positions(self, blocks, grid):
        i, j = torch.arange(-(-blocks.n_q // blocks.shared))[:, None], torch.arange(blocks.n_k)
        return (i - j).abs().float()


def test_a_static_map_is_made_once_for_each_cut(seed):
    grid = Grid(2, 4, 8)
    q = normal(2, 3, 64, 32)
    one, two = (AtDensity(Diagonal(), 0.5)(x, x, x, Blocks(8, 64, 64, grid)) for x in (q, q + 1))
    assert one is two and one.counts.shape == (2, 3, 8)
    assert (Diagonal()(q, q, q, Blocks(8, 64, 64, grid)).density(), one.density()) == (22 / 64, 0.5)
    assert static_map(Diagonal(), 0.25, Blocks(8, 64, 64, grid), 2, 3, q.device).density() == 0.25
    with pytest.raises(ValueError, match=r"Diagonal\(\) needs to know where the tokens sit: pass grid="):
        Diagonal()(q, q, q, Blocks(8, 64, 64))


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_impossible_densities_are_refused(density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        AtDensity(Diagonal(), density)


def test_scores_that_are_not_finite_still_make_a_legal_map():
    assert (routed(torch.full((1, 1, 4, 8), torch.nan), 0.5).counts >= 1).all()


def test_lowest_of_one_block():
    assert lowest(torch.zeros(1, 1, 1), 0.01).all()
