"""The linear gate: shares of the scaled gates, the own block and at least one beside it."""

import pytest
import torch

from baselines.knob import AtDensity
from baselines.vmoba import VMoBA
from pisa import Blocks, Grid
from tests.pisa.cases import normal


def kept_by_hand(gate: list[float], own: int, tau: float) -> set[int]:
    """The paper's threshold selection for one row."""
    low, high = min(gate), max(gate)
    scaled = [(g - low) / (high - low) for g in gate]
    total = sum(scaled)
    need = max(0.0, tau - scaled[own] / total)
    others = sorted((j for j in range(len(gate)) if j != own), key=lambda j: -scaled[j])
    held, kept = 0.0, {own}
    for j in others:
        kept.add(j)
        held += scaled[j]
        if held / total >= need:
            break
    return kept


@pytest.mark.parametrize("tau", [0.02, 0.25, 0.7])
def test_it_is_the_selection_of_the_paper(tau, seed):
    q = normal(1, 2, 192, 32)
    k = normal(1, 2, 192, 32)
    mask = VMoBA(tau)(q, k, k, Blocks(16, 192, 192)).validate().to_mask()
    qbar, kbar = (x.double().unflatten(2, (12, 16)).mean(3) for x in (q, k))
    for h in range(2):
        for i, gate in enumerate((qbar[0, h] @ kbar[0, h].T).tolist()):
            assert set(mask[0, h, i].nonzero().flatten().tolist()) == kept_by_hand(gate, i, tau)


def test_scale_and_common_mean_of_keys_change_nothing(seed):
    q, k = normal(1, 2, 128, 32), normal(1, 2, 128, 32)
    blocks = Blocks(16, 128, 128)
    mask = VMoBA()(q, k, k, blocks).to_mask()
    assert torch.equal(VMoBA()(3 * q, k + normal(1, 2, 1, 32), k, blocks).to_mask(), mask)


def test_own_blocks_and_one_more_at_any_density(seed):
    q = normal(1, 2, 256, 32)
    blocks = Blocks(16, 256, 256, shared=2)
    mask = AtDensity(VMoBA(), 0.01)(q, q, q, blocks).to_mask()
    own = torch.arange(16)
    assert mask[:, :, own, own].all() and mask[:, :, own, own ^ 1].all()  # both blocks of the list
    assert (mask.sum(-1) == 3).all()


def test_equal_gates_and_one_block(seed):
    k = torch.ones(1, 1, 64, 32)
    q, blocks = normal(1, 1, 64, 32), Blocks(16, 64, 64)
    assert VMoBA()(q, k, k, blocks).validate().density() == 1
    assert AtDensity(VMoBA(), 0.75)(q, k, k, blocks).validate().density() == 0.75
    one = normal(1, 1, 16, 32)
    assert VMoBA()(one, one, one, Blocks(16, 16, 16)).validate().density() == 1


def test_text_is_as_in_top_k(seed):
    grid = Grid(2, 8, 4, text=12)
    q = normal(1, 2, 76, 32)
    mask = VMoBA(0.1, text_keys_exact=True, text_rows_dense=True)(q, q, q, Blocks(8, 76, 76, grid)).to_mask()
    assert mask[..., 8:].all() and mask[:, :, 8:].all() and not mask[:, :, :8, :8].all()


def test_tau_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1\]"):
        VMoBA(0)
