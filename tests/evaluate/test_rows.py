"""What each row of a comparison changes, and that rows which begin alike share their first stage."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_control.distill.distil import Distiller
from refine_control.errors import RecipeError
from refine_control.evaluate.rows import ROWS, check_rows, train_row, wall_seconds
from refine_control.recipe import DistilRecipe, LossWeights
from tiny import RUN, distil_recipe, stage


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> DistilRecipe:
    return distil_recipe(
        tmp_path_factory.mktemp("rows"),
        labelled=5,
        plain=4,
        stage1=stage(3, ema_decay=0.5),
        stage2=stage(2, ema_decay=0.5, labelled_fraction=0.5, learning_rate=1e-4),
        run=RUN,
    )


@pytest.fixture(scope="module")
def distiller(recipe: DistilRecipe) -> Distiller:
    return Distiller(recipe.teacher, recipe.data, recipe.run)


def weights(student: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("unet", "controlnet")
        for path in (student / part).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_every_row_sees_as_many_steps_rows_and_rates(recipe: DistilRecipe) -> None:
    for name, vary in ROWS.items():
        for ours, theirs in ((vary(recipe).stage1, recipe.stage1), (vary(recipe).stage2, recipe.stage2)):
            for key in ("steps", "batch_size", "learning_rate", "warmup_steps", "ema_decay"):
                assert getattr(ours, key) == getattr(theirs, key), (name, key)


def test_what_each_row_changes(recipe: DistilRecipe) -> None:
    varied = {name: vary(recipe) for name, vary in ROWS.items()}
    for name, start in (("scratch", "random"), ("teacher-weights", "teacher")):
        assert varied[name].init == start
        assert varied[name].stage1.weights == varied[name].stage2.weights == LossWeights(task=1)
    assert varied["stage1-continued"].stage2.labelled_fraction == recipe.stage1.labelled_fraction == 1
    assert varied["stage1-continued"].stage1 == recipe.stage1
    assert not varied["plain-rows-without-task"].stage2.task_on_unlabelled
    assert varied["refine-control"] == recipe


def test_rows_that_begin_alike_share_stage_1_and_end_as_if_they_had_not(
    recipe: DistilRecipe, distiller: Distiller, tmp_path: Path
) -> None:
    first = train_row(distiller, recipe, "stage1-continued", 0, tmp_path / "stage1-continued/seed-0")
    log = tmp_path / "stage1-continued/seed-0/stage1/losses.jsonl"
    shared = train_row(distiller, recipe, "refine-control", 0, tmp_path / "refine-control/seed-0")
    assert (tmp_path / "refine-control/seed-0/stage1/losses.jsonl").read_text() == log.read_text(), "seconds and all"
    alone = train_row(distiller, recipe, "refine-control", 0, tmp_path / "elsewhere/refine-control/seed-0")
    ours, theirs = weights(shared), weights(alone)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert any(not torch.equal(ours[key], value) for key, value in weights(first).items())
    assert wall_seconds(shared.parent) > 0


def test_rows_that_begin_otherwise_share_nothing(recipe: DistilRecipe, distiller: Distiller, tmp_path: Path) -> None:
    logs = []
    for row, seed in (("refine-control", 0), ("refine-control", 1), ("teacher-weights", 0)):
        folder = tmp_path / row / f"seed-{seed}"
        train_row(distiller, recipe, row, seed, folder)
        logs.append((folder / "stage1/losses.jsonl").read_text())
    assert len(set(logs)) == 3


def test_another_recipe_in_a_rows_folder_is_refused(recipe: DistilRecipe, distiller: Distiller, tmp_path: Path) -> None:
    folder = tmp_path / "scratch/seed-0"
    train_row(distiller, recipe, "scratch", 0, folder)
    with pytest.raises(
        RecipeError, match=r"holds a run of another recipe \(feature_norm channel, not l2\); remove it or"
    ):
        train_row(distiller, recipe.model_copy(update={"init": "random", "feature_norm": "l2"}), "scratch", 0, folder)


def test_an_unknown_row() -> None:
    with pytest.raises(RecipeError, match="no row 'magic'; there are: scratch, teacher-weights, stage1-continued"):
        check_rows(["scratch", "magic"])
