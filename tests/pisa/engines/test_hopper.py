"""The kernel for compute capability 9.0, which no interpreter runs: every edge of its rings, on a GPU."""

import pytest
import torch

from pisa import BlockMap, Blocks, SparseAttention, Tail, reference
from pisa.engines import eager
from pisa.engines import triton as engine
from pisa.routing import TopK
from tests.pisa.cases import DEVICE, normal, random_map, relative_l2
from tests.pisa.engines.test_triton import agree, framed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="needs a GPU of compute capability 9.0"
    ),
]
# query and key tokens, batch, heads: fewer tiles than the ring has places, whole and short blocks, groups of the tail
SHAPES = [
    (64, 64, 1, 1), (130, 65, 1, 2), (300, 127, 2, 1), (64, 192, 1, 3), (257, 4096, 1, 2), (100, 4097, 2, 2),
    (64, 8256, 1, 1), (1000, 12345, 1, 2), (4160, 200, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tail", engine.TAILS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_edge_of_the_rings(shape, tail, dim, dtype, seed):
    q_len, k_len, batch, heads = shape
    blocks = Blocks(64, q_len, k_len)
    q, k, v = (framed(batch, heads, n, dim, dtype=dtype, strided=seed % 2) for n in (q_len, k_len, k_len))
    for uniform in (True, False):
        block_map = random_map(batch, heads, blocks, uniform=uniform)
        assert engine.hopper_takes(q, k, v, block_map)
        agree(q, k, v, block_map, tail)


def test_tensors_that_tma_cannot_load_take_the_portable_kernel(seed):
    """Rows that start at odd addresses."""
    blocks = Blocks(64, 200, 200)
    block_map = random_map(1, 2, blocks, uniform=True)
    q, k, v = (torch.randn(1, 2, 200, 130, device=DEVICE, dtype=torch.float16)[..., 1:129] for _ in range(3))
    assert not engine.hopper_takes(q, k, v, block_map)
    agree(q, k, v, block_map, "hybrid")


def test_a_common_mean_of_the_keys_costs_little(seed):
    """The means are rounded to bf16, and with them what all keys have in common: here twice their spread."""
    blocks = Blocks(64, 512, 4096)
    q, k, v = (normal(1, 2, n, 128, torch.bfloat16) for n in (512, 4096, 4096))
    k = k + 2 * torch.randn(1, 2, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    block_map = TopK(0.125)(q, k, v, blocks)
    truth, _ = reference.attend(q, k, v, block_map, "hybrid")
    found = relative_l2(engine.attend(q, k, v, block_map, Tail("hybrid"))[0], truth)
    assert found <= 2 * relative_l2(eager.attend(q, k, v, block_map, Tail("hybrid"))[0], truth)


def problem(tokens: int = 4608, heads: int = 8) -> list[torch.Tensor]:
    return [normal(1, heads, tokens, 128, torch.bfloat16, strided=True) for _ in range(3)]


def test_a_replayed_graph_gives_the_same_bits(seed):
    method, (q, k, v) = SparseAttention(engine="triton"), problem()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        method(q, k, v)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            o = method(q, k, v)
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(o, method(q, k, v))


def test_two_streams_do_not_disturb_each_other(seed):
    method, streams = SparseAttention(engine="triton"), [torch.cuda.Stream() for _ in range(2)]
    problems = [problem(), problem()]
    alone = [method(*qkv) for qkv in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for qkv, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(method(*qkv))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_a_thousand_calls_keep_no_memory(seed):
    method, (q, k, v) = SparseAttention(engine="triton"), problem(640, 2)
    for n in range(1000):
        method(q, k, v)
        if n == 10:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("score", ["centroid", "covariance"])
def test_nothing_waits_for_the_gpu(score, seed):
    method, (q, k, v) = SparseAttention(engine="triton", routing=TopK(score=score)), problem()
    method(q, k, v)
    try:
        torch.cuda.set_sync_debug_mode("error")
        method(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_compile_sees_one_graph(seed):
    method, (q, k, v) = SparseAttention(engine="triton"), problem()
    compiled = torch.compile(lambda q, k, v: method(q, k, v), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), method(q, k, v))
        q, k, v = problem(1000)
        assert torch.equal(compiled(q, k, v), method(q, k, v))


def test_a_full_map_that_nobody_declared_full_is_dense(seed):
    q, k, v = (normal(1, 2, 1000, 128, torch.bfloat16) for _ in range(3))
    mask = torch.ones(1, 2, 16, 16, dtype=torch.bool, device=DEVICE)
    full = BlockMap.from_mask(mask, Blocks(64, 1000, 1000))
    full = BlockMap(full.counts, full.indices, 64, 1000, 1000)
    truth, _ = reference.dense(q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative_l2(engine.attend(q, k, v, full, Tail("hybrid"))[0], truth) <= 2 * relative_l2(dense, truth)
