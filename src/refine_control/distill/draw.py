"""What a step draws: timesteps, noise, dropped captions. All from the batch's own seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refine_control.data.batch import Batch
from refine_control.diffusion.noise import NoiseSchedule


@dataclass(frozen=True)
class Draw:
    """t: int64 (B,). eps, x_t, target: (B, c, h, w). control: (B, 3, H, W). captions: B, some dropped to ''."""

    t: Int64[Tensor, " B"]
    eps: Float[Tensor, "B c h w"]
    x_t: Float[Tensor, "B c h w"]
    target: Float[Tensor, "B c h w"]
    control: Float[Tensor, "B k H W"]
    captions: tuple[str, ...]


def draw(batch: Batch, latents: Float[Tensor, "B c h w"], schedule: NoiseSchedule, caption_dropout: float) -> Draw:
    """Timesteps are stratified over the whole batch (Kingma et al. 2021, 2107.00630): less variance for nothing."""
    generator, rows = batch.generator("draw"), list(batch.rows)
    u = (torch.rand(1, generator=generator) + torch.randperm(batch.whole, generator=generator) / batch.whole) % 1
    t = (u[rows] * len(schedule)).long().clamp_max(len(schedule) - 1)
    keep = (torch.rand(batch.whole, generator=generator) >= caption_dropout)[rows]
    eps = batch.noise(tuple(latents.shape[1:]))
    t, eps = t.to(latents.device), eps.to(latents)
    return Draw(
        t=t,
        eps=eps,
        x_t=schedule.add_noise(latents, eps, t),
        target=schedule.target(latents, eps, t),
        control=batch.control,
        captions=tuple(c if k else "" for c, k in zip(batch.captions, keep.tolist(), strict=True)),
    )
