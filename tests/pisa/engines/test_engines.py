"""Every engine against the float64 definition, on the same numbers. Whoever stands in ENGINES is tested."""

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given

from pisa import BlockMap, Blocks, Tail, engines, reference
from pisa.engines import ENGINES, FASTEST_FIRST, choose, eager
from pisa.tail import TAILS
from tests.pisa.cases import DEVICE, Largest, cases, normal, random_map, relative_l2

# The eager engine is the measure of all others, so it has numbers of its own: it may round a few times in fp32,
# and in half precision the weights and the output once each.
EAGER_BUDGET = {torch.float32: 1e-5, torch.float16: 2 * 2**-10, torch.bfloat16: 2 * 2**-7}


def can_run_here(name):
    q = normal(1, 1, 64, 64, torch.float16)
    block_map = BlockMap.from_indices(torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=DEVICE), Blocks(64, 64, 64))
    try:
        choose(name, q, block_map, Tail("hybrid"))
    except ValueError:
        return False
    return True


every_engine = pytest.mark.parametrize("engine", [name for name in ENGINES if can_run_here(name)])


def run(engine, q, k, v, block_map, tail, scale=None):
    """The engine's answer in poisoned memory; the test's case is passed over where the engine refuses it."""
    tail = Tail.of(tail)
    try:
        module = choose(engine, q, block_map, tail)
    except ValueError as refusal:
        assume(False) if currently_in_test_context() else pytest.skip(str(refusal))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        return module.attend(q, k, v, block_map, tail, scale)
    finally:
        torch.use_deterministic_algorithms(False)


def budget(engine, q, k, v, block_map, tail, scale, truth):
    if engine == "eager":
        return EAGER_BUDGET[q.dtype]
    return 2 * relative_l2(run("eager", q, k, v, block_map, tail, scale)[0], truth) + torch.finfo(q.dtype).eps


def lse_budget(engine, q):
    """Others than eager may round the means of key blocks to q's dtype, and the tail's logits with them."""
    return 2e-4 if engine == "eager" else 2e-4 + torch.finfo(q.dtype).eps


@every_engine
@given(case=cases())
def test_engine_equals_the_definition(engine, case):
    scale = 1.7 * case.q.shape[-1] ** -0.5
    truth, truth_lse = reference.attend(*case.qkv, case.block_map, case.tail, scale)
    o, lse = run(engine, *case.qkv, case.block_map, case.tail, scale)
    assert (o.dtype, o.shape, lse.dtype, lse.shape) == (case.q.dtype, case.q.shape, torch.float32, case.q.shape[:3])
    assert relative_l2(o, truth) <= budget(engine, *case.qkv, case.block_map, case.tail, scale, truth)
    assert (lse - truth_lse).abs().max() < lse_budget(engine, case.q)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("many", [False, True], ids=["whole", "ragged"])
def test_many_chunks_of_eager_equal_the_definition(tail, many, seed, monkeypatch):
    """Chunks of less than a head, and of several heads, with counts that differ between and inside them."""
    blocks = Blocks(16, 300, 333) if many else Blocks(16, 256, 320)
    q, k, v = (normal(2, 3, n, 32) for n in (blocks.q_len, blocks.k_len, blocks.k_len))
    for block_map in (random_map(2, 3, blocks, uniform=False), random_map(2, 3, blocks, uniform=True)):
        truth, truth_lse = reference.attend(q, k, v, block_map, tail)
        for chunk_bytes in (1, 100_000, 1_000_000):
            monkeypatch.setattr(eager, "GATHERED_BYTES_CPU", chunk_bytes)
            monkeypatch.setattr(eager, "TAIL_BYTES_CPU", chunk_bytes)
            o, lse = run("eager", q, k, v, block_map, tail)
            assert relative_l2(o, truth) < 1e-5
            assert (lse - truth_lse).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # interpreter
@every_engine
@given(case=cases(tails=("drop",)))
def test_drop_never_reads_what_it_drops(engine, case):
    """For each query block in turn, NaN in every key block that it does not compute: its rows stay as they were."""
    size = case.blocks.size
    clean, clean_lse = run(engine, *case.qkv, case.block_map, "drop")
    for i, selected in enumerate(case.block_map.to_mask().unbind(2)):
        tokens = selected.repeat_interleave(size, -1)[..., : case.blocks.k_len, None]
        k, v = (x.where(tokens, torch.nan) for x in (case.k, case.v))
        o, lse = run(engine, case.q, k, v, case.block_map, "drop")
        rows = slice(i * size, (i + 1) * size)
        assert torch.equal(o[:, :, rows], clean[:, :, rows])
        assert torch.equal(lse[:, :, rows], clean_lse[:, :, rows])


def disagreeing_queries(blocks, dtype, dim=64):
    """Clustered keys, and query blocks whose halves want opposite ends of them: half the rows meet rising tail logits.

    Keys of block j sit around a_j e_0 with a_j from -1 to 1, queries at +-g e_0, so the tail's logits of a row run from
    -4 to 4 or back, always far beyond its one exact block in the middle. Values follow the key's offset from its
    cluster, so the first-order term is as large as the rest and the tail mass in front of it shows in the output.
    """
    axis = torch.linspace(-1, 1, blocks.n_k, device=DEVICE).repeat_interleave(blocks.size)[: blocks.k_len]
    offset = normal(1, 2, blocks.k_len, dim) * 0.3
    k = offset.clone()
    k[..., 0] += axis
    sign = torch.arange(blocks.q_len, device=DEVICE) % 2 * 2.0 - 1
    q = normal(1, 2, blocks.q_len, dim)
    q[..., 0] = 4 * dim**0.5 * sign
    v = 10 * offset + normal(1, 2, blocks.k_len, dim) * 0.1
    middle = torch.full((1, 2, blocks.n_q, 1), blocks.n_k // 2, device=DEVICE)
    return q.to(dtype), k.to(dtype), v.to(dtype), BlockMap.from_indices(middle, blocks)


def without_rescaling(q, k, v, block_map, blocks, group):
    """Hybrid with the fault of the public kernel: groups of tail columns add to the tail mass without rescaling it.

    The numerator and the denominator are right, as there; only the mass before the first-order term is wrong.
    """
    zeroth, lse = reference.attend(q, k, v, block_map, "zeroth")
    right = reference.attend(q, k, v, block_map, "hybrid")[0] - zeroth  # the first-order term
    s, size = q.shape[-1] ** -0.5, blocks.size
    exact = block_map.to_mask().repeat_interleave(size, 2)[:, :, : blocks.q_len]  # [B, H, Lq, Nk]
    exact_tokens = exact.repeat_interleave(size, 3)[..., : blocks.k_len]
    maximum = (s * q.double() @ k.double().mT).masked_fill(~exact_tokens, -torch.inf).amax(-1)  # after the exact tiles
    logits = (s * q.double() @ blocks.mean(k).double().mT).masked_fill(exact, -torch.inf)
    mass, wrong = torch.zeros_like(lse), torch.zeros_like(lse)
    for columns in logits.split(group, -1):
        higher = torch.maximum(maximum, columns.amax(-1))
        added = (columns - higher[..., None]).exp().sum(-1)
        mass, wrong, maximum = mass * (maximum - higher).exp() + added, wrong + added, higher
    return zeroth + right * (wrong / mass)[..., None]


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tail_mass_follows_a_rising_maximum(engine, dtype, seed):
    """Fails for a kernel that does not rescale the tail mass, and for a merge that forgets the tail's own maximum."""
    blocks = Blocks(16, 32, 2560)
    q, k, v, block_map = disagreeing_queries(blocks, dtype)
    truth, truth_lse = reference.attend(q, k, v, block_map, "hybrid")
    faulty, one_group = (without_rescaling(q, k, v, block_map, blocks, group) for group in (64, blocks.n_k))
    assert relative_l2(faulty, truth) > 0.05, "the case does not show the fault"
    assert relative_l2(one_group, truth) < 1e-12, "the fault needs a second group"
    o, lse = run(engine, q, k, v, block_map, "hybrid")
    assert relative_l2(o, truth) <= budget(engine, q, k, v, block_map, "hybrid", None, truth)
    assert (lse - truth_lse).abs().max() < lse_budget(engine, q)


@pytest.mark.parametrize("tail", TAILS)
def test_eager_never_makes_a_large_matrix(tail, seed, monkeypatch):
    """No L x L matrix, no D x D matrix per block: the largest tensor is an input or a chunk."""
    monkeypatch.setattr(eager, "GATHERED_BYTES_CPU", 1 << 17)
    monkeypatch.setattr(eager, "TAIL_BYTES_CPU", 1 << 17)
    blocks = Blocks(16, 2048, 2048)
    q, k, v = (normal(1, 1, 2048, 128, device="cpu") for _ in range(3))
    block_map = random_map(1, 1, blocks, uniform=True, device="cpu")
    block_map = BlockMap.from_indices(block_map.indices[..., :1].long(), blocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # Largest sees the tensors of its own thread
    with Largest() as largest:
        eager.attend(q, k, v, block_map, Tail(tail))
    assert largest.numel <= q.numel()  # N D^2 is 8 times as much, L^2 16 times


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k_len", [1024, 1000])
def test_eager_never_waits_for_the_gpu(tail, k_len, seed):
    blocks = Blocks(64, 1024, k_len)
    q, k, v = (normal(1, 2, n, 64, torch.bfloat16) for n in (1024, k_len, k_len))
    block_map = BlockMap.from_indices(torch.rand(1, 2, 16, 16, device=DEVICE).topk(3).indices, blocks)
    try:
        torch.cuda.set_sync_debug_mode("error")
        eager.attend(q, k, v, block_map, Tail(tail))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_engine_is_chosen_by_name_or_with_every_reason(monkeypatch):
    q = normal(1, 1, 64, 64)
    block_map = BlockMap.from_indices(torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=DEVICE), Blocks(64, 64, 64))
    assert engines.name_of(choose("eager", q, block_map, Tail("drop"))) == "eager"
    assert engines.name_of(choose("auto", q, block_map, Tail("drop"))) in FASTEST_FIRST
    monkeypatch.setattr(eager, "refuses", lambda q, block_map, tail: "it is Sunday")
    with pytest.raises(ValueError, match="engine eager cannot run this: it is Sunday"):
        choose("eager", q, block_map, Tail("drop"))
    with pytest.raises(ValueError, match="No engine 'egaer'. Did you mean 'eager'"):
        choose("egaer", q, block_map, Tail("drop"))
