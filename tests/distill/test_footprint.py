"""What training takes, counted on tensors without contents, against the same on real ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from refine_control.diffusion.taps import Taps
from refine_control.distill.distil import Distiller
from refine_control.distill.footprint import Footprint, footprint, footprint_table
from refine_control.distill.losses import feature_loss
from refine_control.recipe import DistilRecipe
from refine_control.student.outline import plan_teacher
from refine_control.student.plan import cost, plan_cost, probe
from tiny import distil_recipe, stage


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> DistilRecipe:
    return distil_recipe(tmp_path_factory.mktemp("footprint"), 4, 4, stage1=stage(3), stage2=stage(2))


def varied(recipe: DistilRecipe, processes: int = 1, **run: object) -> Footprint:
    changed = recipe.model_copy(update={"run": recipe.run.model_copy(update=run)})
    return footprint(changed, plan_teacher(recipe.teacher), processes)


def test_activations_are_those_of_a_real_pass(recipe: DistilRecipe) -> None:
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run)
    student, bridges = distiller.fresh_student(recipe)
    own = {p.untyped_storage().data_ptr() for p in (*student.parameters(), *bridges.parameters())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x_t, t, text, control = probe(distiller.teacher)
    assert control is not None
    inputs = (x_t.repeat(4, 1, 1, 1), t.repeat(4), type(text)(text.tokens.repeat(4, 1, 1)), control.repeat(4, 1, 1, 1))
    student.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Taps(student, bridges.mapping) as taps:
        student(*inputs).square().mean()
        bridged = bridges(taps.features)
        feature_loss(bridged, {point: torch.empty_like(value) for point, value in bridged.items()})
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert varied(recipe).activations == pytest.approx(real, rel=0.01)


def test_weights_and_arithmetic_follow_from_the_counts(recipe: DistilRecipe) -> None:
    teacher = plan_teacher(recipe.teacher)
    ours, theirs = plan_cost(recipe.student, teacher), cost(teacher.denoiser, teacher)
    f = varied(recipe)
    assert f.rows == 4
    assert f.macs == (3 + 2) * 4 * (theirs.macs + 3 * ours.macs)
    assert varied(recipe, gradient_checkpointing=True).macs == f.macs + (3 + 2) * 4 * ours.macs
    assert f.learning > 20 * ours.parameters, "bridges learn too"
    assert f.frozen - varied(recipe, teacher_dtype="fp16").frozen == 2 * theirs.parameters
    assert f.memory == f.frozen + f.learning + f.activations
    assert f"{f.memory / 1e9:.1f} GB" in footprint_table(f)


@pytest.mark.slow
def test_what_saves_memory_saves_it(recipe: DistilRecipe) -> None:
    whole = varied(recipe).activations
    assert varied(recipe, gradient_accumulation_steps=2).activations < 0.7 * whole
    assert varied(recipe, gradient_checkpointing=True).activations < 0.7 * whole
    assert varied(recipe, mixed_precision="bf16").activations < whole
    assert varied(recipe, mixed_precision="fp16").activations < whole
    plain, eight = varied(recipe), varied(recipe, use_8bit_adam=True)
    assert eight.learning == pytest.approx(plain.learning * (20 - 6) / 20)
    assert eight.checkpoint == pytest.approx(plain.checkpoint * (16 - 6) / 16)
    assert varied(recipe, 2, shard=True).learning == pytest.approx(plain.learning / 2, abs=1)
    assert varied(recipe, 2).learning == plain.learning


def test_the_larger_stage_counts(recipe: DistilRecipe) -> None:
    larger = recipe.stage2.model_copy(update={"batch_size": 2 * recipe.stage1.batch_size, "steps": 1})
    changed = recipe.model_copy(update={"stage2": larger})
    assert varied(changed).rows == 2 * varied(recipe).rows
    assert varied(changed).activations > varied(recipe).activations


def test_nothing_is_left_behind(recipe: DistilRecipe, tmp_path: Path) -> None:
    varied(recipe)
    assert type(torch.zeros(1)) is Tensor
