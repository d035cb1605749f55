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
def caption_losses(model: Model, heldout: HeldOut, draws: int = 8, rows: int = 64) -> dict[str, float]:
    """Mean L_task over `draws` noises and timesteps of every held-out picture, the same for the three captions.

    rows: pictures that go through the model at once.
    """
    schedule = NoiseSchedule.from_config(model.scheduler, model.only_steps)
    batch = heldout.batch
    captions = list(batch.captions)
    order = torch.randperm(len(captions), generator=batch.generator("shuffled captions")).tolist()
    kinds = {"right": captions, "empty": [""] * len(captions), "shuffled": [captions[i] for i in order]}
    losses = dict.fromkeys(kinds, 0.0)
    chunks = [slice(first, first + rows) for first in range(0, len(captions), rows)]
    latents = torch.cat([model.encode(batch.image[chunk].to(model.device)).cpu() for chunk in chunks])
    text = {kind: [model.embed(words[chunk]) for chunk in chunks] for kind, words in kinds.items()}
    for turn in range(draws):
        d = draw(replace(batch, seed=batch.seed + turn), latents, schedule)
        for place, chunk in enumerate(chunks):
            x_t, t, control, target = (x[chunk].to(model.device) for x in (d.x_t, d.t, d.control, d.target))
            share = torch.full((len(t),), len(t) / len(captions) / draws, device=model.device)
            for kind in kinds:
                predicted = model.denoiser(x_t, t, text[kind][place], control)
                losses[kind] += task_loss(predicted, target, share).item()
    return losses
