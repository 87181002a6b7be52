"""toy_wan: a real WanPipeline whose transformer was trained on drawn videos (scripts/train_toy.py)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.models.captions import Caption, embed
from harness.models.toy import Toy


@dataclass(kw_only=True)
class ToyWan(Toy):
    """The settings of conf/model/toy_wan.yaml."""

    NAME = "toy_wan"
    PIPELINE = "WanPipeline"
    LEFT_OUT = ("vae", "text_encoder", "tokenizer")
    PATCH = 4
    TRAINED = (16, 64, 64)

    @cached_property
    def family(self) -> Any:
        from harness.models.wan import WanFamily

        return WanFamily()

    def encode(self, prompt: str | None) -> Tensor:
        """Text tokens `[1, 9, 64]`; None is the empty prompt."""
        caption = None if prompt is None else Caption.parse(prompt)
        return embed([caption], self.vocabulary).to(self.device, self.torch_dtype)

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

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, 3, F, H, W]` of one forward, conditional branch; timestep from 0 to 1000."""
        return self.transformer(
            hidden_states=latents.to(self.device, self.torch_dtype),
            timestep=torch.tensor([timestep], device=self.device),
            encoder_hidden_states=self.encode(prompt),
            return_dict=False,
        )[0]
