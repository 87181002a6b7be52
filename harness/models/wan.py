"""Wan2.1 (diffusers' WanTransformer3DModel): where its self-attention sits and how its tokens lie.

Only `blocks.{i}.attn1` is replaced; `attn2` attends to text and stays. Tokens run frame by frame, row by row.
"""

from typing import TYPE_CHECKING, Any

from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

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
