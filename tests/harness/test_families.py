"""Every family: the hook changes nothing but the attention, and knows where the tokens are. On CPU in fp32."""

import math
import subprocess
import sys

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import harness
from harness.models.flux import FluxFamily
from pisa.orders import Raster, Tile2D
from tests.harness.pipelines import BUILDERS, build

SMALL = {"block_size": 16}
every_family = pytest.mark.parametrize("name", BUILDERS)


@pytest.fixture(scope="module")
def made():
    """The tiny pipelines by name, with the stock latents of each."""
    found = {}

    def get(name):
        if name not in found:
            tiny = build(name)
            found[name] = tiny, tiny.run()
        return found[name]

    return get


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def inputs_of(tiny) -> dict[str, torch.Tensor]:
    """The keyword arguments of the pipeline's first call of its transformer."""
    kept: list[dict] = []
    hook = tiny.pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: kept.append(kwargs), with_kwargs=True)
    tiny.run()
    hook.remove()
    return kept[0]


@torch.no_grad()
def first_values(tiny, inputs: dict) -> tuple[torch.Tensor, object]:
    """v `[B, H, L, D]` of layer 0 in one forward, and the grid that goes with it."""
    kept = []
    session = harness.attach(tiny.pipe, density=1.0, order="raster", **SMALL)
    session.observe = lambda s, layer, q, k, v: kept.append((v.clone(), s.grid)) if layer == 0 else None
    with session:
        tiny.pipe.transformer(**inputs)
    return kept[0]


def changed_rows(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    return (a - b).abs().amax((0, 1, 3)).nonzero().flatten().tolist()


@every_family
@pytest.mark.parametrize("order", ["raster", "tile_2d", "tile_3d"])
def test_density_one_equals_the_stock_pipeline(made, name, order):
    """Also catches a lost rotary embedding, norm, projection or padding mask. Token counts are ragged everywhere."""
    tiny, stock = made(name)
    with harness.attach(tiny.pipe, density=1.0, order=order, **SMALL) as session:
        ours = tiny.run()
    assert relative(ours, stock) < 1e-4
    assert session.report()["dense_calls"] == 0


@every_family
def test_kept_dense_it_equals_the_stock_pipeline(made, name):
    """HunyuanVideo's padding is trimmed for the dense kernel too, and no mask is passed."""
    tiny, stock = made(name)
    with harness.attach(tiny.pipe, method="dense") as session:
        ours = tiny.run()
    assert relative(ours, stock) < 1e-4
    assert session.report()["sparse_calls"] == 0


@every_family
def test_prompts_of_several_lengths_in_one_session(made, name):
    tiny, _ = made(name)
    stock = [tiny.run(text=length) for length in (1, 13, 24)]
    with harness.attach(tiny.pipe, density=1.0, **SMALL):
        ours = [tiny.run(text=length) for length in (1, 13, 24)]
    assert max(map(relative, ours, stock)) < 1e-4


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "flux"])
def test_positions_matter_to_these_models(made, name):
    """The tests above can see a lost rotary embedding: without it the output moves far more than they allow."""
    tiny, stock = made(name)
    transformer = tiny.pipe.transformer
    rope = transformer.pos_embed if name == "flux" else transformer.rope
    hook = rope.register_forward_hook(lambda m, a, out: (torch.ones_like(out[0]), torch.zeros_like(out[1])))
    still = tiny.run()
    hook.remove()
    assert relative(still, stock) > 1e-3


@every_family
def test_text_is_where_the_grid_says(made, name):
    """Another prompt changes the values of the text tokens and of no other, in the first layer."""
    tiny, _ = made(name)
    inputs = inputs_of(tiny)
    a, grid = first_values(tiny, inputs)
    b, _ = first_values(tiny, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].flip(1) + 1})
    text = range(grid.text) if grid.text_first else range(grid.video, grid.tokens)
    assert (grid.frames, grid.height, grid.width) == tiny.grid and grid.text == tiny.text
    assert grid.tokens == a.shape[2]
    assert changed_rows(a, b) == list(text)


@every_family
def test_a_place_in_the_latents_is_the_token_that_the_grid_says(made, name):
    tiny, _ = made(name)
    inputs = inputs_of(tiny)
    a, grid = first_values(tiny, inputs)
    frame, row, column = grid.frames - 1, 2, grid.width - 3
    latents = inputs["hidden_states"].clone()
    if name == "flux":  # packed: one row a token
        place = (inputs["img_ids"] == torch.tensor([0, row, column])).all(1).nonzero().item()
        latents[:, place] += 1
    else:  # [B, C, frames, h, w] or [B, C, h, w], 2 x 2 latents a token
        latents.view(*latents.shape[:2], -1, *latents.shape[-2:])[:, :, frame, 2 * row, 2 * column] += 1
    b, _ = first_values(tiny, inputs | {"hidden_states": latents})
    token = (frame * grid.height + row) * grid.width + column + (grid.text if grid.text_first else 0)
    assert changed_rows(a, b) == [token]


def test_what_stands_in_the_padding_changes_nothing(made):
    tiny, _ = made("hunyuan_video")
    inputs = inputs_of(tiny)
    text = inputs["encoder_hidden_states"].clone()
    text[:, tiny.text :] = 100 * torch.randn_like(text[:, tiny.text :])
    with harness.attach(tiny.pipe, density=0.25, **SMALL), torch.no_grad():
        a, b = (
            tiny.pipe.transformer(**inputs | {"encoder_hidden_states": x})[0]
            for x in (inputs["encoder_hidden_states"], text)
        )
    assert torch.equal(a, b)


def test_prompts_of_one_batch_must_have_one_length(made):
    tiny, _ = made("hunyuan_video")
    inputs = inputs_of(tiny)
    two = {k: torch.cat([x, x]) if torch.is_tensor(x) else x for k, x in inputs.items()}
    with harness.attach(tiny.pipe, density=1.0, **SMALL), torch.no_grad():
        both = tiny.pipe.transformer(**two)[0]
        assert relative(both[:1], tiny.pipe.transformer(**inputs)[0]) < 1e-4
        two["encoder_attention_mask"][1, 5:] = 0
        with pytest.raises(ValueError, match="17, 5 text tokens"):
            tiny.pipe.transformer(**two)


@every_family
def test_every_layer_is_reached_once_in_every_forward(made, name):
    tiny, _ = made(name)
    calls = []
    session = harness.attach(tiny.pipe, density=0.5, **SMALL)
    session.observe = lambda s, layer, q, k, v: calls.append((s.step, s.branch, layer))
    with session:
        tiny.run()
    every = [(s, b, layer) for s in range(2) for b in range(tiny.branches) for layer in range(tiny.layers)]
    assert calls == every
    report = session.report()
    assert report["layers"] == tiny.layers and report["forwards"] == 2 * tiny.branches
    assert report["sparse_calls"] == len(every)


@every_family
def test_low_density_differs(made, name):
    tiny, stock = made(name)
    with harness.attach(tiny.pipe, density=0.25, **SMALL):
        ours = tiny.run()
    assert relative(ours, stock) > 1e-2


def test_an_order_carried_through_the_model_is_the_order_of_every_layer(made, monkeypatch):
    """FLUX permutes its tokens once for all layers; each layer by itself would choose the same blocks."""
    tiny, _ = made("flux")

    def run(order):
        with harness.attach(tiny.pipe, density=0.25, order=order, **SMALL) as session:
            return tiny.run(), session.permutation

    carried, permutation = run("tile_2d")
    assert permutation is not None
    monkeypatch.delattr(FluxFamily, "reorder")
    by_layer, permutation = run("tile_2d")
    assert permutation is None
    assert relative(carried, by_layer) < 1e-5
    assert relative(run("raster")[0], by_layer) > 1e-3, "the two orders do not differ here"


@every_family
def test_the_report_counts_what_ran(made, name):
    """One of two steps dense, and in the other the first block."""
    tiny, _ = made(name)
    with harness.attach(tiny.pipe, density=0.25, dense_steps=1, dense_layers=1, **SMALL) as session:
        tiny.run()
    report = session.report()
    video = math.prod(tiny.grid)
    counts = [math.ceil((video + tiny.text) / 16)] * (tiny.layers - 1)
    if name == "sd3":  # block 0 has two layers; what is left is attn and attn2 of block 1, attn of block 2
        counts = [counts[0], math.ceil(video / 16), counts[0]]
    density = sum(math.floor(0.25 * n) / n for n in counts) / len(counts)
    assert report["sparse_calls"] == tiny.branches * len(counts)
    assert report["sparse_calls"] + report["dense_calls"] == 2 * tiny.branches * tiny.layers
    assert report["density_realised"] == pytest.approx(density)
    sparse = len(counts) / (2 * tiny.layers)
    assert report["exact_fraction"] == pytest.approx(sparse * density + 1 - sparse)
    assert report["engine"] == "eager"


@every_family
def test_the_pipeline_is_restored_also_after_an_error(made, name):
    tiny, stock = made(name)
    transformer = tiny.pipe.transformer
    before = dict(transformer.attn_processors)
    with pytest.raises(ZeroDivisionError), harness.attach(tiny.pipe, density=0.25, **SMALL):
        assert transformer.attn_processors != before
        raise ZeroDivisionError
    with harness.attach(tiny.pipe, density=0.25, **SMALL):
        tiny.run()
    assert transformer.attn_processors == before
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
    assert torch.equal(tiny.run(), stock)


@every_family
def test_a_stock_processor_put_back_is_an_error(made, name):
    tiny, _ = made(name)
    transformer = tiny.pipe.transformer
    stock = dict(transformer.attn_processors)
    with harness.attach(tiny.pipe, density=0.5, **SMALL):
        key = [k for k, p in transformer.attn_processors.items() if p is not stock[k]][-1]
        transformer.get_submodule(key.removesuffix(".processor")).set_processor(stock[key])
        with pytest.raises(RuntimeError, match=rf"layers \[{tiny.layers - 1}\]"):
            tiny.run()


@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
def test_fused_projections_are_refused_until_they_are_undone(name):
    tiny = build(name)
    tiny.pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\)"), harness.attach(tiny.pipe):
        pass
    tiny.pipe.transformer.unfuse_qkv_projections()
    with harness.attach(tiny.pipe, density=0.5, **SMALL):
        tiny.run()


def test_adapters_and_other_hooks_are_refused(made):
    tiny = build("flux")
    attention = tiny.pipe.transformer.transformer_blocks[1].attn
    attention.set_processor(FluxIPAdapterAttnProcessor(128, 32))
    with pytest.raises(ValueError, match="blocks.1.attn.processor is FluxIPAdapter"), harness.attach(tiny.pipe):
        pass
    tiny, _ = made("sd3")
    with harness.attach(tiny.pipe), pytest.raises(ValueError, match="SD3SelfAttention"), harness.attach(tiny.pipe):
        pass


def test_a_reference_image_beside_the_image_is_refused(made):
    tiny, _ = made("flux")
    inputs = inputs_of(tiny)
    more = {name: torch.cat([inputs[name]] * 2, dim) for name, dim in (("hidden_states", 1), ("img_ids", 0))}
    with harness.attach(tiny.pipe), pytest.raises(ValueError, match="374 image tokens"), torch.no_grad():
        tiny.pipe.transformer(**inputs | more)


@every_family
def test_the_order_is_the_family_s_unless_it_is_named(made, name):
    tiny, _ = made(name)
    usual = Raster() if name in ("wan", "hunyuan_video") else Tile2D()
    assert harness.attach(tiny.pipe).method.order == usual
    named = harness.attach(tiny.pipe, order="tile_3d", tail="zeroth", routing="covariance", block_size=32).method
    assert type(named.order).__name__ == "Tile3D" and named.routing.score == "covariance"
    assert named.tail.name == "zeroth" and named.block_size == 32


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "pizza"}, "No method 'pizza'.*Did you mean 'pisa'"),
        ({"order": "tile2d"}, "No order 'tile2d'.*Did you mean 'tile_2d'"),
        ({"tail": "none"}, "No tail 'none'"),
        *[({"density": d}, r"density must be in \(0, 1\]") for d in (0, -0.5, 1.5, math.nan, True, "0.5")],
        ({"dense_layers": -1}, "at least 0"),
    ],
)
def test_wrong_words_are_said_before_any_work(made, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        harness.attach(made("sd3")[0].pipe, **settings)


def test_other_pipelines_are_refused():
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Linear: supported are WanTransformer3DModel, Hunyuan"):
        harness.attach(Other())
    tiny = build("wan")
    tiny.pipe.transformer_2 = tiny.pipe.transformer
    with pytest.raises(ValueError, match="second transformer"):
        harness.attach(tiny.pipe)


def test_importing_harness_is_cheap_and_attach_stays_a_function():
    code = (
        "import sys, harness; assert not {'torch', 'diffusers', 'hydra'} & set(sys.modules); "
        "harness.attach; import harness.api; from harness import attach; assert attach is harness.attach"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
