"""Models with few and many steps: one line a name, nothing drawn twice."""

from pathlib import Path

import pytest

import sampler_steps
import tiny
from refine_control.compare import plots
from refine_control.compare.plan import load
from refine_control.compare.runs import Workshop
from refine_control.diffusion import store
from refine_control.evaluate.heldout import HeldOut
from refine_control.recipe import EvaluateConfig, SampleConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_name_that_stands_several_times_is_several_seeds() -> None:
    found = sampler_steps.named_models(["a=runs/a/0", "zoo:emoji-student", "a=runs/a/1"])
    assert found == {"a": ["runs/a/0", "runs/a/1"], "zoo:emoji-student": ["zoo:emoji-student"]}


def test_students_that_are_not_there_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = load(RECIPES / "compare-emoji.yaml", {})
    assert set(sampler_steps.ROWS) <= set(plan.rows)
    monkeypatch.chdir(tmp_path)
    for seed in (0, 2, 3):
        (tmp_path / f"runs/compare-emoji/scratch/seed-{seed}/student").mkdir(parents=True)
    assert sampler_steps.default_models(plan) == {
        "teacher": ["zoo:emoji-teacher"],
        "scratch": [f"runs/compare-emoji/scratch/seed-{seed}/student" for seed in (0, 2)],
        "emoji-student": ["zoo:emoji-student"],
    }
    assert "no student in 'runs/compare-emoji/scratch/seed-1/student'" in capsys.readouterr().err


def test_scores_by_steps_resume_and_make_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"stage1": tiny.stage(1), "stage2": tiny.stage(0)}
    recipe = tiny.distil_recipe(tmp_path, 2, 1, **steps, evaluate=EvaluateConfig(images=2), run=tiny.RUN)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"unlabelled": None})})
    store.save(tiny.tiny_model(seed=1), tmp_path / "other")
    models = {"teacher": [recipe.teacher], "two": [recipe.teacher, str(tmp_path / "other")]}
    drawn: list[int] = []
    draw = HeldOut.draw

    def counted(heldout: HeldOut, model: object, sample: SampleConfig) -> object:
        drawn.append(sample.num_inference_steps)
        return draw(heldout, model, sample)  # type: ignore[arg-type]

    monkeypatch.setattr(HeldOut, "draw", counted)
    domains = Workshop(recipe).domains
    few = sampler_steps.measure(models, [1], recipe, domains, tmp_path / "work")
    assert drawn == [1] * 3, "three models"
    lines = sampler_steps.measure(models, [1, 3], recipe, domains, tmp_path / "work")
    assert drawn == [1] * 3 + [3] * 3, "what was drawn before is taken as it is"
    assert {name: by_steps[1] for name, by_steps in lines.items()} == {name: one[1] for name, one in few.items()}
    one = lines["two"][3]
    assert one["models"] == 2
    assert one["spread"]["labelled"]["psnr"]["hole"] > 0
    assert lines["teacher"][3]["spread"]["labelled"]["psnr"]["hole"] is None
    text = sampler_steps.markdown(lines, "How.")
    assert text.count("\n| two | 3 | ") == 1
    plots.plot_lines(lines, "sampler steps", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
