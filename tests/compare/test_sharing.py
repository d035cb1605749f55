"""Rows that begin alike share stage 1, and a plan knows it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from comparison import CONTINUED, ROWS, SCRATCH, plan_of
from refine_control import recipe as recipes
from refine_control.compare import compare as comparing
from refine_control.compare import runs as running
from refine_control.compare import sharing
from refine_control.compare.plan import base_recipe


def planned(base: Path, out: Path, rows: dict[str, Any]) -> dict[str, float]:
    """ "row seed" -> the share of its steps that a dry run takes for done."""
    plan = plan_of(base, out, rows)
    shop = running.Workshop(base_recipe(plan, {}))
    todo = comparing._planned(plan, {}, shop)
    assert todo[0].row == "teacher"
    scored = {run.out for run in todo if running.result_of(run) is not None}
    done = comparing.done_of(todo, scored, shop)
    return {f"{run.row} {run.seed}": done[run.out] for run in todo[1:]}


def test_a_stage_1_that_rows_share_is_planned_once(base: Path, tmp_path: Path) -> None:
    alone, network = {"set": {"stage2.steps": 0}}, {"rival": "feedforward"}
    rows = {**ROWS, "continued": CONTINUED, "stage-1": alone, "network": network, "again": network}
    alike = {"continued 0": 0.6, "continued 1": 0.6, "stage-1 0": 1, "stage-1 1": 1}
    assert planned(base, tmp_path, rows) == alike | {
        f"{row} {seed}": 0 for row in (*ROWS, "network", "again") for seed in (0, 1) if (row, seed) != ("telea", 1)
    }


def test_a_stage_1_is_taken_over_from_where_it_is(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "results/refine-control", tmp_path / "results/refine-control")
    rows = {"refine-control": {}, "continued": CONTINUED}
    scored = {"refine-control 0": 1, "refine-control 1": 1}
    assert planned(base, tmp_path, rows) == scored | {"continued 0": 0, "continued 1": 0}, "its folder is gone"
    shutil.copytree(whole / "work/refine-control/seed-0", tmp_path / "work/refine-control/seed-0")
    assert planned(base, tmp_path, rows) == scored | {"continued 0": 0.6, "continued 1": 0}
    later = planned(base, tmp_path, {"continued": CONTINUED, "scratch": SCRATCH})
    assert later == {"continued 0": 0.6, "continued 1": 0, "scratch 0": 0, "scratch 1": 0}, "of a row that is left out"


@pytest.mark.parametrize(("fraction", "alike"), [(1, True), (0.5, False)])
def test_plain_pictures_decide_stage_1_where_it_takes_some(base: Path, fraction: float, alike: bool) -> None:
    recipe = recipes.load(recipes.DistilRecipe, base, {"stage1.labelled_fraction": fraction})
    other = recipe.model_copy(
        update={"stage2": recipe.stage1, "data": recipe.data.model_copy(update={"unlabelled": "other"})}
    )
    contents = {"teacher": "t", "data.labelled": "l", "data.unlabelled": "u"}
    begun = [
        sharing.beginning(recipe, contents, {}),
        sharing.beginning(other, contents | {"data.unlabelled": "v"}, {}),
    ]
    assert (begun[0] == begun[1]) is alike
    assert begun[0] != sharing.beginning(recipe, contents | {"data.labelled": "v"}, {})


@pytest.mark.slow
def test_rows_that_begin_alike_share_stage_1_and_end_as_if_they_had_not(base: Path, tmp_path: Path) -> None:
    plain = [str(base.parent / "plain"), str(base.parent / "labelled")]
    rows = {
        "stage1-continued": {"set": {"stage2.labelled_fraction": 1}},
        "other-pictures": {"set": {"data.unlabelled": plain}},  # of stage 2
        "refine-control": {},
    }
    comparing.compare(plan_of(base, tmp_path, rows, seeds=(0,)), {})
    comparing.compare(plan_of(base, tmp_path / "alone", {"refine-control": {}}, seeds=(0,)), {})
    logs = [tmp_path / f"work/{row}/seed-0/stage1/losses.jsonl" for row in rows]
    assert len({log.read_text() for log in logs}) == 1, "seconds and all"
    shared, alone = (
        load_file(out / "work/refine-control/seed-0/student/unet/diffusion_pytorch_model.safetensors")
        for out in (tmp_path, tmp_path / "alone")
    )
    assert [key for key in shared if not torch.equal(shared[key], alone[key])] == []
    assert running.trained_seconds(logs[2].parents[1])


def test_a_stage_1_of_another_precision_is_another(base: Path) -> None:
    recipe = recipes.load(recipes.DistilRecipe, base)
    for change in ({"mixed_precision": "bf16"}, {"teacher_dtype": "fp16"}, {"use_8bit_adam": True}):
        other = recipe.model_copy(update={"run": recipe.run.model_copy(update=change)})
        assert sharing.beginning(other, {}, {}) != sharing.beginning(recipe, {}, {})
    slower = recipe.model_copy(update={"run": recipe.run.model_copy(update={"num_threads": 2, "compile": True})})
    assert sharing.beginning(slower, {}, {}) == sharing.beginning(recipe, {}, {})
