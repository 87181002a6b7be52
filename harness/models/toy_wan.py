"""toy_wan: a real WanPipeline whose transformer was trained for this project on drawn videos (scripts/train_toy.py).

It works on pixels (no VAE) and knows a small vocabulary (harness/models/captions.py), so that quality can be judged
with learned attention on a laptop.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import InputError
from harness.models.captions import Caption, embed, load_vocabulary

ASSETS = Path(__file__).parent.parent / "assets"
TRAINED_SIZE = (16, 64, 64)


@dataclass
class ToyWan:
    """The settings of conf/model/toy_wan.yaml; `pipe` loads the pipeline when first asked for."""

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
        return Path(self.path) if self.path else ASSETS / "toy_wan"

    @property
    def weights_file(self) -> Path:
        return self.folder / "transformer" / "diffusion_pytorch_model.safetensors"

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // 4) * (self.width // 4)

    def check(self) -> None:
        """Everything that can be wrong before work starts. Raises InputError in one sentence."""
        if self.weights not in ("toy", "random"):
            raise InputError(f"model.weights must be toy (trained) or random (for latency only), got {self.weights!r}.")
        size = (self.frames, self.height, self.width)
        if min(size) < 1 or self.height % 4 or self.width % 4 or max(self.height, self.width) > 4 * 1024:
            raise InputError(
                f"toy_wan cannot make {self.frames} frames of {self.height} x {self.width}: height and width must be "
                f"multiples of 4 pixels (it was trained at {TRAINED_SIZE[0]} frames of 64 x 64)."
            )
        if self.steps < 1 or not 0 <= self.dense_steps <= self.steps or self.dense_layers < 0:
            raise InputError(
                f"model.steps must be at least 1 and dense_steps from 0 to it, dense_layers at least 0; "
                f"got steps={self.steps}, dense_steps={self.dense_steps}, dense_layers={self.dense_layers}."
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"model.dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")
        self._check_weights()

    def _check_weights(self) -> None:
        from safetensors import SafetensorError, safe_open

        if not self.weights_file.is_file():
            raise InputError(
                f"there are no toy_wan weights at {self.weights_file}: reinstall the package, or name a folder that "
                "scripts/train_toy.py wrote with model.path=."
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
        try:
            Caption.parse(prompt)
        except ValueError as error:
            raise InputError(str(error)) from error

    @cached_property
    def family(self) -> Any:
        from harness.models.wan import WanFamily

        return WanFamily()

    @cached_property
    def pipe(self) -> Any:
        from diffusers import WanPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        pipe = WanPipeline.from_pretrained(
            self.folder, vae=None, text_encoder=None, tokenizer=None, dtype=getattr(torch, self.dtype)
        )
        if self.weights == "random":
            torch.manual_seed(0)
            fresh = type(pipe.transformer).from_config(pipe.transformer.config)
            pipe.transformer.load_state_dict(fresh.state_dict())
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    def noise(self, seed: int) -> Tensor:
        """Initial latents `[1, 3, F, H, W]`, fp32, the same on every device."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(1, 3, self.frames, self.height, self.width, generator=g)

    def encode(self, prompt: str | None) -> Tensor:
        """Text tokens `[1, 9, 64]`; None is the empty prompt."""
        caption = None if prompt is None else Caption.parse(prompt)
        return embed([caption], load_vocabulary(self.folder)).to(self.device, getattr(torch, self.dtype))

    @torch.no_grad()
    def generate(self, prompt: str, seed: int) -> Tensor:
        """Latents `[1, 3, F, H, W]` fp32 of one sample."""
        return self.pipe(
            prompt_embeds=self.encode(prompt),
            negative_prompt_embeds=self.encode(None),
            num_frames=4 * self.frames - 3,  # the pipeline believes in a VAE that shrinks time by 4 and space by 8
            height=8 * self.height,
            width=8 * self.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            latents=self.noise(seed).to(self.device),
            output_type="latent",
        ).frames.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[F, 3, H, W]` fp32 in [0, 1] from latents `[1, 3, F, H, W]`."""
        return latents[0].transpose(0, 1).add(1).div(2).clamp(0, 1).float()

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, 3, F, H, W]` of one forward, conditional branch."""
        dtype = getattr(torch, self.dtype)
        return self.transformer(
            hidden_states=latents.to(self.device, dtype),
            timestep=torch.tensor([timestep], device=self.device),
            encoder_hidden_states=self.encode(prompt),
            return_dict=False,
        )[0]
