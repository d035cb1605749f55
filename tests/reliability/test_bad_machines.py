"""A disk that fills up, a folder that may not be written to, data that goes away: one line that says so, the last
checkpoint as it was, and once that is mended the same command ends bit by bit as if nothing had been."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from refine_control import recipe as recipes
from refine_control.distill import checkpoint
from reliability.faults import Killer, code_of, differences, full_disk, no_privileges, not_finite, outcome
from tiny import RUN, distil_recipe, stage

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]
STEPS = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is kept in memory, so that every step reads its pictures."""
    root = tmp_path_factory.mktemp("machines")
    run = RUN.model_copy(update={"checkpoint_every": 2, "workers": 2})
    recipes.save(distil_recipe(root, 6, 4, stage1=stage(STEPS), stage2=stage(0), run=run), root / "recipe.yaml")
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    killer = distill(recipe, recipe.parent / "whole")
    assert killer.run() == 0, killer.told()
    return recipe.parent / "whole"


def distill(recipe: Path, out: Path, *flags: str, ranks: int = 1) -> Killer:
    return Killer(["distill", str(recipe), "--output_dir", str(out), *flags], out.with_suffix(".log"), ranks)


def begun(recipe: Path, out: Path) -> Killer:
    """A run that was killed after its first checkpoint."""
    killer = distill(recipe, out)
    assert killer.run(kill_when=(out / "stage1/checkpoints/step-000002").is_dir) == -signal.SIGKILL, killer.told()
    return killer


def last_step(out: Path) -> int:
    newest = checkpoint.latest(out / "stage1/checkpoints")
    assert newest is not None
    return checkpoint.read(newest)[0]


def lines_of(killer: Killer) -> list[str]:
    told = killer.told()
    assert "Traceback" not in told
    return re.findall(r"refine-control: [^\r\n]*", told)


def modes(folder: Path, file: int, directory: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(directory if path.is_dir() else file)


def test_a_full_disk(recipe: Path, whole: Path, tmp_path: Path) -> None:
    killer = begun(recipe, tmp_path / "run")
    before = last_step(tmp_path / "run")
    assert killer.run(fault=partial(full_disk, 20_000)) == 2, killer.told()
    (line,) = lines_of(killer)
    assert "File too large" in line
    assert "make room" in line
    assert last_step(tmp_path / "run") == before
    assert killer.run() == 0, killer.told()
    assert differences(outcome(whole), outcome(tmp_path / "run")) == []


def test_a_folder_that_may_not_be_written_to(recipe: Path, whole: Path, tmp_path: Path) -> None:
    killer = begun(recipe, tmp_path / "run")
    before = last_step(tmp_path / "run")
    modes(tmp_path / "run", 0o444, 0o555)
    assert killer.run(fault=no_privileges) == 2, killer.told()
    (line,) = lines_of(killer)
    assert "Permission denied" in line
    assert str(tmp_path / "run") in line
    assert last_step(tmp_path / "run") == before
    modes(tmp_path / "run", 0o644, 0o755)
    assert killer.run() == 0, killer.told()
    assert differences(outcome(whole), outcome(tmp_path / "run")) == []


def gone(path: Path) -> Callable[[], None]:
    aside = path.with_name(f"{path.name}-aside")
    path.rename(aside)
    return lambda: aside.rename(path) and None


def test_data_that_goes_away(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killer = distill(recipe, out)
    children = killer.start()
    while not (out / "stage1/checkpoints/step-000002").is_dir():
        time.sleep(0.001)
    come_back = gone(recipe.parent / "labelled")
    try:
        assert code_of(children) == 2, killer.told()
        (line,) = lines_of(killer)
        assert "labelled" in line
        assert "No such file" in line
        before = last_step(out)
        assert 2 <= before < STEPS
        assert killer.run() == 2, killer.told()
        assert "no such folder" in lines_of(killer)[-1]
        assert last_step(out) == before
    finally:
        come_back()
    assert killer.run() == 0, killer.told()
    assert differences(outcome(whole), outcome(out)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_in_one_of_two_processes(recipe: Path, tmp_path: Path, rank: int) -> None:
    """Neither takes the step, both go on; the pictures of both are named."""
    killer = distill(recipe, tmp_path / "run", "--stage1.steps", "6", ranks=2)
    assert killer.run(fault=partial(not_finite, 2, rank)) == 0, killer.told()
    stage1 = tmp_path / "run/stage1"
    (skipped,) = [json.loads(line) for line in (stage1 / "skipped.jsonl").read_text().splitlines()]
    assert skipped["step"] == 2
    assert len(skipped["pictures"]) == 4
    lines = [json.loads(line) for line in (stage1 / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    before = tmp_path / "none"
    killer = distill(recipe, before, "--stage1.steps", "6", "--run.max_skipped_steps", "0", ranks=2)
    assert killer.run(fault=partial(not_finite, 2, rank)) == 2, killer.told()
    assert len([line for line in lines_of(killer) if "step 2: loss or gradient is not finite" in line]) == 2
    assert last_step(before) == 2
