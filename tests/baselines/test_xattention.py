"""Antidiagonal sums, their softmax, and the fewest blocks that hold tau."""

import pytest
import torch

from baselines import xattention
from baselines.xattention import XAttention, antidiagonal_mass
from pisa import Blocks
from tests.pisa.cases import normal


def mass_by_hand(q, k, stride, rows, columns):
    """The definition in loops, float64: one head, `[lists, blocks]`; tokens beyond the end count nothing."""
    logits = q.double() @ k.double().T * q.shape[1] ** -0.5  # [Lq, Lk]
    groups = [range(0, len(x), stride) for x in (q, k)]
    summed = torch.zeros(len(groups[0]), len(groups[1]), dtype=torch.float64)
    for a, i in enumerate(groups[0]):
        for b, j in enumerate(groups[1]):
            pairs = [(i + stride - 1 - r, j + r) for r in range(stride)]
            summed[a, b] = sum(logits[x, y] for x, y in pairs if x < len(q) and y < len(k)) / stride
    p = summed.softmax(-1)
    split = [x.split(columns // stride, 1) for x in p.split(rows // stride, 0)]
    return torch.tensor([[part.sum() for part in row] for row in split])


@pytest.mark.parametrize(
    ("q_len", "k_len", "stride", "shared"), [(64, 64, 4, 1), (64, 64, 16, 1), (55, 42, 8, 1), (55, 42, 4, 2)]
)
def test_mass_is_that_of_the_antidiagonals(q_len, k_len, stride, shared, seed, monkeypatch):
    monkeypatch.setattr(xattention, "CHUNK", 1)  # one list at a time
    q, k = normal(2, 2, q_len, 32), normal(2, 2, k_len, 32)
    found = antidiagonal_mass(q, k, Blocks(16, q_len, k_len, shared=shared), stride)
    for b in range(2):
        for h in range(2):
            truth = mass_by_hand(q[b, h].cpu(), k[b, h].cpu(), stride, 16 * shared, 16)
            torch.testing.assert_close(found[b, h].double().cpu(), truth, rtol=1e-4, atol=1e-5)


def test_a_vertical_line_of_attention_is_seen(seed):
    """One key that all queries look at: every antidiagonal of its tiles meets it once."""
    q = torch.zeros(1, 1, 64, 32)
    q[..., 0] = 30
    k = torch.zeros(1, 1, 64, 32)
    k[:, :, 37, 0] = 30
    assert antidiagonal_mass(q, k, Blocks(16, 64, 64), 8).argmax(-1).eq(2).all()


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_each_row_has_the_fewest_blocks_that_hold_tau(tau, seed):
    q, k = 2 * normal(1, 2, 96, 32), 2 * normal(1, 2, 96, 32)
    blocks = Blocks(16, 96, 96)
    mask, mass = XAttention(tau, 4)(q, k, k, blocks).validate().to_mask(), antidiagonal_mass(q, k, blocks, 4)
    held, total = (mass * mask).sum(-1), mass.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 4.0))  # the four groups of a block
    assert (held >= (tau - 1e-5) * total).all()
    assert (held - mass.masked_fill(~mask, torch.inf).amin(-1) < (tau + 1e-5) * total).all()


def test_tau_of_1_is_dense(seed):
    q = 50 * normal(1, 1, 64, 32)
    assert XAttention(1.0, 8)(q, q, q, Blocks(16, 64, 64)).density() == 1


def test_what_cannot_be_is_refused(seed):
    q = normal(1, 1, 64, 32)
    with pytest.raises(ValueError, match="stride must divide the block size 16, got 5"):
        XAttention(stride=5)(q, q, q, Blocks(16, 64, 64))
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1\]"):
        XAttention(tau=0)
