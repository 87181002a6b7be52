"""Stable Diffusion 3 and 3.5 (diffusers' SD3Transformer2DModel): where its self-attention sits and how its tokens lie.

`transformer_blocks.{i}.attn` is joint, text last: `[image, text]`, the image row by row. In the medium model the first
blocks also have `attn2`, over the image alone. Both are layers, numbered as they run (attn, then attn2 of a block);
the session's `dense_layers` counts blocks. There is no RoPE: positions were added to the latents.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from harness.models.full import FullModel
from harness.models.stock import (
    Replacement,
    join,
    own_projections,
    project,
    replacements,
    text_projections,
)
from pisa import Grid

if TYPE_CHECKING:
    from harness.hook import Session


class SD3SelfAttention(Replacement, JointAttnProcessor2_0):
    """The stock processor's arithmetic on public submodules, with the attention itself handed to the session."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # ignored, as in the stock processor
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text = hidden_states.shape[1], 0
        q, k, v = project(hidden_states, attn.heads, *own_projections(attn))  # [B, image, H, D]
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            q, k, v = join((q, k, v), project(encoder_hidden_states, attn.heads, *text_projections(attn)))
        o = self.session.attention(self.layer, q, k, v, text=text).flatten(2).type_as(q)
        x = attn.to_out[1](attn.to_out[0](o[:, :image]))
        if encoder_hidden_states is None:
            return x
        # the last block drops its text, so it has no projection for it
        return x, o[:, image:] if attn.context_pre_only else attn.to_add_out(o[:, image:])


class SD3Family:
    """SD3's answers to the attention hook."""

    order = "tile_2d"

    def processors(self, transformer: nn.Module, session: "Session") -> dict[str, Any]:
        names = []
        for i, block in enumerate(transformer.transformer_blocks):
            names.append(f"transformer_blocks.{i}.attn.processor")
            if block.attn2 is not None:
                names.append(f"transformer_blocks.{i}.attn2.processor")
        return replacements(transformer, names, JointAttnProcessor2_0, SD3SelfAttention, session)

    def grid(self, transformer: nn.Module, inputs: dict[str, Any]) -> Grid:
        height, width = inputs["hidden_states"].shape[2:]
        p = transformer.config.patch_size
        return Grid(1, height // p, width // p, text=inputs["encoder_hidden_states"].shape[1])


CLIP_TOKENS = 77  # of the text tokens, from the two CLIP encoders; T5 gives the others


@dataclass(kw_only=True)
class SD3(FullModel):
    """Stable Diffusion 3.5 text to image at full size. shift: of the noise schedule."""

    shift: float

    title = "Stable Diffusion 3.5"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
    gated = True
    activations = 13.0
    family = SD3Family()

    @staticmethod
    def pipeline_class() -> type:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    @staticmethod
    def classes() -> tuple[type, type]:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

        return SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler

    def scheduler_settings(self) -> dict[str, Any]:
        return {"shift": self.shift}

    @property
    def longest(self) -> int:
        """The table of positions has as many rows and columns as it was built with."""
        return 16 * self.outline.config.pos_embed_max_size

    @property
    def rows(self) -> int:
        return 2 if self.guidance > 1 else 1  # both branches of guidance in one forward

    def random_embeddings(self, draw: Any) -> dict[str, Tensor]:
        config = self.outline.config
        shapes = {
            "prompt_embeds": (1, self.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        words = {name: draw(*shape) for name, shape in shapes.items()}
        return words | ({f"negative_{name}": draw(*shape) for name, shape in shapes.items()} if self.rows > 1 else {})

    def text_embeddings(self, prompt: str) -> dict[str, Tensor]:
        words, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=self.rows > 1,
            max_sequence_length=self.text_tokens - CLIP_TOKENS,
        )  # fmt: skip
        found = {"prompt_embeds": words, "pooled_prompt_embeds": pooled}
        return found | {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The predictions `[rows, 16, h, w]` of one forward, guided: without and with the prompt; timestep 0 to 1000.

        latents: `[1, 16, h, w]` or `[rows, 16, h, w]`.
        """
        dtype, words = getattr(torch, self.dtype), self.encode(prompt)
        kinds = ("negative_", "") if self.rows > 1 else ("",)
        text, pooled = (torch.cat([words[f"{kind}{name}"] for kind in kinds]).to(dtype)
                        for name in ("prompt_embeds", "pooled_prompt_embeds"))  # fmt: skip
        return self.transformer(
            hidden_states=latents.to(self.device, dtype).expand(self.rows, -1, -1, -1),
            timestep=torch.full((self.rows,), timestep, device=self.device),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The picture `[1, 3, H, W]` fp32 in [0, 1] from latents `[1, 16, h, w]`."""
        vae = self.pipe.vae
        latents = latents.to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        picture = vae.decode(latents, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(picture, output_type="pt").float()
