"""Cutting into blocks, and the block map's rules."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pisa import BlockMap, Blocks, Grid
from tests.pisa.cases import DEVICE, normal, random_map, relative_l2


@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_sums_and_means_are_those_of_the_blocks(tokens, size, seed):
    torch.manual_seed(seed)
    x, blocks = normal(1, 2, tokens, 32, strided=True), Blocks(size, tokens, tokens)
    parts = x.double().split(size, 2)
    assert blocks.n_q == blocks.n_k == len(parts)
    assert blocks.lengths(tokens).tolist() == [part.shape[2] for part in parts]
    assert relative_l2(blocks.sum(x), torch.stack([part.sum(2) for part in parts], 2)) < 1e-6
    assert relative_l2(blocks.mean(x), torch.stack([part.mean(2) for part in parts], 2)) < 1e-6


def test_half_precision_is_summed_in_fp32():
    x = torch.full((1, 1, 257, 32), 1.0, dtype=torch.bfloat16)  # bf16 has no 257
    assert (Blocks(257, 257, 257).sum(x) == 257).all()


@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), st.integers(0, 2**31 - 1))
def test_mask_to_map_and_back(n_q, n_k, uniform, seed):
    torch.manual_seed(seed)
    blocks = Blocks(4, 4 * n_q - 1, 4 * n_k - 2)
    block_map = random_map(1, 2, blocks, uniform)
    mask = block_map.to_mask()
    again = BlockMap.from_mask(mask, blocks).validate()
    assert torch.equal(again.indices, block_map.indices)
    assert torch.equal(again.counts, block_map.counts)
    assert torch.equal(mask.sum(-1), block_map.counts.long())
    assert block_map.density() == pytest.approx(mask.float().mean().item())
    assert block_map.uniform == (len(block_map.counts.unique()) == 1)


@given(st.integers(0, 2**31 - 1), st.booleans())
def test_dense_rows_and_exact_columns(seed, uniform):
    torch.manual_seed(seed)
    blocks = Blocks(4, 20, 28)
    block_map = random_map(2, 1, blocks, uniform)
    mask = block_map.to_mask()
    rows, columns = slice(1, 3), slice(5, 7)
    dense = block_map.with_dense_rows(rows).validate().to_mask()
    mask_rows = mask.clone()
    mask_rows[:, :, rows] = True
    assert torch.equal(dense, mask_rows)
    mask[..., columns] = True
    assert torch.equal(block_map.with_blocks(columns).validate().to_mask(), mask)
    assert block_map.with_dense_rows(slice(0, 0)) is block_map.with_blocks(slice(0, 0)) is block_map


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(1, 4, 5, text=9, text_first=True), [0, 1]),
        (Grid(1, 4, 5, text=8, text_first=True), [0]),
        (Grid(1, 4, 5, text=9), [2, 3]),  # tokens 20 to 28: block 2 holds four of them
        (Grid(1, 4, 4, text=9), [2, 3]),
        (Grid(1, 4, 5), []),
        (None, []),
    ],
)
def test_text_blocks_hold_every_text_token(grid, expected):
    tokens = grid.tokens if grid else 20
    blocks = Blocks(8, tokens, tokens, grid)
    assert list(range(blocks.n_k))[blocks.text_key_blocks()] == expected
    assert list(range(blocks.n_q))[blocks.text_query_blocks()] == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: replace(m, q_len=64), "needs counts"),
        (lambda m: replace(m, counts=m.counts.long()), "int32"),
        (lambda m: replace(m, counts=m.counts * 0), "at least one exact"),
        (lambda m: replace(m, counts=m.counts + 9), "at least one exact"),
        (lambda m: replace(m, indices=m.indices + 7), "must be a key block"),
        (lambda m: replace(m, indices=m.indices.flip(-1)), "strictly ascending"),
        (lambda m: replace(m, indices=m.indices * 0), "strictly ascending"),
        (lambda m: replace(m, counts=m.counts - 1, uniform=False), "must be -1"),
        (lambda m: replace(m.with_dense_rows(slice(0, 1)), uniform=True), "says uniform"),
    ],
)
def test_a_broken_map_is_refused_with_its_rule(change, sentence):
    indices = torch.tensor([0, 2, 3], device=DEVICE).expand(1, 2, 4, 3)
    good = BlockMap.from_indices(indices, Blocks(8, 32, 40)).validate()
    with pytest.raises(ValueError, match=sentence):
        change(good).validate()


@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 4, -1)])
def test_an_empty_grid_is_refused(shape):
    with pytest.raises(ValueError, match="at least 1"):
        Grid(*shape)
