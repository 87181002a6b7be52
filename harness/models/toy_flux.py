"""toy_flux: a real FluxPipeline whose transformer is trained on drawn pictures (scripts/train_toy.py).

As in FLUX.1, 2 x 2 places of three channels make a token, text comes first and is padded, and the guidance scale is an
input of the model. The prompt's motion says where an object stands: left, right, up, down; swings: twice, mirrored;
circles: four times, around the middle.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.models.captions import Caption, pooled, sentence
from harness.models.toy import Toy

TEXT_TOKENS = 64  # one block, so that tiles of 8 x 8 stay whole in blocks of 64, as FLUX.1's 512 tokens do


@dataclass(kw_only=True)
class ToyFlux(Toy):
    """The settings of conf/model/toy_flux.yaml."""

    NAME = "toy_flux"
    PIPELINE = "FluxPipeline"
    LEFT_OUT = (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
    )
    PATCH = 2
    TRAINED = (1, 128, 128)

    frames: int = 1

    @cached_property
    def family(self) -> Any:
        from harness.models.flux import FluxFamily

        return FluxFamily()

    def prompt(self, seed: int) -> str:
        """Prompt number `seed` of the model's endless list; nothing moves in a picture."""
        return super().prompt(seed).replace("moves ", "")

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Text tokens `[1, 64, 64]` and their mean over the words `[1, 64]`, named as the pipeline takes them."""
        text, mask = sentence([Caption.parse(prompt)], self.vocabulary, TEXT_TOKENS)
        found = {"prompt_embeds": text, "pooled_prompt_embeds": pooled(text, mask)}
        return {name: x.to(self.device, self.torch_dtype) for name, x in found.items()}

    def noise(self, seed: int) -> Tensor:
        """Initial latents `[1, H/2 * W/2, 12]`, fp32, the same on every device."""
        return pack(super().noise(seed)[:, :, 0])

    @torch.no_grad()
    def generate(self, prompt: str, seed: int) -> Tensor:
        """Latents `[1, H/2 * W/2, 12]` fp32 of one sample."""
        return self.pipe(
            **self.encode(prompt),
            height=8 * self.height,  # the pipeline believes in a VAE that shrinks space by 8
            width=8 * self.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            latents=self.noise(seed).to(self.device),
            output_type="latent",
        ).images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The picture `[1, 3, H, W]` fp32 in [0, 1] from latents `[1, H/2 * W/2, 12]`."""
        return super().decode(unpack(latents, self.height, self.width)[:, :, None])

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, H/2 * W/2, 12]` of one forward; timestep from 0 to 1."""
        words = self.encode(prompt)
        return self.transformer(
            hidden_states=latents.to(self.device, self.torch_dtype),
            timestep=torch.tensor([timestep], device=self.device),
            guidance=torch.tensor([self.guidance], device=self.device),
            encoder_hidden_states=words["prompt_embeds"],
            pooled_projections=words["pooled_prompt_embeds"],
            txt_ids=torch.zeros(TEXT_TOKENS, 3, device=self.device, dtype=self.torch_dtype),
            img_ids=positions(self.height, self.width).to(self.device, self.torch_dtype),
            return_dict=False,
        )[0]


def pack(pictures: Tensor) -> Tensor:
    """Tokens `[B, H/2 * W/2, 12]` of pictures `[B, 3, H, W]`, row by row, the channels in FLUX.1's order."""
    return torch.nn.functional.pixel_unshuffle(pictures, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Pictures `[B, 3, H, W]` of tokens `[B, H/2 * W/2, 12]`."""
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def positions(height: int, width: int) -> Tensor:
    """(0, row, column) of every token of an H x W picture, `[H/2 * W/2, 3]` fp32."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    return torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())
