"""The tail kernel alone: exact part from the eager engine, tail by the kernel, both together against float64.

Without a GPU it runs in Triton's interpreter, so every case is tiny.
"""

import pytest
import torch

from pisa import BlockMap, Blocks, Tail, reference
from pisa.engines import eager, peers
from tests.pisa.cases import DEVICE, normal, random_map, relative_l2
from tests.pisa.engines.test_engines import disagreeing_queries
from tests.pisa.engines.test_triton import DTYPES, framed, pytestmark  # noqa: F401  GPU or interpreter, poisoned memory

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_tile = pytest.mark.parametrize("rows", [64, 128])

# block size, query and key tokens, D, batch, heads; up to 64 key blocks are one step of the kernel
SHAPES = {
    "ragged": (16, 90, 77, 64, 2, 2),
    "one query": (64, 1, 65, 64, 1, 1),
    "one block": (16, 16, 16, 128, 1, 1),
    "a tile and a token": (16, 129, 80, 32, 1, 2),
    "blocks of 64": (64, 130, 300, 128, 1, 1),
    "blocks of 128": (128, 150, 300, 64, 1, 1),
    "a step": (16, 20, 1024, 32, 1, 1),
    "a step and a token": (16, 20, 1025, 64, 1, 2),
    "steps": (16, 70, 2100, 32, 1, 1),
}


def run(q, k, v, block_map, tail, scale=None):
    """o and lse, and the exact part that they started from."""
    exact_o, exact_lse = eager.attend(q, k, v, block_map, Tail("drop"), scale)
    o = framed(*q.shape, dtype=q.dtype, strided=True).copy_(exact_o)
    lse = torch.full((*q.shape[:2], q.shape[2] + 5), torch.nan, device=q.device)[:, :, : q.shape[2]].copy_(exact_lse)
    peers.add_tail_(o, lse, q, k, v, block_map, Tail(tail), q.shape[3] ** -0.5 if scale is None else scale)
    for x in (o, lse):
        assert x._base.isnan().sum() == x._base.numel() - x.numel(), "wrote beside the result, or NaN into it"
    return o, lse, exact_o, exact_lse


def agree(q, k, v, block_map, tail, scale=None):
    """What `run` returns, no further from float64 than twice the eager engine, output and normaliser."""
    truth, truth_lse = reference.attend(q, k, v, block_map, tail, scale)
    answer = o, lse, _, _ = run(q, k, v, block_map, tail, scale)
    eps = torch.finfo(q.dtype).eps  # the means are rounded to it
    assert relative_l2(o, truth) <= 2 * relative_l2(eager.attend(q, k, v, block_map, Tail(tail), scale)[0], truth) + eps
    assert ((lse - truth_lse).abs() <= 1e-5 + eps + 1e-6 * truth_lse.abs()).all()
    return answer


@pytest.fixture
def tile(monkeypatch, rows):
    monkeypatch.setitem(peers.TILE, "ROWS", rows)


@every_dtype
@pytest.mark.parametrize("tail", ["zeroth", "hybrid"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact_part_and_tail_equal_the_definition(shape, tail, dtype, seed, monkeypatch):
    size, q_len, k_len, dim, batch, heads = shape
    monkeypatch.setitem(peers.TILE, "ROWS", 64 * (1 + seed // 2 % 2))
    monkeypatch.setitem(peers.TILE, "STEP", 32 * (1 + seed // 4 % 2))
    blocks, strided = Blocks(size, q_len, k_len), bool(seed % 2)
    q, k, v = (framed(batch, heads, n, dim, dtype=dtype, strided=strided) for n in (q_len, k_len, k_len))
    agree(q, k, v, random_map(batch, heads, blocks, uniform=False), tail, scale=1.7 * dim**-0.5)


def test_the_tile_does_not_matter(seed, monkeypatch):
    blocks = Blocks(16, 70, 1100)
    q, k, v = (normal(1, 1, n, 32, DTYPES[-1]) for n in (70, 1100, 1100))
    block_map = random_map(1, 1, blocks, uniform=False)
    answers = []
    for rows, step in ((64, 64), (128, 64), (64, 32), (64, 128)):
        monkeypatch.setattr(peers, "TILE", peers.TILE | {"ROWS": rows, "STEP": step, "num_stages": 2})
        answers.append(run(q, k, v, block_map, "hybrid")[:2])
    for o, lse in answers[1:]:
        assert relative_l2(o, answers[0][0]) < torch.finfo(DTYPES[-1]).eps
        assert relative_l2(lse, answers[0][1]) < 1e-6


@every_tile
def test_rows_without_a_tail_stay_as_they_are(rows, seed, tile):
    """Query blocks with every key exact beside others that have a tail, in one tile and over two steps."""
    blocks = Blocks(16, 70, 1030)
    q, k, v = (normal(1, 1, n, 32, torch.float16) for n in (70, 1030, 1030))
    mask = random_map(1, 1, blocks, uniform=False).to_mask()
    mask[:, :, 1::2] = True
    o, lse, exact_o, exact_lse = agree(q, k, v, BlockMap.from_mask(mask, blocks), "hybrid")
    whole = (torch.arange(70, device=DEVICE) // 16) % 2 == 1
    assert torch.equal(o[:, :, whole], exact_o[:, :, whole])
    assert torch.equal(lse[:, :, whole], exact_lse[:, :, whole])


@pytest.mark.parametrize("size", [16, 64])
def test_density_one_leaves_the_exact_part(size, seed):
    """A full map that does not say so: every column of every step is masked."""
    blocks = Blocks(size, 70, 150)
    q, k, v = (normal(1, 2, n, 64, torch.float16) for n in (70, 150, 150))
    full = BlockMap.from_mask(torch.ones(1, 2, blocks.n_q, blocks.n_k, dtype=torch.bool, device=DEVICE), blocks)
    o, lse, exact_o, exact_lse = run(q, k, v, full, "hybrid")
    assert torch.equal(o, exact_o)
    assert torch.equal(lse, exact_lse)


@every_tile
def test_the_tail_mass_follows_a_rising_maximum(rows, seed, tile):
    """Fails for a kernel that does not rescale the tail mass, as test_engines.py shows by numbers."""
    q, k, v, block_map = disagreeing_queries(Blocks(16, 32, 2560), DTYPES[0])
    agree(q, k, v, block_map, "hybrid")


@pytest.mark.parametrize("j", [0, 31, 32, 63, 64, 68])
def test_the_exact_block_is_not_in_the_tail(j, seed):
    """One exact block that outweighs the others: counted twice, its normaliser would be off by log 2."""
    blocks = Blocks(16, 16, 16 * 68 + 5)
    q, k, v = (normal(1, 1, n, 64, DTYPES[0]) for n in (16, blocks.k_len, blocks.k_len))
    k[:, :, j * 16 : (j + 1) * 16] = 3 * q[:, :, :1]
    agree(q, k, v, BlockMap.from_indices(torch.full((1, 1, 1, 1), j, device=DEVICE), blocks), "zeroth")


@pytest.mark.parametrize("last", [1, 5, 63, 64])
def test_a_short_last_block_weighs_its_tokens(last, seed):
    """A last block of one token that outweighs the others: taken for a whole one, lse would be off by log 16."""
    blocks = Blocks(16, 16, 16 * last + 1)
    q, k, v = (normal(1, 1, n, 64, DTYPES[0]) for n in (16, blocks.k_len, blocks.k_len))
    k[:, :, -1] = 3 * q[:, :, 0]
    agree(q, k, v, BlockMap.from_indices(torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=DEVICE), blocks), "zeroth")
