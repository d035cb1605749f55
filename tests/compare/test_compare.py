"""The harness: rows, seeds, resuming; a table is the same however often it was interrupted."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from comparison import ROWS, plan_of, scores
from refine_control.compare import claims as claiming
from refine_control.compare import compare as comparing
from refine_control.compare import tables
from refine_control.compare.plan import Run, narrowed
from refine_control.compare.runs import Workshop, finish
from refine_control.distill.learner import Learner
from refine_control.errors import BusyError, RecipeError, UserError
from refine_control.evaluate.report import Row
from refine_control.files import hold


def test_it_writes_a_json_a_run_and_tables_plots_and_a_page(whole: Path) -> None:
    results = whole / "results"
    runs = {path.parent.relative_to(results).as_posix() for path in results.rglob("run.json")}
    assert runs == {
        "teacher/seed-0",
        "telea/seed-0",
        *(f"{r}/seed-{s}" for r in ("scratch", "refine-control") for s in (0, 1)),
    }
    for name in ("table.md", "table.csv", "rows.png", "wall_seconds.png", "report.html", "speed.json"):
        assert (results / name).stat().st_size > 0, name
    assert not (results / "macs.png").exists(), "beside the teacher's they are all the same"
    assert not list(results.rglob("*.safetensors")), "what is large is in work_dir"
    one = json.loads((results / "scratch/seed-1/run.json").read_text())
    assert (one["seed"], one["recipe"]["init"]) == (1, "random")
    assert one["trained_seconds"] > 0
    assert one["machine"]["torch"] == torch.__version__
    assert {"psnr", "ssim"} <= set(one["domains"]["labelled"]["per_image"])
    text = (results / "table.md").read_text()
    assert re.search(r"\| scratch \| [\d.]+ ± ", text)
    sample = one["recipe"]["sample"]
    assert f"{sample['num_inference_steps']} sampler step(s), guidance {sample['guidance_scale']:g};" in text
    assert "| telea | unlabelled |" in text
    assert set(json.loads((results / "speed.json").read_text())["step_ms"]) == {"scratch", "refine-control"}
    scores = json.loads((results / "scores.json").read_text())
    assert scores["gate_failures"] is not None
    assert scores["rows"]["scratch"]["made_by"]["1"] == {key: one[key] for key in ("identity", "commit")}


@pytest.mark.slow
def test_interrupted_and_resumed_it_gives_the_same_table(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first step of stage 2 of the second run."""
    plan, save = plan_of(base, tmp_path), Learner.save

    def save_and_stop(learner: Learner, step: int) -> None:
        save(learner, step)
        if learner.folder.parts[-4:-1] == ("refine-control", "seed-0", "stage2") and step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        comparing.compare(plan, {})
    monkeypatch.undo()
    left = tmp_path / "work/refine-control/seed-0"
    assert [path.name for path in (left / "stage2/checkpoints").glob("step-*")] == ["step-000001"]
    assert not (left / "student").exists()
    comparing.compare(plan, {})
    assert scores(tmp_path) == scores(whole)


def test_complete_runs_are_taken_as_they_are_without_their_students(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    before = scores(whole)
    page = tmp_path / "results/report.html"
    page.unlink()
    comparing.compare(plan_of(base, tmp_path), {})
    assert scores(tmp_path) == before
    assert not list((tmp_path / "work").rglob("student"))
    assert page.read_text() == (whole / "results/report.html").read_text(), "curves and pictures as well"


def test_tables_of_what_is_complete_without_training_the_rest(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results/scratch/seed-1")
    shutil.rmtree(tmp_path / "results/telea")
    comparing.compare(plan_of(base, tmp_path), {}, finished_only=True)
    table = json.loads((tmp_path / "results/scores.json").read_text())
    assert table["seeds"] == {"teacher": [0], "scratch": [0], "refine-control": [0, 1]}
    assert set(table["rows"]) == set(table["seeds"])
    assert not list((tmp_path / "work").rglob("losses.jsonl"))
    (tmp_path / "results/speed.json").unlink()
    with hold(tmp_path / "work/scratch/seed-1"):
        comparing.compare(plan_of(base, tmp_path), {}, finished_only=True)
    assert not (tmp_path / "results/speed.json").exists(), "another process is training the rest"


@pytest.mark.parametrize("proof", [True, False])
def test_an_ablation_claims_nothing(
    proof: bool, base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LEAST_SEEDS", 2)
    shutil.copytree(whole / "results", tmp_path / "results")
    plan = plan_of(base, tmp_path).model_copy(update={"proof": proof})
    comparing.compare(plan, {}, finished_only=True)
    assert bool(json.loads((tmp_path / "results/scores.json").read_text())["claims"]) == proof
    assert ("## Claims" in (tmp_path / "results/table.md").read_text()) == proof


@pytest.mark.slow
def test_a_rival_of_ones_own_is_a_file_and_a_line(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "loudness.py"
    path.write_text(
        "def losses(seen, weights):\n    return {'task': (seen.predicted.std() - seen.target.std()).square()}\n"
    )
    plan = plan_of(base, tmp_path, {"loudness": {"rival": "loudness"}, "refine-control": {}}, seeds=(0,))
    text = comparing.compare(plan, {}, [path])
    assert "loudness" in text
    with pytest.raises(RecipeError, match="no rival 'loudness'"):
        comparing.compare(plan, {})
    (tmp_path / "telea.py").write_text(path.read_text())
    with pytest.raises(UserError, match=r"telea.py': there is a 'telea' already"):
        comparing.compare(plan, {}, [path, tmp_path / "telea.py"])
    path.write_text(path.read_text() + "# otherwise\n")
    with pytest.raises(RecipeError, match="another recipe"):
        comparing.compare(plan, {}, [path])


@pytest.mark.slow
def test_a_network_of_a_rivals_own_is_trained_on_the_same_batches(base: Path, tmp_path: Path) -> None:
    rows = {"feedforward": {"rival": "feedforward"}, "refine-control": {}}
    comparing.compare(plan_of(base, tmp_path, rows, seeds=(0,)), {})
    one = json.loads((tmp_path / "results/feedforward/seed-0/run.json").read_text())
    assert one["cost"]["params"] > 1e6
    assert one["trained_seconds"] > 0
    assert json.loads((tmp_path / "results/speed.json").read_text())["forward_ms"]["feedforward"] > 0
    log = (tmp_path / "work/feedforward/seed-0/stage1/losses.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 3
    path = tmp_path / "odd.py"
    path.write_text("def losses(seen, weights):\n    return {'loudness': seen.predicted.mean()}\n")
    odd = plan_of(base, tmp_path / "odd", {"odd": {"rival": "odd"}}, seeds=(0,))
    with pytest.raises(UserError, match="losses are named loudness; name them task, output or feature"):
        comparing.compare(odd, {}, [path])


def test_devices_are_not_mixed_in_a_table(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    path = tmp_path / "results/scratch/seed-1/run.json"
    other = json.loads(path.read_text())
    other["machine"]["gpu"], other["device"] = "some GPU", "cuda"
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"runs are of different devices \(CPU, some GPU\)"):
        comparing.compare(plan_of(base, tmp_path), {})
    shutil.rmtree(tmp_path / "results/telea")
    with pytest.raises(UserError, match="different devices"):
        comparing.compare(plan_of(base, tmp_path), {})
    assert not (tmp_path / "results/telea").exists(), "before anything is done"
    path.write_text("{torn")
    with pytest.raises(UserError, match=r"cannot read '.*run.json'"):
        comparing.compare(plan_of(base, tmp_path), {})


@pytest.mark.slow
def test_what_another_process_is_at_is_left_to_it(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, seeds=(0,))
    with hold(tmp_path / "work/scratch/seed-0"):
        comparing.compare(plan, {})
    table = json.loads((tmp_path / "results/scores.json").read_text())
    assert set(table["rows"]) == {"teacher", "telea", "refine-control"}
    assert table["rows"]["refine-control"]["wall_seconds"] is None, "all takes longer beside another process's work"
    assert not (tmp_path / "results/speed.json").exists()
    comparing.compare(plan, {})
    assert (tmp_path / "results/speed.json").exists()
    assert "scratch" in json.loads((tmp_path / "results/scores.json").read_text())["rows"]


def test_what_was_busy_is_looked_at_again_and_is_no_row_before_it_was_checked(
    base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    refused: dict[Path, int] = {}

    def busy_at_first(run: Run, shop: Workshop) -> None:
        refused[run.out] = refused.get(run.out, 0) + 1
        if refused[run.out] <= (2 if run.row == "scratch" else 1):
            raise BusyError("another process is at it")
        finish(run, shop)

    monkeypatch.setattr(comparing, "finish", busy_at_first)
    comparing.compare(plan_of(base, tmp_path), {})
    table = json.loads((tmp_path / "results/scores.json").read_text())
    assert set(table["rows"]) == {"teacher", "telea", "refine-control"}


def test_the_tables_are_of_all_that_is_complete_whatever_is_trained(base: Path, whole: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path)
    shutil.copytree(whole / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results/telea")
    comparing.compare(plan, {}, part=narrowed(plan, ["telea"], [1]))
    shutil.move(tmp_path / "results/telea/seed-1", tmp_path / "results/telea/seed-0")
    comparing.compare(plan_of(base, tmp_path, seeds=(0,)), {}, finished_only=True)
    assert scores(tmp_path) == scores(whole), "of all seeds that are there"


def test_a_row_that_is_not_asked_for_needs_no_rival(base: Path, whole: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, {**ROWS, "missing": {"rival": "no-such"}})
    shutil.copytree(whole / "results", tmp_path / "results")
    comparing.compare(plan, {}, part=narrowed(plan, ["scratch"], None))
    with pytest.raises(RecipeError, match="no rival 'no-such'"):
        comparing.compare(plan, {})


def test_a_dry_run_trains_nothing_and_says_what_is_left(base: Path, whole: Path, tmp_path: Path) -> None:
    text = comparing.dry_run(plan_of(base, tmp_path), {})
    assert not list(tmp_path.rglob("run.json"))
    assert not (tmp_path / "results").exists()  # where a table would be, which is of other times perhaps
    lines = {line.split()[0]: line.split() for line in text.splitlines()[1:] if not line.startswith(" ")}
    assert lines["scratch"][1:4] == ["0,1", "3", "+"]
    assert "0/2" in lines["scratch"]
    assert "0/1" in lines["telea"]
    shutil.copytree(whole / "results", tmp_path / "results", dirs_exist_ok=True)
    assert "2/2" in comparing.dry_run(plan_of(base, tmp_path), {})


def test_pictures_that_were_trained_on_are_not_called_held_out(whole: Path) -> None:
    for name in ("table.md", "report.html"):
        text = (whole / "results" / name).read_text(encoding="utf-8")
        assert "of the labelled domain, which were trained on" in text
        assert "Held-out" not in text
    assert "pictures scored: 4 of " in (whole / "results/table.md").read_text(encoding="utf-8")


def test_a_label_may_hold_what_parts_cells() -> None:
    scored = {"labelled": {"psnr": {"hole": 1.0}}}
    row = Row("a", "L1|L2", scored, None, None, None, None, None, {}, {"labelled": {"psnr": {"hole": None}}})
    assert tables._scores([row], "labelled", {"a": {0: {}}})[-1] == r"| L1\|L2 | 1 | 1 |"
