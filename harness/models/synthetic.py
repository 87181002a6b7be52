"""No model at all: random q, k, v of one attention call, for timing kernels and checking their error."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.errors import InputError
from harness.shapes import SIZES
from pisa import Grid


@dataclass
class Synthetic:
    """The settings of conf/model/synthetic.yaml; tensors are `[batch, heads, tokens, head_dim]`."""

    weights: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    dense_steps: int
    dense_layers: int
    order: str
    device: str = "cpu"
    _made: tuple[int, tuple[Tensor, ...]] | None = field(default=None, init=False, repr=False)

    def check(self) -> None:
        """Raises InputError in one sentence."""
        if min(self.batch, self.heads, self.tokens) < 1:
            raise InputError("model.batch, model.heads and model.tokens must be at least 1.")
        if self.head_dim not in (32, 64, 96, 128):
            raise InputError(f"model.head_dim must be 32, 64, 96 or 128, got {self.head_dim}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"model.dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")

    def prompt(self, seed: int) -> None:
        return None

    @property
    def grid(self) -> Grid:
        """A single row of tokens."""
        return Grid(1, 1, self.tokens)

    def qkv(self, seed: int) -> tuple[Tensor, ...]:
        """q, k, v of the seed, drawn where they are needed: a seed is all there is to store. The last three stay.

        A GPU draws other numbers than a CPU does, and the same ones every time.
        """
        if self._made is None or self._made[0] != seed:
            self._made = None  # free before the next: long calls take gigabytes
            g = torch.Generator(self.device).manual_seed(seed)
            shape, dtype = tuple(getattr(self, size) for size in SIZES), getattr(torch, self.dtype)
            draw = torch.float32 if self.device == "cpu" else dtype
            made = (torch.randn(shape, generator=g, device=self.device, dtype=draw).to(dtype) for _ in "qkv")
            self._made = (seed, tuple(made))
        return self._made[1]
