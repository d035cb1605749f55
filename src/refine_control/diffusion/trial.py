"""One use of a model that was read. Libraries look at many values of a config only when they compute with them: what
would fail there in an hour fails here, where the model can be named. Networks run on tensors without contents, so it
takes no memory, and a second at most for any size."""

from __future__ import annotations

from dataclasses import replace

import torch

from refine_control.diffusion.build import build_outline
from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import sampler_at
from refine_control.diffusion.text import Text

CAPTIONS = ["", "word " * 300]  # one that is padded, one longer than any model reads, that is cut


@torch.no_grad()
def try_out(model: Model) -> None:
    """Encodes captions, and sends one picture through the networks and one step of the sampler.

    Raises what the libraries below do, nearly every type.
    """
    text = model.embed(CAPTIONS)  # with contents: a token's number may lie outside of the table
    nets = [net.config for net in model.denoiser.nets]
    denoiser, vae = build_outline(model.denoiser.foundation.config, nets, model.vae.config)
    outline = replace(model, denoiser=denoiser, vae=vae)
    pooled = None if text.pooled is None else text.pooled[:1].to("meta")
    prediction = try_outline(outline, Text(text.tokens[:1].to("meta"), pooled))
    scheduler = sampler_at(model.scheduler, steps=1)
    latents = torch.zeros_like(prediction, device="cpu")
    scheduler.step(latents, scheduler.timesteps[0], latents)


@torch.no_grad()
def try_outline(model: Model, text: Text) -> torch.Tensor:
    """One picture through autoencoder, denoiser and autoencoder, at the model's own resolution.

    model: its networks lie on the meta device, as `text` does. Returns the prediction; raises as `try_out` does.
    """
    side = model.resolution
    latents = model.encode(torch.zeros(1, 3, side, side, device="meta"))
    control = torch.zeros(1, model.denoiser.control_channels, side, side, device="meta")
    prediction = model.denoiser(latents, torch.zeros(1, dtype=torch.long, device="meta"), text, control)
    model.decode(latents + prediction)
    return prediction
