"""What the toy models share: settings, checks, prompts, and a pipeline of diffusers read from a folder.

A toy is a real pipeline, small enough to ship, whose transformer scripts/train_toy.py trains on pictures or videos that
it draws. It works on pixels (no VAE) and knows a small vocabulary (harness/models/captions.py), so that quality can be
judged with learned attention on a laptop.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.errors import InputError
from harness.models.captions import Caption, load_vocabulary
from harness.models.settings import check_steps

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(kw_only=True)
class Toy(ABC):
    """The settings that every conf/model/toy_*.yaml has; `pipe` loads the pipeline when first asked for.

    A toy says of itself: its name, its pipeline's class in diffusers and the parts of it that are left out, the pixels
    along a token's edge, and the size it was trained at (frames, height, width).
    """

    NAME: ClassVar[str]
    PIPELINE: ClassVar[str]
    LEFT_OUT: ClassVar[tuple[str, ...]]
    PATCH: ClassVar[int]
    TRAINED: ClassVar[tuple[int, int, int]]

    weights: str
    path: str | None
    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    dense_steps: int
    dense_layers: int
    order: str
    dtype: str
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        return Path(self.path) if self.path else ASSETS / self.NAME

    @property
    def weights_file(self) -> Path:
        return self.folder / "transformer" / "diffusion_pytorch_model.safetensors"

    @property
    def tokens(self) -> int:
        """Video or image tokens, without text."""
        return self.frames * (self.height // self.PATCH) * (self.width // self.PATCH)

    def check(self) -> None:
        """Everything that can be wrong before work starts. Raises InputError in one sentence."""
        if self.weights not in ("toy", "random"):
            raise InputError(f"model.weights must be toy (trained) or random (for latency only), got {self.weights!r}.")
        edges = (self.height, self.width)
        if min(self.frames, *edges) < 1 or any(edge % self.PATCH or edge > 1024 * self.PATCH for edge in edges):
            raise InputError(
                f"{self.NAME} cannot make {_size(self.frames, *edges)}: height and width must be multiples of "
                f"{self.PATCH} pixels up to {1024 * self.PATCH} (it was trained at {_size(*self.TRAINED)})."
            )
        check_steps(self.steps, self.dense_steps, self.dense_layers)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"model.dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")
        self._check_weights()

    def _check_weights(self) -> None:
        from safetensors import SafetensorError, safe_open

        if not self.weights_file.is_file():
            raise InputError(
                f"there are no {self.NAME} weights at {self.weights_file}: train them with "
                f"`{training_command(self.NAME)}`, then say model.path=runs/{self.NAME}/{self.NAME}_latest."
            )
        try:
            with safe_open(self.weights_file, "pt") as file:
                file.keys()
        except SafetensorError as error:
            raise InputError(
                f"the weights {self.weights_file} are damaged ({error}): fetch or train them again."
            ) from error

    def prompt(self, seed: int) -> str:
        """Prompt number `seed` of the model's endless list."""
        return str(Caption.draw(random.Random(1000 + seed)))

    def check_prompt(self, prompt: str) -> None:
        """Raises InputError for a word that the toys do not know."""
        try:
            Caption.parse(prompt)
        except ValueError as error:
            raise InputError(str(error)) from error

    @cached_property
    def vocabulary(self) -> dict[str, Tensor]:
        """The word vectors that the model was trained with."""
        return load_vocabulary(self.folder)

    @property
    @abstractmethod
    def family(self) -> Any:
        """The family's answers to the attention hook."""

    @cached_property
    def pipe(self) -> Any:
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        pipe = getattr(diffusers, self.PIPELINE).from_pretrained(
            self.folder, **dict.fromkeys(self.LEFT_OUT), dtype=self.torch_dtype
        )
        if self.weights == "random":
            torch.manual_seed(0)
            fresh = type(pipe.transformer).from_config(pipe.transformer.config)
            pipe.transformer.load_state_dict(fresh.state_dict())
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    def noise(self, seed: int) -> Tensor:
        """Gaussian pixels `[1, 3, F, H, W]`, fp32, the same on every device: the initial latents of a video toy."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(1, 3, self.frames, self.height, self.width, generator=g)

    @abstractmethod
    def generate(self, prompt: str, seed: int) -> Tensor:
        """Latents, fp32, of one sample; a video toy's are `[1, 3, F, H, W]`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[F, 3, H, W]` fp32 in [0, 1] from latents `[1, 3, F, H, W]`."""
        return latents[0].transpose(0, 1).add(1).div(2).clamp(0, 1).float()

    @abstractmethod
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction of one forward for latents and a timestep as the transformer takes them."""


def training_command(name: str) -> str:
    """What makes the weights of a toy."""
    return f"python scripts/train_toy.py --model {name} --out runs/{name}"


def _size(frames: int, height: int, width: int) -> str:
    return f"{frames} frames of {height} x {width}" if frames != 1 else f"a picture of {height} x {width}"
