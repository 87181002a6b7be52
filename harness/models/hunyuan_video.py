"""HunyuanVideo (diffusers' HunyuanVideoTransformer3DModel): where its self-attention sits and how its tokens lie.

Every attention is joint, text last: `[video, text]`, the video frame by frame, row by row; only video gets RoPE.
Layers: double blocks, then single blocks; the text refiner stays. Padded text is masked as keys in the stock model and
its queries are read by nobody, so leaving it out is exact, and needs no mask (which fast dense kernels refuse).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from harness.models.full import FullModel
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


@dataclass(kw_only=True)
class HunyuanVideo(FullModel):
    """HunyuanVideo text to video at full size. shift: of the noise schedule. guidance is an input of the model."""

    shift: float

    title = "HunyuanVideo"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    video = True
    activations = 18.5
    family = HunyuanVideoFamily()

    @staticmethod
    def pipeline_class() -> type:
        from diffusers import HunyuanVideoPipeline

        return HunyuanVideoPipeline

    @staticmethod
    def classes() -> tuple[type, type]:
        from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel, FlowMatchEulerDiscreteScheduler

    def scheduler_settings(self) -> dict[str, Any]:
        return {"shift": self.shift}

    def random_embeddings(self, draw: Any) -> dict[str, Tensor]:
        config = self.outline.config
        return {
            "prompt_embeds": draw(1, self.text_tokens, config.text_embed_dim),
            "pooled_prompt_embeds": draw(1, config.pooled_projection_dim),
            "prompt_attention_mask": torch.ones(1, self.text_tokens, dtype=torch.long),
        }

    def text_embeddings(self, prompt: str) -> dict[str, Tensor]:
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        return dict(zip(names, self.pipe.encode_prompt(prompt, max_sequence_length=self.text_tokens), strict=True))

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, 16, F, h, w]` of one forward; timestep 0 to 1000."""
        dtype, words = getattr(torch, self.dtype), self.encode(prompt)
        return self.transformer(
            hidden_states=latents.to(self.device, dtype),
            timestep=torch.tensor([timestep], device=self.device, dtype=dtype),
            encoder_hidden_states=words["prompt_embeds"].to(dtype),
            encoder_attention_mask=words["prompt_attention_mask"].to(dtype),
            pooled_projections=words["pooled_prompt_embeds"].to(dtype),
            guidance=torch.tensor([1000.0 * self.guidance], device=self.device, dtype=dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[F, 3, H, W]` fp32 in [0, 1] from latents `[1, 16, F, h, w]`, in tiles to save memory."""
        vae = self.pipe.vae
        vae.enable_tiling()
        latents = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        video = vae.decode(latents, return_dict=False)[0]
        return self.pipe.video_processor.postprocess_video(video, output_type="pt")[0].float()
