"""The verb `score`: true values of files on disk, and its table."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from harness import media
from harness.errors import InputError
from harness.score import main, score


@pytest.fixture
def fifteen_db(tmp_path):
    """Two 8-bit pictures whose PSNR is 15 dB; uint8 arithmetic reads about 28."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    a = random.integers(100, 156, (96, 96, 3))
    error = random.normal(0, 1, a.shape).clip(-2, 2)
    error *= 255 * 10 ** (-15 / 20) / np.sqrt((error**2).mean())
    b = (a + error.round()).astype(np.int64)
    assert b.min() >= 0 and b.max() <= 255
    true = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
    wrapped = 10 * np.log10(255**2 / ((a.astype(np.uint8) - b.astype(np.uint8)) ** 2).mean())
    assert abs(true - 15) < 0.05 and 26 < wrapped < 30
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path, pixels in zip(paths, (a, b), strict=True):
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("protocol", ["v1", "fastvideo"])
def test_fifteen_db_read_fifteen(fifteen_db, protocol):
    assert score(*fifteen_db, protocol)["psnr_db"] == pytest.approx(15, abs=0.1)


def video(level, frames=3):
    x = torch.linspace(0, 0.4, 48).expand(frames, 3, 40, 48)
    return x + level


def test_every_kind_of_file_gives_the_same_score(tmp_path):
    dense, other = video(0.1), video(0.2)
    folders = tmp_path / "dense", tmp_path / "other"
    for folder, frames in zip(folders, (dense, other), strict=True):
        for i in range(len(frames)):
            media.write(frames[i : i + 1], folder / f"{i}.png")
    tensors = media.write(dense, tmp_path / "a.safetensors"), media.write(other, tmp_path / "b.safetensors")
    videos = media.write(dense, tmp_path / "a.mp4"), media.write(other, tmp_path / "b.mp4")
    assert score(*tensors)["psnr_frames"] == pytest.approx([20] * 3, abs=1e-3)
    assert score(*folders)["psnr_db"] == pytest.approx(20, abs=0.05)
    assert score(folders[0], tensors[1])["psnr_db"] == pytest.approx(20, abs=0.05)
    from_videos = score(*videos)
    assert from_videos["psnr_db"] == pytest.approx(20, abs=0.2)
    assert "codec" in from_videos["notes"] and not score(*tensors)["notes"]


def test_a_video_file_is_not_encoded_twice(tmp_path):
    noise = 0.1 * torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    paths = [media.write_mp4(video(level) + noise, tmp_path / f"{level}.mp4") for level in (0.1, 0.13)]
    assert score(*paths, "svg")["psnr_frames"] == score(*paths, "v1")["psnr_frames"]


def test_the_first_path_is_the_dense_one(tmp_path):
    still = media.write(video(0.1), tmp_path / "still.safetensors")
    restless = media.write(
        torch.stack([torch.zeros(3, 40, 40), torch.ones(3, 40, 40)]), tmp_path / "on_off.safetensors"
    )
    still2 = media.write(torch.full((2, 3, 40, 40), 0.5), tmp_path / "grey.safetensors")
    quality = score(still2, restless)
    assert (quality["flicker_dense"], quality["flicker"]) == (0, 1)
    with pytest.raises(ValueError, match="equal shapes"):
        score(still, restless)


def test_the_table_shows_values_with_units(fifteen_db, capsys):
    assert main([*map(str, fifteen_db), "metrics.protocol=fastvideo"]) == 0
    out = capsys.readouterr().out
    value = f"{score(*fifteen_db, 'fastvideo')['psnr_db']:.2f}"
    assert "protocol fastvideo" in out and value in out and "dB" in out and "LPIPS (AlexNet)" in out
    assert main([str(fifteen_db[0])] * 2) == 0
    out = capsys.readouterr().out
    assert "protocol v1" in out and out.count("identical") >= 3 and "inf" not in out


def test_words_that_score_does_not_know(fifteen_db):
    a, b = map(str, fifteen_db)
    cases = {
        "compares two paths": ([a], [a, b, a]),
        "does not know": ([a, b, "metric.protocol=v1"],),
        "must be one of": ([a, b, "metrics.protocol=v2"], [a, b, "metrics="]),
        "no file or folder": ([a, b + "x"],),
    }
    for sentence, lines in cases.items():
        for args in lines:
            with pytest.raises(InputError, match=sentence):
                main(args)


def test_a_path_may_hold_an_equals_sign(tmp_path):
    frames = video(0.1)
    paths = [str(media.write(frames, tmp_path / f"metrics={i}" / "a.safetensors")) for i in range(2)]
    assert main(paths) == 0


def test_importing_score_needs_neither_lpips_nor_torchmetrics():
    code = "import sys, harness.score; print([m for m in ('lpips', 'torchmetrics') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
