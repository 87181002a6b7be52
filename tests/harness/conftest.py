"""A toy model small enough for every test: two untrained layers, 4 frames of 32 x 32 pixels, 256 tokens."""

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny Wan pipeline, written by save_pretrained."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from safetensors.torch import save_file

    from harness.models.captions import make_vocabulary

    folder = tmp_path_factory.mktemp("tiny_wan")
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=64,
        freq_dim=64,
        ffn_dim=128,
        num_layers=3,
    )
    for block in transformer.blocks:  # sharper attention than a fresh model has, so that methods differ
        block.attn1.norm_q.weight.data.mul_(3)
        block.attn1.norm_k.weight.data.mul_(3)
        block.scale_shift_table.data[:, 2].fill_(3.0)  # the gate of self-attention
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.save_pretrained(folder)
    save_file(make_vocabulary(), folder / "vocabulary.safetensors")
    return folder


@pytest.fixture
def tiny_words(tiny_model, tmp_path):
    """Overrides that make any sweep a matter of a second or two."""
    return [
        f"model.path={tiny_model}",
        "model.steps=2",
        "model.frames=4",
        "model.height=32",
        "model.width=32",
        "model.dtype=float32",
        f"out={tmp_path / 'out'}",
    ]


@pytest.fixture
def tiny(tiny_model):
    """The adapter of the tiny model."""
    from harness.models.toy_wan import ToyWan

    return ToyWan(
        weights="toy",
        path=str(tiny_model),
        frames=4,
        height=32,
        width=32,
        steps=2,
        guidance=1.0,
        dense_steps=0,
        dense_layers=0,
        order="tile_3d",
        dtype="float32",
    )
