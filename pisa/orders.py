"""Token orders: which tokens share a block. An order is called as `order(q, k, grid)`.

It returns the permutation `[L]` int64 so that `x[:, :, permutation]` is the new order, or None when nothing moves.
A static order looks at the grid alone, so that a model can put its tokens in it once for all layers; the signature
leaves room for orders that cluster q or k. Text stays in place.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .blocks import Grid


@dataclass(frozen=True)
class Raster:
    """Frame by frame, line by line, as the model has it."""

    def __call__(self, q: Tensor, k: Tensor, grid: Grid | None) -> None:
        return None


@dataclass(frozen=True)
class Tile2D:
    """Tiles of height x width inside each frame; 8 x 8 puts one tile in a block of 64 (PISA on FLUX.1)."""

    height: int = 8
    width: int = 8

    static: ClassVar[bool] = True

    def __call__(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return tile_order(grid, (1, self.height, self.width), q.device)


@dataclass(frozen=True)
class Tile3D:
    """Tiles of frames x height x width; 4 x 4 x 4 puts one tile in a block of 64."""

    frames: int = 4
    height: int = 4
    width: int = 4

    static: ClassVar[bool] = True

    def __call__(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return tile_order(grid, (self.frames, self.height, self.width), q.device)


ORDERS = {"raster": Raster, "tile_2d": Tile2D, "tile_3d": Tile3D}


def named(name: str, tile: tuple[int, ...] = ()) -> Raster | Tile2D | Tile3D:
    """The order called `name`, with its tile edges where it has any. Raises ValueError for an unknown name."""
    if name not in ORDERS:
        near = get_close_matches(name, ORDERS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"No order '{name}'.{hint} Allowed: {', '.join(ORDERS)}.")
    return ORDERS[name](*tile)


@lru_cache(maxsize=64)
def tile_order(grid: Grid, tile: tuple[int, int, int], device: torch.device) -> Tensor:
    """Tokens by tile, raster inside a tile, `[L]` int64; tiles at the far edges may be cut. Do not write to it."""
    if min(tile) < 1:
        raise ValueError(f"Tile edges must be at least 1, got {tile}.")
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in (grid.frames, grid.height, grid.width)), indexing="ij")
    tiles_h, tiles_w = -(-grid.height // tile[1]), -(-grid.width // tile[2])
    number = ((t // tile[0]) * tiles_h + h // tile[1]) * tiles_w + w // tile[2]
    video = number.flatten().argsort(stable=True)
    text = torch.arange(grid.text)
    permutation = [text, video + grid.text] if grid.text_first else [video, text + grid.video]
    return torch.cat(permutation).to(device)


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes `permutation`: `x[permutation][inverse(permutation)]` is x."""
    numbers = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, numbers)
