"""Stage 1 and stage 2: a batch in, named losses out.

Both are this one function. Stage 1 sees labelled rows only. Stage 2 mixes plain images in, row by row: a row without a
caption takes the empty prompt and its control is derived from the picture itself; the recipe says whether it takes the
task term too. With only `task` weighted this is training from scratch, and the teacher is never run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from refine_control.data.batch import Batch
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.noise import NoiseSchedule
from refine_control.diffusion.taps import Taps
from refine_control.distill.alignment import Bridges
from refine_control.distill.draw import draw
from refine_control.distill.loop import Losses
from refine_control.distill.losses import feature_loss, output_loss, task_loss
from refine_control.recipe import StageConfig


def distillation_losses(
    student: Denoiser, teacher: Model, bridges: Bridges | None, encoder: Encoder, stage: StageConfig
) -> Callable[[Batch], Losses]:
    """The tri-level loss as a function of a batch. Terms with weight 0 are neither computed nor named."""
    schedule = NoiseSchedule.from_config(teacher.scheduler)
    weights = stage.weights
    student_points = tuple(bridges.mapping) if bridges and weights.feature else ()
    teacher_points = tuple(dict.fromkeys(bridges.mapping.values())) if bridges and weights.feature else ()

    def losses(batch: Batch) -> Losses:
        d = draw(batch, encoder.latents(batch), schedule, stage.caption_dropout)
        inputs = (d.x_t, d.t, encoder.text(d.captions), d.control)
        weight = schedule.row_weight(d.t, stage.snr_gamma)
        with Taps(student, student_points) as student_taps:
            predicted = student(*inputs)
        terms: Losses = {}
        if weights.task:
            has_task = 1.0 if stage.task_on_unlabelled else batch.labelled.to(weight)
            terms["task"] = task_loss(predicted, d.target, weight * has_task)
        if weights.output or weights.feature:
            with torch.no_grad(), Taps(teacher.denoiser, teacher_points) as teacher_taps:
                taught = teacher.denoiser(*inputs)
            if weights.output:
                terms["output"] = output_loss(predicted, taught, weight)
            if bridges and weights.feature:
                bridged, targets = bridges(student_taps.features), bridges.targets(teacher_taps.features)
                terms["feature"] = feature_loss(bridged, targets, stage.feature_norm)
        return terms

    return losses
