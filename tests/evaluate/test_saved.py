"""Saved models and classical inpainting, scored on a recipe's held-out pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refine_control.errors import DataError
from refine_control.evaluate.saved import evaluate
from refine_control.provenance import commit
from refine_control.recipe import DistilRecipe
from tiny import distil_recipe, stage, write_folder
from tiny_sd import tiny_pipeline


def recipe_for(root: Path) -> DistilRecipe:
    recipe = distil_recipe(root, labelled=4, plain=3, stage1=stage(1), stage2=stage(0))
    run = recipe.run.model_copy(update={"num_threads": 1})  # else it takes all cores, beside other tests
    return recipe.model_copy(update={"output_dir": str(root / "scores"), "run": run})


def scored(recipe: DistilRecipe, *models: str, baselines: bool = False) -> dict[str, Any]:
    evaluate(recipe, models, baselines)
    return json.loads((Path(recipe.output_dir) / "scores.json").read_text(encoding="utf-8"))


def test_the_recipes_teacher_is_scored_with_its_controlnets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, whole, foundation = tiny_pipeline("sd", 1), str(tmp_path / "whole"), str(tmp_path / "foundation")
    made.save_pretrained(whole)
    parts = {name: getattr(made, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    tiny_pipeline("sd", 0, **parts).save_pretrained(foundation)
    made.controlnet.save_pretrained(tmp_path / "net")
    recipe = recipe_for(tmp_path)
    expected = scored(recipe, whole)[whole]["domains"]
    assert "has no ControlNet" not in capsys.readouterr().err
    with_net = recipe.model_copy(update={"teacher": foundation, "controlnets": (str(tmp_path / "net"),)})
    assert scored(with_net, foundation)[foundation]["domains"] == expected
    assert "has no ControlNet" not in capsys.readouterr().err
    assert scored(recipe, foundation)[foundation]["domains"] != expected
    assert f"'{foundation}' has no ControlNet" in capsys.readouterr().err


def test_the_scores_say_on_what(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    found = scored(recipe, recipe.teacher)
    assert found["data"]["labelled"] == recipe.data.labelled
    assert found["evaluate"]["seed"] == recipe.evaluate.seed
    assert found["masks"] == recipe.masks.model_dump()
    assert found["commit"] == found[recipe.teacher]["commit"] == commit()
    assert set(found["heldout"]) == {"labelled", "unlabelled"}
    assert found["provenance"][0]["trained_on"], "the folders are not split"


def test_classical_inpainting_of_whole_pictures_is_refused_before_any_model_is_scored(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    edges = recipe.model_copy(update={"data": recipe.data.model_copy(update={"controls": ("edges",)})})
    with pytest.raises(DataError, match=r"4 masks of the labelled pictures cover all of them"):
        scored(edges, "no/such/model", baselines=True)


def test_a_data_set_that_has_a_test_split_alone_is_enough(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    write_folder(tmp_path / "tested" / "test", 4)
    data = recipe.data.model_copy(update={"labelled": str(tmp_path / "tested"), "unlabelled": None})
    found = scored(recipe.model_copy(update={"data": data}), recipe.teacher)
    assert "trained_on" not in found["provenance"][0]
