"""Every number against its definition written a second time, and the mistakes that other projects made."""

import json
import os
import socket
from dataclasses import asdict
from importlib.util import find_spec
from math import log10
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import conv2d, max_pool2d, pad, relu, unfold

from harness import metrics
from harness.metrics import FORMULAS, Protocol, tensor_errors


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a metric tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture
def generator():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def noisy_pair(generator, frames=3, height=48, width=40, noise=0.1):
    """A coarse random texture and the same with noise, `[F, 3, H, W]` each."""
    coarse = torch.rand(frames, 3, 8, 8, generator=generator)
    dense = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return dense, (dense + noise * torch.randn(dense.shape, generator=generator)).clamp(0, 1)


def offsets(*errors):
    """Frames that differ from the dense ones by these constants, so frame i has a PSNR of -20 log10(errors[i])."""
    dense = torch.full((len(errors), 3, 40, 40), 0.5)
    return dense, dense + torch.tensor(errors)[:, None, None, None]


# ---- PSNR


def test_psnr_is_the_definition(generator):
    dense, video = noisy_pair(generator, frames=11)
    quality = Protocol()(dense, video)
    errors = [float(((a.double() - b.double()) ** 2).mean()) for a, b in zip(dense, video, strict=True)]
    assert quality.psnr_frames == pytest.approx([-10 * log10(error) for error in errors], abs=1e-3)
    assert quality.psnr_db == pytest.approx(sum(quality.psnr_frames) / 11, abs=1e-9)
    assert quality.psnr_pooled_db == pytest.approx(-10 * log10(sum(errors) / 11), abs=1e-3)
    assert quality.psnr_min_db == min(quality.psnr_frames)


def test_mean_over_frames_and_pooled_differ_as_known():
    quality = Protocol()(*offsets(0.1, 0.01))  # 20 and 40 dB
    assert quality.psnr_frames == pytest.approx([20, 40], abs=1e-3)
    assert quality.psnr_db == pytest.approx(30, abs=1e-3)
    assert quality.psnr_pooled_db == pytest.approx(-10 * log10((0.01 + 0.0001) / 2), abs=1e-3)  # 22.97
    assert quality.psnr_min_db == pytest.approx(20, abs=1e-3)


def test_identical_frames_are_none_and_left_out():
    quality = Protocol()(*offsets(0.1, 0.0, 0.01))
    assert quality.psnr_frames[1] is None and not quality.identical
    assert quality.psnr_db == pytest.approx(30, abs=1e-3)
    assert quality.psnr_pooled_db == pytest.approx(-10 * log10((0.01 + 0.0001) / 3), abs=1e-3)  # counts all three


@pytest.mark.parametrize("protocol", FORMULAS)
def test_identical_videos_are_flagged_and_fit_into_json(protocol):
    dense, video = offsets(0.0, 0.0)
    quality = Protocol(protocol)(dense, video)
    assert quality.identical and quality.ssim == pytest.approx(1)
    numbers = [quality.psnr_db, quality.psnr_pooled_db, quality.psnr_min_db]
    assert numbers == ([100.0] * 3 if protocol == "fastvideo" else [None] * 3)
    assert quality.lpips == (0 if FORMULAS[protocol].alexnet else None)
    json.dumps(asdict(quality), allow_nan=False)


def test_frames_are_clamped_first():
    dense, video = torch.full((1, 3, 40, 40), 1.5), torch.full((1, 3, 40, 40), 0.9)
    assert Protocol()(dense, video).psnr_db == pytest.approx(20, abs=1e-3)
    assert Protocol()(dense, dense + 1).identical


# ---- SSIM


def naive_ssim(x, y, window, mode, correction=1.0):
    """SSIM by its definition in float64: weighted mean and variance of every k x k patch. window `[k, k]`, sum 1."""
    k = window.shape[0]
    if mode != "valid":
        x, y = (pad(z, (k // 2,) * 4, mode=mode) for z in (x, y))
    x, y = (unfold(z.double().flatten(0, 1)[:, None], k) for z in (x, y))  # [F * 3, k * k, patches]
    w = window.double().flatten()[:, None]
    mx, my = (w * x).sum(1), (w * y).sum(1)
    vx, vy = correction * (w * (x - mx[:, None]) ** 2).sum(1), correction * (w * (y - my[:, None]) ** 2).sum(1)
    cov = correction * (w * (x - mx[:, None]) * (y - my[:, None])).sum(1)
    luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
    return float((luminance * (2 * cov + 9e-4) / (vx + vy + 9e-4)).mean())


def gaussian_window():
    g = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    return torch.outer(g, g) / g.sum() ** 2


@pytest.mark.parametrize(
    "protocol, window, mode, correction",
    [
        ("v1", gaussian_window(), "reflect", 1.0),
        ("fastvideo", gaussian_window(), "constant", 1.0),
        ("svg", torch.full((11, 11), 1 / 121), "constant", 1.0),
        ("sparsevideo", torch.full((7, 7), 1 / 49), "valid", 49 / 48),
    ],
)
def test_ssim_is_the_definition(protocol, window, mode, correction, generator):
    dense, video = noisy_pair(generator)
    got = FORMULAS[protocol].ssim(dense, video)
    assert got.shape == (3,)
    assert float(got.mean()) == pytest.approx(naive_ssim(dense, video, window, mode, correction), abs=1e-5)


def test_protocols_call_their_own_ssim(generator):
    """On noise over a texture: v1 < zero-padded Gaussian < zero-padded box, as measured on real videos."""
    dense, video = noisy_pair(generator, noise=0.05)
    v1, fastvideo, svg = (float(FORMULAS[name].ssim(dense, video).mean()) for name in ("v1", "fastvideo", "svg"))
    assert v1 < fastvideo < svg
    assert Protocol()(dense, video).ssim == pytest.approx(v1)
    assert Protocol("fastvideo")(dense, video).ssim == pytest.approx(fastvideo)
    decoded = (True, True)  # no MP4 step, so the same frames
    assert Protocol("svg")(dense, video, decoded=decoded).ssim == pytest.approx(svg)
    sparsevideo = Protocol("sparsevideo")(dense, video, decoded=decoded).ssim
    assert sparsevideo == pytest.approx(float(FORMULAS["sparsevideo"].ssim(dense[:1], video[:1])), abs=1e-6)


def test_sparsevideo_samples_frames():
    pick = FORMULAS["sparsevideo"].pick
    assert pick(1) == [0] and pick(5) == [0, 1]  # fewer frames than samples: only the first ones, as there
    assert pick(16) == list(range(16))
    assert len(pick(81)) == 16 and pick(81)[0] == 0 and pick(81)[-1] == 80
    assert FORMULAS["v1"].pick(81) == list(range(81))


# ---- LPIPS


def naive_lpips(x, y):
    """LPIPS v0.1 of frames in [0, 1], from torch primitives, our backbone file and the heads in lpips' wheel: `[F]`."""
    features = load_file(metrics.ALEXNET)
    wheel = Path(find_spec("lpips").origin).parent
    heads = torch.load(wheel / "weights" / "v0.1" / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def layers(frames):
        h = (2 * frames - 1 - shift[:, None, None]) / scale[:, None, None]
        for number, stride, padding, pool in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            h = max_pool2d(h, 3, 2) if pool else h
            weight, bias = features[f"features.{number}.weight"], features[f"features.{number}.bias"]
            h = relu(conv2d(h, weight, bias, stride, padding))
            yield h / (h.norm(dim=1, keepdim=True) + 1e-10)

    return sum(
        ((a - b) ** 2 * heads[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
        for i, (a, b) in enumerate(zip(layers(x), layers(y), strict=True))
    )


def test_lpips_is_the_definition(generator):
    dense, video = noisy_pair(generator, frames=metrics.CHUNK + 2, height=64, width=48, noise=0.2)
    expected = naive_lpips(dense, video)
    assert expected.min() > 0.01  # else the comparison says nothing
    assert torch.allclose(metrics.lpips_alex(dense, video), expected, rtol=1e-4, atol=1e-6)
    assert Protocol()(dense, video).lpips == pytest.approx(float(expected.mean()), rel=1e-4)
    assert Protocol("fastvideo")(dense, video).lpips == pytest.approx(float(expected.mean()), rel=1e-4)


def test_building_lpips_is_silent_and_leaves_the_random_state(capsys):
    metrics._alexnet.cache_clear()
    before = torch.random.get_rng_state()
    metrics._alexnet(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("side, missing", [(40, []), (31, ["LPIPS"]), (5, ["SSIM", "LPIPS"])])
def test_small_frames_lose_a_metric_and_say_why(side, missing):
    dense = torch.full((2, 3, side, 50), 0.5)
    quality = Protocol()(dense, dense + 0.1)
    assert (quality.ssim is None, quality.lpips is None) == ("SSIM" in missing, "LPIPS" in missing)
    assert [note.split()[0] for note in quality.notes.split("; ") if note] == missing
    assert quality.psnr_db == pytest.approx(20, abs=1e-3)


# ---- the other protocols


@pytest.mark.parametrize("protocol", ["svg", "sparsevideo"])
def test_a_protocol_that_scores_files_hides_a_good_method(protocol, generator):
    dense, _ = noisy_pair(generator, frames=4, height=64, width=64)
    dense = (dense + 0.1 * torch.randn(dense.shape, generator=generator)).clamp(0, 1)  # texture, so the codec works
    video = dense + 0.004 * torch.randn(dense.shape, generator=generator)  # 48 dB
    v1, other = Protocol()(dense, video), Protocol(protocol)(dense, video)
    assert v1.psnr_db > 45 and other.psnr_db < v1.psnr_db - 5
    assert other.lpips is None and "LPIPS" in other.notes


def test_headline_psnr_is_each_projects_average():
    dense, video = offsets(0.1, 0.01)
    decoded = (True, True)
    assert Protocol("svg")(dense, video, decoded=decoded).psnr_db == pytest.approx(30, abs=1e-3)
    assert Protocol("sparsevideo")(dense, video, decoded=decoded).psnr_db == pytest.approx(22.967, abs=1e-2)
    assert Protocol("fastvideo")(*offsets(0.1, 0.0)).psnr_db == pytest.approx(60, abs=1e-3)  # 20 and the floor's 100


def test_who_cuts_and_who_resizes():
    dense, video = torch.full((4, 3, 40, 40), 0.5), torch.full((3, 3, 40, 40), 0.6)
    assert len(Protocol("fastvideo")(dense, video).psnr_frames) == 3
    larger = torch.full((3, 3, 80, 60), 0.6)
    assert Protocol("sparsevideo")(dense, larger).psnr_db == pytest.approx(20, abs=0.7)
    for protocol, other in (("v1", video), ("svg", video), ("v1", larger), ("fastvideo", larger), ("v1", dense[:1])):
        with pytest.raises(ValueError, match="equal shapes"):
            Protocol(protocol)(dense, other)


def test_the_mp4_step_keeps_odd_sizes():
    dense, video = torch.full((2, 3, 33, 41), 0.5), torch.full((2, 3, 33, 41), 0.6)
    assert metrics._through_mp4(dense).shape == dense.shape
    assert Protocol("svg")(dense, video).psnr_db == pytest.approx(20, abs=0.7)


def test_conf_has_one_file_for_each_protocol():
    folder = Path(__file__).parents[2] / "conf" / "metrics"
    files = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    assert files == {name: {"_target_": "harness.metrics.Protocol", "protocol": name} for name in FORMULAS}


# ---- refusals, flicker, tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_frames_are_refused(dtype):
    good, bad = torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 40, dtype=dtype)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(TypeError, match="divide by 255"):
            Protocol()(*pair)


def test_frames_without_meaning_are_refused():
    good = torch.zeros(2, 3, 40, 40)
    cases = {
        r"\[F, 3, H, W\]": [good[0], good[:, :2], good[:0]],
        "NaN or infinity": [good / 0, good + torch.inf],
        r"in \[0, 1\], got values up to 255": [good + 255],
    }
    for sentence, bad in cases.items():
        for frames in bad:
            for pair in ((frames, good), (good, frames)):
                with pytest.raises(ValueError, match=sentence):
                    Protocol()(*pair)


def test_an_unknown_protocol_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"svg, fastvideo, sparsevideo, got .fast_video.\. Did you mean .fastvideo."):
        Protocol("fast_video")


def test_flicker_is_the_mean_change_between_frames(generator):
    dense = torch.tensor([0.2, 0.2, 0.5])[:, None, None, None].expand(3, 3, 40, 40)
    quality = Protocol()(dense, dense.flip(0) * 2)
    assert quality.flicker_dense == pytest.approx(0.15)
    assert quality.flicker == pytest.approx(0.3)
    picture = Protocol()(dense[:1], dense[1:2] + 0.1)
    assert picture.flicker is None and picture.flicker_dense is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensor_errors_are_the_definition(dtype, generator):
    truth = (300 * torch.randn(2, 3, 500, 8, generator=generator)).to(dtype)  # its squares overflow float16
    out = truth + (30 * torch.randn(truth.shape, generator=generator)).to(dtype)
    x, y = out.flatten().tolist(), truth.flatten().tolist()
    errors = tensor_errors(out, truth)
    square = sum(b * b for b in y) ** 0.5
    assert errors["rel_l1"] == pytest.approx(
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) / sum(map(abs, y)), rel=1e-9
    )
    assert errors["rel_l2"] == pytest.approx(
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 / square, rel=1e-9
    )
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    assert errors["cosine"] == pytest.approx(dot / square / sum(a * a for a in x) ** 0.5, rel=1e-9)


def test_tensor_errors_at_the_edges():
    ones, zeros = torch.ones(2, 4), torch.zeros(2, 4)
    assert tensor_errors(ones, ones) == pytest.approx({"rel_l1": 0, "rel_l2": 0, "cosine": 1})
    assert tensor_errors(zeros, ones) == {"rel_l1": 1.0, "rel_l2": 1.0, "cosine": None}
    assert tensor_errors(ones, zeros) == {"rel_l1": None, "rel_l2": None, "cosine": None}
    with pytest.raises(ValueError, match="equal shapes"):
        tensor_errors(ones, ones[:1])  # would broadcast
    with pytest.raises(ValueError, match="NaN or infinity"):
        tensor_errors(ones / 0, ones)
