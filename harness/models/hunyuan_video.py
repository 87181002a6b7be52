"""HunyuanVideo (diffusers' HunyuanVideoTransformer3DModel): where its self-attention sits and how its tokens lie.

Every attention is joint, text last: `[video, text]`, the video frame by frame, row by row; only video gets RoPE.
Layers: double blocks, then single blocks; the text refiner stays. Padded text is masked as keys in the stock model and
its queries are read by nobody, so leaving it out is exact, and needs no mask (which fast dense kernels refuse).
"""

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
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


class HunyuanVideoSelfAttention(Replacement, HunyuanVideoAttnProcessor2_0):
    """The stock processor's arithmetic on public submodules, with the attention itself handed to the session."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,  # the padding, which is trimmed
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        single = attn.add_q_proj is None  # one set of projections for video and text, the output projection outside
        video, valid, padded = hidden_states.shape[1], self.session.grid.text, encoder_hidden_states.shape[1]
        q, k, v = project(hidden_states, attn.heads, *own_projections(attn))  # [B, video, H, D]
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        of_text = own_projections(attn) if single else text_projections(attn)
        q, k, v = join((q, k, v), project(encoder_hidden_states[:, :valid], attn.heads, *of_text))
        o = self.session.attention(self.layer, q, k, v).flatten(2).type_as(q)
        o, text = o[:, :video], o[:, video:]
        if not single:
            o, text = attn.to_out[1](attn.to_out[0](o)), attn.to_add_out(text)
        return o, torch.nn.functional.pad(text, (0, 0, 0, padded - valid))


class HunyuanVideoFamily:
    """HunyuanVideo's answers to the attention hook."""

    order = "raster"

    def processors(self, transformer: nn.Module, session: "Session") -> dict[str, Any]:
        names = double_and_single(transformer)
        return replacements(transformer, names, HunyuanVideoAttnProcessor2_0, HunyuanVideoSelfAttention, session)

    def grid(self, transformer: nn.Module, inputs: dict[str, Any]) -> Grid:
        """Counts the valid text tokens, the one transfer from the device in a forward."""
        frames, height, width = inputs["hidden_states"].shape[2:]
        lengths = inputs["encoder_attention_mask"].sum(1, dtype=torch.int).tolist()  # the stock model counts so too
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the prompts of this batch have {', '.join(map(str, lengths))} text tokens, and one length is "
                "needed: generate them one after the other."
            )
        t, p = transformer.config.patch_size_t, transformer.config.patch_size
        return Grid(frames // t, height // p, width // p, text=lengths[0])
