"""Fresh networks from their plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, MultiControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from refine_control.diffusion.model import Denoiser, halvings
from refine_control.errors import RecipeError
from refine_control.plans import AutoencoderPlan, DenoiserPlan, TextPlan


def build_denoiser(plan: DenoiserPlan, latent_channels: int, text_width: int, sample_size: int) -> Denoiser:
    """A fresh foundation and its module for these latents and text embeddings; all else as diffusers has it."""
    shared = {"in_channels": latent_channels, "cross_attention_dim": text_width}
    foundation = build_foundation(plan, {**shared, "out_channels": latent_channels, "sample_size": sample_size})
    return Denoiser(foundation, build_net(plan, shared), halvings(plan.conditioning_channels))


def build_foundation(plan: DenoiserPlan, inherited: Mapping[str, Any]) -> UNet2DConditionModel:
    """A fresh UNet of the plan's shape. inherited: config values for what the plan does not say; its own win."""
    return UNet2DConditionModel.from_config(
        {
            **_open(inherited),
            **_shape(plan),
            "layers_per_block": plan.layers_per_block,
            "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(plan.attention)),
            "mid_block_type": "UNetMidBlock2DCrossAttn" if plan.mid_block == "attention" else None,
            "reverse_transformer_layers_per_block": None,  # the way up mirrors the way down
        }
    )


def build_net(plan: DenoiserPlan, inherited: Mapping[str, Any]) -> ControlNetModel:
    """A fresh ControlNet that mirrors the encoder of the plan's foundation.

    Without a mid block the foundation has none and the ControlNet keeps one: a stock ControlNetModel cannot be built
    without (diffusers issue 8424), and stock UNets add the mid residual all the same, to the output of their last down
    block. It keeps the cheapest there is, UNetMidBlock2D: one resnet, a third of the usual mid block's parameters.

    Raises:
        RecipeError: layers_per_block differs from level to level, which a stock ControlNetModel cannot express.
    """
    if len(set(plan.layers)) > 1:
        raise RecipeError(f"layers_per_block {plan.layers}: a ControlNet has one number for all levels; give one")
    return ControlNetModel.from_config(
        {
            **_open(inherited),
            **_shape(plan),
            "layers_per_block": plan.layers[0],
            "mid_block_type": "UNetMidBlock2DCrossAttn" if plan.mid_block == "attention" else "UNetMidBlock2D",
            "conditioning_embedding_out_channels": plan.conditioning_channels,
        }
    )


def module_of(nets: Sequence[ControlNetModel]) -> ControlNetModel | MultiControlNetModel | None:
    """None, the one ControlNet, or several as diffusers bundles them."""
    return MultiControlNetModel(nets) if len(nets) > 1 else next(iter(nets), None)


def build_outline(
    unet: Mapping[str, Any], nets: Sequence[Mapping[str, Any]], vae: Mapping[str, Any]
) -> tuple[Denoiser, AutoencoderKL]:
    """A saved model's networks by their configs, without weights, on the meta device.

    Raises:
        ValueError, TypeError: a config makes no network.
    """
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(vae)
        module = module_of([ControlNetModel.from_config(net) for net in nets])
        foundation = UNet2DConditionModel.from_config(unet)
        return Denoiser(foundation, module, halvings(autoencoder.config.block_out_channels)).eval(), autoencoder


def build_text_outline(config: Mapping[str, Any]) -> CLIPTextModel:
    """A saved text encoder by its config, without weights, on the meta device; raises as `build_outline`."""
    projects = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**_open(config)))


def _shape(plan: DenoiserPlan) -> dict[str, Any]:
    """What a UNet's encoder and a ControlNet have in common, in diffusers' words."""
    return {
        "block_out_channels": plan.block_out_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in plan.attention),
        "transformer_layers_per_block": plan.transformers,
        "norm_num_groups": plan.norm_num_groups,
        "attention_head_dim": plan.heads,  # diffusers' name; it has always meant the number of heads
        "num_attention_heads": None,  # given, it would win
    }


def _open(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without diffusers' own notes, of which `_use_default_values` would undo what a plan says."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def build_autoencoder(plan: AutoencoderPlan) -> AutoencoderKL:
    levels = len(plan.block_out_channels)
    return AutoencoderKL(
        latent_channels=plan.latent_channels,
        block_out_channels=plan.block_out_channels,
        layers_per_block=plan.layers_per_block,
        norm_num_groups=plan.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        mid_block_add_attention=False,
    )


def build_tokenizer(plan: TextPlan, captions: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer trained on these captions. Equally frequent pairs get other numbers in another process."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=plan.vocab_size)
    tokenizer.model_max_length = plan.max_length
    return tokenizer


def build_text_encoder(plan: TextPlan, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh text encoder for a tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        intermediate_size=4 * plan.hidden_size,
        projection_dim=plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=plan.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
