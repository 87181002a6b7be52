"""Wan2.1 (diffusers' WanTransformer3DModel): where its self-attention sits and how its tokens lie.

Only `blocks.{i}.attn1` is replaced; `attn2` attends to text and stays. Tokens run frame by frame, row by row.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from harness.models.full import FullModel
from harness.models.stock import Replacement, replacements
from pisa import Grid

if TYPE_CHECKING:
    from harness.hook import Session


class WanSelfAttention(Replacement, WanAttnProcessor):
    """The stock processor's arithmetic on public submodules, with the attention itself handed to the session."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))  # [B, L, H, D]
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        o = self.session.attention(self.layer, rotate(q, *rotary_emb), rotate(k, *rotary_emb), v)
        return attn.to_out[1](attn.to_out[0](o.flatten(2).type_as(q)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on interleaved pairs; x `[B, L, H, D]`, cos and sin `[1, L, 1, D]`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = x.new_empty(x.shape)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


class WanFamily:
    """Wan's answers to the attention hook."""

    order = "raster"

    def processors(self, transformer: nn.Module, session: "Session") -> dict[str, Any]:
        names = [f"blocks.{i}.attn1.processor" for i in range(len(transformer.blocks))]
        return replacements(transformer, names, WanAttnProcessor, WanSelfAttention, session)

    def grid(self, transformer: nn.Module, inputs: dict[str, Any]) -> Grid:
        frames, height, width = inputs["hidden_states"].shape[2:]
        t, h, w = transformer.config.patch_size
        return Grid(frames // t, height // h, width // w)


@dataclass(kw_only=True)
class Wan(FullModel):
    """Wan2.1 text to video at full size. shift: of the noise schedule, 3 for 480p and 5 for 720p."""

    shift: float

    title = "Wan2.1"
    text_parts = ("tokenizer", "text_encoder")
    video = True
    activations = 26.0
    vae_dtype = "float32"  # as its authors run it
    family = WanFamily()

    @staticmethod
    def pipeline_class() -> type:
        from diffusers import WanPipeline

        return WanPipeline

    @staticmethod
    def classes() -> tuple[type, type]:
        from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

        return WanTransformer3DModel, UniPCMultistepScheduler

    def scheduler_settings(self) -> dict[str, Any]:
        return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": self.shift}

    @property
    def joint_text(self) -> int:
        return 0  # text has a cross-attention of its own

    @property
    def branches(self) -> int:
        return 2 if self.guidance > 1 else 1

    def random_embeddings(self, draw: Any) -> dict[str, Tensor]:
        shape = (1, self.text_tokens, self.outline.config.text_dim)
        words = {"prompt_embeds": draw(*shape)}
        return words | ({"negative_prompt_embeds": draw(*shape)} if self.branches > 1 else {})

    def text_embeddings(self, prompt: str) -> dict[str, Tensor]:
        guided = self.branches > 1
        words, negative = self.pipe.encode_prompt(prompt, None, guided, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": words, "negative_prompt_embeds": negative}

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, 16, F, h, w]` of one forward, conditional branch; timestep 0 to 1000."""
        dtype = getattr(torch, self.dtype)
        return self.transformer(
            hidden_states=latents.to(self.device, dtype),
            timestep=torch.tensor([timestep], device=self.device),
            encoder_hidden_states=self.encode(prompt)["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[F, 3, H, W]` fp32 in [0, 1] from latents `[1, 16, F, h, w]`."""
        vae = self.pipe.vae
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
        latents = latents.to(self.device, vae.dtype) * std.to(self.device) + mean.to(self.device)
        video = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return self.pipe.video_processor.postprocess_video(video, output_type="pt")[0].float()
