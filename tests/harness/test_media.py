"""Files written and read back: sizes, order, colours, whole files only."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from harness import media


def smooth(frames=6, height=64, width=96):
    """Colour ramps that drift, `[F, 3, H, W]`: what a codec keeps well, and every axis and channel differs."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([0.2 + 0.6 * x, 0.7 - 0.4 * y, 0.3 + 0.3 * t], dim=1)


def random_frames(*shape):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quality, tolerance", [(media.VIEW_QUALITY, 0.01), (5, 0.02)])
def test_mp4_comes_back_close_for_smooth_content(tmp_path, quality, tolerance):
    frames = smooth()
    back = media.read(media.write_mp4(frames, tmp_path / "a.mp4", quality=quality))
    assert back.shape == frames.shape and back.dtype == torch.float32
    assert (back - frames).abs().mean() < tolerance
    assert (back - frames).mean((0, 2, 3)).abs().max() < tolerance  # no shift of one colour


@pytest.mark.parametrize("height, width", [(33, 47), (34, 47), (33, 48)])
def test_odd_sizes_are_padded_never_rescaled(tmp_path, height, width):
    frames = smooth(3, height, width)
    back = media.read(media.write(frames, tmp_path / "odd.mp4"))
    assert back.shape == (3, 3, height + height % 2, width + width % 2)
    assert (back[..., :height, :width] - frames).abs().mean() < 0.01


@pytest.mark.parametrize("frames, fps", [(1, 16), (2, 8), (17, 24), (40, 60)])
def test_mp4_keeps_every_frame(tmp_path, frames, fps):
    video = smooth(frames, 32, 32)
    back = media.read(media.write(video, tmp_path / "a.mp4", fps=fps))
    assert len(back) == frames
    assert (back.mean((1, 2, 3)).diff() >= -0.005).all()  # in order: blue rises


def test_safetensors_are_exact(tmp_path):
    frames = random_frames(3, 3, 9, 7) * 3 - 1  # out of range too: the file keeps what it gets
    assert torch.equal(media.read(media.write(frames, tmp_path / "a.safetensors")), frames)


def test_png_keeps_bytes(tmp_path):
    frames = (random_frames(1, 3, 9, 7) * 255).round() / 255
    assert torch.equal(media.read(media.write(frames, tmp_path / "a.png")), frames)


def test_bytes_round_and_clamp():
    levels = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.5]).expand(1, 3, 1, 6)
    assert media.to_bytes(levels)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_gif_keeps_frames_in_order(tmp_path):
    frames = torch.linspace(0.1, 0.9, 5)[:, None, None, None].expand(5, 3, 16, 16)
    back = media.read(media.write(frames, tmp_path / "a.gif", fps=10))
    assert back.shape == frames.shape and (back - frames).abs().max() < 0.02


def test_a_folder_is_read_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        media.write(torch.full((1, 3, 4, 4), number / 255), tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert (media.read(tmp_path)[:, 0, 0, 0] * 255).round().tolist() == [1, 2, 10]


def test_a_grey_or_transparent_picture_becomes_three_channels(tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (5, 4)).save(tmp_path / f"{mode}.png")
        assert media.read(tmp_path / f"{mode}.png").shape == (1, 3, 4, 5)


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for size in (4, 5):
        media.write(torch.zeros(1, 3, size, size), tmp_path / "mixed" / f"{size}.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "frames.xyz").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    save_file({"video": torch.zeros(1, 3, 4, 4)}, tmp_path / "other.safetensors")
    save_file({"frames": torch.zeros(4, 4)}, tmp_path / "flat.safetensors")
    cases = {
        "missing.png": "no file or folder",
        "empty": "holds no picture",
        "mixed": "differ in size",
        "broken.mp4": "cannot decode",
        "broken.png": "cannot read the picture",
        "frames.xyz": "suffix must be",
        "deep.png": "more than 8 bits",
        "other.safetensors": "no tensor named 'frames'",
        "flat.safetensors": r"must be \[F, 3, H, W\]",
    }
    for name, sentence in cases.items():
        with pytest.raises(ValueError, match=sentence):
            media.read(tmp_path / name)
    save_file({"frames": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, tmp_path / "bytes.safetensors")
    with pytest.raises(TypeError, match="floating point"):
        media.read(tmp_path / "bytes.safetensors")


def test_what_cannot_be_written_is_refused(tmp_path):
    frames = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="one frame, got 2"):
        media.write(frames, tmp_path / "a.png")
    with pytest.raises(ValueError, match="suffix must be"):
        media.write(frames, tmp_path / "a.tiff")
    with pytest.raises(TypeError, match="floating point"):
        media.write(frames.to(torch.uint8), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"\[F, 3, H, W\]"):
        media.write(frames[0], tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = media.write(torch.zeros(1, 3, 4, 4), tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), media.atomic(path) as temporary:
        temporary.write_bytes(b"half a file")
        assert path.read_bytes() == before
        raise RuntimeError("killed")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_side_by_side_enlarges_exactly_and_labels():
    a, b = random_frames(2, 3, 20, 30), random_frames(2, 3, 20, 30)
    row = media.side_by_side({"dense": a, "pisa 87.5 %": b}, smallest=64)
    height, width = 20 * 4, 30 * 4  # 4 is the least whole factor that brings 20 to 64
    strip = row.shape[2] - height
    assert row.shape == (2, 3, strip + height, 2 * width + media.GAP) and strip > 0
    assert torch.equal(row[:, :, strip + 2 :: 4, 2:width:4], a)
    assert torch.equal(row[:, :, strip:, width + media.GAP :: 4][:, :, ::4], b)
    labels = row[:, :, :strip]
    assert (labels[..., :width] < 0.5).any() and (labels[..., width + media.GAP :] < 0.5).any()
    assert not torch.equal(labels[..., :width], labels[..., width + media.GAP :])
    assert media.side_by_side({"large": torch.zeros(1, 3, 300, 256)}).shape[3] == 256


def test_a_long_label_stays_inside_its_panel():
    text = "a name that is too long at 18"  # ends at the strip's edge only if the letters did not shrink
    strip = media.label(text, 140)
    assert strip.shape == (1, 3, 28, 140) and (strip < 0.5).any() and (strip[..., -4:] == 1).all()


def test_side_by_side_refuses_unequal_panels():
    with pytest.raises(ValueError, match="equal shape"):
        media.side_by_side({"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(3, 3, 8, 8)})
    with pytest.raises(ValueError, match="one or more"):
        media.side_by_side({})
