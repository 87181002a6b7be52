"""The engines that borrow their exact part: around stand-ins for the packages anywhere, the packages on Hopper.

A stand-in has the call of the package and computes with the eager engine, so that everything around it is tested.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pisa import BlockMap, Blocks, Tail, reference
from pisa.engines import choose, cudnn, eager, fa4, peers
from tests.pisa.cases import DEVICE, normal, random_map, relative_l2
from tests.pisa.engines.test_engines import disagreeing_queries
from tests.pisa.engines.test_triton import framed, pytestmark  # noqa: F401  GPU or interpreter, poisoned memory

ENGINES = {"cudnn": cudnn, "fa4": fa4}
every_engine = pytest.mark.parametrize("engine", ENGINES)

# block size, query and key tokens, D, batch, heads
SHAPES = {
    "ragged": (64, 130, 300, 128, 1, 2),
    "whole blocks": (64, 128, 192, 64, 2, 1),
    "one block, ragged": (64, 70, 64, 64, 1, 1),
    "blocks of 128": (128, 150, 300, 64, 1, 2),
}


def standing_in(q, k, v, counts, indices, size, scale):
    """The exact part of `[B, L, H, D]` tensors by the eager engine: o `[B, Lq, H, D]`, lse `[B, H, Lq]`."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.is_contiguous() and indices.is_contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    block_map = BlockMap(counts, indices, size, q.shape[2], k.shape[2])
    o, lse = eager.attend(q, k, v, block_map, Tail("drop"), scale)
    return o.transpose(1, 2).contiguous(), lse.contiguous()


def block_sparse_attention_forward(
    q, k, v, indices, *, block_sizes, q2k_block_nums, sparse_block_size, softmax_scale, layout
):
    assert layout == "bshd"
    assert sparse_block_size == 128 or q.shape[1] % 64 == 0, "it refuses queries that do not fill their blocks of 64"
    lengths = Blocks(sparse_block_size, q.shape[1], k.shape[1]).lengths(k.shape[1], k.device).int()
    whole = k.shape[1] % sparse_block_size == 0
    assert whole if block_sizes is None else torch.equal(block_sizes, lengths), "it takes no short block without sizes"
    return standing_in(q, k, v, q2k_block_nums, indices, sparse_block_size, softmax_scale)


def flash_attn_func(q, k, v, *, softmax_scale, block_sparse_tensors, return_lse):
    blocks = block_sparse_tensors
    assert return_lse
    assert not blocks.mask_block_cnt.any()
    assert blocks.block_size[0] == blocks.block_size[1]
    return standing_in(q, k, v, blocks.full_block_cnt, blocks.full_block_idx, blocks.block_size[0], softmax_scale)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for both packages, with what the engines import from them and nothing else."""
    for name, symbols in {
        "cudnn": {},
        "cudnn.block_sparse_attention": {"block_sparse_attention_forward": block_sparse_attention_forward},
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": SimpleNamespace},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(symbols)
        monkeypatch.setitem(sys.modules, name, module)


def agree(attend, q, k, v, block_map, tail, scale=None):
    """No further from float64 than twice the eager engine, output and normaliser."""
    truth, truth_lse = reference.attend(q, k, v, block_map, tail, scale)
    o, lse = attend(q, k, v, block_map, Tail(tail), scale)
    eps = torch.finfo(q.dtype).eps
    assert (o.dtype, o.shape, lse.dtype, lse.shape) == (q.dtype, q.shape, torch.float32, q.shape[:3])
    assert relative_l2(o, truth) <= 2 * relative_l2(eager.attend(q, k, v, block_map, Tail(tail), scale)[0], truth) + eps
    assert ((lse - truth_lse).abs() <= 1e-5 + eps + 1e-6 * truth_lse.abs()).all()


@every_engine
@pytest.mark.parametrize("tail", peers.TAILS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_whole_engine_around_a_stand_in(engine, shape, tail, seed, packages):
    size, q_len, k_len, dim, batch, heads = shape
    blocks, strided = Blocks(size, q_len, k_len), bool(seed % 2)
    q, k, v = (framed(batch, heads, n, dim, dtype=torch.float16, strided=strided) for n in (q_len, k_len, k_len))
    block_map = random_map(batch, heads, blocks, uniform=bool(seed // 2 % 2))
    agree(ENGINES[engine].attend, q, k, v, block_map, tail, scale=1.7 * dim**-0.5)


@every_engine
def test_no_tail_where_there_is_none(engine, seed, packages, monkeypatch):
    monkeypatch.setattr(peers, "add_tail_", None)
    blocks = Blocks(64, 100, 150)
    q, k, v = (normal(1, 1, n, 64, torch.float16) for n in (100, 150, 150))
    agree(ENGINES[engine].attend, q, k, v, random_map(1, 1, blocks, uniform=False), "drop")
    full = BlockMap.from_mask(torch.ones(1, 1, blocks.n_q, blocks.n_k, dtype=torch.bool, device=DEVICE), blocks)
    agree(ENGINES[engine].attend, q, k, v, full, "hybrid")


def test_a_copy_only_where_rows_are_not_aligned(seed):
    memory = torch.randn(3 << 15, device=DEVICE).half()
    memory = memory[-memory.data_ptr() % 128 // 2 :]
    x = memory[: 2 * 70 * 3 * 64].view(2, 70, 3, 64).transpose(1, 2)
    for y in (x, x[:, :, 5:], x[:, 1:], memory[: x.numel()].view(x.shape)):
        assert peers.aligned(y) is y
    wide = memory[: 2 * 3 * 70 * 68].view(2, 3, 70, 68)[..., :64]  # rows of 136 bytes
    odd = memory[8 : 8 + x.numel()].view(x.shape)  # contiguous, 16 bytes off
    for y in (wide, odd, x.mT.contiguous().mT, x[:, :1].expand(-1, 3, -1, -1)):
        copy = peers.aligned(y)
        assert torch.equal(copy, y)
        assert copy.is_contiguous() and copy.data_ptr() != y.data_ptr()


NAMES = {"cudnn": "nvidia-cudnn-frontend[cutedsl]>=1.32", "fa4": "flash-attn-4>=4.0.0b36"}


@every_engine
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_cuda": False}, "it needs a CUDA GPU, and q is on cpu: use engine eager"),
        ({"capability": (8, 0)}, "it needs compute capability 9.x, this GPU has 8.0: use engine triton or eager"),
        ({"capability": (10, 0)}, "it needs compute capability 9.x, this GPU has 10.0: use engine triton or eager"),
        ({"installed": False}, "it needs a package: pip install '{package}', or use engine triton or eager"),
        ({"dtype": torch.float32}, "it needs float16 or bfloat16, got torch.float32: cast, or use engine eager"),
        ({"dim": 96}, "head_dim must be one of (64, 128), got 96: use engine triton or eager"),
        ({"size": 32}, "block_size must be one of (64, 128), got 32: use engine triton or eager"),
        ({"tail": "blockwise_first"}, "it has no tail blockwise_first (it has drop, zeroth, hybrid): use engine eager"),
        ({}, None),
    ],
    ids=str,
)
def test_a_refusal_names_what_would_do(engine, change, reason, monkeypatch):
    case = {"is_cuda": True, "capability": (9, 0), "installed": True, "dtype": torch.bfloat16, "dim": 128, "size": 64}
    case |= {"tail": "hybrid"} | change
    monkeypatch.setattr(peers, "capability_of", lambda q: case["capability"])
    monkeypatch.setattr(peers, "installed", lambda module: case["installed"])
    q = SimpleNamespace(
        is_cuda=case["is_cuda"], device=torch.device("cpu"), dtype=case["dtype"], shape=(1, 1, 64, case["dim"])
    )
    block_map, tail = BlockMap(None, None, case["size"], 64, 64), Tail(case["tail"])
    if reason is None:
        assert choose(engine, q, block_map, tail) is ENGINES[engine]
        return
    with pytest.raises(ValueError) as refusal:
        choose(engine, q, block_map, tail)
    assert str(refusal.value) == f"engine {engine} cannot run this: {reason.format(package=NAMES[engine])}."


def test_what_is_not_installed():
    assert peers.installed("pisa.engines")
    assert not peers.installed("pisa.no_such_module")
    assert not peers.installed("no_such_package.module")


def on_hopper(test):
    """Only where there is a GPU, and whatever the packages warn about is not ours to mend."""
    return pytest.mark.gpu(pytest.mark.filterwarnings("ignore")(test))


def real(engine, q, block_map, tail="hybrid"):
    """The engine itself; skips where it refuses."""
    try:
        return choose(engine, q, block_map, Tail(tail)).attend
    except ValueError as refusal:
        pytest.skip(str(refusal))


@on_hopper
@every_engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_real_one_equals_the_definition(engine, dtype, dim, seed):
    """Ragged lengths, one block, counts that differ, strides, every tail."""
    for size, q_len, k_len in [(64, 1, 65), (64, 64, 64), (64, 130, 1000), (64, 300, 4160), (128, 200, 1000)]:
        blocks = Blocks(size, q_len, k_len)
        for strided in (False, True):
            q, k, v = (framed(2, 3, n, dim, dtype=dtype, strided=strided) for n in (q_len, k_len, k_len))
            block_map = random_map(2, 3, blocks, uniform=strided)
            for tail in peers.TAILS:
                agree(real(engine, q, block_map), q, k, v, block_map, tail, scale=1.7 * dim**-0.5)


@on_hopper
@every_engine
def test_the_real_one_rescales(engine, seed):
    q, k, v, block_map = disagreeing_queries(Blocks(64, 128, 64 * 160), torch.bfloat16)
    agree(real(engine, q, block_map), q, k, v, block_map, "hybrid")


@on_hopper
@every_engine
@pytest.mark.parametrize("k_len", [640, 650])
def test_the_real_one_never_reads_what_it_drops(engine, k_len, seed):
    """For each query block in turn, NaN in every key block that it does not compute: its rows stay as they were."""
    blocks = Blocks(64, 200, k_len)
    q, k, v = (normal(1, 2, n, 128, torch.bfloat16) for n in (200, k_len, k_len))
    block_map = random_map(1, 2, blocks, uniform=False)
    attend = real(engine, q, block_map, "drop")
    clean, clean_lse = attend(q, k, v, block_map, Tail("drop"))
    for i, selected in enumerate(block_map.to_mask().unbind(2)):
        tokens = selected.repeat_interleave(64, -1)[..., :k_len, None]
        o, lse = attend(q, *(x.where(tokens, torch.nan) for x in (k, v)), block_map, Tail("drop"))
        rows = slice(i * 64, (i + 1) * 64)
        assert torch.equal(o[:, :, rows], clean[:, :, rows])
        assert torch.equal(lse[:, :, rows], clean_lse[:, :, rows])


@on_hopper
@every_engine
def test_the_real_one_never_waits_for_the_gpu(engine, seed):
    blocks = Blocks(64, 1000, 1000)
    q, k, v = (normal(1, 2, 1000, 64, torch.bfloat16) for _ in range(3))
    block_map = BlockMap.from_indices(torch.rand(1, 2, blocks.n_q, blocks.n_k, device=DEVICE).topk(3).indices, blocks)
    attend = real(engine, q, block_map)
    attend(q, k, v, block_map, Tail("hybrid"))  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        attend(q, k, v, block_map, Tail("hybrid"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
