"""Times of a step: whose they are, and when they are taken again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from comparison import plan_of
from refine_control import recipe as recipes
from refine_control.compare import compare as comparing
from refine_control.compare import runs as running
from refine_control.compare import speed
from refine_control.compare.plan import Run


def test_times_are_of_the_work_that_was_measured(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, recipe = [], recipes.load(recipes.DistilRecipe, base)
    monkeypatch.setattr(speed, "step_times", lambda runs, shop: measured.append(runs))
    monkeypatch.setattr(speed, "forward_times", lambda runs, shop: {})
    shop = running.Workshop(recipe)

    def times_measured(**changes: Any) -> int:
        run, file = Run("a", 0, recipe.model_copy(update=changes), None, base, base), tmp_path / "speed.json"
        if speed.kept_times([file], [run], shop) is None:
            file.write_text(json.dumps(speed.measure([run], shop)))
        return len(measured)

    half = {"stage2": recipe.stage2.model_copy(update={"steps": 0})}
    assert [times_measured(**half), times_measured(**half)] == [1, 1]
    assert [times_measured(), times_measured()] == [2, 2], "of stage 2 nothing was known"
    assert times_measured(teacher="another") == 3
    assert times_measured(data=recipe.data.model_copy(update={"resolution": 64})) == 4


def test_a_dry_run_takes_the_times_of_the_table(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")

    def measured_anew(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("refine_control.compare.speed.step_times", measured_anew)
    torch.set_num_threads(torch.get_num_threads() + 1)  # as torch begins, before a recipe's number is set
    assert "2/2" in comparing.dry_run(plan_of(base, tmp_path), {})
    assert not (tmp_path / "work/planned-speed.json").exists()
    told = json.loads((tmp_path / "results/speed.json").read_text())
    slow = {row: dict.fromkeys(stages, 60e3) for row, stages in told["step_ms"].items()}  # a minute a step
    (tmp_path / "results/speed.json").write_text(json.dumps(told | {"step_ms": slow}))
    line = next(line for line in comparing.dry_run(plan_of(base, tmp_path), {}).splitlines() if "scratch" in line)
    assert line.split("2/2")[1].split() == ["5.0", "min", "0", "min"], "what a run takes, and that none is left"
    for other in ({"of": "median"}, {"machine": told["machine"] | {"processor": "another"}}):  # by an earlier version
        (tmp_path / "results/speed.json").write_text(json.dumps(told | other))
        with pytest.raises(AssertionError):
            comparing.dry_run(plan_of(base, tmp_path), {})
