"""The public call and SparseAttention: dense limits, orders, refusals."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pisa import Blocks, Grid, SparseAttention, Tail, attend, piecewise_sparse_attention, reference
from pisa.engines import FASTEST_FIRST
from pisa.orders import Raster, Tile2D, Tile3D, inverse
from pisa.routing import RandomTopK, TopK
from tests.pisa.cases import cases, normal, relative_l2


def qkv(tokens=128, dim=32, **kwargs):
    return tuple(normal(1, 2, tokens, dim, **kwargs) for _ in range(3))


@given(cases(dtypes=(torch.float32,)), st.sampled_from(("centroid", "covariance", "random")))
def test_density_one_is_dense(case, routing):
    size = min(case.blocks.size, case.blocks.q_len, case.blocks.k_len)
    o, lse = piecewise_sparse_attention(
        *case.qkv, density=1, block_size=size, tail=case.tail, routing=routing, return_lse=True
    )
    truth, truth_lse = reference.dense(*case.qkv)
    assert relative_l2(o, truth) < 1e-5
    assert (lse - truth_lse).abs().max() < 1e-4


@given(cases(dtypes=(torch.float32,)), st.floats(0.05, 0.9), st.sampled_from(("centroid", "covariance", "random")))
def test_the_call_is_route_then_attend(case, density, routing):
    size = min(case.blocks.size, case.blocks.q_len, case.blocks.k_len)
    o = piecewise_sparse_attention(
        *case.qkv, density=density, block_size=size, tail=case.tail, routing=routing, scale=0.3
    )
    rule = RandomTopK(density) if routing == "random" else TopK(density, routing)
    block_map = rule(*case.qkv, Blocks(size, case.q.shape[2], case.k.shape[2], scale=0.3))
    assert relative_l2(o, reference.attend(*case.qkv, block_map, case.tail, 0.3)[0]) < 1e-5


def test_a_routing_of_your_own(seed):
    q, k, v = qkv()
    first_block = lambda q, k, v, blocks: TopK(1e-9)(q, k, v, blocks)  # noqa: E731
    o = piecewise_sparse_attention(q, k, v, routing=first_block, block_size=16, tail="drop")
    assert torch.equal(o, piecewise_sparse_attention(q, k, v, density=1e-9, block_size=16, tail="drop"))


grids = st.builds(Grid, st.integers(1, 3), st.integers(2, 6), st.integers(2, 6), st.integers(0, 9), st.booleans())


@given(grids, st.sampled_from((Tile2D(2, 4), Tile3D(2, 2, 2), Tile3D(4, 4, 4))), st.integers(0, 2**31 - 1))
def test_an_order_and_back_changes_nothing_but_the_blocks(grid, order, seed):
    """Ordering inside the call equals ordering the tokens outside; and with every block exact no order matters."""
    torch.manual_seed(seed)
    q, k, v = qkv(grid.tokens)
    permutation = order(q, k, grid)
    inside = SparseAttention(order, TopK(0.4), block_size=4)(q, k, v, grid)
    moved = SparseAttention(Raster(), TopK(0.4), block_size=4)(*(x[:, :, permutation] for x in (q, k, v)))
    assert torch.equal(inside, moved[:, :, inverse(permutation)])
    dense = SparseAttention(order, TopK(1.0), block_size=4)(q, k, v, grid)
    assert relative_l2(dense, reference.dense(q, k, v)[0]) < 1e-5


@pytest.mark.parametrize("text_first", [True, False])
def test_dense_text_rows_are_dense_attention(seed, text_first):
    grid = Grid(2, 8, 8, text=20, text_first=text_first)
    q, k, v = qkv(grid.tokens)
    method = SparseAttention(
        Tile2D(4, 4), TopK(0.2, text_rows_dense=True, text_keys_exact=True), "hybrid", block_size=16
    )
    text = slice(0, 20) if text_first else slice(128, 148)
    o, truth = method(q, k, v, grid), reference.dense(q, k, v)[0]
    assert relative_l2(o[:, :, text], truth[:, :, text]) < 1e-5
    assert relative_l2(o, truth) > 1e-3  # the other rows are sparse


def test_last_tells_what_ran(seed):
    method = SparseAttention(routing=TopK(0.3), block_size=16)
    assert method.last is None
    method(*qkv())
    assert method.last.engine in FASTEST_FIRST
    assert method.last.density == 2 / 8
    assert method.tail == Tail("hybrid")


def test_half_precision_in_and_out(seed):
    q, k, v = qkv(dtype=torch.bfloat16)
    o, lse = piecewise_sparse_attention(q, k, v, block_size=16, return_lse=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (o.shape, lse.shape) == (q.shape, q.shape[:3])


@dataclass(frozen=True)
class Bad:
    sentence: str
    error: type = ValueError
    q: tuple = (1, 2, 128, 32)
    k: tuple = (1, 2, 128, 32)
    v: tuple = (1, 2, 128, 32)
    dtype: torch.dtype = torch.float32
    options: tuple = ()


@pytest.mark.parametrize(
    "bad",
    [
        Bad(r"must be \[B, H, L, D\], got q \[2, 128, 32\]", q=(2, 128, 32)),
        Bad("k and v must have one shape", v=(1, 2, 100, 32)),
        Bad("agree in B, H and D", k=(1, 1, 128, 32), v=(1, 1, 128, 32)),
        Bad("head_dim must be one of .*, got 40", q=(1, 2, 128, 40), k=(1, 2, 128, 40), v=(1, 2, 128, 40)),
        Bad("one dtype of float32, float16, bfloat16", TypeError, dtype=torch.float64),
        Bad(r"block_size must be in \[1, 128\]", options=(("block_size", 129),)),
        Bad("block_size must be in", options=(("block_size", 0),)),
        Bad(r"density must be in \(0, 1\], got 0", options=(("density", 0),)),
        Bad("scale must be positive", options=(("scale", -1.0),)),
        Bad("No tail 'hybird'. Did you mean 'hybrid'", options=(("tail", "hybird"),)),
        Bad("No routing 'centroids'. Did you mean 'centroid'", options=(("routing", "centroids"),)),
        Bad("No engine 'eagr'. Did you mean 'eager'", options=(("engine", "eagr"),)),
    ],
    ids=lambda bad: bad.sentence[:24],
)
def test_bad_inputs_get_one_sentence(bad):
    q, k, v = (torch.zeros(shape, dtype=bad.dtype) for shape in (bad.q, bad.k, bad.v))
    with pytest.raises(bad.error, match=bad.sentence):
        piecewise_sparse_attention(q, k, v, **dict(bad.options))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_non_finite_inputs_are_refused(seed, value, which):
    tensors = qkv()
    tensors[which][0, 1, 77, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        piecewise_sparse_attention(*tensors, block_size=16)
    piecewise_sparse_attention(*tensors, block_size=16, check_finite=False)


def test_large_finite_inputs_are_not_refused():
    """Their sum overflows, they do not."""
    q, k, v = (torch.full((1, 2, 128, 32), 3e38) for _ in range(3))
    piecewise_sparse_attention(q * 1e-38, k * 1e-38, v, block_size=16)


def test_gradients_are_refused(seed):
    q, k, v = qkv()
    q.requires_grad_()
    with pytest.raises(ValueError, match="inference only"):
        piecewise_sparse_attention(q, k, v, block_size=16)
    with torch.no_grad():
        piecewise_sparse_attention(q, k, v, block_size=16)


def test_orders_need_a_fitting_grid(seed):
    with pytest.raises(ValueError, match=r"pass grid=Grid\(frames, height, width\)"):
        SparseAttention(Tile2D(), block_size=16)(*qkv())
    with pytest.raises(ValueError, match="has 64 tokens, but q has 128"):
        SparseAttention(Tile2D(), block_size=16)(*qkv(), Grid(1, 8, 8))


def test_attend_takes_a_known_map(seed):
    q, k, v = qkv()
    block_map = TopK(0.3)(q, k, v, Blocks(16, 128, 128))
    o, lse = attend(q, k, v, block_map, "zeroth")
    truth, truth_lse = reference.attend(q, k, v, block_map, "zeroth")
    assert relative_l2(o, truth) < 1e-5
    assert relative_l2(lse, truth_lse) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
def test_torch_compile_sees_one_graph_and_the_same_bits(seed):
    method = SparseAttention(engine="eager", block_size=16)
    compiled = torch.compile(lambda q, k, v: method(q, k, v), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for strided in (False, True):
            q, k, v = (normal(1, 2, 100, 32, strided=strided) for _ in range(3))
            assert torch.equal(compiled(q, k, v), method(q, k, v))
