"""Killed at random moments over both stages, their boundary, caching and evaluation, the same command goes on, and
ends bit by bit where an uninterrupted run ends."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from refine_control import recipe as recipes
from refine_control.files import hold
from refine_control.recipe import DataConfig, EvaluateConfig
from reliability.faults import Killer, differences, outcome
from tiny import RUN, distil_recipe, stage, write_comparison

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.timeout(3000)]
KILLS = {"sample": 4, "long": 50}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, mixed rows, everything kept in memory that can be, a checkpoint every second step."""
    root = tmp_path_factory.mktemp("kills")
    whole = distil_recipe(
        root,
        labelled=5,
        plain=4,
        stage1=stage(5, ema_decay=0.5),
        stage2=stage(5, ema_decay=0.5, labelled_fraction=0.5),
        run=RUN.model_copy(update={"checkpoint_every": 2, "preview_every": 3}),
        evaluate=EvaluateConfig(images=4),
    )
    data = DataConfig(**(whole.data.model_dump() | {"cache_gb": 1.0}))
    recipes.save(whole.model_copy(update={"data": data}), root / "recipe.yaml")
    write_comparison(root / "recipe.yaml")
    return root / "recipe.yaml"


def compare(recipe: Path, out: Path, *flags: str) -> Killer:
    plan = recipe.with_name("compare.yaml")
    return Killer(["compare", str(plan), "--output_dir", str(out), *flags], out.with_suffix(".log"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_killed_at_random_it_ends_where_an_uninterrupted_run_ends(
    recipe: Path, tmp_path: Path, workers: int, cached: bool, request: pytest.FixtureRequest
) -> None:
    flags = ["--run.workers", str(workers)]
    caches = [["--data.cache_dir", str(tmp_path / name)] if cached else [] for name in ("a", "b")]
    whole = compare(recipe, tmp_path / "whole", *flags, *caches[0])
    began = time.monotonic()
    assert whole.run() == 0, whole.log.read_text(encoding="utf-8")[-3000:]
    taken = time.monotonic() - began
    wanted = KILLS["long" if request.config.getoption("--long") else "sample"] // 2
    round_ = 0
    phases: Counter[str] = Counter()
    while sum(phases.values()) < wanted:  # a run that ends early is begun anew
        out = tmp_path / f"killed-{round_}"
        killed = compare(recipe, out, *flags, *caches[1])
        killed.until_done(
            wanted - sum(phases.values()), 0.8 * taken, seed=100 * workers + 10 * cached + round_, folder=out
        )
        assert differences(outcome(tmp_path / "whole"), outcome(out)) == []
        phases.update(killed.kills)
        round_ += 1
    print(json.dumps({"kills": sum(phases.values()), "runs": round_, "after": phases}))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(recipe: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    flags = ["--run.checkpoint_every", "1000", "--stage1.steps", "400"]
    killer = Killer(["distill", str(recipe), "--output_dir", str(out), *flags], tmp_path / "log")
    log = out / "stage1" / "losses.jsonl"
    child = killer.start()
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") > 3):
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == code
    told = (tmp_path / "log").read_text(encoding="utf-8")
    assert "stopping after this step; once more stops at once" in told
    assert "the same command goes on where this one was" in told
    (saved,) = (out / "stage1" / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) >= 4


def test_a_second_process_on_the_same_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["distill", str(recipe), "--output_dir", str(out)]
    first = Killer([*command, "--stage1.steps", "400"], tmp_path / "first.log")
    child = first.start()
    try:
        while not (out / "stage1" / "losses.jsonl").is_file():
            time.sleep(0.01)
        second = Killer(command, tmp_path / "second.log")
        assert second.run() == 2
        assert "another process is at work" in (tmp_path / "second.log").read_text(encoding="utf-8")
    finally:
        child.kill()
        child.join()
    with hold(out):  # the dead one holds nothing
        pass
