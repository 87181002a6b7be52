"""toy_hunyuan: a real HunyuanVideoPipeline whose transformer is trained on drawn videos.

As in HunyuanVideo, text comes last, prompts have lengths of their own and are padded behind a mask, a refiner prepares
the text, and the guidance scale is an input of the model.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.errors import InputError
from harness.models.captions import TEXT_TOKENS, Caption, pooled, sentence
from harness.models.toy import Toy


@dataclass(kw_only=True)
class ToyHunyuan(Toy):
    """The settings of conf/model/toy_hunyuan.yaml. text_tokens: the length that every prompt is padded to."""

    NAME = "toy_hunyuan"
    PIPELINE = "HunyuanVideoPipeline"
    LEFT_OUT = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    PATCH = 4
    TRAINED = (16, 64, 64)

    text_tokens: int

    @cached_property
    def family(self) -> Any:
        from harness.models.hunyuan_video import HunyuanVideoFamily

        return HunyuanVideoFamily()

    def check(self) -> None:
        super().check()
        if self.text_tokens < TEXT_TOKENS:
            raise InputError(
                f"model.text_tokens must be at least {TEXT_TOKENS}, the length of the longest prompt, "
                f"got {self.text_tokens}."
            )

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Text tokens `[1, T, 64]`, their mask `[1, T]` and their mean `[1, 64]`, named as the pipeline takes them."""
        text, mask = sentence([Caption.parse(prompt)], self.vocabulary, self.text_tokens)
        found = {"prompt_embeds": text, "prompt_attention_mask": mask, "pooled_prompt_embeds": pooled(text, mask)}
        return {name: x.to(self.device, self.torch_dtype) for name, x in found.items()}

    @torch.no_grad()
    def generate(self, prompt: str, seed: int) -> Tensor:
        """Latents `[1, 3, F, H, W]` fp32 of one sample."""
        return self.pipe(
            **self.encode(prompt),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            latents=self.noise(seed).to(self.device),  # their size is the video's, whatever the pipeline's default
            output_type="latent",
        ).frames.float()

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, 3, F, H, W]` of one forward; timestep from 0 to 1000."""
        words = self.encode(prompt)
        return self.transformer(
            hidden_states=latents.to(self.device, self.torch_dtype),
            timestep=torch.tensor([timestep], device=self.device),
            guidance=torch.tensor([1000 * self.guidance], device=self.device, dtype=self.torch_dtype),
            encoder_hidden_states=words["prompt_embeds"],
            encoder_attention_mask=words["prompt_attention_mask"],
            pooled_projections=words["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
