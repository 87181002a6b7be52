"""The Triton engine where test_engines.py does not look: its kernels one by one, the edges of its tiles, its refusals.

Without a GPU the kernels run in Triton's interpreter, so every case is tiny.
"""

from dataclasses import replace

import pytest
import torch

from pisa import BlockMap, Blocks, Tail, launch, reference
from pisa.engines import choose, eager, name_of
from pisa.engines import triton as engine
from tests.pisa.cases import DEVICE, normal, random_map, relative_l2

pytestmark = [
    pytest.mark.skipif(
        engine.refuses(normal(1, 1, 64, 64, torch.float16), BlockMap(*[None] * 2, 64, 64, 64), Tail("drop"))
        is not None,
        reason="the Triton engine needs a CUDA GPU or Triton's interpreter",
    ),
    pytest.mark.usefixtures("poisoned"),
]
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # what is not refused
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# block size, query and key tokens, D, batch, heads; 64 key blocks are one step of the tail
SHAPES = {
    "ragged": (16, 90, 77, 64, 1, 2),
    "one token over": (16, 17, 65, 64, 2, 1),
    "one token short": (16, 31, 63, 128, 1, 1),
    "whole blocks": (16, 48, 80, 32, 1, 2),
    "one block": (16, 16, 16, 128, 1, 1),
    "one key block, ragged": (16, 40, 16, 64, 1, 1),
    "blocks of 64": (64, 130, 300, 128, 1, 1),
    "blocks of 128": (128, 100, 200, 64, 1, 1),
    "a step of the tail": (16, 20, 1024, 32, 1, 1),
    "steps of the tail": (16, 33, 1100, 64, 1, 1),
}


def framed(*shape: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """`[B, H, L, D]` of normal numbers cut out of a larger tensor of NaN: who reads a neighbour shows it."""
    batch, heads, tokens, dim = shape
    if strided:  # heads inside tokens
        frame = torch.full((batch, tokens + 40, heads + 1, 2 * dim), torch.nan, dtype=dtype, device=DEVICE)
        x = frame[:, 20 : 20 + tokens, :heads, dim:].transpose(1, 2)
    else:
        frame = torch.full((batch, heads, tokens + 40, dim), torch.nan, dtype=dtype, device=DEVICE)
        x = frame[:, :, 20 : 20 + tokens]
    return x.copy_(normal(*shape, dtype))


def agree(q, k, v, block_map, tail):
    """No further from float64 than twice the eager engine, output and normaliser."""
    tail = Tail(tail)
    truth, truth_lse = reference.attend(q, k, v, block_map, tail)
    o, lse = engine.attend(q, k, v, block_map, tail)
    eps = torch.finfo(q.dtype).eps
    assert (o.dtype, o.shape, lse.dtype, lse.shape) == (q.dtype, q.shape, torch.float32, q.shape[:3])
    assert relative_l2(o, truth) <= 2 * relative_l2(eager.attend(q, k, v, block_map, tail)[0], truth) + eps
    assert (lse - truth_lse).abs().max() <= 1e-5 + (0 if tail.name == "drop" else eps)  # the means are rounded


@every_dtype
@pytest.mark.parametrize("tail", engine.TAILS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_edge_of_a_tile(shape, tail, dtype, seed):
    size, q_len, k_len, dim, batch, heads = shape
    blocks, strided = Blocks(size, q_len, k_len), bool(seed % 2)
    q, k, v = (framed(batch, heads, n, dim, dtype=dtype, strided=strided) for n in (q_len, k_len, k_len))
    agree(q, k, v, random_map(batch, heads, blocks, uniform=bool(seed // 2 % 2)), tail)


@every_dtype
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_density_one_is_dense(told, dtype, seed):
    """Told by the map, the tail is not computed at all; else every step of it is masked."""
    blocks = Blocks(16, 50, 61)
    q, k, v = (normal(1, 2, n, 64, dtype) for n in (50, 61, 61))
    full = BlockMap.from_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool, device=DEVICE), blocks)
    full = full if told else BlockMap(full.counts, full.indices, 16, 50, 61)
    agree(q, k, v, full, "hybrid")
    o, lse = engine.attend(q, k, v, full, Tail("hybrid"))
    truth, truth_lse = reference.dense(q, k, v)
    # fp32 rounds every sum of a long row, fp16 only the weights and the output
    assert relative_l2(o, truth) <= (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert (lse - truth_lse).abs().max() < 1e-5


@every_dtype
@pytest.mark.parametrize("row", ["first", "last"])
def test_the_exact_block_is_not_in_the_tail(row, dtype, seed):
    """One exact block that outweighs the others: counted twice, its normaliser would be off by log 2."""
    blocks = Blocks(16, 16, 90)
    q, k, v = (normal(1, 1, n, 64, dtype) for n in (16, 90, 90))
    j = 0 if row == "first" else blocks.n_k - 1
    k[:, :, j * 16 : (j + 1) * 16] = 3 * q[:, :, :1]
    agree(q, k, v, BlockMap.from_indices(torch.full((1, 1, 1, 1), j, device=DEVICE), blocks), "zeroth")


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(16, 16, 45, 64, 2, 2), (64, 64, 300, 128, 1, 1), (16, 16, 1100, 32, 1, 2)])
def test_statistics_are_means_and_the_sum_of_slopes(shape, strided, seed, monkeypatch):
    """Keys far from zero: the sum of H_j must not be the difference of two large numbers."""
    size, _, k_len, dim, batch, heads = shape
    monkeypatch.setattr(launch, "PROGRAMS", 20)  # several blocks in a program
    dtype = DTYPES[0]
    k, v = (framed(batch, heads, k_len, dim, dtype=dtype, strided=strided) for _ in range(2))
    k += 30
    blocks = Blocks(size, k_len, k_len)
    kbar_fp32 = torch.full((batch * heads, blocks.n_k, dim), torch.nan, device=DEVICE)
    found = launch.summarise(k, v, size, first_order=True, kbar_fp32=kbar_fp32)
    true_kbar, true_vbar = (
        torch.stack([block.mean(2) for block in x.double().split(size, 2)], 2).flatten(0, 1) for x in (k, v)
    )
    eps = torch.finfo(dtype).eps
    assert relative_l2(kbar_fp32, true_kbar) < 1e-6
    assert relative_l2(found.kbar[:, : blocks.n_k], true_kbar) < 2 * eps
    assert relative_l2(found.vbar[:, : blocks.n_k], true_vbar) < 4 * eps
    assert not found.kbar[:, blocks.n_k :].any()
    assert not found.vbar[:, blocks.n_k :].any()
    keys = k.double() - true_kbar.unflatten(0, (batch, heads)).repeat_interleave(size, 2)[:, :, :k_len]
    slope = (keys.mT @ v.double()).flatten(0, 1) / k_len
    assert relative_l2(found.slope, slope) < 1e-4 + 2 * eps  # fp32 sums, whatever the inputs are
    assert launch.summarise(k, v, size, first_order=False).slope is None


def test_a_map_brings_the_summary_of_its_own_tensors_only(seed):
    k, v = (normal(1, 1, 64, 32, DTYPES[0]) for _ in range(2))
    block_map = random_map(1, 1, Blocks(16, 64, 64), uniform=True)
    brought = replace(block_map, summary=launch.summarise(k, v, 16, first_order=False))
    assert launch.summary_of(brought, k, v, first_order=False) is brought.summary
    assert launch.summary_of(brought, k, v, first_order=True).slope is not None
    for other in ((k.clone(), v), (k, v.clone())):
        assert launch.summary_of(brought, *other, first_order=False) is not brought.summary


@pytest.mark.parametrize("k_len", [16, 512, 528, 1100])
def test_bits_are_the_map(k_len, seed):
    blocks = Blocks(16, 40, k_len)
    block_map = random_map(1, 2, blocks, uniform=False)
    bits = launch.bits_of(block_map)
    j = torch.arange(32 * bits.shape[-1], device=DEVICE)
    mask = (bits[..., j // 32] >> (j % 32) & 1).bool()
    assert torch.equal(mask[..., : blocks.n_k], block_map.to_mask())
    assert mask[..., blocks.n_k :].all()


def test_the_layout_of_q_is_kept(seed):
    """Heads inside tokens come back so, without a copy on either side."""
    q, k, v = (normal(1, 2, 20, 32, torch.float16, strided=True) for _ in range(3))
    block_map = random_map(1, 2, Blocks(16, 20, 20), uniform=True)
    o, _ = engine.attend(q, k, v, block_map, Tail("drop"))
    assert o.stride() == q.stride()


@pytest.mark.parametrize(
    ("shape", "size", "tail", "dtype", "reason"),
    [
        ((1, 1, 64, 64), 64, "blockwise_first", torch.float16, "no tail blockwise_first .* use engine eager"),
        ((1, 1, 64, 96), 64, "hybrid", torch.float16, "head_dim must be one of .* got 96"),
        ((1, 1, 64, 64), 24, "hybrid", torch.float16, "block_size must be one of .* got 24"),
        ((1, 1, 64, 64), 64, "hybrid", torch.bfloat16 if DEVICE == "cpu" else torch.float32, "float16"),
    ],
)
def test_a_refusal_names_what_would_do(shape, size, tail, dtype, reason):
    q, block_map = normal(*shape, dtype), BlockMap(None, None, size, 64, 64)
    with pytest.raises(ValueError, match=f"engine triton cannot run this: .*{reason}"):
        choose("triton", q, block_map, Tail(tail))
    assert name_of(choose("auto", q, block_map, Tail(tail))) == "eager"


@pytest.mark.skipif(DEVICE != "cpu", reason="about machines without a GPU")
def test_auto_never_emulates(monkeypatch):
    q, block_map = normal(1, 1, 64, 64, torch.float16), BlockMap(None, None, 64, 64, 64)
    assert name_of(choose("auto", q, block_map, Tail("hybrid"))) == "eager"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a CUDA GPU, and q is on cpu: use engine eager"):
        choose("triton", q, block_map, Tail("hybrid"))
