"""Procedural videos for the toy models, drawn by torch on any device: textured shapes move over a drifting background.

What makes them need long-range attention: an object keeps its colour, its texture (which moves with it) and its path
over all frames, may be hidden behind the other and return, and the background is one pattern over the whole picture.
Look at some: `python scripts/toy_videos.py out.png`.
"""

import math
import random
import sys

import torch
from torch import Tensor

from harness.models.captions import BACKGROUNDS, COLOURS, MAX_OBJECTS, MOTIONS, SHAPES, TEXTURES, Caption

RGB = torch.tensor(
    [
        (0.92, 0.15, 0.15),
        (0.15, 0.75, 0.20),
        (0.20, 0.32, 0.98),
        (0.97, 0.87, 0.12),
        (0.12, 0.85, 0.92),
        (0.92, 0.20, 0.85),
        (0.99, 0.52, 0.08),
        (0.96, 0.96, 0.96),
    ]
)


def draw_captions(n: int, seed: int) -> list[Caption]:
    rng = random.Random(seed)
    return [Caption.draw(rng) for _ in range(n)]


def encode(captions: list[Caption], device: torch.device | str) -> dict[str, Tensor]:
    """Caption words as numbers: objects `[B, 2, 4]` (-1 where there is no second one), background `[B]`."""
    slots = (COLOURS, TEXTURES, SHAPES, MOTIONS)
    objects = torch.full((len(captions), MAX_OBJECTS, 4), -1)
    for b, caption in enumerate(captions):
        for i, words in enumerate(caption.objects):
            objects[b, i] = torch.tensor([slot.index(w) for slot, w in zip(slots, words, strict=True)])
    background = torch.tensor([BACKGROUNDS.index(c.background) for c in captions])
    return {"objects": objects.to(device), "background": background.to(device)}


def render(captions: list[Caption], frames: int, size: int, g: torch.Generator, first: Tensor | None = None) -> Tensor:
    """Videos `[B, 3, frames, size, size]` in [-1, 1], fp32, on g's device; positions and palettes are drawn from g.

    A whole path takes 16 frames; `first` `[B]` says at which of them a shorter clip starts (0 if None).
    """
    device, n = g.device, len(captions)
    codes = encode(captions, device)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=g, device=device) * (high - low) + low

    y, x = torch.meshgrid(*(torch.arange(size, device=device) + 0.5,) * 2, indexing="ij")
    x, y = (c * (64 / size) for c in (x, y))  # all lengths below are for a picture of 64 x 64
    frame = torch.arange(frames, device=device) + (0 if first is None else first.to(device)[:, None])
    t = (frame / 16.0).expand(n, frames)  # [B, F]
    picture = _background(codes["background"], x, y, t, uniform)
    for i in reversed(range(MAX_OBJECTS)):  # the object named first is drawn last, in front
        colour, texture, shape, motion = codes["objects"][:, i].unbind(1)
        radius = uniform(n, low=11.0, high=14.0)
        cx, cy = _path(motion, t, uniform)  # [B, F]
        dx, dy = x - cx[..., None, None], y - cy[..., None, None]  # [B, F, S, S]
        alpha = _shape(shape, dx, dy, radius) * (colour >= 0).float().view(n, 1, 1, 1)
        dark = _texture(texture, dx, dy)
        paint = RGB.to(device)[colour.clamp(min=0)].view(n, 3, 1, 1, 1) * (1 - 0.78 * dark)[:, None]
        picture = picture * (1 - alpha[:, None]) + paint * alpha[:, None]
    return picture.clamp(0, 1) * 2 - 1


def _path(motion: Tensor, t: Tensor, uniform) -> tuple[Tensor, Tensor]:
    """Centres `[B, F]` in pixels of a 64 x 64 picture."""
    n = len(motion)
    along, across = uniform(n, 1, low=28, high=36), uniform(n, 1, low=16, high=48)
    phase, turn = uniform(n, 1, high=2 * math.pi), uniform(n, 1).round() * 2 - 1
    travel = 32 * (t - 0.5)
    angle = 2 * math.pi * t * turn + phase
    xs = (along - travel, along + travel, across, across, along + 13 * angle.cos(), along + 15 * angle.sin())
    ys = (across, across, along - travel, along + travel, along + 13 * angle.sin(), across)
    pick = motion.clamp(min=0).view(1, n, 1).expand(1, n, t.shape[1])
    cx, cy = (torch.stack([c.expand_as(t) for c in cs]).gather(0, pick)[0] for cs in (xs, ys))
    return cx, cy


def _shape(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Coverage `[B, F, S, S]` in [0, 1] with soft edges one pixel wide."""
    r = radius.view(-1, 1, 1, 1)
    u, v = dx / r, dy / r
    distance = torch.hypot(u, v)
    signed = torch.stack(
        [
            distance - 0.95,
            torch.maximum(u.abs(), v.abs()) - 0.82,
            torch.maximum(v - 0.8, (1.8 * u.abs() - 1.0 * (v + 1)) / 2.06),
            torch.minimum(torch.maximum(u.abs() - 1.0, v.abs() - 0.34), torch.maximum(u.abs() - 0.34, v.abs() - 1.0)),
            (distance - 0.74).abs() - 0.26,
        ]
    )
    pick = shape.clamp(min=0).view(1, -1, 1, 1, 1).expand(1, *dx.shape)
    return (0.5 - signed.gather(0, pick)[0] * r).clamp(0, 1)


def _texture(texture: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """How dark the second tone is, `[B, F, S, S]` in [0, 1]; the pattern is fixed to the object."""
    wave_x, wave_y = (torch.sin(2 * math.pi * c / 11.0) for c in (dx, dy))
    dots = torch.hypot(*((c + 4.5) % 9.0 - 4.5 for c in (dx, dy)))
    dark = torch.stack(
        [
            torch.zeros_like(dx),
            (torch.sin(2 * math.pi * dy / 8.0) * 2.5 + 0.5).clamp(0, 1),
            (wave_x * wave_y * 4 + 0.5).clamp(0, 1),
            (2.9 - dots).clamp(0, 1),
        ]
    )
    return dark.gather(0, texture.clamp(min=0).view(1, -1, 1, 1, 1).expand(1, *dx.shape))[0]


def _background(kind: Tensor, x: Tensor, y: Tensor, t: Tensor, uniform) -> Tensor:
    """`[B, 3, F, S, S]`: a muted palette whose pattern drifts slowly."""
    n = len(kind)
    heading = uniform(n, 1, high=2 * math.pi)
    drift = 10 * t - 5
    bx = (x - (drift * heading.cos())[..., None, None]) + uniform(n, 1, 1, 1, high=64)
    by = (y - (drift * heading.sin())[..., None, None]) + uniform(n, 1, 1, 1, high=64)
    clouds = torch.zeros_like(bx)
    for _ in range(5):
        kx, ky = (uniform(n, 1, 1, 1, low=-0.22, high=0.22) for _ in range(2))
        clouds = clouds + torch.sin(kx * bx + ky * by + uniform(n, 1, 1, 1, high=2 * math.pi)) / 2.2
    waves = torch.sin(2 * math.pi * by / 13.0 + 1.6 * torch.sin(2 * math.pi * bx / 32.0))
    row = torch.floor(by / 9.0)
    edge = torch.minimum(4.5 - (by % 9.0 - 4.5).abs(), 9.0 - ((bx + 9.0 * (row % 2)) % 18.0 - 9.0).abs())
    bricks = (edge - 1.2).clamp(-1, 1)
    fog = (y - 32).expand_as(bx) / 32
    pattern = torch.stack([fog, clouds, waves, bricks])
    pattern = pattern.gather(0, kind.view(1, n, 1, 1, 1).expand(1, *bx.shape))[0]
    base = uniform(n, 3, 1, 1, 1, low=0.25, high=0.5)
    return base + 0.13 * pattern[:, None] * uniform(n, 3, 1, 1, 1, low=0.6, high=1.0)


def strip(videos: Tensor, columns: int = 8) -> Tensor:
    """Rows of evenly spaced frames as one picture `[3, n*S, columns*S]` in [0, 1]."""
    pick = torch.linspace(0, videos.shape[2] - 1, columns).round().long()
    rows = [torch.cat(list(v[:, pick].unbind(1)), dim=-1) for v in videos]
    return torch.cat(rows, dim=-2).add(1).div(2).clamp(0, 1)


if __name__ == "__main__":
    from torchvision.utils import save_image

    examples = draw_captions(8, seed=1)
    print("\n".join(map(str, examples)))
    save_image(strip(render(examples, 16, 64, torch.Generator().manual_seed(0))), sys.argv[1])
