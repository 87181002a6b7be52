"""The full-size models: the adapter equals diffusers' own pipeline on tiny checkpoints, the real sizes are counted
without allocating them, and everything that can be wrong is one sentence before any work."""

import shutil

import pytest
import torch

from harness.config import Composer
from harness.errors import InputError
from harness.hook import Session
from harness.models import checkpoint, full
from harness.sweep import sweep
from pisa import SparseAttention
from pisa.routing import TopK
from tests.harness.checkpoints import CONF, adapter, overrides, save

PROMPT = "a red fox in the snow"
every_family = pytest.mark.parametrize("name", CONF)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of the tiny checkpoints by family."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def pretrained(saved, name, **more):
    return adapter(overrides(name, weights="pretrained", path=saved(name), **more))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def stock_sample(model, output_type):
    """diffusers' own pipeline on the same checkpoint, from words and the same noise."""
    pipe = model.pipeline_class().from_pretrained(model.folder)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **model.scheduler_settings())
    pipe.set_progress_bar_config(disable=True)
    size = {"height": model.height, "width": model.width} | ({"num_frames": model.frames} if model.video else {})
    text = model.text_tokens - (77 if model.title.startswith("Stable") else 0)
    with torch.no_grad():
        return pipe(
            PROMPT, **size, num_inference_steps=model.steps, guidance_scale=model.guidance, latents=model.noise(3),
            max_sequence_length=text, output_type=output_type,
        )[0]  # fmt: skip


@every_family
def test_density_one_equals_the_stock_pipeline(saved, name):
    """From the words of a prompt to latents, and from latents to pictures."""
    model = pretrained(saved, name)
    model.check()
    method = SparseAttention(routing=TopK(1.0), block_size=16)
    with Session(model.transformer, model.family, method=method, scheduler=model.scheduler) as session:
        latents = model.generate(PROMPT, seed=3)
    assert session.sparse_calls == session.layers * 2 * model.branches
    assert relative(latents, stock_sample(model, "latent")) < 1e-4
    frames = model.decode(latents)
    assert frames.shape == (model.frames, 3, model.height, model.width)
    stock = stock_sample(model, "pt").flatten(0, -4)
    assert frames.std() > 1e-3 and (frames - stock).abs().max() < 1e-3


@every_family
def test_one_forward_is_that_of_the_sample(saved, name, tmp_path):
    """The step workload takes its inputs from a whole sample: dense again, the prediction must be the same."""
    words = overrides(name, weights="pretrained", path=saved(name))
    words += ["workload=step", "workload.at=[1]", "workload.repeats=0", "experiment=main", "method=pisa", "seed=0"]
    words += ["method.block_size=16", "device=cpu", "noise_floor=0", f"out={tmp_path}"]
    assert sweep([*words, "sparsity=0,0.75"], Composer()) == 0
    import pandas as pd

    table = pd.read_csv(tmp_path / "summary.csv").query("role == 'method'").set_index("sparsity")
    assert table.loc[0.0, "rel_l2"] < 1e-4 < 1e-2 < table.loc[0.75, "rel_l2"]


@every_family
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_weights_run_and_have_the_tokens_that_the_adapter_says(name, dtype):
    model, grids = adapter(overrides(name, dtype=dtype)), []
    model.check()
    session = Session(model.transformer, model.family, observe=lambda s, layer, *_: grids.append(s.grid))
    with session:
        o = model.forward(model.noise(0), 500.0, PROMPT)
    assert o.isfinite().all() and o.shape == (model.rows, *model.noise(0).shape[1:])
    assert max(grid.tokens for grid in grids) == model.tokens
    generated = model.generate(PROMPT, seed=0)
    assert generated.shape == model.noise(0).shape and generated.isfinite().all()


def test_random_weights_are_kept_in_fp32_where_a_checkpoint_s_are(saved):
    """Wan's norms and time embedding, as from_pretrained leaves them."""
    drawn = adapter(overrides("wan", dtype="bfloat16")).transformer
    read = pretrained(saved, "wan", dtype="bfloat16").transformer
    kinds = {name: p.dtype for name, p in read.named_parameters()}
    assert {name: p.dtype for name, p in drawn.named_parameters()} == kinds
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


@every_family
def test_fp8_storage_is_close_and_small(saved, name):
    a, b = (pretrained(saved, name, offload=offload) for offload in (None, "fp8"))
    one, other = (m.forward(m.noise(0), 0.5 if name == "flux" else 500.0, PROMPT) for m in (a, b))
    assert 1e-4 < relative(other, one) < 0.2
    bytes_of = [sum(p.nbytes for p in m.transformer.parameters()) for m in (a, b)]
    assert bytes_of[1] < 0.6 * bytes_of[0]  # norms and embedders stay


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "forwards"),
    [
        ("wan2.1_1.3b", 1_418_996_800, 32_760, 2),
        ("wan2.1_14b", 14_288_491_584, 75_600, 2),
        ("hunyuan_video", 12_821_012_544, 118_800 + 256, 1),
        ("flux1_dev", 11_901_408_320, 4_096 + 512, 1),
        ("sd3.5_medium", 2_243_171_520, 4_096 + 333, 1),
        ("sd3.5_large_turbo", 8_056_627_520, 4_096 + 333, 1),
    ],
)
def test_the_real_sizes(name, parameters, tokens, forwards):
    """Published counts, on the meta device."""
    model = adapter([f"model={name}", "model.weights=random"])
    assert full.parameter_count(model.outline) == parameters
    assert (model.tokens, model.branches) == (tokens, forwards)
    assert model.rows == (2 if name == "sd3.5_medium" else 1)
    needed = model.memory()
    assert needed["transformer"] == 2 * parameters and 0.2 < needed["activations"] / 2**30 < 20


def test_other_sizes_have_other_tokens():
    assert adapter(["model=flux1_dev", "model.height=2048", "model.width=2048"]).tokens == 16_384 + 512
    assert adapter(["model=hunyuan_video", "model.height=544", "model.width=960"]).tokens == 67_320 + 256


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("flux", {"height": 1000}, "cannot make a picture of 1000 x 112 pixels.*of 16.*is a picture of 992 x 112"),
        ("wan", {"width": 5}, "nearest that works is 9 frames of 144 x 16"),
        ("wan", {"frames": 8}, r"8 frames of 144 x 112.*frames 4n \+ 1.*9 frames of 144 x 112"),
        ("wan", {"frames": 6}, "nearest that works is 5 frames"),
        ("hunyuan_video", {"frames": 0}, "nearest that works is 1 frames"),
        ("sd3", {"height": 1024}, "up to 512; the nearest that works is a picture of 512 x 112"),
        ("flux", {"text_tokens": 0}, "text_tokens must be at least 1"),
        ("flux", {"steps": 0}, "steps must be at least 1"),
        ("flux", {"dense_steps": 3}, "dense_steps from 0"),
        ("flux", {"weights": "toy"}, "model.weights must be one of pretrained, random, got 'toy'"),
        ("flux", {"dtype": "int8"}, "model.dtype must be one of"),
        ("flux", {"offload": "cpu"}, "model.offload must be one of null, model, fp8"),
        ("flux", {"offload": "model"}, "model.offload=model keeps parts"),
        ("wan", {"path": "nowhere/at/all", "weights": "pretrained"}, "there is no folder nowhere/at/all"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(name, settings, sentence):
    with pytest.raises(InputError, match=sentence) as told:
        adapter(overrides(name, **settings)).check()
    assert len(told.value.sentences) == 1


def test_an_unknown_argument_of_the_architecture_is_named():
    words = [*overrides("wan"), "+model.architecture.depth=3"]
    with pytest.raises(InputError, match="WanTransformer3DModel has no argument depth"):
        adapter(words).check()


@pytest.mark.parametrize(("name", "login"), [("wan", False), ("flux", True), ("sd3", True), ("hunyuan_video", False)])
def test_missing_weights_name_the_command_and_gated_ones_the_login(name, login, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = adapter([f"model={CONF[name]}"])
    with pytest.raises(InputError) as told:
        model.check()
    sentence = str(told.value)
    assert f'hf download {model.path} --include "model_index.json" "scheduler/*" "transformer/*"' in sentence
    assert ("hf auth login" in sentence) == login and "nothing is downloaded unasked" in sentence


@pytest.fixture
def copied(saved, tmp_path):
    """A checkpoint to be spoiled."""
    return shutil.copytree(saved("flux"), tmp_path / "flux")


def spoiled(folder):
    with pytest.raises(InputError) as told:
        adapter(overrides("flux", weights="pretrained", path=folder)).check()
    assert len(told.value.sentences) == 1
    return str(told.value)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_truncated_file_is_named_as_damaged(copied, part):
    file = next((copied / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    sentence = spoiled(copied)
    assert str(file) in sentence and "damaged" in sentence and "copy the whole folder again" in sentence


def test_a_file_that_is_not_there_is_named(copied):
    next((copied / "vae").glob("*.safetensors")).unlink()
    assert "lacks vae/diffusion_pytorch_model.safetensors" in spoiled(copied)
    shutil.rmtree(copied / "vae")
    assert "lacks its vae" in spoiled(copied)
    (copied / "model_index.json").unlink()
    assert "no model_index.json" in spoiled(copied)


def test_a_missing_shard_is_named(copied, saved):
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(saved("flux") / "transformer")
    shutil.rmtree(copied / "transformer")
    transformer.save_pretrained(copied / "transformer", max_shard_size="1MB")
    shards = sorted((copied / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    model = adapter(overrides("flux", weights="pretrained", path=copied))
    model.check()
    assert model.weights_file.name == "diffusion_pytorch_model.safetensors.index.json"
    assert checkpoint.parameters(copied, ["transformer"])["transformer"] == full.parameter_count(transformer)
    shards[1].unlink()
    assert f"lacks transformer/{shards[1].name}" in spoiled(copied)


@pytest.mark.parametrize(("weights", "device"), [("random", "cpu"), ("pretrained", "cuda")])
def test_too_little_memory_is_said_before_any_work(saved, weights, device, monkeypatch):
    monkeypatch.setattr(full, "memory_there", lambda device: 2.0**20)
    model = adapter(overrides("flux", weights=weights, path=saved("flux")), device)
    with pytest.raises(InputError, match="needs about 0.0 GiB .transformer") as told:
        model.check()
    remedy = "use a GPU" if device == "cpu" else "model.offload=fp8, model.offload=model"
    assert remedy in str(told.value) and "pipe" not in vars(model)
    monkeypatch.setattr(full, "memory_there", lambda device: 2.0**40)
    model.check()


def test_prompts_begin_again_at_the_end_and_empty_ones_are_refused():
    model = adapter(overrides("flux"))
    assert model.prompt(0) == model.prompt(len(full.PROMPTS)) != model.prompt(1)
    model.check_prompt(PROMPT)
    with pytest.raises(InputError, match="leave it out"):
        model.check_prompt("  ")


def test_noise_and_embeddings_are_the_seed_s_and_the_prompt_s():
    a, b = (adapter(overrides("sd3")) for _ in "ab")
    assert torch.equal(a.noise(5), b.noise(5)) and not torch.equal(a.noise(5), a.noise(6))
    assert torch.equal(a.encode("x")["prompt_embeds"], b.encode("x")["prompt_embeds"])
    assert not torch.equal(a.encode("x")["prompt_embeds"], a.encode("y")["prompt_embeds"])


@every_family
@torch.no_grad()
def test_compiled_blocks_are_few_graphs_and_change_nothing(name, monkeypatch):
    """fullgraph, so a break in the graph would raise; a new session, method or warm-up compiles nothing again."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(full, "COMPILER", "eager")
    torch._dynamo.reset()
    counters.clear()
    layers = {"architecture.num_layers": 6}
    layers |= {"architecture.num_single_layers": 6} if name in ("flux", "hunyuan_video") else {}
    plain, compiled = (adapter(overrides(name, compile=choice, **layers)) for choice in (False, True))
    graphs = []
    for density, dense_layers in ((1.0, 0), (0.25, 1)):
        outputs = []
        for model in (plain, compiled):
            method = SparseAttention(routing=TopK(density), block_size=16)
            with Session(model.transformer, model.family, method=method, dense_layers=dense_layers) as session:
                outputs.append(model.forward(model.noise(0), 500.0, PROMPT))
            assert session.report()["sparse_calls"] > 0
        graphs.append(counters["stats"]["unique_graphs"])
        assert relative(*outputs) < 1e-5
    assert 0 < graphs[0] == graphs[1] <= 3  # kinds of blocks, and the one where two kinds meet


def test_a_compiled_model_with_offload_is_refused():
    with pytest.raises(InputError, match="model.compile=true and model.offload do not go together"):
        adapter(overrides("flux", compile=True, offload="fp8")).check()
