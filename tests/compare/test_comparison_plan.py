"""A comparison is data: rows, each a base recipe with some keys set otherwise."""

from pathlib import Path

import pytest
import yaml

import tiny
from refine_control import recipe as recipes
from refine_control.compare.plan import base_recipe, load, narrowed, runs
from refine_control.compare.rivals import known
from refine_control.distill.alignment import automatic_map
from refine_control.errors import RecipeError
from refine_control.recipe import DistilRecipe, LossWeights

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("compare-*.yaml"))
OF_THE_ROW = {"steps", "weights", "labelled_fraction"}  # what a row may be about; all else of a stage is alike
FAIR = [path for path in SHIPPED if path.name != "compare-schedule.yaml"]  # whose rows are about the rates themselves


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = DistilRecipe(
        output_dir="unused", student=tiny.STUDENT, stage1=tiny.stage(3), stage2=tiny.stage(2, labelled_fraction=0.5)
    )
    recipes.save(config, tmp_path / "base.yaml")
    return tmp_path / "base.yaml"


def refused(path: Path, **overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        runs(*load(path, overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_row_of_a_shipped_comparison_is_a_valid_recipe(path: Path) -> None:
    plan, _ = load(path, {})
    for run in runs(plan, {}):
        assert run.rival is None or run.rival in known()
        assert run.out == Path(plan.output_dir) / run.row / f"seed-{run.seed}"


@pytest.mark.parametrize("path", FAIR, ids=lambda path: path.name)
def test_rows_of_a_shipped_comparison_learn_alike(path: Path) -> None:
    """Same student, rates and sampler, batches as large; as many steps unless the row is of stage 1 or about time.

    A network of a rival's own learns at its own rate, for its own time.
    """
    plan, _ = load(path, {})
    ours = next(run.recipe for run in runs(plan, {}) if run.row == plan.ours)
    for run in runs(plan, {}):
        assert run.recipe.student == ours.student
        assert run.recipe.sample == ours.sample
        assert run.recipe.masks == ours.masks
        assert run.recipe.evaluate == ours.evaluate
        if str(run.rival).startswith("feedforward"):
            continue
        steps = run.recipe.stage1.steps + run.recipe.stage2.steps
        all_steps = ours.stage1.steps + (0 if run.row == "stage1" else ours.stage2.steps)
        assert steps == all_steps or "time" in run.row
        for name, stage in run.recipe.stages.items():
            alike = stage.model_dump(exclude=OF_THE_ROW), ours.stages[name].model_dump(exclude=OF_THE_ROW)
            assert alike[0] == alike[1], run.row


def test_rows_set_keys_of_the_base_and_the_command_line_has_the_last_word(base: Path) -> None:
    rows = {"scratch": {"set": {"init": "random", "stage1.weights": {"task": 1}}}, "refine-control": {}}
    path = tiny.write_comparison(base, rows, set={"stages.learning_rate": 0.5})
    plan, rest = load(path, {"stage1.weights.output": "0.25", "output_dir": "elsewhere"})
    scratch, ours = runs(plan, rest)
    assert (scratch.recipe.init, ours.recipe.init) == ("random", "teacher")
    assert scratch.recipe.stage1.weights == LossWeights(task=1, output=0.25)
    assert ours.recipe.stage1.weights == LossWeights(task=1, output=0.25, feature=1)
    assert scratch.recipe.stage1.learning_rate == ours.recipe.stage2.learning_rate == 0.5
    assert scratch.out == Path("elsewhere/scratch/seed-0")
    assert rest == {"stage1.weights.output": "0.25"}


def test_a_comparison_may_name_the_teacher_of_all_its_rows_and_a_row_may_not(base: Path) -> None:
    plan, _ = load(tiny.write_comparison(base, set={"teacher": "zoo:other"}), {})
    every = [base_recipe(plan, {}), *(run.recipe for run in runs(plan, {}))]
    assert {recipe.teacher for recipe in every} == {"zoo:other"}
    assert base_recipe(plan, {"teacher": "zoo:third"}).teacher == "zoo:third"
    path = tiny.write_comparison(base, {"refine-control": {"set": {"teacher": "zoo:other"}}})
    assert "all rows have one teacher; set 'teacher' for the whole comparison" in refused(path)


def test_what_rows_are_scored_on_is_the_comparisons(base: Path) -> None:
    """An 'edges' student scored on an inpainting control would be no student at all."""
    common = {"data.controls": ["edges"], "data.fit": "pad", "masks.thin": 0, "evaluate.images": 3}
    plan, _ = load(tiny.write_comparison(base, set=common), {})
    for recipe in (base_recipe(plan, {}), *(run.recipe for run in runs(plan, {}))):
        assert (recipe.data.controls, recipe.data.fit, recipe.masks.thin) == (("edges",), "pad", 0)
    for key in ("data.controls", "data.resolution", "data", "evaluate.split", "evaluate", "sample.seed", "masks.box"):
        told = refused(tiny.write_comparison(base, {"a": {"set": {key: 1}}}, ours="a"))
        assert f"all rows are scored alike; set '{key}'" in told
    for key in ("seed", "output_dir"):
        told = refused(tiny.write_comparison(base, {"a": {"set": {key: 1}}}, ours="a"))
        assert f"'{key}' is the comparison's" in told


def test_the_teacher_is_drawn_as_all_rows_are(base: Path) -> None:
    few = {"sample.num_inference_steps": 1, "evaluate": {"images": 5}, "stages.num_inference_steps": 1}
    plan, _ = load(tiny.write_comparison(base, set=few), {})
    for recipe in (base_recipe(plan, {}), *(run.recipe for run in runs(plan, {}))):
        assert (recipe.sample.num_inference_steps, recipe.evaluate.images) == (1, 5)
        assert recipe.only_steps == 1
    del few["stages.num_inference_steps"]
    first = {"stage1.num_inference_steps": 1, "stage2.steps": 0}
    run = {"run.device": "cpu", "run.use_8bit_adam": True, "stages.optimizer": "adamw"}
    plan, _ = load(tiny.write_comparison(base, set={**few, **first, **run}), {})
    for recipe in (base_recipe(plan, {}), *(run.recipe for run in runs(plan, {}))):
        assert (recipe.only_steps, recipe.run.device) == (1, "cpu")


def test_a_comparison_over_a_student_of_few_steps_may_ask_for_others(base: Path) -> None:
    one = {"stage1.num_inference_steps": "1", "stage2.num_inference_steps": "1", "sample.num_inference_steps": "1"}
    recipes.save(recipes.load(DistilRecipe, base, one), base)
    two = {"stages.num_inference_steps": 2, "sample.num_inference_steps": 2}
    plan, _ = load(tiny.write_comparison(base, set=two), {})
    assert base_recipe(plan, {}).sample == runs(plan, {})[0].recipe.sample


def test_each_layer_lies_over_those_below_it(base: Path) -> None:
    rows = {"a": {"set": {"stages.learning_rate": 0.2}}, "b": {"set": {"stage2.learning_rate": 0.3}}}
    path = tiny.write_comparison(base, rows, set={"stage1.learning_rate": 0.1})
    for given, expected in (({}, [0.2, 0.2, 0.1, 0.3]), ({"stages.learning_rate": "0.4"}, [0.4] * 4)):
        found = [run.recipe for run in runs(*load(path, given))]
        assert [stage.learning_rate for r in found for stage in (r.stage1, r.stage2)] == expected


def test_seeds_come_in_turns_and_a_row_may_have_its_own(base: Path) -> None:
    rows = {"scratch": {"seeds": [4, 5, 6]}, "refine-control": {}, "telea": {"rival": "telea"}}
    plan, _ = load(tiny.write_comparison(base, rows, seeds=[0, 1]), {})
    order = [(run.row, run.seed) for run in runs(plan, {}, once=["telea"])]
    assert order == [
        ("scratch", 4), ("refine-control", 0), ("telea", 0),
        ("scratch", 5), ("refine-control", 1),
        ("scratch", 6),
    ]  # fmt: skip
    assert [run.recipe.seed for run in runs(plan, {})] == [run.seed for run in runs(plan, {})]


def test_rows_and_seeds_may_be_narrowed(base: Path) -> None:
    plan, _ = load(tiny.write_comparison(base, {"a": {"seeds": [7]}, "b": {}}), {})
    assert [(run.row, run.seed) for run in runs(narrowed(plan, ["b", "a"], [1]), {})] == [("b", 1), ("a", 1)]
    with pytest.raises(RecipeError, match="no row 'magic'; there are: a, b"):
        narrowed(plan, ["magic"], None)


def test_mistakes_name_the_row_and_the_key(base: Path) -> None:
    assert "row 'a'" in (line := refused(tiny.write_comparison(base, {"a": {"set": {"stage1.stepz": 3}}})))
    assert "stage1.stepz" in line
    assert "teacher" in refused(tiny.write_comparison(base, {"teacher": {}}))
    for name in ("../a", "..", ".", "a/b", ""):
        assert "name" in refused(tiny.write_comparison(base, {name: {}}))
    assert "path" in refused(tiny.write_comparison(base, {"a": {"rival": "../../evil"}}))
    assert "seed" in refused(tiny.write_comparison(base, seeds=[]))
    assert "seed" in refused(tiny.write_comparison(base, {"refine-control": {"seeds": [0, 0]}}))
    assert "'ours' = 'mine' is no row" in refused(tiny.write_comparison(base, ours="mine"))
    path = tiny.write_comparison(base)
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "base"}))
    assert "base" in refused(path)


def test_a_plain_sum_over_points_is_as_many_times_the_mean() -> None:
    """The weights of the rows with BK-SDM's and distill-sd's losses count the points that are aligned."""
    from refine_control.diffusion import store
    from refine_control.diffusion.taps import feature_shapes
    from refine_control.student.plan import build_student, probe

    plan, _ = load(next(path for path in SHIPPED if path.name == "compare-emoji.yaml"), {})
    by_row = {run.row: run.recipe for run in runs(plan, {})}
    teacher = store.load("zoo:emoji-teacher")
    student = build_student(by_row["bk-sdm"].student, teacher)
    inputs = probe(teacher, teacher.device)
    points = len(automatic_map(feature_shapes(student, inputs), feature_shapes(teacher.denoiser, inputs)))
    assert by_row["bk-sdm"].stage1.weights.feature == points
    assert by_row["distill-sd"].stage1.weights.feature == points / 2


def test_the_recipe_needs_a_row(base: Path) -> None:
    assert "one row or more" in refused(tiny.write_comparison(base, rows={}))


def test_held_out_plain_pictures_are_the_bases_whatever_rows_learn_from(base: Path) -> None:
    learnt = {"data.unlabelled": ["x", "y"], "data.labelled": "z"}
    plan, rest = load(tiny.write_comparison(base, {"a": {}}, ours="a", set=learnt), {})
    assert base_recipe(plan, rest).data.unlabelled is None, "plain pictures may be of any kind"
    assert base_recipe(plan, rest).data.labelled == "z", "captioned ones of another kind are another comparison"
    assert runs(plan, rest)[0].recipe.data.unlabelled == ("x", "y")
