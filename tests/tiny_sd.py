"""Tiny stock pipelines as users have them, random weights: SD 1, SD 2 with v, SDXL. 16 px pictures, latents 4x8x8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tiny import WORDS

LENGTH = 8  # tokens in a caption
WIDTHS = (8, 16)
NAMES = {"sd": "StableDiffusion", "sd2": "StableDiffusion", "sdxl": "StableDiffusionXL"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

# The schedulers that these families were published with.
SCHEDULERS: dict[str, Any] = {
    "sd": lambda: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
    "sd2": lambda: diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    ),
    "sdxl": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    },
    "sd2": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 16,
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 16 + 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 20,
    },
}


def tiny_pipeline(family: str = "sd", nets: int = 1, kind: str | None = None, **changes: Any) -> Any:
    """A stock pipeline with `nets` ControlNets. kind: another class of the family's. changes: of its parts."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        unet = tiny_unet(family)
        parts: dict[str, Any] = {
            "vae": tiny_vae(),
            "text_encoder": _text_encoder(16, family),
            "tokenizer": _tokenizer(),
            "unet": unet,
            "scheduler": SCHEDULERS[family](),
        }
        if nets:
            several = [tiny_controlnet(unet, seed) for seed in range(nets)]
            parts["controlnet"] = several if nets > 1 else several[0]
        if family == "sdxl":
            parts["text_encoder_2"] = _text_encoder(24, family, CLIPTextModelWithProjection)
            parts["tokenizer_2"] = _tokenizer(pad_token="!")
            parts["add_watermarker"] = False
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kind = kind or f"{NAMES[family]}{'ControlNet' if nets else ''}Pipeline"
    pipeline = getattr(diffusers, kind)(**{**parts, **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path, family: str = "sd", nets: int = 1, **options: Any) -> Path:
    tiny_pipeline(family, nets, **options).save_pretrained(folder)
    return folder


def tiny_unet(family: str = "sd", **changes: Any) -> UNet2DConditionModel:
    shape = {"sample_size": 8, "block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DConditionModel(**{**shape, **UNETS[family], **changes}).eval()


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0, **changes: Any) -> ControlNetModel:
    """The UNet's own shape. Its zero convolutions are filled: fresh ones would hide whether it does anything."""
    keys = ("block_out_channels", "layers_per_block", "norm_num_groups", *UNETS["sdxl"].keys() - {"up_block_types"})
    shape = {key: unet.config[key] for key in keys}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        net = ControlNetModel(**{**shape, "conditioning_embedding_out_channels": (4, 8), **changes})
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net.eval()


def tiny_vae(**changes: Any) -> AutoencoderKL:
    shape = {"block_out_channels": WIDTHS, "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.5}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**{**shape, **blocks, **changes}).eval()


def _text_encoder(width: int, family: str, kind: type[nn.Module] = CLIPTextModel, **changes: Any) -> Any:
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": 20,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "hidden_act": "quick_gelu" if family == "sd" else "gelu",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_factor": 3.0,  # else the hidden states of two layers are hard to tell apart
            **changes,
        }
    )
    return kind(config).eval()


def _tokenizer(**changes: Any) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer(**changes).train_new_from_iterator(list(WORDS), vocab_size=600)
    tokenizer.model_max_length = LENGTH
    return tokenizer
