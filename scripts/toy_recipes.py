"""What scripts/train_toy.py must know of each toy: its transformer, its data, its stages, how a prediction is made.

Data and predictions are pixels `[B, 3, F, S, S]` for videos and `[B, 3, S, S]` for pictures; t `[B]` runs from 0 (data)
to 1 (noise).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn
from toy_videos import draw_captions, render, render_pictures

from harness.models.captions import TEXT_DIM, Caption, embed, pooled, sentence
from harness.models.toy_flux import TEXT_TOKENS, pack, positions, unpack


@dataclass(frozen=True)
class Stage:
    """A part of the training: its share of the time, samples in a step as a multiple of --batch, frames and size."""

    name: str
    share: float
    batch: int
    frames: int
    size: int


class Recipe(Protocol):
    """One toy. embedded: guidance is an input of the model, not a constant of the distillation."""

    stages: tuple[Stage, ...]
    embedded: bool

    def build(self, small: bool) -> nn.Module:
        """A fresh transformer, on the CPU; `small` has fewer layers."""

    def pipeline(self, transformer: nn.Module) -> Any:
        """The pipeline that is written to disk."""

    def captions(self, stage: Stage, n: int, seed: int) -> list[Caption]:
        """The captions of one step."""

    def draw(self, captions: list[Caption], stage: Stage, g: torch.Generator) -> Tensor:
        """Data in [-1, 1] on g's device."""

    def text(self, captions: list[Caption], vocabulary: dict[str, Tensor]) -> Tensor:
        """Text tokens `[B, T, 64]`; all zeros is the empty prompt."""

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        """The model's noise - data, like x_t; guidance `[B]`."""


class Videos:
    """The drawn videos: short clips first (shapes, textures, words), then whole ones (paths, occlusion)."""

    stages = (
        Stage("clips", 0.26, 4, 4, 64),
        Stage("videos", 0.56, 1, 16, 64),
        Stage("guidance", 0.18, 1, 16, 64),
    )

    def draw(self, captions: list[Caption], stage: Stage, g: torch.Generator) -> Tensor:
        first = torch.randint(0, 17 - stage.frames, (len(captions),), generator=g, device=g.device)
        return render(captions, stage.frames, stage.size, g, first)


class Wan(Videos):
    embedded = False

    def build(self, small: bool) -> nn.Module:
        model = WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=3,
            out_channels=3,
            text_dim=TEXT_DIM,
            freq_dim=256,
            ffn_dim=768,
            num_layers=2 if small else 8,
        )
        return zero(model, ("proj_out",))

    def pipeline(self, transformer: nn.Module) -> Any:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
        return WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)

    def captions(self, stage: Stage, n: int, seed: int) -> list[Caption]:
        return draw_captions(n, seed)

    def text(self, captions: list[Caption], vocabulary: dict[str, Tensor]) -> Tensor:
        return embed(captions, vocabulary)

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        return model(x_t, t * 1000, text, return_dict=False)[0]


class Hunyuan(Videos):
    embedded = True

    def build(self, small: bool) -> nn.Module:
        model = HunyuanVideoTransformer3DModel(
            in_channels=3,
            out_channels=3,
            num_attention_heads=3,
            attention_head_dim=64,
            num_layers=1 if small else 2,
            num_single_layers=1 if small else 7,
            num_refiner_layers=1,
            patch_size=4,
            patch_size_t=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            rope_axes_dim=(16, 24, 24),
        )
        ours = {
            name: Unmasked() if isinstance(processor, HunyuanVideoAttnProcessor2_0) else processor
            for name, processor in model.attn_processors.items()
        }
        model.set_attn_processor(ours)
        model.x_embedder.register_forward_hook(lambda module, args, tokens: tokens.contiguous())
        return zero(alike(model), ("proj_out", *MODULATIONS))

    def pipeline(self, transformer: nn.Module) -> Any:
        none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return HunyuanVideoPipeline(vae=None, transformer=transformer, scheduler=scheduler, **none)

    def captions(self, stage: Stage, n: int, seed: int) -> list[Caption]:
        """All of one length, so that nothing is padded; clips always have two objects, which saves a compilation."""
        return draw_captions(n, seed, 1 if stage.name != "clips" and seed % 3 == 0 else 2)

    def text(self, captions: list[Caption], vocabulary: dict[str, Tensor]) -> Tensor:
        words, mask = sentence(captions, vocabulary, 16)
        return words[:, : mask[0].sum()]

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        mask = torch.ones(text.shape[:2], device=text.device, dtype=torch.long)
        return model(x_t, t * 1000, text, mask, pooled(text, mask), guidance * 1000, return_dict=False)[0]


class Flux:
    embedded = True
    stages = (  # half-size pictures first, at a quarter of the cost
        Stage("small", 0.26, 4, 1, 64),
        Stage("pictures", 0.56, 1, 1, 128),
        Stage("guidance", 0.18, 1, 1, 128),
    )

    def build(self, small: bool) -> nn.Module:
        model = FluxTransformer2DModel(
            in_channels=12,
            num_layers=1 if small else 2,
            num_single_layers=1 if small else 8,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            guidance_embeds=True,
            axes_dims_rope=(16, 24, 24),
        )
        # It rounds t to the type of its tokens: bf16 under autocast, which is too coarse to embed.
        for embedder in (model.x_embedder, model.context_embedder):
            embedder.register_forward_hook(lambda module, args, tokens: tokens.float())
        return zero(alike(model), ("proj_out", *MODULATIONS))

    def pipeline(self, transformer: nn.Module) -> Any:
        none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        )
        return FluxPipeline(vae=None, transformer=transformer, scheduler=scheduler, **none)

    def captions(self, stage: Stage, n: int, seed: int) -> list[Caption]:
        return draw_captions(n, seed)

    def draw(self, captions: list[Caption], stage: Stage, g: torch.Generator) -> Tensor:
        return render_pictures(captions, stage.size, g)

    def text(self, captions: list[Caption], vocabulary: dict[str, Tensor]) -> Tensor:
        return sentence(captions, vocabulary, TEXT_TOKENS)[0]

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        size = x_t.shape[-1]
        mask = (text != 0).any(-1, keepdim=True).sum(1)  # [B, 1], words
        places = positions(size, size) if size == self.stages[-1].size else self._spread(size)
        out = model(
            hidden_states=pack(x_t),
            encoder_hidden_states=text,
            pooled_projections=text.sum(1) / mask.clamp(min=1),
            timestep=t,
            guidance=guidance,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=places.to(text.device),
            return_dict=False,
        )[0]
        return unpack(out, size, size)

    def _spread(self, size: int) -> Tensor:
        """Positions of a smaller picture's tokens over the whole of a full one: attention learns the same distances."""
        places = positions(size, size)
        factor = self.stages[-1].size / size
        places[:, 1:] = (places[:, 1:] + 0.5) * factor - 0.5
        return places


class Unmasked(HunyuanVideoAttnProcessor2_0):
    """The stock attention without its mask, which nothing needs where nothing is padded, and which flash refuses."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


def alike(model: nn.Module) -> nn.Module:
    """Gives every single block the same strides as the first, so that all of them share one compilation."""
    for block in model.single_transformer_blocks:
        block.register_forward_hook(lambda module, args, out: tuple(x.contiguous() for x in out))
    return model


MODULATIONS = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")


def zero(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Starts these linear layers at zero: no block does anything yet, and the prediction is zero."""
    for name, module in model.named_modules():
        if name.endswith(names) and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


RECIPES: dict[str, Recipe] = {"toy_wan": Wan(), "toy_flux": Flux(), "toy_hunyuan": Hunyuan()}
