"""FLUX.1 (diffusers' FluxTransformer2DModel): where its self-attention sits and how its tokens lie.

Every attention is joint, text first: `[text, image]`, the image row by row. In a double block text has projections of
its own; a single block gets the joined tokens and one set of projections. Layers: double blocks, then single blocks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
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
        if any(
            inputs.get(name) is not None for name in ("controlnet_block_samples", "controlnet_single_block_samples")
        ):
            return None
        tokens, ids = inputs["hidden_states"], inputs["img_ids"]
        return inputs | {
            "hidden_states": tokens.index_select(1, permutation),
            "img_ids": ids.index_select(ids.ndim - 2, permutation),
        }


@dataclass(kw_only=True)
class Flux(FullModel):
    """FLUX.1 text to image at full size. guidance is an input of the model; the shift follows from the size."""

    title = "FLUX.1"
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    gated = True
    activations = 19.0
    family = FluxFamily()

    @staticmethod
    def pipeline_class() -> type:
        from diffusers import FluxPipeline

        return FluxPipeline

    @staticmethod
    def classes() -> tuple[type, type]:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        return FluxTransformer2DModel, FlowMatchEulerDiscreteScheduler

    def scheduler_settings(self) -> dict[str, Any]:
        return {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}

    def random_embeddings(self, draw: Any) -> dict[str, Tensor]:
        config = self.outline.config
        return {
            "prompt_embeds": draw(1, self.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": draw(1, config.pooled_projection_dim),
        }

    def text_embeddings(self, prompt: str) -> dict[str, Tensor]:
        words, pooled, _ = self.pipe.encode_prompt(prompt, None, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": words, "pooled_prompt_embeds": pooled}

    def noise(self, seed: int) -> Tensor:
        """Initial latents, packed `[1, tokens, 64]`, fp32, the same on every device."""
        _, height, width = self.latent_size
        g = torch.Generator().manual_seed(seed)
        return torch.randn(1, height * width, self.outline.config.in_channels, generator=g)

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The prediction `[1, tokens, 64]` of one forward; timestep as the transformer is given it, from 0 to 1."""
        dtype, words = getattr(torch, self.dtype), self.encode(prompt)
        guided = self.outline.config.guidance_embeds
        return self.transformer(
            hidden_states=latents.to(self.device, dtype),
            timestep=torch.tensor([timestep], device=self.device, dtype=dtype),
            guidance=torch.tensor([self.guidance], device=self.device) if guided else None,
            encoder_hidden_states=words["prompt_embeds"].to(dtype),
            pooled_projections=words["pooled_prompt_embeds"].to(dtype),
            txt_ids=torch.zeros(words["prompt_embeds"].shape[1], 3, device=self.device, dtype=dtype),
            img_ids=self._positions(dtype),
            return_dict=False,
        )[0]

    def _positions(self, dtype: torch.dtype) -> Tensor:
        """(0, row, column) of every image token, made where it is needed."""
        return torch.cartesian_prod(*(torch.arange(n, device=self.device, dtype=dtype) for n in self.latent_size))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The picture `[1, 3, H, W]` fp32 in [0, 1] from packed latents `[1, tokens, 64]`."""
        vae, (_, height, width) = self.pipe.vae, self.latent_size
        latents = latents.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))  # [1, h, w, 16, 2, 2]
        latents = latents.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [1, 16, 2h, 2w]
        latents = latents.to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        picture = vae.decode(latents, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(picture, output_type="pt").float()
