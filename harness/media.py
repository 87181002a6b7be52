"""Frames to files and back: MP4, GIF, PNG and .safetensors out; videos, pictures, folders and .safetensors in.

Frames are `[F, 3, H, W]`, float in [0, 1] (F frames, H height, W width), on any device; what is read is float32 on the
CPU. Every file appears whole: it is written under a temporary name, then renamed.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from math import ceil
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
VIEW_QUALITY = 8  # of 10, for people to look at; 5 is what diffusers and imageio write by default
GAP = 4  # white pixels between two panels


def is_video(path: Path) -> bool:
    """True for a file that a video codec has been through."""
    return path.suffix.lower() in VIDEOS


# ---- out


def write(frames: Tensor, path: Path, fps: int = 16) -> Path:
    """Write frames `[F, 3, H, W]` as .mp4, .gif, .png (one frame) or .safetensors (exact), by the suffix of `path`.

    Raises ValueError (another suffix, several frames in a PNG, shape) or TypeError (integer frames).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".png", ".safetensors"):
        raise ValueError(
            f"cannot write {path.name}: the suffix must be .mp4, .gif, .png or .safetensors, got '{suffix}'."
        )
    if suffix == ".mp4":
        return write_mp4(frames, path, fps)
    pixels = to_bytes(frames)
    if suffix == ".png" and len(pixels) != 1:
        raise ValueError(f"a PNG holds one frame, got {len(pixels)}: pass frames[i : i + 1], or write a .gif or .mp4.")
    with atomic(path) as temporary:
        if suffix == ".safetensors":
            save_file({"frames": frames.detach().float().cpu().contiguous()}, temporary)
        else:
            first, *others = [Image.fromarray(picture) for picture in pixels]
            options = {"save_all": True, "append_images": others, "duration": 1000 / fps, "loop": 0}
            first.save(temporary, **(options if suffix == ".gif" else {}))
    return path


def write_mp4(frames: Tensor, path: Path, fps: int = 16, quality: int = VIEW_QUALITY) -> Path:
    """Write frames `[F, 3, H, W]` as H.264, yuv420p. An odd height or width gets one more line (the edge, repeated).

    Four encoder threads, whatever the machine: x264's output depends on their number.
    """
    pixels = to_bytes(frames)  # [F, H, W, 3]
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic(Path(path)) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (pixels.shape[2], pixels.shape[1]),
            fps=fps,
            codec="libx264",
            quality=quality,
            macro_block_size=1,  # else the picture is rescaled to a multiple of 16
            ffmpeg_log_level="error",
            output_params=["-threads", "4"],
        )
        with closing(writer):
            writer.send(None)
            for picture in pixels:
                writer.send(np.ascontiguousarray(picture))
    return Path(path)


def to_bytes(frames: Tensor) -> np.ndarray:
    """Frames `[F, 3, H, W]` in [0, 1], clamped and rounded to uint8 `[F, H, W, 3]`."""
    if not frames.is_floating_point():
        raise TypeError(f"frames must be floating point in [0, 1], got {frames.dtype}: divide bytes by 255 first.")
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise ValueError(f"frames must be [F, 3, H, W] with F, H, W >= 1, got {list(frames.shape)}.")
    pixels = (frames.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same suffix); renamed to `path` at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- in


def read(path: Path) -> Tensor:
    """Frames `[F, 3, H, W]`, float32 in [0, 1], of a video, a picture, a folder of pictures or a .safetensors file.

    A folder is read in natural order (2 before 10); an animated GIF gives all its frames; transparency is dropped.
    Raises ValueError (missing, empty, unreadable, of unequal sizes) or TypeError (integer frames in .safetensors).
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder '{path}'.")
    if path.is_dir():
        return read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return read_tensor(path)
    if suffix in PICTURES:
        return from_bytes(read_picture(path))
    if suffix in VIDEOS:
        return from_bytes(read_video(path))
    known = ", ".join((*VIDEOS, *PICTURES, ".safetensors"))
    raise ValueError(
        f"cannot read frames from '{path}': the suffix must be one of {known}, or give a folder of pictures."
    )


def read_video(path: Path) -> list[np.ndarray]:
    """Every stored frame once (no frame is doubled or dropped to keep a rate), uint8 `[H, W, 3]` each."""
    pictures, reason = [], "it holds no frame"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # imageio-ffmpeg leaves its pipes to the garbage collector
        try:
            with closing(imageio_ffmpeg.read_frames(path, output_params=["-fps_mode", "passthrough"])) as reader:
                width, height = next(reader)["size"]
                pictures = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
        except (OSError, RuntimeError, KeyError, IndexError) as error:
            reason = str(error).strip().splitlines()[-1]
        reader = None  # its pipes go here
    if not pictures:
        raise ValueError(f"cannot decode the video '{path}': {reason}.")
    return pictures


def read_picture(path: Path) -> list[np.ndarray]:
    """The frames of one picture file, uint8 `[H, W, 3]` each."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # PIL would clip them to 8 bits without a word
                raise ValueError(f"'{path}' has more than 8 bits a channel (mode {picture.mode}): give 8-bit pictures.")
            return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
    except OSError as error:
        raise ValueError(f"cannot read the picture '{path}': {error}") from error


def read_folder(path: Path) -> Tensor:
    """The pictures of a folder in natural order as frames `[F, 3, H, W]`."""

    def natural(file: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]

    files = sorted((file for file in path.iterdir() if file.suffix.lower() in PICTURES), key=natural)
    if not files:
        raise ValueError(f"the folder '{path}' holds no picture ({', '.join(PICTURES)}).")
    pictures = [picture for file in files for picture in read_picture(file)]
    if len(sizes := {picture.shape[:2] for picture in pictures}) > 1:
        raise ValueError(f"the pictures of '{path}' differ in size (height, width): {sorted(sizes)}.")
    return from_bytes(pictures)


def read_tensor(path: Path) -> Tensor:
    """The tensor "frames" of a .safetensors file, float32 `[F, 3, H, W]`."""
    with safe_open(path, framework="pt") as file:
        if "frames" not in (names := list(file.keys())):
            raise ValueError(f"'{path}' has no tensor named 'frames', only {sorted(names)}.")
        frames = file.get_tensor("frames")
    if not frames.is_floating_point():
        raise TypeError(f"frames in '{path}' must be floating point in [0, 1], got {frames.dtype}.")
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames in '{path}' must be [F, 3, H, W], got {list(frames.shape)}.")
    return frames.float()


def from_bytes(pictures: list[np.ndarray]) -> Tensor:
    """uint8 `[H, W, 3]` pictures to float32 frames `[F, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).contiguous()


# ---- side by side


def side_by_side(panels: Mapping[str, Tensor], smallest: int = 256) -> Tensor:
    """Frames of all panels in one row, each under a strip with its name: `[F, 3, H', W']`, on the CPU.

    panels: name -> frames `[F, 3, H, W]`, equal shapes. Small frames are enlarged by a whole factor (nearest
    neighbour, so no pixel is invented) until neither side is below `smallest`.
    Raises ValueError when there is no panel or the shapes differ.
    """
    shapes = {name: list(frames.shape) for name, frames in panels.items()}
    if not panels or any(shape != next(iter(shapes.values())) for shape in shapes.values()):
        raise ValueError(f"panels must be one or more videos of equal shape [F, 3, H, W], got {shapes}.")
    columns = []
    for name, frames in panels.items():
        factor = max(1, ceil(smallest / min(frames.shape[2:])))
        large = frames.detach().float().cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        strip = label(name, large.shape[3]).expand(len(large), -1, -1, -1)
        columns += [pad(torch.cat([strip, large], dim=2), (0, GAP), value=1.0)]
    return torch.cat(columns, dim=3)[..., :-GAP]


def label(text: str, width: int, height: int = 28) -> Tensor:
    """Black text on white, `[1, 3, height, width]`; the letters shrink until the text fits."""
    size = 18
    while size > 8 and ImageFont.load_default(size).getlength(text) > width - 8:
        size -= 1
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((4, height / 2), text, fill="black", font=ImageFont.load_default(size), anchor="lm")
    return from_bytes([np.asarray(strip)])
