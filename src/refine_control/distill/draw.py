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


def draw(
    batch: Batch,
    latents: Float[Tensor, "B c h w"],
    schedule: NoiseSchedule,
    caption_dropout: float = 0.0,
    word_dropout: float = 0.0,
) -> Draw:
    """Timesteps are stratified over the whole batch (Kingma et al. 2021, 2107.00630): less variance for nothing.

    caption_dropout, word_dropout: the share of the captions that become '', and of the words that the others lose.
    """
    generator, rows = batch.generator("draw"), list(batch.rows)
    u = (torch.rand(1, generator=generator) + torch.randperm(batch.whole, generator=generator) / batch.whole) % 1
    count = len(schedule.timesteps)
    t = schedule.timesteps[(u[rows] * count).long().clamp_max(count - 1)]
    keep = (torch.rand(batch.whole, generator=generator) >= caption_dropout)[rows]
    eps = batch.noise(tuple(latents.shape[1:]))
    t, eps = t.to(latents.device), eps.to(latents)
    return Draw(
        t=t,
        eps=eps,
        x_t=schedule.add_noise(latents, eps, t),
        target=schedule.target(latents, eps, t),
        control=batch.control,
        captions=tuple(
            _drop_words(caption, word_dropout, batch.generator("words", row)) if kept else ""
            for caption, kept, row in zip(batch.captions, keep.tolist(), batch.rows, strict=True)
        ),
    )


def _drop_words(caption: str, share: float, generator: torch.Generator) -> str:
    if not share:
        return caption
    words = caption.split()
    keep = torch.rand(len(words), generator=generator) >= share
    return " ".join(word for word, kept in zip(words, keep.tolist(), strict=True) if kept)
