"""The definition itself: against softmax by hand, its own limits, and Theorem 3.1 of the paper."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pisa import BlockMap, Blocks, reference
from pisa.tail import TAILS
from tests.pisa.cases import Case, cases, normal, random_map, relative_l2

EXACT = 1e-12  # float64 rounding of sums this short


def by_hand(q, k, v, s):
    """Softmax attention of one head with python floats."""
    out = []
    for row in q.tolist():
        weights = [math.exp(s * sum(a * b for a, b in zip(row, key, strict=True))) for key in k.tolist()]
        total = sum(weights)
        out.append(
            [sum(w * value[d] for w, value in zip(weights, v.tolist(), strict=True)) / total for d in range(len(row))]
        )
    return torch.tensor(out, dtype=torch.float64)


def test_dense_is_softmax_attention(seed):
    q, k, v = normal(1, 1, 7, 4), normal(1, 1, 11, 4), normal(1, 1, 11, 4)
    o, lse = reference.dense(q, k, v)
    assert (
        relative_l2(o[0, 0], by_hand(q[0, 0], k[0, 0], v[0, 0], 0.5)) < 1e-6
    )  # s = 1 / sqrt(4); fp32 inputs as they are
    assert torch.allclose(lse.exp(), (q.double() @ k.double().mT * 0.5).exp().sum(-1))


def everything(case):
    mask = torch.ones(*case.block_map.counts.shape, case.blocks.n_k, dtype=torch.bool, device=case.q.device)
    return BlockMap.from_mask(mask, case.blocks)


@given(cases())
def test_every_block_exact_is_dense(case):
    o, lse = reference.attend(*case.qkv, everything(case), case.tail)
    truth, truth_lse = reference.dense(*case.qkv)
    assert relative_l2(o, truth) < EXACT
    assert relative_l2(lse, truth_lse) < EXACT


@given(cases(tails=("zeroth", "blockwise_first", "hybrid")))
def test_tails_are_exact_on_constant_blocks(case):
    """Equal keys in a block leave nothing to expand: all three tails are dense attention, whatever the values are."""
    k = torch.cat([x[:, :, :1].expand_as(x) for x in case.k.split(case.blocks.size, 2)], 2)
    o, lse = reference.attend(case.q, k, case.v, case.block_map, case.tail)
    truth, truth_lse = reference.dense(case.q, k, case.v)
    assert relative_l2(o, truth) < EXACT
    assert relative_l2(lse, truth_lse) < EXACT


def test_drop_is_softmax_over_the_exact_tokens(seed):
    blocks = Blocks(4, 10, 14)
    q, k, v = normal(1, 1, 10, 32), normal(1, 1, 14, 32), normal(1, 1, 14, 32)
    block_map = random_map(1, 1, blocks, uniform=False)
    o, _ = reference.attend(q, k, v, block_map, "drop")
    mask = block_map.to_mask().repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :10, :14]
    logits = (q.double() @ k.double().mT / 32**0.5).masked_fill(~mask, -torch.inf)
    assert relative_l2(o, logits.softmax(-1) @ v.double()) < EXACT


def test_blockwise_first_is_the_taylor_expansion(seed):
    """As the keys of a block draw together, first order's error falls with their distance squared, zeroth's with it."""
    blocks = Blocks(8, 16, 32)
    block_map, q, v = random_map(1, 1, blocks, uniform=True), normal(1, 1, 16, 32), normal(1, 1, 32, 32)
    block_map = BlockMap.from_indices(block_map.indices[..., :1].long(), blocks)  # one exact block: a large tail
    centre, offset = normal(1, 1, 4, 32).repeat_interleave(8, 2).double(), normal(1, 1, 32, 32).double()

    def error(tail, distance):
        k = centre + distance * offset
        return relative_l2(reference.attend(q, k, v, block_map, tail)[0], reference.dense(q, k, v)[0])

    assert 6 < error("zeroth", 1e-3) / error("zeroth", 1e-4) < 14
    assert 60 < error("blockwise_first", 1e-3) / error("blockwise_first", 1e-4) < 140


def first_order_matrices(case):
    """H_j / n_j of every key block, `[B, H, Nk, D, D]`, and sum_j H_j / Lk, `[B, H, D, D]`; float64."""
    pairs = zip(case.k.double().split(case.blocks.size, 2), case.v.double().split(case.blocks.size, 2), strict=True)
    H = [(k - k.mean(2, keepdim=True)).mT @ v for k, v in pairs]
    lengths = case.blocks.lengths(case.blocks.k_len).tolist()
    return torch.stack([x / n for x, n in zip(H, lengths, strict=True)], 2), sum(H) / case.blocks.k_len


def theorem(case):
    """Both sides of Theorem 3.1, |hybrid - blockwise| and C_q M rho / b, for every query: `[B, H, Lq]`.

    Both outputs have the same denominator Z, as the first-order terms of Z vanish. Their numerators differ by
    sum_{j in U} e_j s q (n_j Hsum / Lk - H_j) with e_j = exp(s q.kbar_j) and Hsum = sum_j H_j, so
        |difference| <= s |q| sum_{j in U} n_j e_j / Z * max_j |Hsum / Lk - H_j / n_j|
    where the sum is the tail's share rho of the mass. With full blocks, n_j = b and Lk = N b, the maximum is M / b,
    M = max_j |H_j - Hbar|; hence C_q = s |q|. The Frobenius norm is at least the operator norm, so it serves as well.
    """
    hybrid, lse = reference.attend(*case.qkv, case.block_map, "hybrid")
    blockwise, _ = reference.attend(*case.qkv, case.block_map, "blockwise_first")
    _, exact_lse = reference.attend(*case.qkv, case.block_map, "drop")
    rho = 1 - (exact_lse - lse).exp()
    own, shared = first_order_matrices(case)
    M_over_b = (own - shared[:, :, None]).norm(dim=(-1, -2)).amax(-1)
    C_q = case.q.double().norm(dim=-1) * case.q.shape[-1] ** -0.5
    return (hybrid - blockwise).norm(dim=-1), C_q * M_over_b[..., None] * rho


@given(cases(tails=("hybrid",)))
def test_hybrid_is_as_near_to_blockwise_as_theorem_3_1_says(case):
    difference, bound = theorem(case)
    assert (difference <= bound + EXACT).all()


@given(st.integers(0, 2**31 - 1))
def test_theorem_3_1_is_attained(seed):
    """One tail block with a rank-one H_j along q, the exact one with the opposite: no smaller C_q would do."""
    torch.manual_seed(seed)
    size, dim = 8, 32
    blocks = Blocks(size, size, 2 * size)
    direction, value = torch.randn(dim), torch.randn(dim)
    sign = torch.tensor([1.0, -1.0]).repeat(size // 2)
    k = torch.cat([sign, sign])[:, None] * direction
    v = torch.cat([-sign, sign])[:, None] * value
    q = torch.rand(size, 1) * direction / 4
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    case = Case(q[None, None], k[None, None], v[None, None], blocks, BlockMap.from_indices(indices, blocks), "hybrid")
    difference, bound = theorem(case)
    assert torch.allclose(difference, bound, rtol=1e-5)


def test_the_four_tails_differ(seed):
    """Or the tests above would say nothing about them."""
    blocks = Blocks(16, 64, 128)
    q, k, v = normal(1, 1, 64, 32), normal(1, 1, 128, 32), normal(1, 1, 128, 32)
    block_map = BlockMap.from_indices(torch.arange(2).expand(1, 1, 4, 2), blocks)
    outputs = [reference.attend(q, k, v, block_map, tail)[0] for tail in TAILS]
    assert all(relative_l2(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])
