"""Configs of published models, as their files on the Hugging Face hub have them: real sizes, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

SD15_UNET: dict[str, Any] = {  # stable-diffusion-v1-5/stable-diffusion-v1-5
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21_UNET = SD15_UNET | {  # stabilityai/stable-diffusion-2-1
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL_UNET = SD15_UNET | {  # stabilityai/stable-diffusion-xl-base-1.0
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
UNETS = {"sd15": SD15_UNET, "sd21": SD21_UNET, "sdxl": SDXL_UNET}
PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}  # of the published UNets

TEXT = {  # openai/clip-vit-large-patch14, of sd15 and the first of sdxl
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
TEXT_H = TEXT | {  # of sd21
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
TEXT_2 = TEXT | {  # the second of sdxl
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
TEXT_PARAMETERS = (123_060_480, 694_659_840)
VAE = {  # AutoencoderKL of all three
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}


def controlnet(unet: dict[str, Any]) -> dict[str, Any]:
    """The config of the ControlNets published for it (e.g. lllyasviel/sd-controlnet-canny): its encoder's."""
    theirs = {"_class_name", "_diffusers_version", "center_input_sample", "out_channels", "sample_size"}
    theirs |= {"up_block_types", "dual_cross_attention"}
    kept = {key: value for key, value in unet.items() if key not in theirs}
    return kept | {
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
    }


def write_configs(folder: Path, family: str, module: bool = True) -> Path:
    """The configs of a saved ControlNet pipeline, or without `module` of the foundation's, and no weights."""
    parts = {"unet": UNETS[family], "vae": VAE, "text_encoder": TEXT_H if family == "sd21" else TEXT}
    if family == "sdxl":
        parts["text_encoder_2"] = TEXT_2
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    if module:
        parts["controlnet"] = controlnet(UNETS[family])
        index["controlnet"] = ["diffusers", "ControlNetModel"]
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
