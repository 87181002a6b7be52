"""`python -m harness score a b [metrics.protocol=v1]`: the quality metrics of two videos, pictures or folders."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness import media
from harness.errors import InputError
from harness.metrics import Protocol

USAGE = "usage: python -m harness score DENSE OTHER [metrics.protocol=v1]"


def score(a: Path, b: Path, protocol: str = "v1") -> dict:
    """Quality of `b` against the dense `a`, as record columns (see harness.metrics.Quality).

    a, b: a video, a picture, a folder of pictures, or a .safetensors file with the tensor "frames" `[F, 3, H, W]`.
    Raises ValueError or TypeError: unknown protocol, unreadable file, shapes that the protocol does not accept.
    """
    metric = Protocol(protocol)
    paths = Path(a), Path(b)
    dense, video = (media.read(path) for path in paths)
    decoded = tuple(media.is_video(path) for path in paths)
    quality = asdict(metric(dense, video, decoded=decoded))
    if any(decoded) and not metric.formula.files:
        note = "read from video files: the codec's own loss is part of every number"
        quality["notes"] = "; ".join(filter(None, [quality["notes"], note]))
    return quality


def main(args: Sequence[str]) -> int:
    """Print one table for the words after `score`. Raises InputError: unknown words, or what `score` refuses."""
    paths, protocol = [], "v1"
    for word in args:
        name, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            paths.append(Path(word))
        elif name in ("metrics.protocol", "metrics"):
            protocol = value
        else:
            raise InputError(f"score does not know '{word}'; {USAGE}")
    if len(paths) != 2:
        raise InputError(f"score compares two paths, got {len(paths)}; {USAGE}")
    try:
        quality = score(*paths, protocol)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    Console().print(table(quality))
    return 0


def table(quality: dict) -> Table:
    """The result of `score` with units; what was not measured is a dash, what is infinite says identical."""
    frames = quality["psnr_frames"]
    infinite = "identical" if quality["identical"] else "-"
    rows = [
        ("PSNR, by the protocol", quality["psnr_db"], "dB", 2),
        ("PSNR, whole video pooled", quality["psnr_pooled_db"], "dB", 2),
        ("PSNR, worst frame", quality["psnr_min_db"], "dB", 2),
        ("SSIM", quality["ssim"], "0 to 1, more is closer", 4),
        ("LPIPS (AlexNet)", quality["lpips"], "less is closer", 4),
        ("flicker", quality["flicker"], "mean change per frame, 0 to 1", 4),
        ("flicker of the dense one", quality["flicker_dense"], "mean change per frame, 0 to 1", 4),
    ]
    result = Table("metric", "value", "unit", title=f"protocol {quality['protocol']}", caption=quality["notes"] or None)
    for name, value, unit, digits in rows:
        missing = infinite if unit == "dB" else "-"
        result.add_row(name, missing if value is None else f"{value:.{digits}f}", unit)
    result.add_row("frames", str(len(frames)), f"{frames.count(None)} identical")
    return result
