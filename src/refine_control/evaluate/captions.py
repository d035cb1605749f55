"""Does the model listen? The task loss under the right caption, the empty one, and somebody else's."""

from __future__ import annotations

from dataclasses import replace

import torch

from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import NoiseSchedule
from refine_control.distill.draw import draw
from refine_control.distill.losses import task_loss
from refine_control.evaluate.heldout import HeldOut


@torch.no_grad()
def caption_losses(model: Model, heldout: HeldOut, draws: int = 8) -> dict[str, float]:
    """Mean L_task over `draws` noises and timesteps of every held-out picture, the same for the three captions."""
    schedule = NoiseSchedule.from_config(model.scheduler)
    batch = heldout.batch.to(model.device)
    latents = model.encode(batch.image)
    captions = list(batch.captions)
    # Neighbours may share a concept, so the stranger's caption comes from half the data set away.
    half = len(captions) // 2
    kinds = {"right": captions, "empty": [""] * len(captions), "shuffled": captions[half:] + captions[:half]}
    text = {kind: model.embed(words) for kind, words in kinds.items()}
    losses = dict.fromkeys(kinds, 0.0)
    for turn in range(draws):
        d = draw(replace(batch, seed=batch.seed + turn), latents, schedule, caption_dropout=0.0)
        ones = torch.ones(len(batch), device=model.device)
        for kind in kinds:
            predicted = model.denoiser(d.x_t, d.t, text[kind], d.control)
            losses[kind] += task_loss(predicted, d.target, ones).item() / draws
    return losses
