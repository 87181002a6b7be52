"""The two rules, the blocks that have no mean, and where the block shapes of the paper come from."""

import pytest
import torch

from baselines.block_topk import block_topk
from baselines.knob import AtDensity
from baselines.spargeattn import SpargeAttn, similarity
from pisa import Blocks, Grid, SparseAttention
from pisa.routing import TopK
from tests.pisa.cases import normal


def test_similarity_is_the_mean_cosine_of_all_pairs(seed):
    x = normal(2, 2, 40, 32)
    found = similarity(x, Blocks(16, 40, 40))
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    truth = torch.stack([(block @ block.mT).mean((-1, -2)) for block in unit.split(16, 2)], 2)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    alike = similarity(normal(1, 1, 1, 32).expand(1, 1, 32, 32), Blocks(16, 32, 32))
    assert torch.allclose(alike, torch.ones_like(alike))
    assert similarity(normal(1, 1, 4096, 128), Blocks(64, 4096, 4096)).mean().item() == pytest.approx(1 / 64, rel=0.1)


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_top_k_is_plain_top_k_while_every_block_may_be_pooled(keep, seed):
    q, k = normal(2, 2, 200, 32), normal(2, 2, 330, 32)
    blocks = Blocks(16, 200, 330)
    ours, plain = (x(q, k, k, blocks).validate() for x in (SpargeAttn("top_k", keep), TopK(keep)))
    assert torch.equal(ours.to_mask(), plain.to_mask())


def test_at_a_density_that_fits_it_is_block_topk(seed):
    q, k, v = (normal(2, 2, 256, 32) for _ in range(3))
    ours = SparseAttention(routing=AtDensity(SpargeAttn(), 0.25), tail="drop", block_size=16)
    plain = block_topk(0.25, block_size=16)
    assert torch.equal(ours(q, k, v), plain(q, k, v))


@pytest.mark.parametrize("tau", [0.4, 0.9])
def test_cdf_leaves_out_the_block_that_crosses_tau_but_never_all(tau, seed):
    q, k = normal(1, 2, 256, 32), normal(1, 2, 256, 32)
    q[:, :, :64] *= 100  # rows whose best block holds more than tau
    mask = SpargeAttn("cdf", tau)(q, k, k, Blocks(16, 256, 256)).validate().to_mask()
    qbar, kbar = (torch.stack([x.mean(2) for x in y.double().split(16, 2)], 2) for y in (q, k))
    mass = (qbar @ kbar.mT * 32**-0.5).softmax(-1)
    held, one = (mass * mask).sum(-1), mask.sum(-1) == 1
    assert one[..., :4].any() and not one[..., 4:].all()
    assert (held[~one] <= tau + 1e-6).all()
    assert (held + mass.masked_fill(mask, 0).amax(-1) > tau - 1e-6).all()  # the next would have crossed it
    assert SpargeAttn("cdf", 1.0)(q, k, k, Blocks(16, 256, 256)).density() == 1


@pytest.mark.parametrize("rule", ["top_k", "cdf"])
def test_blocks_without_a_mean_are_always_exact(rule, seed):
    """Query block 2 and key block 5 hold tokens that differ, these with a large mean; in all others all are alike."""
    q, k = (normal(1, 2, 10, 32).repeat_interleave(16, 2) for _ in range(2))
    q[:, :, 32:48], k[:, :, 80:96] = normal(1, 2, 16, 32), 20 * normal(1, 2, 16, 32)
    routing = SpargeAttn(rule, 0.3, similarity=0.6)
    mask = routing(q, k, k, Blocks(16, 160, 160)).validate().to_mask()
    assert mask[:, :, 2].all() and mask[..., 5].all() and not mask.all()
    others = [j for j in range(10) if j != 5]
    rest = [i for i in range(10) if i != 2]
    if rule == "cdf":  # the block that is always exact has no part in the softmax
        q_less, k_less = (x.unflatten(2, (10, 16))[:, :, i].flatten(2, 3) for x, i in ((q, rest), (k, others)))
        plain = SpargeAttn(rule, 0.3)(q_less, k_less, k_less, Blocks(16, 144, 144)).to_mask()
        assert torch.equal(mask[:, :, rest][..., others], plain)
    assert not SpargeAttn(rule, 0.3)(q, k, k, Blocks(16, 160, 160)).to_mask()[:, :, 2].all()  # below 0: judge off
    assert AtDensity(routing, 0.1)(q, k, k, Blocks(16, 160, 160)).to_mask()[..., 5].all()


def test_similarity_of_keys_is_judged_without_their_common_mean(seed):
    """A large common mean makes all keys alike; softmax does not see it, and neither does the judge."""
    q, k = normal(1, 1, 16, 32).repeat_interleave(8, 2), normal(1, 1, 128, 32)
    routing = SpargeAttn("top_k", 0.25, similarity=0.5)
    assert routing(q, k + 100, k, Blocks(16, 128, 128)).density() == 1


def test_all_keys_unlike_is_dense_and_not_nan(seed):
    q = normal(1, 1, 128, 32)
    assert SpargeAttn("cdf", 0.5, similarity=0.99)(q, q, q, Blocks(16, 128, 128)).validate().density() == 1


def test_block_shapes_of_the_paper_and_of_hopper(seed):
    """128 x 64: two query blocks share a list. 64 x 128: key blocks come in pairs. Both from blocks of one size."""
    q, k = normal(1, 2, 256, 32), normal(1, 2, 250, 32)
    shared = Blocks(16, 256, 250, shared=2)
    paper = SpargeAttn("top_k", 0.5)(q, k, k, shared).validate()
    assert paper.shared == 2 and torch.equal(paper.to_mask(), TopK(0.5)(q, k, k, shared).to_mask())
    hopper = SpargeAttn("top_k", 0.5, key_blocks=2)(q, k, k, Blocks(16, 256, 250)).validate().to_mask()
    assert torch.equal(hopper[..., ::2], hopper[..., 1::2])
    means = torch.stack([x.mean(2) for x in q.split(16, 2)], 2) @ torch.stack([x.mean(2) for x in k.split(32, 2)], 2).mT
    best = means.topk(4).indices
    assert torch.equal(hopper[..., ::2], torch.zeros_like(means, dtype=torch.bool).scatter(-1, best, True))


def test_sink_and_text(seed):
    grid = Grid(2, 8, 4, text=12)
    q = normal(1, 2, 76, 32)
    blocks = Blocks(8, 76, 76, grid)
    mask = SpargeAttn(keep=0.2, sink=True, text_keys_exact=True, text_rows_dense=True)(q, q, q, blocks).to_mask()
    assert mask[..., 0].all() and mask[..., 8:].all() and mask[:, :, 8:].all()
    assert not mask[:, :, :8, 1:8].all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="No rule 'topk' in SpargeAttn. Allowed: top_k, cdf"):
        SpargeAttn("topk")
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        SpargeAttn(keep=0)
    with pytest.raises(ValueError, match="key_blocks must be at least 1"):
        SpargeAttn(key_blocks=0)
