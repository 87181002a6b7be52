"""Scores against the definition; budgets, ties and text."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pisa import Blocks, Grid, reference
from pisa.routing import SCORES, RandomTopK, TopK, best, covariance_scores, deviations, kept_blocks
from tests.pisa.cases import Largest, cases, normal, relative_l2


@given(cases())
def test_centroid_scores(case):
    truth = reference.centroid_scores(case.q, case.k, case.blocks.size)
    assert relative_l2(SCORES["centroid"](*case.qkv, case.blocks), truth) < 1e-5


@given(cases())
def test_covariance_scores(case):
    """M_j is compared before its logarithm, which blows up the rounding of an M_j that is zero in truth."""
    truth = reference.covariance_scores(*case.qkv, case.blocks.size)
    plain = reference.centroid_scores(case.q, case.k, case.blocks.size)
    scores = covariance_scores(*case.qkv, case.blocks).double()
    M, M_truth = (scores - plain).exp(), (truth - plain).exp()
    assert (
        M - M_truth
    ).abs().max() <= 1e-3 * case.k.double().norm() * case.v.double().norm() / case.blocks.n_k**0.5 + 2e-5
    if case.blocks.n_k > 1:
        assert relative_l2(M, M_truth) < 1e-3


def test_covariance_needs_no_matrix_per_block(seed):
    k, v, blocks = normal(1, 1, 1024, 128), normal(1, 1, 1024, 128), Blocks(16, 1024, 1024)
    with Largest() as largest:
        deviations(k, v, blocks)
    assert largest.numel < blocks.n_k * 128 * 128 / 4  # L * D is an eighth of N * D * D here


@given(cases(), st.floats(0.01, 1))
def test_top_k_equals_the_definition(case, density):
    block_map = TopK(density)(*case.qkv, case.blocks).validate()
    scores = SCORES["centroid"](*case.qkv, case.blocks)
    assert block_map.indices.tolist() == reference.top_k(scores, density)
    assert block_map.uniform


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_of_equal_scores_the_lowest_block_wins(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    chosen = best(torch.tensor(scores, dtype=torch.float32) * 0.5, count).sort().values.tolist()
    assert chosen == sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def test_minus_zero_ties_with_zero():
    assert best(torch.tensor([-1.0, -0.0, 0.0]), 1).tolist() == [1]


@given(st.integers(1, 2000), st.integers(1, 100))
@example(10, 20)  # 10 * (1 - 0.8) is 1.9999999999999996
def test_density_never_loses_a_block_to_rounding(n_k, percent):
    assert kept_blocks(percent / 100, n_k) == max(1, percent * n_k // 100)
    assert kept_blocks(1 - (100 - percent) / 100, n_k) == max(1, percent * n_k // 100)  # as 1 - sparsity


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(("density", "count"), [(0.5, 5), (0.1, 2)])  # two of ten blocks hold text
def test_text_keys_are_exact_inside_the_budget(seed, text_first, density, count):
    grid = Grid(2, 8, 4, text=16, text_first=text_first)
    q, k, v = (normal(1, 2, 80, 32) for _ in range(3))
    block_map = TopK(density, text_keys_exact=True)(q, k, v, Blocks(8, 80, 80, grid)).validate()
    text = slice(0, 2) if text_first else slice(8, 10)
    assert block_map.to_mask()[..., text].all()
    assert (block_map.counts == count).all()
    assert block_map.uniform


def test_text_rows_are_dense(seed):
    grid = Grid(2, 8, 4, text=12)
    q, k, v = (normal(1, 2, 76, 32) for _ in range(3))
    block_map = TopK(0.2, text_rows_dense=True)(q, k, v, Blocks(8, 76, 76, grid)).validate()
    assert block_map.counts[..., 8:].eq(10).all()
    assert block_map.counts[..., :8].eq(2).all()
    assert not block_map.uniform


def test_random_blocks_follow_the_seed_alone(seed):
    blocks = Blocks(8, 160, 160)
    q, other = normal(1, 2, 160, 32), normal(1, 2, 160, 32)
    block_map = RandomTopK(0.25, seed=1)(q, q, q, blocks).validate()
    assert (block_map.counts == 5).all()
    assert torch.equal(block_map.indices, RandomTopK(0.25, seed=1)(other, other, other, blocks).indices)
    assert not torch.equal(block_map.indices, RandomTopK(0.25, seed=2)(q, q, q, blocks).indices)
    assert not torch.equal(block_map.indices[0, 0], block_map.indices[0, 1])


@pytest.mark.parametrize("routing", [TopK, RandomTopK])
@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_impossible_densities_are_refused(routing, density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        routing(density)


def test_unknown_score_is_refused():
    with pytest.raises(ValueError, match="No score 'mean'. Allowed: centroid, covariance"):
        TopK(score="mean")


@pytest.mark.parametrize("q_len", [64, 90, 96])
def test_query_blocks_that_share_a_list_are_scored_as_one(q_len, seed):
    """Their list is that of one block of all their queries; a lone last block has its own."""
    q, k, v = (normal(1, 2, n, 32) for n in (q_len, 200, 200))
    one = TopK(0.3)(q, k, v, Blocks(16, q_len, 200, shared=2)).validate()
    assert (one.shared, one.counts.shape[2]) == (2, -(-q_len // 16))
    scores = Blocks(32, q_len, 200).mean(q) @ Blocks(16, 200, 200).mean(k).mT
    expected = scores.topk(one.indices.shape[-1]).indices.sort().values
    assert torch.equal(one.indices[:, :, ::2].long(), expected)
    drawn = RandomTopK(0.3)(q, k, v, Blocks(16, q_len, 200, shared=2)).validate()
    assert drawn.shared == 2
