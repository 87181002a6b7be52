"""Tiny random pipelines of the four families, without files: text goes in as embeddings, latents come out.

Sizes are odd on purpose: no token count is a multiple of a block, and prompts have lengths of their own. Weights are
sharpened, since the near-uniform attention of a fresh model would hide what a method changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADS, DIM, TEXT, POOLED = 2, 64, 32, 16


@dataclass
class Tiny:
    """A pipeline, how to run it, and what a test must find: layers, token grid, text tokens, forwards of a step."""

    pipe: Any
    run: Callable[..., Tensor]  # latents of one sample; keyword arguments go to the pipeline
    layers: int
    grid: tuple[int, int, int]
    text: int
    branches: int = 1


def sharpen(transformer: nn.Module) -> None:
    """Attention with contrast: longer q and k."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            parameter.data.mul_(2.5)


def embeddings(text: int, seed: int, negative: bool = False, pooled: bool = True) -> dict[str, Tensor]:
    """Random prompt embeddings `[1, text, 32]`; pooled ones and a negative prompt where the pipeline takes them."""
    g = torch.Generator().manual_seed(seed)
    found = {"prompt_embeds": torch.randn(1, text, TEXT, generator=g)}
    if pooled:
        found["pooled_prompt_embeds"] = torch.randn(1, POOLED, generator=g)
    if negative:
        found |= {f"negative_{name}": torch.randn(x.shape, generator=g) for name, x in found.items()}
    return found


def sample(pipe: Any, **settings: Any) -> Tensor:
    """Latents of two steps from fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        out = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent", **settings)
    return out[0]


def wan() -> Tiny:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM, ffn_dim=128, num_layers=3, text_dim=TEXT, freq_dim=32
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)

    def run(text: int = 7, **more: Any) -> Tensor:
        words = embeddings(text, 0, negative=True, pooled=False)
        return sample(pipe, height=144, width=112, num_frames=9, guidance_scale=4.0, **words | more)

    return Tiny(pipe, run, layers=3, grid=(3, 9, 7), text=0, branches=2)


def hunyuan_video() -> Tiny:
    """24 text tokens, of which 17 are valid: the rest is padding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(16, 24, 24),
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = HunyuanVideoPipeline(
        transformer=transformer, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **none
    )
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8

    def run(text: int = 17, padded: int = 24, **more: Any) -> Tensor:
        mask = (torch.arange(padded) < text).long()[None]
        words = embeddings(padded, 0) | {"prompt_attention_mask": mask}
        return sample(pipe, height=144, width=112, num_frames=9, **words | more)

    return Tiny(pipe, run, layers=4, grid=(3, 9, 7), text=17)


def flux() -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(transformer=transformer, vae=None, scheduler=scheduler, **none)

    def run(text: int = 21, **more: Any) -> Tensor:
        return sample(pipe, height=272, width=176, **embeddings(text, 0) | more)

    return Tiny(pipe, run, layers=4, grid=(1, 17, 11), text=21)


def sd3() -> Tiny:
    """As the medium model: blocks 0 and 1 also have an image-only attention."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=32,
        num_layers=3,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        caption_projection_dim=HEADS * DIM,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    none = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=None, scheduler=scheduler, **none)

    def run(text: int = 19, **more: Any) -> Tensor:
        words = embeddings(text, 0, negative=True)
        return sample(pipe, height=272, width=176, guidance_scale=4.0, **words | more)

    return Tiny(pipe, run, layers=5, grid=(1, 17, 11), text=19)


BUILDERS = {"wan": wan, "hunyuan_video": hunyuan_video, "flux": flux, "sd3": sd3}


def build(name: str) -> Tiny:
    """The same tiny pipeline on every call."""
    torch.manual_seed(0)
    tiny = BUILDERS[name]()
    sharpen(tiny.pipe.transformer)
    return tiny
