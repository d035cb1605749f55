"""Killed at random moments over both stages, their boundary, caching and evaluation, the same command goes on, and
ends bit by bit where an uninterrupted run ends."""

import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from refine_control import recipe as recipes
from refine_control.files import hold
from refine_control.recipe import DataConfig, EvaluateConfig
from reliability.faults import Killer, code_of, differences, outcome
from tiny import RUN, distil_recipe, stage, write_comparison

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, mixed rows, everything kept in memory that can be, a checkpoint every second step.

    Stage 1 takes 20 of 24 captioned pictures: it is within one epoch.
    """
    root = tmp_path_factory.mktemp("kills")
    whole = distil_recipe(
        root,
        labelled=24,
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


def distill(recipe: Path, out: Path, *flags: str, ranks: int = 1) -> Killer:
    return Killer(["distill", str(recipe), "--output_dir", str(out), *flags], out.with_suffix(".log"), ranks)


def killed_at_random(make: Callable[[Path], Killer], root: Path, wanted: int, seed: int) -> dict[str, object]:
    """Kills runs until there were `wanted` kills; each must end as one that was let alone. Returns the counts.

    Only while there is training to lose: the speed, measured after all results, is taken from the whole run.
    """
    whole = make(root / "whole")
    began = time.time()
    assert whole.run() == 0, whole.told()
    results = sorted((root / "whole").rglob("run.json")) or [root / "whole/student/model_index.json"]
    taken = max(path.stat().st_mtime for path in results) - began
    last = [path.relative_to(root / "whole").as_posix() for path in results]
    runs = 0
    after: Counter[str] = Counter()
    while after.total() < wanted:  # a run that ends early is begun anew
        out = root / f"killed-{runs}"
        killed = make(out)
        if (root / "whole/speed.json").is_file():
            out.mkdir()
            shutil.copy(root / "whole/speed.json", out)
        killed.until_done(wanted - after.total(), 0.4 * taken, seed + runs, out, last)
        assert differences(outcome(root / "whole"), outcome(out)) == []
        after.update(killed.kills)
        runs += 1
    return {"kills": after.total(), "runs": runs, "newest_file_at_the_kill": dict(sorted(after.items()))}


SLOW, LONG = pytest.mark.slow, [pytest.mark.long, pytest.mark.timeout(3000)]


@pytest.mark.parametrize(
    ("workers", "cached", "wanted"),
    [
        pytest.param(0, False, 2, marks=SLOW),
        pytest.param(2, True, 2, marks=SLOW),
        *(pytest.param(workers, cached, 20, marks=LONG) for workers in (0, 2) for cached in (False, True)),
    ],
)
def test_killed_at_random_it_ends_where_an_uninterrupted_run_ends(
    recipe: Path, tmp_path: Path, workers: int, cached: bool, wanted: int, tally: Callable[..., None]
) -> None:
    """Both stages, their boundary, evaluation and the report; the caches on disk are filled anew by each run."""

    def make(out: Path) -> Killer:
        caches = ["--data.cache_dir", f"{out}-cache", "--data.teacher_cache_gb", "0.1"] if cached else []
        return compare(recipe, out, "--run.workers", str(workers), *caches)

    found = killed_at_random(make, tmp_path, wanted, seed=1000 * workers + 100 * cached)
    tally(f"killed at random, {workers} workers{', caches on disk' * cached}", **found)


@pytest.mark.parametrize("wanted", [pytest.param(1, marks=SLOW), pytest.param(20, marks=LONG)])
def test_two_processes_killed_at_random(recipe: Path, tmp_path: Path, wanted: int, tally: Callable[..., None]) -> None:
    found = killed_at_random(lambda out: distill(recipe, out, ranks=2), tmp_path, wanted, seed=7)
    tally("killed at random, two processes", **found)


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), *(pytest.param(w, r, marks=SLOW) for w, r in [(2, 1), (0, 2)])])
def test_resumed_twice_within_one_epoch(recipe: Path, tmp_path: Path, workers: int, ranks: int) -> None:
    flags = ("--stage2.steps", "0", "--run.workers", str(workers))
    whole, killed = (distill(recipe, tmp_path / name, *flags, ranks=ranks) for name in ("whole", "killed"))
    assert whole.run() == 0, whole.told()
    checkpoints = tmp_path / "killed" / "stage1" / "checkpoints"
    for step in (2, 4):
        assert killed.run(kill_when=(checkpoints / f"step-{step:06d}").is_dir) == -signal.SIGKILL
    assert killed.run() == 0, killed.told()
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []


@pytest.mark.parametrize(
    ("workers", "ranks"), [pytest.param(0, 1, marks=SLOW), *(pytest.param(2, ranks, marks=LONG) for ranks in (1, 2))]
)
def test_killed_at_each_file_of_the_caches(
    recipe: Path, tmp_path: Path, workers: int, ranks: int, tally: Callable[..., None]
) -> None:
    """Latents, embeddings and the teacher's steps: as soon as one is begun, and as soon as it is there."""
    out, kept = tmp_path / "killed", tmp_path / "killed-cache"
    seen, kills = set[str](), 0

    def there() -> set[str]:
        names = (path.relative_to(kept).as_posix() for path in kept.rglob("*.*"))
        return {re.sub(r"\.[0-9a-f]{16}(?=\.tmp$)", "", name) for name in names}

    def run(out: Path) -> Killer:
        caches = ("--data.cache_dir", f"{out}-cache", "--data.teacher_cache_gb", "0.1")
        return distill(recipe, out, *caches, "--run.workers", str(workers), ranks=ranks)

    whole, killed = run(tmp_path / "whole"), run(out)
    assert whole.run() == 0, whole.told()
    while (code := killed.run(kill_when=lambda: not there() <= seen)) != 0:
        assert code == -signal.SIGKILL, killed.told()
        seen.update(there())
        kills += 1
    tally(f"killed at each file of the caches, {workers} workers, {ranks} processes", kills=kills, files=len(seen))
    assert kills > 8
    assert {name.partition("-")[0] for name in seen} == {"latents", "text", "teacher"}
    assert differences(outcome(tmp_path / "whole"), outcome(out)) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(
    recipe: Path, tmp_path: Path, ranks: int, number: int, code: int
) -> None:
    """Of two processes only the second one hears it."""
    out = tmp_path / "run"
    killer = distill(recipe, out, "--run.checkpoint_every", "1000", "--stage1.steps", "400", ranks=ranks)
    log = out / "stage1" / "losses.jsonl"
    children = killer.start()
    while not (log.is_file() and log.read_text(encoding="utf-8").count("\n") > 3):
        time.sleep(0.01)
    assert children[-1].pid is not None
    os.kill(children[-1].pid, number)
    assert [code_of([child]) for child in children] == [code] * ranks, killer.told()
    assert "the same command goes on where this one was" in killer.told()
    assert ranks == 2 or "stopping after this step; once more stops at once" in killer.told()
    (saved,) = (out / "stage1" / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) >= 4


def test_a_second_process_on_the_same_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (child,) = distill(recipe, out, "--stage1.steps", "400").start()
    try:
        while not (out / "stage1" / "losses.jsonl").is_file():
            time.sleep(0.01)
        second = Killer(["distill", str(recipe), "--output_dir", str(out)], tmp_path / "second.log")
        assert second.run() == 2
        assert "another process is at work" in second.told()
    finally:
        child.kill()
        child.join()
    with hold(out):  # the dead one holds nothing
        pass
