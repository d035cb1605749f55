"""Do the parts of a model belong together? Asked when they are read, where the numbers that differ can be named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import ControlNetModel

from refine_control.diffusion.model import Model, halvings
from refine_control.errors import ModelError

PICTURE_CHANNELS = 3
MOST_PIXELS = 4096  # a side; SDXL's pictures have 1024
SIZES = 6  # what SDXL is told of a picture: height and width, the crop's corner, height and width
Pair = tuple[str, Any, Any]

# What networks of other families are conditioned on beside text and size; nothing here would feed it.
FOREIGN = {
    "unet": ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"),
    "vae": ("latents_mean", "shift_factor"),
}


def check_belonging(model: Model, name: str, controlnets: Sequence[str] = ()) -> None:
    """controlnets: where each ControlNet came from, if not from the model's own folder.

    Raises:
        ModelError: two parts differ where they must agree, or one needs what we do not feed; both values are named.
    """
    for part, network in (("unet", model.denoiser.foundation), ("vae", model.vae)):
        for key in FOREIGN[part]:
            if network.config.get(key) is not None:
                raise ModelError(f"'{name}' is of another family: {part} has {key} = {network.config[key]}, not null")
    side, most = model.denoiser.foundation.config.sample_size, MOST_PIXELS // model.downscale
    if not isinstance(side, int):
        raise ModelError(f"'{name}': sample_size in unet/config.json is {side}; write one number, latents are square")
    if not 1 <= side <= most:
        raise ModelError(f"'{name}': sample_size in unet/config.json is {side}; latents have 1 to {most} a side")
    pairs = list(_without_module(model))
    for place, net in enumerate(model.denoiser.nets):
        label = f"ControlNet '{controlnets[place]}'" if controlnets else "ControlNet" + (f"_{place}" if place else "")
        pairs += _with_net(model, net, label)
    for what, left, right in pairs:
        if left != right:
            raise ModelError(f"the parts of '{name}' do not belong together: {what} differ, {left} and {right}")


def _without_module(model: Model) -> Iterator[Pair]:
    """What must be equal between foundation, autoencoder and text encoders."""
    unet, text = model.denoiser.foundation.config, model.text_encoder.config
    text_2 = model.text_encoder_2.config if model.text_encoder_2 else None
    yield "latent channels of UNet and VAE", unet.in_channels, model.vae.config.latent_channels
    yield "latent channels of UNet's output and VAE", unet.out_channels, model.vae.config.latent_channels
    yield from _of_text("", model.tokenizer, text)
    lengths = [
        tokenizer.model_max_length for tokenizer in (model.tokenizer, model.tokenizer_2) if tokenizer is not None
    ]
    yield "tokens in a caption of tokenizer and tokenizer_2", lengths[0], lengths[-1]
    width = text.hidden_size
    if text_2:
        yield from _of_text("_2", model.tokenizer_2, text_2)
        width += text_2.hidden_size
    yield "width of UNet's text input and text encoder", unet.cross_attention_dim, width
    kind = "text_time" if text_2 else None
    yield "addition_embed_type of UNet and of its pipeline's class", unet.addition_embed_type, kind
    if text_2:
        fed = SIZES * unet.addition_time_embed_dim + text_2.projection_dim
        what = "projection_class_embeddings_input_dim of UNet and the width of pooled text and sizes"
        yield what, unet.projection_class_embeddings_input_dim, fed


def _of_text(number: str, tokenizer: Any, encoder: Any) -> Iterator[Pair]:
    """A table with more rows than are used does no harm."""
    words, length = len(tokenizer), tokenizer.model_max_length
    what = f"tokenizer{number} and text encoder{number}"
    yield f"vocabulary of {what}", words, min(words, encoder.vocab_size)
    yield f"tokens in a caption of {what}", length, min(length, encoder.max_position_embeddings)


def _with_net(model: Model, net: ControlNetModel, label: str) -> Iterator[Pair]:
    """What must be equal between foundation and one ControlNet, down to the shape of every residual."""
    unet, config = model.denoiser.foundation.config, net.config
    for key in (
        "cross_attention_dim",
        "in_channels",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    ):
        yield f"{key} of UNet and {label}", unet[key], config[key]
    for key in ("block_out_channels", "layers_per_block"):
        yield f"{key} of UNet and {label}", _by_level(unet, key), _by_level(config, key)
    scale = halvings(config.conditioning_embedding_out_channels)
    yield f"pixels per latent of VAE and {label}", model.downscale, scale
    what = f"conditioning_channels of {label} and channels of a control picture"
    yield what, config.conditioning_channels, PICTURE_CHANNELS


def _by_level(config: Any, key: str) -> tuple[int, ...]:
    """A number for each level of the encoder; some configs write one number for all."""
    value = config[key]
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(config.down_block_types)
