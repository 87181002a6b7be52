"""FLUX.1 (diffusers' FluxTransformer2DModel): where its self-attention sits and how its tokens lie.

Every attention is joint, text first: `[text, image]`, the image row by row. In a double block text has projections of
its own; a single block gets the joined tokens and one set of projections. Layers: double blocks, then single blocks.
"""

from typing import TYPE_CHECKING, Any

from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from harness.models.stock import (
    Replacement,
    double_and_single,
    join,
    own_projections,
    project,
    replacements,
    text_projections,
)
from pisa import Grid

if TYPE_CHECKING:
    from harness.hook import Session


class FluxSelfAttention(Replacement, FluxAttnProcessor):
    """The stock processor's arithmetic on public submodules, with the attention itself handed to the session."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("FLUX was given an attention mask, which sparse attention would ignore: leave it out.")
        q, k, v = project(hidden_states, attn.heads, *own_projections(attn))  # [B, L, H, D]
        if encoder_hidden_states is not None:
            q, k, v = join(project(encoder_hidden_states, attn.heads, *text_projections(attn)), (q, k, v))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        o = self.session.attention(self.layer, q, k, v).flatten(2).type_as(q)
        if encoder_hidden_states is None:
            return o  # a single block has its output projection outside
        text = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](o[:, text:])), attn.to_add_out(o[:, :text])


class FluxFamily:
    """FLUX's answers to the attention hook."""

    order = "tile_2d"

    def processors(self, transformer: nn.Module, session: "Session") -> dict[str, Any]:
        names = double_and_single(transformer)
        return replacements(transformer, names, FluxAttnProcessor, FluxSelfAttention, session)

    def grid(self, transformer: nn.Module, inputs: dict[str, Any]) -> Grid:
        """The latents come packed, so the size is read from the last image token's (0, row, column); one transfer."""
        tokens, text = inputs["hidden_states"].shape[1], inputs["encoder_hidden_states"].shape[1]
        row, column = inputs["img_ids"].reshape(-1, 3)[-1, 1:].tolist()
        height, width = int(row) + 1, int(column) + 1
        if height * width != tokens:
            raise ValueError(
                f"FLUX has {tokens} image tokens, but their positions end at row {height - 1}, column {width - 1}: "
                "only one plain image is supported, not a reference image beside it (Kontext)."
            )
        return Grid(1, height, width, text=text, text_first=True)

    def reorder(self, inputs: dict[str, Any], permutation: Tensor) -> dict[str, Any] | None:
        """An image token is where its id says; only a ControlNet's residuals know the tokens by their place."""
        if any(inputs.get(name) is not None for name in ("controlnet_block_samples", "controlnet_single_block_samples")):
            return None
        tokens, ids = inputs["hidden_states"], inputs["img_ids"]
        return inputs | {
            "hidden_states": tokens.index_select(1, permutation),
            "img_ids": ids.index_select(ids.ndim - 2, permutation),
        }
