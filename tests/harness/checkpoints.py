"""Tiny checkpoints of the four families as diffusers saves them, with VAE, text encoders and tokenizers, and the
overrides that make the full-size models of conf/model as small."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from harness.checks import build_model
from harness.config import Composer
from tests.harness.pipelines import DIM, HEADS, POOLED, TEXT, build

WORDS = ("a", "red", "fox", "blue", "snow", "the", "video", "in")
T5 = {"vocab_size": 32, "d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CONF = {"wan": "wan2.1_1.3b", "hunyuan_video": "hunyuan_video", "flux": "flux1_dev", "sd3": "sd3.5_medium"}
TEXT_TOKENS = {"wan": 24, "hunyuan_video": 24, "flux": 21, "sd3": 77 + 19}
ARCHITECTURE = {  # of random weights
    "wan": {"num_layers": 3, "ffn_dim": 128, "text_dim": TEXT, "freq_dim": 32},
    "hunyuan_video": {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": TEXT,
                      "pooled_projection_dim": POOLED, "rope_axes_dim": "[16,24,24]"},
    "flux": {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED,
             "axes_dims_rope": "[16,24,24]"},
    "sd3": {"num_layers": 3, "joint_attention_dim": TEXT, "caption_projection_dim": HEADS * DIM, "sample_size": 32,
            "pooled_projection_dim": POOLED, "pos_embed_max_size": 32, "dual_attention_layers": "[0,1]"},
}  # fmt: skip


def overrides(name: str, **more: Any) -> list[str]:
    """Words for the command line: a family's model, small, random unless `more` says otherwise."""
    settings = {"weights": "random", "dtype": "float32", "height": 144, "width": 112, "steps": 2, "dense_steps": 0}
    settings |= {"dense_layers": 0, "text_tokens": TEXT_TOKENS[name]}
    settings |= {"frames": 9} if name in ("wan", "hunyuan_video") else {}
    small = {"num_attention_heads": HEADS, "attention_head_dim": DIM, **ARCHITECTURE[name]}
    settings |= {f"architecture.{key}": value for key, value in small.items()}
    words = [f"model={CONF[name]}"]
    return words + [f"model.{k}={'null' if v is None else v}" for k, v in (settings | more).items()]


def adapter(words: list[str], device: str = "cpu") -> Any:
    """The adapter that these overrides describe."""
    pairs = [tuple(word.split("=", 1)) for word in words]
    return build_model(Composer().compose(pairs).config, device)


def save(name: str, folder: Path) -> Path:
    """Writes the tiny checkpoint of a family."""
    tiny = build(name)
    stock = tiny.pipe
    pipe = type(stock)(transformer=stock.transformer, scheduler=stock.scheduler, vae=vae(name), **text_parts(name))
    pipe.save_pretrained(folder)
    return folder


def vae(name: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLWan

    small = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    if name == "wan":
        return AutoencoderKLWan(
            base_dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    if name == "hunyuan_video":
        return AutoencoderKLHunyuanVideo(**small)
    return AutoencoderKL(
        **small,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def text_parts(name: str) -> dict[str, Any]:
    if name == "wan":
        return {"tokenizer": tokenizer(512), "text_encoder": UMT5EncoderModel(UMT5Config(**T5)).eval()}
    if name == "hunyuan_video":
        llama = LlamaConfig(
            vocab_size=32,
            hidden_size=TEXT,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            pad_token_id=0,
        )
        return {
            "tokenizer": tokenizer(512),
            "text_encoder": LlamaModel(llama).eval(),
            "tokenizer_2": tokenizer(77),
            "text_encoder_2": clip(CLIPTextModel, POOLED),
        }
    if name == "flux":
        return {
            "tokenizer": tokenizer(77),
            "text_encoder": clip(CLIPTextModel, POOLED),
            "tokenizer_2": tokenizer(512),
            "text_encoder_2": T5EncoderModel(T5Config(**T5)).eval(),
        }
    half = POOLED // 2
    return {
        "tokenizer": tokenizer(77),
        "text_encoder": clip(CLIPTextModelWithProjection, half),
        "tokenizer_2": tokenizer(77),
        "text_encoder_2": clip(CLIPTextModelWithProjection, half),
        "tokenizer_3": tokenizer(512),
        "text_encoder_3": T5EncoderModel(T5Config(**T5)).eval(),
    }


def clip(kind: type, width: int) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    return kind(config).eval()


def tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """Knows a few words; all others are one."""
    words = {word: i for i, word in enumerate(("<pad>", "<unk>", "<eos>", *WORDS))}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=longest
    )
