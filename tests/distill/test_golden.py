"""A refactor changes no number: the seeded losses of both stages, as they were when they were last meant to change.

When a change of the method is meant, write the new ones: `python tests/distill/test_golden.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tiny
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.taps import feature_shapes
from refine_control.diffusion.text import Text
from refine_control.distill.alignment import Bridges, automatic_map
from refine_control.distill.stages import Distillation, teacher_features
from refine_control.student.plan import probe

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"


class FixedText(Encoder):
    """Text embeddings by seed: two runs of byte-pair training number equally frequent pairs differently."""

    def text(self, captions: Sequence[str]) -> Text:
        shape = (len(captions), tiny.TEXT.max_length, tiny.TEXT.hidden_size)
        return Text(torch.randn(shape, generator=torch.Generator().manual_seed(3)))


def seeded_losses() -> dict[str, dict[str, float]]:
    teacher = tiny.tiny_model().freeze()
    student = tiny.tiny_denoiser(tiny.STUDENT, seed=1)
    inputs = probe(teacher)
    ours, theirs = feature_shapes(student, inputs), feature_shapes(teacher.denoiser, inputs)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        bridges = Bridges(automatic_map(ours, theirs), ours, theirs)
    result = {}
    for name, fraction, task_on_unlabelled in (("stage 1", 1.0, True), ("stage 2", 0.5, False)):
        stage = tiny.stage(labelled_fraction=fraction, task_on_unlabelled=task_on_unlabelled)
        encoder, batch = FixedText(teacher, 0.01), tiny.batch(labelled_fraction=fraction)
        bridges.measure(teacher_features(bridges.teacher_points, teacher, encoder, stage, [batch]), "channel")
        terms = Distillation(student, teacher, bridges, encoder, stage)(batch)
        result[name] = {term: value.item() for term, value in terms.items()}
    return result


def test_seeded_losses_are_what_they_were() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = seeded_losses()
    assert {stage: pytest.approx(terms, rel=1e-4) for stage, terms in golden.items()} == now


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(seeded_losses(), indent=1) + "\n", encoding="utf-8")
