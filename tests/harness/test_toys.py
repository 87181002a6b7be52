"""The toy models through the real adapter, at small sizes and with random weights, so that no asset is needed."""

import pytest
import torch

from harness.checks import build_model
from harness.config import Composer
from harness.errors import InputError
from harness.hook import Session
from harness.models.captions import Caption, make_vocabulary, sentence
from harness.models.toy import ASSETS
from pisa import SparseAttention
from pisa.orders import Raster
from pisa.routing import TopK
from tests.harness.pipelines import sharpen

NAMES = ("toy_wan", "toy_flux", "toy_hunyuan")
SMALL = {"toy_wan": {"frames": 4}, "toy_flux": {}, "toy_hunyuan": {"frames": 4}}
SIZE = {"height": 32, "width": 40, "steps": 2, "dense_layers": 0}  # 320 video or image tokens
LAYERS = {"toy_wan": 2, "toy_flux": 2, "toy_hunyuan": 2}
GRID = {"toy_wan": (4, 8, 10), "toy_flux": (1, 16, 20), "toy_hunyuan": (4, 8, 10)}
ROTATE = {
    "toy_wan": "harness.models.wan.rotate",
    "toy_flux": "harness.models.flux.apply_rotary_emb",
    "toy_hunyuan": "harness.models.hunyuan_video.apply_rotary_emb",
}
SHORT = "a red plain disc moves left over fog"
LONG = "a red plain disc swings and a blue dotted ring circles over waves"
every_toy = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a small random pipeline of each toy, as scripts/train_toy.py writes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ASSETS.parents[1] / "scripts")
        from toy_recipes import RECIPES
    found = {}
    for name in NAMES:
        torch.manual_seed(0)
        transformer = RECIPES[name].build(small=True)
        for parameter in transformer.parameters():  # training starts with layers of zeros, which would hide attention
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        sharpen(transformer)
        found[name] = tmp_path_factory.mktemp(name)
        RECIPES[name].pipeline(transformer).save_pretrained(found[name])
        save_vocabulary(found[name])
    return found


def save_vocabulary(folder):
    from safetensors.torch import save_file

    save_file(make_vocabulary(), folder / "vocabulary.safetensors")


@pytest.fixture
def toy(folders):
    """The adapter of a toy with its config's settings but for the size, and with other `settings`."""

    def make(name, **settings):
        config = Composer().compose([("model", name)]).config
        config["model"] |= SIZE | SMALL[name] | {"path": str(folders[name])} | settings
        return build_model(config, "cpu")

    return make


def run(model, prompt=LONG, density=None, **settings):
    """Latents of a hooked sample and its session; no density is dense."""
    method = None if density is None else SparseAttention(order=Raster(), routing=TopK(density), tail="hybrid")
    session = Session(model.transformer, model.family, method=method, scheduler=model.scheduler, **settings)
    with session:
        return model.generate(prompt, seed=0), session


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@every_toy
def test_density_one_equals_the_stock_pipeline(toy, name):
    model = toy(name)
    model.check()
    stock = model.generate(LONG, seed=0)
    ours, session = run(model, density=1.0)
    assert relative(ours, stock) < 1e-4
    assert session.report()["dense_calls"] == 0
    assert relative(run(model, density=0.25)[0], stock) > 1e-3


@every_toy
def test_every_layer_is_reached_once_in_every_step(toy, name):
    model, calls, grids = toy(name), [], set()

    def look(session, layer, q, k, v):
        calls.append((session.step, layer))
        grids.add(session.grid)
        assert q.shape[-1] == 64 and q.shape[2] == session.grid.tokens

    run(model, observe=look)
    assert calls == [(step, layer) for step in range(2) for layer in range(LAYERS[name])]
    (grid,) = grids
    assert (grid.frames, grid.height, grid.width) == GRID[name]
    assert grid.video == model.tokens
    assert grid.text == {"toy_wan": 0, "toy_flux": 64, "toy_hunyuan": 9}[name]  # padding is trimmed, but not in FLUX
    assert grid.text_first or name != "toy_flux"


@every_toy
def test_a_hook_that_loses_the_positions_is_seen(toy, name, monkeypatch):
    model = toy(name)
    stock = model.generate(LONG, seed=0)
    monkeypatch.setattr(ROTATE[name], lambda x, *_, **__: x)
    assert relative(run(model, density=1.0)[0], stock) > 1e-3


@every_toy
def test_one_forward_is_what_the_pipeline_computes_first(toy, name):
    """Same text, positions, guidance and scale of time."""
    model, seen = toy(name, guidance=1.5 if name != "toy_wan" else 1.0), []

    def keep(module, args, kwargs, out):
        seen.append((kwargs["hidden_states"], kwargs["timestep"].item(), out[0]))

    hook = model.transformer.register_forward_hook(keep, with_kwargs=True)
    model.generate(LONG, seed=0)
    hook.remove()
    latents, time, prediction = seen[0]
    assert torch.equal(latents, model.noise(0))
    assert relative(model.forward(latents, time, LONG), prediction) < 1e-6


@every_toy
def test_the_prompt_and_the_seed_matter(toy, name):
    model = toy(name)
    one = model.generate(LONG, seed=0)
    for other in (SHORT, LONG.replace("blue", "green")):
        assert relative(model.generate(other, seed=0), one) > 1e-4
    assert relative(model.generate(LONG, seed=1), one) > 1e-1
    assert torch.equal(model.generate(LONG, seed=0), one)


@pytest.mark.parametrize("name", ["toy_flux", "toy_hunyuan"])
def test_the_guidance_is_an_input_of_the_model(toy, name):
    one, four = (toy(name, guidance=g).generate(LONG, seed=0) for g in (1.0, 4.0))
    assert relative(four, one) > 1e-4


@pytest.mark.parametrize("density", [None, 0.5])
def test_padding_does_not_matter(toy, density):
    """The same prompt behind more zeros: the refiner and the attention must not see them, hooked or not."""
    for prompt in (SHORT, LONG):
        ours, stock = [], []
        for length in (9, 40):
            model = toy("toy_hunyuan", text_tokens=length)
            ours.append(run(model, prompt, density)[0])
            stock.append(model.generate(prompt, seed=0))
        assert relative(stock[1], stock[0]) < 1e-5
        assert relative(ours[1], ours[0]) < 1e-5


def test_a_sentence_is_its_words_then_padding():
    words = make_vocabulary()
    tokens, mask = sentence([Caption.parse(SHORT), Caption.parse(LONG)], words, 12)
    assert mask.tolist() == [[1] * 5 + [0] * 7, [1] * 9 + [0] * 3]
    assert torch.equal((tokens != 0).any(-1).long(), mask)
    fog, waves = tokens[0, 4], tokens[1, 8]
    assert not torch.equal(fog, waves)
    assert torch.equal(tokens[0, :3], tokens[1, :3])  # red, plain, disc of the first object
    assert not torch.equal(tokens[0, 3], tokens[1, 3])  # left, swings


def test_pictures_are_packed_as_the_pipeline_of_flux_does():
    from diffusers import FluxPipeline

    from harness.models.toy_flux import pack, positions, unpack

    pictures = torch.randn(2, 3, 8, 12)
    tokens = pack(pictures)
    assert torch.equal(tokens, FluxPipeline._pack_latents(pictures, 2, 3, 8, 12))
    assert torch.equal(unpack(tokens, 8, 12), pictures)
    ids = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    assert torch.equal(positions(8, 12), ids)


@every_toy
def test_what_is_decoded_are_frames(toy, name):
    model = toy(name)
    frames = model.decode(model.noise(3))
    assert frames.shape == (SMALL[name].get("frames", 1), 3, 32, 40)
    assert frames.min() == 0 and frames.max() == 1
    spot = torch.full((1, 3, model.frames, 32, 40), -1.0)
    spot[0, 1, 0, 5, 9] = 1
    if name == "toy_flux":
        from harness.models.toy_flux import pack

        spot = pack(spot[:, :, 0])
    assert model.decode(spot).nonzero().tolist() == [[0, 1, 5, 9]]


@every_toy
def test_own_prompts_are_known_and_other_words_are_refused(toy, name):
    model = toy(name)
    for seed in range(20):
        model.check_prompt(model.prompt(seed))
        assert name != "toy_flux" or "moves" not in model.prompt(seed)
    with pytest.raises(InputError, match="do not know the word 'rde'. Did you mean 'red'"):
        model.check_prompt("a rde disc over fog")
    with pytest.raises(InputError, match="names 3 objects, at most 2"):
        model.check_prompt("a red disc and a blue disc and a green disc over fog")


@every_toy
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"height": 31}, "cannot make .*31 x 40: height and width must be multiples of"),
        ({"width": 0}, "cannot make"),
        ({"weights": "pretrained"}, r"must be toy \(trained\) or random"),
        ({"dense_steps": 3}, "dense_steps from 0 to it"),
        ({"dtype": "float64"}, "must be float32, bfloat16 or float16"),
    ],
)
def test_wrong_settings_are_refused(toy, name, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        toy(name, **settings).check()


def test_text_that_does_not_fit_is_refused(toy):
    with pytest.raises(InputError, match="text_tokens must be at least 9, .* got 8"):
        toy("toy_hunyuan", text_tokens=8).check()


@every_toy
def test_without_weights_the_command_that_trains_them_is_said(toy, name, tmp_path):
    model = toy(name, path=str(tmp_path))
    with pytest.raises(InputError) as error:
        model.check()
    (said,) = error.value.sentences
    assert said.startswith(f"there are no {name} weights at {tmp_path}")
    assert f"python scripts/train_toy.py --model {name} --out runs/{name}" in said
    model.weights_file.parent.mkdir()
    model.weights_file.write_bytes(b"torn")
    with pytest.raises(InputError, match="are damaged"):
        model.check()


@pytest.mark.parametrize("name", [name for name in NAMES if (ASSETS / name).exists()])
def test_what_ships_loads_and_is_small(name):
    model = build_model(Composer().compose([("model", name)]).config, "cpu")
    model.check()
    files = [file for file in model.folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert model.transformer.dtype == torch.float32
    with torch.no_grad():
        prediction = model.forward(model.noise(0), 1.0, model.prompt(0))
    assert prediction.shape == model.noise(0).shape and prediction.isfinite().all()
