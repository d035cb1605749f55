"""Fresh networks from their plans."""

from __future__ import annotations

from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from refine_control.diffusion.model import Denoiser
from refine_control.recipe import AutoencoderPlan, DenoiserPlan, TextPlan


def build_denoiser(plan: DenoiserPlan, latent_channels: int, text_width: int, sample_size: int) -> Denoiser:
    """A fresh foundation and the module that mirrors its encoder.

    Without a mid block the module keeps one and the foundation has none: stock ControlNetModel cannot be built
    without (diffusers issue 8424), and stock UNets add the mid residual all the same.
    """
    foundation_shape = {
        "in_channels": latent_channels,
        "block_out_channels": plan.block_out_channels,
        "layers_per_block": plan.layers_per_block,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in plan.attention),
        "norm_num_groups": plan.norm_num_groups,
        "cross_attention_dim": text_width,
        "attention_head_dim": plan.heads,  # diffusers' name; it has always meant the number of heads
    }
    foundation = UNet2DConditionModel(
        **foundation_shape,
        sample_size=sample_size,
        out_channels=latent_channels,
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(plan.attention)),
        mid_block_type="UNetMidBlock2DCrossAttn" if plan.mid_block == "attention" else None,
    )
    module = ControlNetModel(**foundation_shape, conditioning_embedding_out_channels=plan.conditioning_channels)
    return Denoiser(foundation, module)


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


def build_text(plan: TextPlan, captions: list[str]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A fresh text encoder and a byte-pair tokenizer trained on these captions."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=plan.vocab_size)
    tokenizer.model_max_length = plan.max_length
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
    return CLIPTextModel(config), tokenizer
