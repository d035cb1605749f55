"""Stage 1 and stage 2: a batch in, named losses out.

Both are this one function. Stage 1 sees labelled rows only. Stage 2 mixes plain images in, row by row: a row without a
caption takes the empty prompt and its control is derived from the picture itself; the recipe says whether it takes the
task term too. With only `task` weighted this is training from scratch, and the teacher is never run.

What a step sees of student and teacher is `Seen`; `tri_level` makes the paper's loss of it. A rival method is another
function of the same (compare/rivals/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
from refine_control.distill.losses import by_place, feature_loss, output_loss, task_loss
from refine_control.errors import UserError
from refine_control.recipe import LossWeights, StageConfig

Inputs = tuple[Tensor, Tensor, Text, Tensor]  # x_t, t, text, control
OUTPUT, HALF_MAX = "output", 65504.0


@dataclass(frozen=True)
class Seen:
    """What a step sees. Points and features only where the feature term has a weight, `taught` where the teacher ran.

    predicted, taught, target: (B, c, h, w), the student's and the teacher's prediction and what is true. weight: (B,),
    of the row (min-SNR). has_task: (B,), 0 for rows that take no task term. mask: (B, 1, H, W), 1 in the hole.
    place: (B, 1, h, w), what each place of a prediction counts; None: all alike.
    student, teacher: point -> (B, C, h, w) as the networks made it; `bridges` maps and projects them.
    """

    predicted: Tensor
    target: Tensor
    taught: Tensor | None
    weight: Tensor
    has_task: Tensor
    mask: Tensor
    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    bridges: Bridges | None
    place: Tensor | None = None


def tri_level(seen: Seen, weights: LossWeights) -> Losses:
    """The terms of the paper's loss. Those with weight 0 are neither computed nor named."""
    terms: Losses = {}
    if weights.task:
        terms["task"] = task_loss(seen.predicted, seen.target, seen.weight * seen.has_task, seen.place)
    if weights.output:
        assert seen.taught is not None
        terms["output"] = output_loss(seen.predicted, seen.taught, seen.weight, seen.place)
    if seen.bridges:
        terms["feature"] = feature_loss(seen.bridges(seen.student), seen.bridges.targets(seen.teacher))
    return terms


LossFunction = Callable[[Seen, LossWeights], Losses]


VERSION = 1  # of what is learnt from a recipe: raise it where the same recipe gives other weights


class Method(NamedTuple):
    """How a step's loss is made, and what changes with the code that makes it ('' for ours, which has VERSION)."""

    losses: LossFunction = tri_level
    digest: str = ""


def takes_task(batch: Batch, stage: StageConfig) -> Tensor:
    """(B,), bool: the rows that take the task term."""
    return batch.labelled | stage.task_on_unlabelled


class Distillation(nn.Module):
    """The loss of a batch, by its terms: the paper's, or a rival's.

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
        losses: LossFunction = tri_level,
    ) -> None:
        """kept: what the teacher made of steps that were met before."""
        super().__init__()
        self.losses = losses
        self.student = student
        self.bridges = bridges if stage.weights.feature else None
        self.teacher, self.encoder, self.stage, self.kept = teacher, encoder, stage, kept
        self.schedule = NoiseSchedule.of_stage(teacher.scheduler, stage)

    def forward(self, batch: Batch) -> Losses:
        weights, bridges = self.stage.weights, self.bridges
        points, teacher_points = (bridges.mapping, bridges.teacher_points) if bridges else ((), ())
        d, inputs = draw_inputs(batch, self.encoder, self.schedule, self.stage)
        with Taps(self.student, points) as taps:
            predicted = self.student(*inputs)
        taught, features = None, dict[str, Tensor]()
        if weights.output or weights.feature:
            taught, features = self._teach(batch, inputs, teacher_points)
        weight = self.schedule.row_weight(d.t, self.stage.snr_gamma)
        has_task = takes_task(batch, self.stage).to(weight)
        place = by_place(batch.mask, self.stage.hole_weight, predicted.shape[-2:])
        seen = Seen(predicted, d.target, taught, weight, has_task, batch.mask, taps.features, features, bridges, place)
        terms = self.losses(seen, weights)
        if odd := terms.keys() - LossWeights.model_fields.keys():
            raise UserError(f"a rival's losses are named {', '.join(sorted(odd))}; name them task, output or feature")
        return terms

    @torch.no_grad()
    def _teach(self, batch: Batch, inputs: Inputs, points: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output and its features. What is kept is rounded to half precision, when it is made too."""
        step = f"{batch.seed:x}-{batch.rows[0]}-{len(batch)}"
        found = self.kept.get(step, (OUTPUT, *points)) if self.kept else None
        if found is None:
            with Taps(self.teacher.denoiser, points) as taps:
                made = {OUTPUT: self.teacher.denoiser(*inputs), **taps.features}
            if self.kept is None:
                return made[OUTPUT], made
            half = {point: value.clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy() for point, value in made.items()}
            found = self.kept.put(step, half)
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
    schedule = NoiseSchedule.of_stage(teacher.scheduler, stage)
    for batch in batches:
        _, inputs = draw_inputs(batch.to(teacher.device), encoder, schedule, stage)
        with Taps(teacher.denoiser, points) as taps:
            teacher.denoiser(*inputs)
        yield taps.features
