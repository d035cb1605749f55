"""The harness: rows, seeds, resuming; a table is the same however often it was interrupted."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from refine_control import recipe as recipes
from refine_control.compare import claims as claiming
from refine_control.compare import compare as comparing
from refine_control.compare import runs as running
from refine_control.compare import sharing, speed, tables
from refine_control.compare.plan import CompareRecipe, Run, base_recipe, load, narrowed
from refine_control.distill.learner import Learner
from refine_control.errors import RecipeError, UserError
from refine_control.evaluate.report import Row
from refine_control.files import hold
from refine_control.recipe import EvaluateConfig

SCRATCH = {"set": {"init": "random", "stage1.weights": {"task": 1}, "stage2.weights": {"task": 1}}}
ROWS: dict[str, Any] = {"scratch": SCRATCH, "telea": {"rival": "telea"}, "refine-control": {}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    recipe = tiny.distil_recipe(
        root,
        labelled=5,
        plain=4,
        stage1=tiny.stage(3, ema_decay=0.5),
        stage2=tiny.stage(2, ema_decay=0.5, labelled_fraction=0.5, learning_rate=1e-4),
        evaluate=EvaluateConfig(images=4),
        run=tiny.RUN.model_copy(update={"checkpoint_every": 1}),
    )
    recipes.save(recipe, root / "recipe.yaml")
    return root / "recipe.yaml"


def plan_of(
    base: Path, out: Path, rows: dict[str, Any] | None = None, seeds: tuple[int, ...] = (0, 1)
) -> CompareRecipe:
    path = tiny.write_comparison(base, rows or ROWS, seeds=list(seeds))
    return load(path, {"output_dir": str(out / "results"), "work_dir": str(out / "work")})[0]


def scores(out: Path) -> dict[str, Any]:
    """All of a table that may not depend on how it came about."""
    table = json.loads((out / "results/scores.json").read_text())
    rows = {
        name: {k: v for k, v in row.items() if k in ("mean", "spread", "runs")} for name, row in table["rows"].items()
    }
    return {"rows": rows, "claims": table["claims"], "seeds": table["seeds"]}


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    comparing.compare(plan_of(base, out), {})
    return out


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
    assert "±" in text
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
    monkeypatch.setattr(running, "SCORING", 2)
    with pytest.raises(RecipeError, match="result of another recipe"):
        comparing.compare(plan_of(base, tmp_path), {})


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


def test_the_tables_are_of_all_that_is_complete_whatever_is_trained(base: Path, whole: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path)
    shutil.copytree(whole / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results/telea")
    comparing.compare(plan, {}, part=narrowed(plan, ["telea"], [0]))
    assert scores(tmp_path) == scores(whole)


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


CONTINUED = {"set": {"stage2.labelled_fraction": 1}}


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


def test_pictures_that_were_trained_on_are_not_called_held_out(whole: Path) -> None:
    for name in ("table.md", "report.html"):
        text = (whole / "results" / name).read_text(encoding="utf-8")
        assert "of the labelled domain, which were trained on" in text
        assert "Held-out" not in text
    assert "pictures scored: 4 of " in (whole / "results/table.md").read_text(encoding="utf-8")


def test_a_stage_1_of_another_precision_is_another(base: Path) -> None:
    recipe = recipes.load(recipes.DistilRecipe, base)
    for change in ({"mixed_precision": "bf16"}, {"teacher_dtype": "fp16"}, {"use_8bit_adam": True}):
        other = recipe.model_copy(update={"run": recipe.run.model_copy(update=change)})
        assert sharing.beginning(other, {}, {}) != sharing.beginning(recipe, {}, {})
    slower = recipe.model_copy(update={"run": recipe.run.model_copy(update={"num_threads": 2, "compile": True})})
    assert sharing.beginning(slower, {}, {}) == sharing.beginning(recipe, {}, {})


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


def test_a_label_may_hold_what_parts_cells() -> None:
    scored = {"labelled": {"psnr": {"hole": 1.0}}}
    row = Row("a", "L1|L2", scored, None, None, None, None, None, {}, {"labelled": {"psnr": {"hole": None}}})
    assert tables._scores([row], "labelled", {"a": {0: {}}})[-1] == r"| L1\|L2 | 1 | 1 |"
