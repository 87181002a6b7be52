"""No model at all: random q, k, v of one attention call, for timing kernels and checking their error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import InputError


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

    def qkv(self, seed: int) -> dict[str, Tensor]:
        """One captured call, named as the operator workload names them; the grid is a single row of tokens."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.heads, self.tokens, self.head_dim)
        kept = {f"random.{name}": torch.randn(shape, generator=g).to(getattr(torch, self.dtype)) for name in "qkv"}
        return {**kept, "random.grid": torch.tensor([1, 1, self.tokens, 0, 0])}
