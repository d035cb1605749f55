"""Stage 1 and stage 2: a batch in, named losses out.

Both are this one function. Stage 1 sees labelled rows only. Stage 2 mixes plain images in, row by row: a row without a
caption takes the empty prompt and its control is derived from the picture itself; the recipe says whether it takes the
task term too. With only `task` weighted this is training from scratch, and the teacher is never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from refine_control.data.batch import Batch
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.noise import NoiseSchedule
from refine_control.diffusion.taps import Taps
from refine_control.distill.alignment import Bridges
from refine_control.distill.draw import Draw, draw
from refine_control.distill.loop import Losses
from refine_control.distill.losses import feature_loss, output_loss, task_loss
from refine_control.recipe import StageConfig


class Distillation(nn.Module):
    """The tri-level loss of a batch. Terms with weight 0 are neither computed nor named.

    Its parameters are those that learn: the student's and the bridges'. The teacher is a Model, no submodule: it can
    neither learn nor be saved.
    """

    def __init__(
        self, student: Denoiser, teacher: Model, bridges: Bridges, encoder: Encoder, stage: StageConfig
    ) -> None:
        super().__init__()
        self.student = student
        self.bridges = bridges if stage.weights.feature else None
        self.teacher, self.encoder, self.stage = teacher, encoder, stage
        self.schedule = NoiseSchedule.from_config(teacher.scheduler)

    def forward(self, batch: Batch) -> Losses:
        weights, bridges = self.stage.weights, self.bridges
        points, teacher_points = (bridges.mapping, bridges.teacher_points) if bridges else ((), ())
        d, inputs = draw_inputs(batch, self.encoder, self.schedule, self.stage)
        weight = self.schedule.row_weight(d.t, self.stage.snr_gamma)
        with Taps(self.student, points) as student_taps:
            predicted = self.student(*inputs)
        terms: Losses = {}
        if weights.task:
            has_task = 1.0 if self.stage.task_on_unlabelled else batch.labelled.to(weight)
            terms["task"] = task_loss(predicted, d.target, weight * has_task)
        if weights.output or weights.feature:
            with torch.no_grad(), Taps(self.teacher.denoiser, teacher_points) as teacher_taps:
                taught = self.teacher.denoiser(*inputs)
        if weights.output:
            terms["output"] = output_loss(predicted, taught, weight)
        if bridges:
            terms["feature"] = feature_loss(bridges(student_taps.features), bridges.targets(teacher_taps.features))
        return terms


def draw_inputs(
    batch: Batch, encoder: Encoder, schedule: NoiseSchedule, stage: StageConfig
) -> tuple[Draw, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What a step draws, and what student and teacher alike are called with: x_t, t, text, control."""
    d = draw(batch, encoder.latents(batch), schedule, stage.caption_dropout)
    return d, (d.x_t, d.t, encoder.text(d.captions), d.control)


@torch.no_grad()
def teacher_features(
    points: tuple[str, ...], teacher: Model, encoder: Encoder, stage: StageConfig, batches: Iterable[Batch]
) -> Iterator[dict[str, Tensor]]:
    """The teacher's features at some points on each batch, to measure their norms."""
    schedule = NoiseSchedule.from_config(teacher.scheduler)
    for batch in batches:
        _, inputs = draw_inputs(batch.to(teacher.device), encoder, schedule, stage)
        with Taps(teacher.denoiser, points) as taps:
            teacher.denoiser(*inputs)
        yield taps.features
