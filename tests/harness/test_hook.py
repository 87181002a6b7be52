"""The hook changes nothing but the attention, reaches every layer, and leaves no trace."""

import pytest
import torch

from harness.hook import Session
from pisa import SparseAttention
from pisa.orders import Tile3D
from pisa.routing import TopK


def sparse(density: float, tail: str = "hybrid") -> SparseAttention:
    return SparseAttention(order=Tile3D(), routing=TopK(density), tail=tail)


def hooked(tiny, **settings) -> tuple[torch.Tensor, Session]:
    with Session(tiny.transformer, tiny.family, scheduler=tiny.scheduler, **settings) as session:
        latents = tiny.generate(tiny.prompt(0), seed=0)
    return latents, session


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("size", [(4, 32, 32), (3, 20, 36)])
def test_density_one_equals_the_stock_pipeline(tiny, size):
    """Also catches a processor that loses the rotary embedding, a norm or the output projection."""
    tiny.frames, tiny.height, tiny.width = size
    stock = tiny.generate(tiny.prompt(0), seed=0)
    ours, session = hooked(tiny, method=sparse(1.0))
    assert relative(ours, stock) < 1e-4
    assert session.sparse_calls == 3 * 2 and session.dense_calls == 0


def test_positions_matter_to_this_model(tiny):
    """The test above can see a lost rotary embedding: without it the output moves by far more than its tolerance."""
    stock = tiny.generate(tiny.prompt(0), seed=0)
    rope = tiny.transformer.rope
    still = torch.ones_like(rope.freqs_cos), torch.zeros_like(rope.freqs_sin)
    rope.freqs_cos, rope.freqs_sin = still
    assert relative(tiny.generate(tiny.prompt(0), seed=0), stock) > 1e-3


def test_low_density_differs(tiny):
    stock = tiny.generate(tiny.prompt(0), seed=0)
    ours, session = hooked(tiny, method=sparse(0.25, "drop"))
    assert relative(ours, stock) > 1e-3
    assert session.report()["density_realised"] == 0.25


def test_processors_and_hooks_are_restored_also_after_an_error(tiny):
    before = dict(tiny.transformer.attn_processors)
    with pytest.raises(ZeroDivisionError), Session(tiny.transformer, tiny.family, method=sparse(0.5)):
        assert tiny.transformer.attn_processors != before
        raise ZeroDivisionError
    assert tiny.transformer.attn_processors == before
    assert not tiny.transformer._forward_pre_hooks and not tiny.transformer._forward_hooks


def test_warm_up_steps_and_layers_stay_dense(tiny):
    calls = []
    _, session = hooked(
        tiny,
        method=sparse(0.5),
        dense_steps=1,
        dense_layers=1,
        observe=lambda s, layer, q, k, v: calls.append((s.step, s.branch, layer)),
    )
    assert session.sparse_calls == 2 and session.dense_calls == 4
    assert session.report()["exact_fraction"] == pytest.approx((4 + 2 * 0.5) / 6)
    assert calls == [(step, 0, layer) for step in (0, 1) for layer in (0, 1, 2)]


def test_guidance_has_two_branches(tiny):
    tiny.guidance = 3.0
    calls = []
    hooked(tiny, observe=lambda s, layer, q, k, v: calls.append((s.step, s.branch)))
    assert calls == [(0, 0)] * 3 + [(0, 1)] * 3 + [(1, 0)] * 3 + [(1, 1)] * 3


def test_a_layer_that_is_not_reached_is_an_error(tiny):
    with Session(tiny.transformer, tiny.family, method=sparse(0.5)):
        block = tiny.transformer.blocks[1].attn1
        block.set_processor(type(block)._default_processor_cls())  # as another library's hook would
        with pytest.raises(RuntimeError, match=r"layers \[1\]"):
            tiny.generate(tiny.prompt(0), seed=0)


def test_fused_projections_are_refused(tiny):
    tiny.transformer.blocks[0].attn1.fused_projections = True
    with pytest.raises(ValueError, match="unfuse"):
        hooked(tiny, method=sparse(0.5))
