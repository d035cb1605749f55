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
from refine_control.data.table import Steps
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.noise import NoiseSchedule
from refine_control.diffusion.taps import Taps
from refine_control.diffusion.text import Text
from refine_control.distill.alignment import Bridges
from refine_control.distill.draw import Draw, draw
from refine_control.distill.loop import Losses
from refine_control.distill.losses import feature_loss, output_loss, task_loss
from refine_control.recipe import StageConfig

Inputs = tuple[Tensor, Tensor, Text, Tensor]  # x_t, t, text, control
OUTPUT, HALF_MAX = "output", 65504.0


class Distillation(nn.Module):
    """The tri-level loss of a batch. Terms with weight 0 are neither computed nor named.

    Its parameters are those that learn: the student's and the bridges'. The teacher is a Model, no submodule: it can
    neither learn nor be saved.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Model,
        bridges: Bridges,
        encoder: Encoder,
        stage: StageConfig,
        kept: Steps | None = None,
    ) -> None:
        """kept: what the teacher made of steps that were met before."""
        super().__init__()
        self.student = student
        self.bridges = bridges if stage.weights.feature else None
        self.teacher, self.encoder, self.stage, self.kept = teacher, encoder, stage, kept
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
            taught, features = self._teach(batch, inputs, teacher_points)
        if weights.output:
            terms["output"] = output_loss(predicted, taught, weight)
        if bridges:
            terms["feature"] = feature_loss(bridges(student_taps.features), bridges.targets(features))
        return terms

    @torch.no_grad()
    def _teach(self, batch: Batch, inputs: Inputs, points: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output and its features. What is kept is rounded to half precision, when it is made too."""
        step = f"{batch.seed:x}-{batch.rows[0]}-{len(batch)}"
        found = self.kept.get(step) if self.kept else None
        if found is None:
            with Taps(self.teacher.denoiser, points) as taps:
                made = {OUTPUT: self.teacher.denoiser(*inputs), **taps.features}
            if self.kept is None:
                return made[OUTPUT], made
            found = {point: value.clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy() for point, value in made.items()}
            self.kept.put(step, found)
        device = self.teacher.device
        made = {point: torch.from_numpy(value).to(device, torch.float32) for point, value in found.items()}
        return made[OUTPUT], made


def draw_inputs(batch: Batch, encoder: Encoder, schedule: NoiseSchedule, stage: StageConfig) -> tuple[Draw, Inputs]:
    """What a step draws, and what student and teacher alike are called with: x_t, t, text, control."""
    d = draw(batch, encoder.latents(batch), schedule, stage.caption_dropout, stage.word_dropout)
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
