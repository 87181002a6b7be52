"""Stable Diffusion 3 and 3.5 (diffusers' SD3Transformer2DModel): where its self-attention sits and how its tokens lie.

`transformer_blocks.{i}.attn` is joint, text last: `[image, text]`, the image row by row. In the medium model the first
blocks also have `attn2`, over the image alone. Both are layers, numbered as they run (attn, then attn2 of a block);
the session's `dense_layers` counts blocks. There is no RoPE: positions were added to the latents.
"""

from typing import TYPE_CHECKING, Any

from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

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
