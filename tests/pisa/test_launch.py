"""The routing kernels against torch and float64: every edge of a tile, ties, text, and where they must not run.

Without a GPU the kernels run in Triton's interpreter, because these tests ask for it; so every case is tiny.
"""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pisa import Blocks, Grid, Tail, launch, reference
from pisa.engines import triton
from pisa.routing import EPSILON, TopK, best
from tests.pisa.cases import DEVICE, normal, relative_l2

interpreted = launch.has_triton() and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not interpreted and not launch.kernels_run_on(torch.empty(0, device=DEVICE)),
        reason="the routing kernels need a CUDA GPU or Triton's interpreter",
    ),
    pytest.mark.usefixtures("poisoned", "emulated"),
]
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
twenty = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)

# block size, query and key tokens, D, batch, heads; 16 query blocks are a tile, 64 key blocks a step of it
SHAPES = {
    "ragged": (16, 90, 77, 64, 1, 2),
    "one token over": (16, 17, 65, 32, 2, 1),
    "one token short": (32, 63, 95, 128, 1, 1),
    "whole blocks": (64, 128, 320, 64, 1, 1),
    "one key block": (16, 40, 16, 64, 1, 1),
    "blocks of 128": (128, 130, 300, 64, 1, 1),
    "a step over": (16, 20, 1030, 32, 1, 1),
    "several tiles in a program": (16, 290, 100, 32, 1, 4),
    "a wide row": (16, 20, 16 * 200 - 3, 32, 1, 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(launch, "EMULATE", True)


def framed(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """`[B, H, L, D]` of normal numbers, heads inside tokens, cut out of NaN: who reads a neighbour shows it."""
    batch, heads, tokens, dim = shape
    frame = torch.full((batch, tokens + 40, heads + 1, 2 * dim), torch.nan, dtype=dtype, device=DEVICE)
    return frame[:, 20 : 20 + tokens, :heads, dim:].transpose(1, 2).copy_(normal(*shape, dtype))


def problem(shape, dtype) -> tuple:
    size, q_len, k_len, dim, batch, heads = shape
    q, k, v = (framed(batch, heads, n, dim, dtype=dtype) for n in (q_len, k_len, k_len))
    return q, k, v.contiguous(), Blocks(size, q_len, k_len)  # whoever takes k's strides for v's shows it


def by_kernels(routing: TopK, q, k, v, blocks):
    assert launch.can_route(q, blocks, routing.score == "covariance")
    return routing(q, k, v, blocks).validate()


def by_torch(routing: TopK, q, k, v, blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "can_route", lambda *_: False)
        return routing(q, k, v, blocks).validate()


def selected_by(bias: torch.Tensor, count: int) -> torch.Tensor:
    """What select makes of five query blocks of zeros: the scores are the bias."""
    rows, n_k = bias.shape
    q, kbar = torch.zeros(1, rows, 70, 32, device=DEVICE), torch.ones(rows, n_k, 32, device=DEVICE)
    counts, indices, bits = launch.select(q, kbar, bias, 16, count, slice(0, 0), 0.5)
    assert (counts == count).all()
    assert (indices == indices[:, :, :1]).all()
    assert torch.equal(bits, launch.selection(counts, indices, n_k))
    return indices[0, :, 0]


@every_dtype
@every_shape
def test_means(shape, dtype, seed):
    _, k, _, blocks = problem(shape, dtype)
    truth = torch.stack([block.mean(2) for block in k.double().split(blocks.size, 2)], 2).flatten(0, 1)
    assert relative_l2(launch.means(k, blocks.size), truth) < 1e-6


@every_dtype
@every_shape
def test_every_edge_of_a_tile(shape, dtype, seed):
    """No block left out scores better than a selected one; as torch selects, wherever rounding cannot decide."""
    q, k, v, blocks = problem(shape, dtype)
    density = torch.rand(1).item() * 0.9 + 0.05
    block_map = by_kernels(TopK(density), q, k, v, blocks)
    assert block_map.uniform
    mask = block_map.to_mask()
    truth = reference.centroid_scores(q, k, blocks.size)
    least = truth.masked_fill(~mask, torch.inf).amin(-1)
    most = truth.masked_fill(mask, -torch.inf).amax(-1)
    rounding = 1e-5 * truth.abs().max()
    assert (least >= most - rounding).all()
    clear = least > most + rounding
    assert torch.equal(block_map.indices[clear], by_torch(TopK(density), q, k, v, blocks).indices[clear])


@every_shape
def test_exact_scores_and_many_ties(shape, seed):
    """Small integers have exact means and products: kernels and torch agree on every tie, zero and sign."""
    size, q_len, k_len, dim, batch, heads = shape
    blocks = Blocks(size, q_len, k_len, scale=0.25)
    n_q, n_k = (torch.randint(-1, 2, (batch, heads, n, dim), device=DEVICE) for n in (blocks.n_q, blocks.n_k))
    q, k = n_q.repeat_interleave(size, 2)[:, :, :q_len].half(), n_k.repeat_interleave(size, 2)[:, :, :k_len].half()
    q[..., 4:] = 0  # few different scores
    for density in (1e-9, 0.3, 1.0):
        answer, truth = (choose(TopK(density), q, k, k, blocks) for choose in (by_kernels, by_torch))
        assert torch.equal(answer.indices, truth.indices)


@pytest.mark.parametrize("n_k", [1, 2, 33, 128, 129, 1000, 2049])
def test_every_width_of_a_row(n_k, seed):
    """One row of any scores, one of few different ones, one of equal ones: the lowest blocks."""
    bias = torch.stack([torch.randn(n_k), torch.randint(-3, 4, (n_k,)).float(), torch.full((n_k,), -1.5)])
    for count in {1, -(-n_k // 3), n_k}:
        indices = selected_by(bias.to(DEVICE), count).tolist()
        assert indices == best(bias, count).sort(-1).values.tolist()
        assert indices[2] == list(range(count))


floats = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, torch.inf])


@twenty
@given(st.lists(floats, min_size=1, max_size=140), st.data())
@example([0.0, -0.0, 0.0], None)
@example([-0.0, 0.0, -1.0, 5e-39, -5e-39], None)
@example([3.4028234663852886e38, torch.inf, -3.4028234663852886e38, -torch.inf], None)
def test_any_numbers(scores, data):
    """Negative, tiny, huge, infinite, next to each other: the bits are searched as the numbers compare."""
    scores = torch.tensor(scores).clamp(min=-3.4028234663852886e38)  # no score is -inf
    for count in range(1, len(scores) + 1) if data is None else [data.draw(st.integers(1, len(scores)))]:
        assert selected_by(scores.to(DEVICE)[None], count)[0].tolist() == best(scores, count).sort().values.tolist()


def test_minus_infinity_and_nan_stay_in_range():
    """Such scores select no particular block, but legal ones: attention reads where the map says."""
    bias = torch.full((3, 70), torch.nan, device=DEVICE)
    bias[1] = -torch.inf
    bias[2, ::2] = 1
    for count in (1, 36, 70):
        indices = selected_by(bias, count)
        assert (indices.diff(dim=-1) > 0).all()
        assert ((indices >= 0) & (indices < 70)).all()
    assert selected_by(bias, 35)[2].tolist() == list(range(0, 70, 2))


def test_the_order_of_axes_changes_nothing(seed, monkeypatch):
    q, k, v, blocks = problem((16, 40, 16 * 140, 32, 1, 1), torch.float16)
    answers = []
    for flip in (False, True):
        monkeypatch.setattr(launch, "first_axes_first", lambda flip=flip: flip)
        answers.append(by_kernels(TopK(0.2), q, k, v, blocks).indices)
    assert torch.equal(*answers)


@pytest.mark.parametrize("score", ["centroid", "covariance"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_text(score, text_first, density, seed):
    """Key blocks with text, which score worst here, are selected; query blocks with text are dense."""
    grid = Grid(4, 8, 4, text=20, text_first=text_first)
    blocks = Blocks(16, 148, 148, grid)
    q, k, v = (normal(1, 2, 148, 32, torch.float16) for _ in range(3))
    q += 1
    text = slice(0, 2) if text_first else slice(8, 10)
    k[:, :, text.start * 16 : text.stop * 16] -= 3
    for routing in (TopK(density, score, True), TopK(density, score, True, True)):
        block_map = by_kernels(routing, q, k, v, blocks)
        assert block_map.to_mask()[..., text].all()
        truth = by_torch(routing, q, k, v, blocks)
        assert torch.equal(block_map.counts, truth.counts)
        if score == "centroid":  # rounded deviations may decide otherwise
            assert torch.equal(block_map.indices, truth.indices)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(16, 16, 77, 64, 1, 2), (64, 64, 300, 128, 1, 1), (128, 128, 500, 32, 2, 1), (32, 32, 95, 128, 1, 1)],
)
def test_deviations(shape, dtype, seed):
    """Keys and values far from zero: the logarithm is right all the same."""
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("torch's business")
    _, k, v, blocks = problem(shape, dtype)
    k, v = k + 3, v - 2
    slope = launch.summarise(k, v, blocks.size, first_order=True).slope
    kbar, bias = launch.deviations(k, v, slope, blocks.size, EPSILON)
    truth = [block.mean(2) for block in k.double().split(blocks.size, 2)]
    assert relative_l2(kbar, torch.stack(truth, 2).flatten(0, 1)) < 1e-6
    plain, full = reference.centroid_scores(k, k, blocks.size), reference.covariance_scores(k, k, v, blocks.size)
    error = (bias - (full - plain)[:, :, 0].flatten(0, 1)).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    still = launch.deviations(torch.zeros_like(k), v, torch.zeros_like(slope), blocks.size, 0.5)[1]
    assert (still - math.log(0.5)).abs().max() < 1e-5


@every_dtype
@pytest.mark.parametrize("shape", [SHAPES["ragged"], SHAPES["blocks of 128"], SHAPES["several tiles in a program"]])
def test_covariance(shape, dtype, seed):
    """The selected blocks are as good as the best, up to the rounding of the deviations."""
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("torch's business")
    q, k, v, blocks = problem(shape, dtype)
    v[:, :, : blocks.size] *= 8
    block_map = by_kernels(TopK(0.4, "covariance"), q, k, v, blocks)
    mask, truth = block_map.to_mask(), reference.covariance_scores(q, k, v, blocks.size)
    least = truth.masked_fill(~mask, torch.inf).amin(-1)
    most = truth.masked_fill(mask, -torch.inf).amax(-1)
    assert (least >= most - 2e-2).all()
    assert mask[..., 0].all()  # the block of large values


def test_a_last_axis_with_gaps_is_copied(seed):
    blocks = Blocks(16, 50, 50)
    q, k, v = (normal(1, 2, 50, 64, torch.float16)[..., ::2] for _ in range(3))
    routing = TopK(0.5)
    assert torch.equal(by_kernels(routing, q, k, v, blocks).indices, by_torch(routing, q, k, v, blocks).indices)


@pytest.mark.parametrize(
    ("size", "k_len", "dim"), [(16, 64, 96), (24, 64, 64), (16, 16 * launch.MOST_KEY_BLOCKS + 1, 32)]
)
def test_what_no_kernel_takes(size, k_len, dim):
    q = torch.empty(1, 1, 64, dim, device=DEVICE)
    assert not launch.can_route(q, Blocks(size, 64, k_len), covariance=False)


@pytest.mark.skipif(DEVICE != "cpu", reason="about machines without a GPU")
def test_nobody_emulates_unasked(monkeypatch):
    q, blocks = normal(1, 1, 64, 32), Blocks(16, 64, 64)
    assert launch.can_route(q, blocks, covariance=False)
    monkeypatch.setattr(launch, "EMULATE", False)
    assert not launch.kernels_run_on(q)
    monkeypatch.setattr(launch, "select", None)  # who calls it fails
    TopK(0.5)(q, q, q, blocks).validate()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not launch.kernels_run_on(q)


@pytest.mark.gpu
@pytest.mark.parametrize("score", ["centroid", "covariance"])
def test_a_cuda_graph_repeats_it(score, seed):
    """So nothing synchronises and nothing depends on the values."""
    q, k, v = (normal(1, 4, 5000, 128, torch.bfloat16) for _ in range(3))
    routing, blocks = TopK(0.2, score), Blocks(64, 5000, 5000)
    routing(q, k, v, blocks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_map = routing(q, k, v, blocks)
    for x in (q, k, v):
        x.copy_(normal(*x.shape, torch.bfloat16))
    graph.replay()
    assert torch.equal(block_map.validate().indices, routing(q, k, v, blocks).indices)


@every_dtype
@pytest.mark.parametrize("tail", ["drop", "zeroth", "hybrid"])
def test_what_a_map_brings_along_changes_nothing(tail, dtype, seed):
    """Bits and summary made on the way, lists shared or not: the engine's answer is that of the bare map."""
    for shared in (1, 2):
        q, k, v = (normal(1, 2, n, 32, dtype) for n in (90, 200, 200))
        blocks = Blocks(16, 90, 200, shared=shared, tail=tail)
        block_map = by_kernels(TopK(0.3), q, k, v, blocks)
        assert (block_map.summary is None) == (tail == "drop")
        bare = replace(block_map, bits=None, summary=None)
        for found, expected in zip(*(triton.attend(q, k, v, m, Tail(tail)) for m in (block_map, bare)), strict=True):
            assert torch.equal(found, expected)
