"""Procedural videos and pictures for the toy models, drawn by torch on any device: textured shapes over a background.

What makes them need long-range attention: an object keeps its colour, its texture (which moves with it) and its path
over all frames, may be hidden behind the other and return, and the background is one pattern over the whole picture.
In a picture the copies of an object, mirrored or turned around the middle, share shade, size and texture.
Look at some: `python scripts/toy_videos.py videos.png pictures.png`.
"""

import math
import random
import sys
from pathlib import Path

import torch
from PIL import Image
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


COPIES = 4


def draw_captions(n: int, seed: int, objects: int | None = None) -> list[Caption]:
    """Random captions, all with this many objects or each with one or two."""
    rng = random.Random(seed)
    return [Caption.draw(rng, objects) for _ in range(n)]


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

    uniform = _uniform(g)
    x, y = _pixels(size, device)
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


def render_pictures(captions: list[Caption], size: int, g: torch.Generator) -> Tensor:
    """Pictures `[B, 3, size, size]` in [-1, 1], fp32, on g's device; places, shades and palettes are drawn from g.

    The motion says where an object stands: left, right, up, down; swings: twice, mirrored; circles: four times, turned
    around the middle.
    """
    device, n = g.device, len(captions)
    codes = encode(captions, device)
    uniform = _uniform(g)
    x, y = _pixels(size, device)
    still = torch.full((n, 1), 0.5, device=device)
    picture = _background(codes["background"], x, y, still, uniform)[:, :, 0]  # [B, 3, S, S]
    for i in reversed(range(MAX_OBJECTS)):
        colour, texture, shape, place = codes["objects"][:, i].unbind(1)
        cx, cy, angle, mirror, shown, radius = _places(place, uniform)  # [B, 4] each, radius [B]
        dx, dy = ((c - centre[..., None, None]) for c, centre in ((x, cx), (y, cy)))  # [B, 4, S, S]
        cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
        u, v = (cos * dx + sin * dy) * mirror[..., None, None], cos * dy - sin * dx
        alpha = _shape(shape, u, v, radius) * (shown * (colour >= 0)[:, None])[..., None, None]
        shift = uniform(2, n, 1, 1, 1, high=11.0)
        dark = _texture(texture, u + shift[0], v + shift[1])
        shade = uniform(n, 3, 1, 1, 1, low=0.8, high=1.0)
        paint = RGB.to(device)[colour.clamp(min=0)].view(n, 3, 1, 1, 1) * shade * (1 - 0.78 * dark)[:, None]
        for copy in range(COPIES):
            picture = torch.lerp(picture, paint[:, :, copy], alpha[:, None, copy])
    return picture.clamp(0, 1) * 2 - 1


def _places(place: Tensor, uniform) -> tuple[Tensor, ...]:
    """Where an object's copies are: centres x and y, angle, mirror (1 or -1), shown (0 or 1) `[B, 4]`, radius `[B]`."""
    n, device = len(place), place.device
    near, across = uniform(n, 1, low=14, high=22), uniform(n, 1, low=18, high=46)
    tilt = uniform(n, 1, low=-0.4, high=0.4)
    copy = torch.arange(COPIES, device=device).expand(n, COPIES)
    quarter = copy * (math.pi / 2)
    around = quarter + uniform(n, 1, high=math.pi / 2)
    away = uniform(n, 1, low=17, high=20)
    side = 1.0 - 2.0 * (copy % 2)  # 1, -1, 1, -1
    one = torch.ones_like(side)
    single = ((copy == 0) * one, uniform(n, 1, low=11, high=14) * one)
    double = ((copy < 2) * one, uniform(n, 1, low=9, high=12) * one)
    four = (one, uniform(n, 1, low=7.5, high=9.5) * one)
    kinds = (  # x, y, angle, mirror, shown, radius for every word of MOTIONS
        (near, across, tilt, one, *single),
        (64 - near, across, tilt, one, *single),
        (across, near, tilt, one, *single),
        (across, 64 - near, tilt, one, *single),
        (32 + away * around.cos(), 32 + away * around.sin(), tilt + quarter, one, *four),
        (32 + side * (32 - near), across, side * tilt, side, *double),
    )
    pick = place.clamp(min=0).view(1, n, 1).expand(1, n, COPIES)
    stacks = (torch.stack([c.expand(n, COPIES) for c in column]) for column in zip(*kinds, strict=True))
    *found, radius = (stack.gather(0, pick)[0] for stack in stacks)
    return *found, radius[:, 0]


def _uniform(g: torch.Generator):
    """A function that draws uniform numbers of any shape from g."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=g, device=g.device) * (high - low) + low

    return uniform


def _pixels(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y `[S, S]` of every pixel's middle; all lengths here are for a picture of 64 x 64."""
    y, x = torch.meshgrid(*(torch.arange(size, device=device) + 0.5,) * 2, indexing="ij")
    return x * (64 / size), y * (64 / size)


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


def sheet(samples: list[Tensor], columns: int = 8) -> Tensor:
    """One picture `[H, W, 3]` uint8 of samples `[F, 3, S, S]` in [0, 1]: a row of frames each, or pictures in rows."""
    if samples[0].shape[0] == 1:
        rows = [torch.cat(samples[i : i + columns]) for i in range(0, len(samples) - columns + 1, columns)]
    else:
        rows = [x[torch.linspace(0, len(x) - 1, columns).round().long()] for x in samples]
    whole = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)  # [3, H, W]
    return (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()


def save(samples: list[Tensor], path: Path) -> None:
    """Writes a sheet as PNG."""
    Image.fromarray(sheet(samples).numpy()).save(path)


if __name__ == "__main__":
    examples = draw_captions(16, seed=1)
    print("\n".join(map(str, examples)))
    g = torch.Generator().manual_seed(0)
    videos, pictures = render(examples[:8], 16, 64, g), render_pictures(examples, 128, g)
    save([v.transpose(0, 1).add(1).div(2) for v in videos], Path(sys.argv[1]))
    save([p[None].add(1).div(2) for p in pictures], Path(sys.argv[2]))
