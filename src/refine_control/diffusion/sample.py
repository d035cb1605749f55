"""Noise -> pictures, under a control signal. The same arithmetic as the stock pipeline, over many pictures at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refine_control.data.batch import Batch
from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import sampler_at
from refine_control.errors import RecipeError
from refine_control.recipe import SampleConfig


@torch.no_grad()
def sample(
    model: Model, control: Tensor | None, captions: Sequence[str], config: SampleConfig, seeds: Sequence[int]
) -> Tensor:
    """Draws one picture for each row.

    Args:
        control: (N, 3, H, W), known pixels in [0, 1], pixels to fill -1; (N, 3k, H, W) for k ControlNets. None for a
            model without a module: pictures at its own resolution.
        seeds: N noise seeds; a row's result does not depend on its neighbours.

    Returns:
        (N, 3, H, W) in [-1, 1], on the CPU.

    Raises:
        RecipeError: more inference steps than the model has timesteps, or others than it has learnt alone.
    """
    if model.only_steps not in (None, steps := config.num_inference_steps):
        raise RecipeError(
            f"num_inference_steps {steps}: the model has learnt the timesteps of {model.only_steps} step(s) alone; "
            "ask for as many"
        )
    pictures = []
    for first in range(0, len(captions), config.batch_size):
        rows = slice(first, first + config.batch_size)
        part = None if control is None else control[rows].to(model.device)
        latents = _denoise(model, part, captions[rows], config, seeds[rows])
        pictures.append(model.decode(latents).cpu())
    return torch.cat(pictures)


def _denoise(
    model: Model, control: Tensor | None, captions: Sequence[str], config: SampleConfig, seeds: Sequence[int]
) -> Tensor:
    scheduler = sampler_at(model.scheduler, config.num_inference_steps, model.device)
    sides = (model.resolution, model.resolution) if control is None else control.shape[-2:]
    shape = (model.denoiser.foundation.config.in_channels, *(side // model.downscale for side in sides))
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    guided = config.guidance_scale > 1
    text = model.embed([*[""] * len(captions), *captions] if guided else list(captions))
    control = torch.cat([control, control]) if guided and control is not None else control
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
        prediction = model.denoiser(x_t, t.expand(len(x_t)), text, control)
        if guided:
            empty, captioned = prediction.chunk(2)
            prediction = empty + config.guidance_scale * (captioned - empty)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


def fill(model: Model, batch: Batch, config: SampleConfig, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the model draws for each row, and the same with the known pixels pasted back: (B, 3, H, W) in [-1, 1]."""
    drawn = sample(model, batch.control, batch.captions, config, seeds)
    return drawn, paste(drawn, batch.image, batch.mask)


def paste(drawn: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The drawn picture in the hole, the known one around it. mask: (N, 1, H, W), 1 = hole."""
    return drawn * mask + known * (1 - mask)
