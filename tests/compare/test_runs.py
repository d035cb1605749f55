"""A run's result: what it is of, and what it is refused for."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comparison import plan_of
from refine_control import recipe as recipes
from refine_control.compare import compare as comparing
from refine_control.compare import runs as running
from refine_control.compare.plan import base_recipe
from refine_control.errors import RecipeError, UserError
from refine_control.evaluate import score


def test_results_of_another_recipe_are_refused(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    with pytest.raises(
        RecipeError,
        match=r"run.json' is the result of another recipe, teacher, data, method, rival, precision or scoring network",
    ):
        comparing.compare(plan_of(base, tmp_path), {"stage1.learning_rate": "0.5"})


def test_results_of_another_scoring_are_refused(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    monkeypatch.setattr(score, "SCORING", 2)
    with pytest.raises(RecipeError, match="result of another recipe"):
        comparing.compare(plan_of(base, tmp_path), {})


def test_rows_of_other_data_share_the_teacher(base: Path) -> None:
    recipe = recipes.load(recipes.DistilRecipe, base)
    shop = running.Workshop(recipe)
    one = shop.distiller(recipe)
    fewer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labelled_limit": 3})})
    whole = one.contents(recipe)
    other = shop.distiller(fewer)
    assert other.teacher is one.teacher
    assert other.encoder is not one.encoder, "which keeps what it made by the place of a picture"
    assert other.labelled.examples == 3
    assert other.contents(recipe)["data.labelled"] != whole["data.labelled"]
    assert one.labelled.examples == 5
    assert one.contents(recipe) == whole
    assert shop.distiller(fewer) is other


def test_results_of_another_scoring_network_are_others(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, {"refine-control": {}}, seeds=(0,))
    shop = running.Workshop(base_recipe(plan, {}))
    recipe = comparing._planned(plan, {}, shop)[1].recipe
    given = recipe.evaluate.model_copy(update={"standard": {"lpips-alex": "weights.pth"}})
    standard = recipe.model_copy(update={"evaluate": given})
    distiller = shop.distiller(recipe)

    def digests(sha256: str) -> list[str]:
        domains: Any = {
            name: SimpleNamespace(heldout=domain.heldout, provenance=lambda: [{"sha256": sha256}])
            for name, domain in shop.domains.items()
        }
        return [running.digest_of(one, one, distiller, {}, domains) for one in (recipe, standard)]

    (plain, ours), (same, other) = digests("a"), digests("b")
    assert ours != other
    assert plain == same, "the embedded one is that of the version"


def test_a_row_is_not_trained_in_two_precisions(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, {"refine-control": {}}, seeds=(0,))
    shop = running.Workshop(base_recipe(plan, {}))
    run = comparing._planned(plan, {}, shop)[1]
    (run.work / "stage1/checkpoints/step-000001").mkdir(parents=True)
    begun = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"mixed_precision": "bf16"})})
    recipes.save(begun, run.work / "recipe.yaml")
    with pytest.raises(UserError, match=r"begun with .*bf16.*, not fp32"):
        running.finish(run, shop)
