"""What an exported model is made of: five graphs, each a function of named tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refine_control.diffusion.model import EmbeddedDenoiser, Model
from refine_control.diffusion.text import Text
from refine_control.errors import ModelError


@dataclass(frozen=True)
class Graph:
    """module(*inputs.values()) -> one tensor for each of `outputs`. The first dimension is a batch of any size."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    @torch.no_grad()
    def expected(self) -> list[Tensor]:
        result = self.module(*self.inputs.values())
        return [result] if isinstance(result, Tensor) else list(result)


class _Part(nn.Module):
    """A function over the networks of a model, as the module that exporters ask for."""

    def __init__(self, networks: list[nn.Module], function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*inputs)


def graphs_of(model: Model, rows: int = 2, seed: int = 0) -> dict[str, Graph]:
    """The graphs of a model, each with one fixed input of `rows` rows.

    text_encoder: input_ids (B, L) int32, of SDXL input_ids_2 too -> tokens (B, L, D), of SDXL pooled (B, P) too.
    condition:    control (B, 3k, H, W) -> condition (B, c, h, w), once a picture. Absent without a module.
    denoiser:     x_t (B, c, h, w), t (B,) float32, tokens, condition, pooled -> prediction; foundation + module in one.
    vae_encoder:  pictures (B, 3, H, W) in [-1, 1] -> latents (B, c, h, w) of about unit variance.
    vae_decoder:  latents -> pictures.

    Raises:
        ModelError: the model's text or control is of a kind that the graphs do not express.
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser = EmbeddedDenoiser(model.denoiser, model.downscale)
    side, latent = model.resolution, model.denoiser.foundation.config.sample_size
    channels = model.denoiser.foundation.config.in_channels

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    text = _text_encoder(model, rows)
    found = {"text_encoder": text}
    said = dict(zip(text.outputs, text.expected(), strict=True))
    inputs = {"x_t": random(rows, channels, latent, latent), "t": torch.linspace(900, 100, rows), **said}
    if model.denoiser.nets:
        if model.denoiser.control_channels != 3:
            raise ModelError(f"it takes {model.denoiser.control_channels // 3} control pictures; export knows one")
        if any(net.config.controlnet_conditioning_channel_order != "rgb" for net in model.denoiser.nets):
            raise ModelError("its ControlNet takes blue first; export knows controlnet_conditioning_channel_order rgb")
        control = {"control": random(rows, model.denoiser.control_channels, side, side)}
        module = _Part(list(denoiser.embeddings), denoiser.embed)
        found["condition"] = Graph("condition", module, control, ("condition",))
        inputs["condition"] = found["condition"].expected()[0]

    names = tuple(inputs)

    def predict(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        read = Text(named["tokens"], named.get("pooled"))
        return denoiser(named["x_t"], named["t"], read, named.get("condition"))

    found["denoiser"] = Graph("denoiser", _Part([denoiser], predict), inputs, ("prediction",))
    pictures, latents = random(rows, 3, side, side), random(rows, model.vae.config.latent_channels, latent, latent)
    found["vae_encoder"] = Graph("vae_encoder", _Part([model.vae], model.encode), {"pictures": pictures}, ("latents",))
    found["vae_decoder"] = Graph("vae_decoder", _Part([model.vae], model.decode), {"latents": latents}, ("pictures",))
    return found


def _text_encoder(model: Model, rows: int) -> Graph:
    """Token ids -> what the denoiser reads, as `Model.embed` without its tokenizers and its zeros for ''."""
    encoders = [encoder for encoder in (model.text_encoder, model.text_encoder_2) if encoder is not None]
    if any(getattr(encoder.config, "use_attention_mask", False) for encoder in encoders):
        raise ModelError("its text encoder reads an attention mask, which export does not express")
    length, smallest = model.tokenizer.model_max_length, min(encoder.config.vocab_size for encoder in encoders)
    words = torch.arange(rows * length, dtype=torch.int32).reshape(rows, length) % smallest
    words[:, -1] = encoders[0].config.eos_token_id if encoders[0].config.eos_token_id < smallest else smallest - 1

    def embed_one(ids: Tensor) -> Tensor:
        return encoders[0](ids)[0]

    def embed_both(ids: Tensor, ids_2: Tensor) -> tuple[Tensor, ...]:
        said = [e(i, output_hidden_states=True) for e, i in zip(encoders, (ids, ids_2), strict=True)]
        return torch.cat([part.hidden_states[-2] for part in said], dim=-1), said[-1].text_embeds

    if len(encoders) == 1:
        return Graph("text_encoder", _Part([*encoders], embed_one), {"input_ids": words}, ("tokens",))
    # Two tensors that differ: of one given twice, tracing makes a graph that reads a single input.
    both = {"input_ids": words, "input_ids_2": words.flip(0)}
    return Graph("text_encoder", _Part([*encoders], embed_both), both, ("tokens", "pooled"))
