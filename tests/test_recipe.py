"""Recipes are validated once, at the edge; every mistake is one line that names its key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from refine_control.claim import claim
from refine_control.compare.plan import CompareRecipe
from refine_control.errors import RecipeError
from refine_control.plans import Config
from refine_control.recipe import DistilRecipe, StageConfig, TeacherRecipe, load, save, validate

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
RECIPES = [path for path in SHIPPED if not path.name.startswith("compare-")]  # tests/compare/ has those
SMALL = """
output_dir: runs/small
teacher: zoo:some
seed: 3
data: {labelled: my/pictures, resolution: 64}
student: {block_out_channels: [16, 32], attention: [false, true], heads: [1, 2], norm_num_groups: 8}
stage1: {steps: 10, weights: {task: 1, output: 0.5}}
stage2: {steps: 0}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def refused(path: Path, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load(DistilRecipe, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kind_of(tree: dict[str, Any]) -> type[TeacherRecipe] | type[DistilRecipe]:
    assert ("denoiser" in tree) != ("student" in tree), "a recipe trains a teacher or distils a student"
    return TeacherRecipe if "denoiser" in tree else DistilRecipe


# The shipped ones


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_valid_and_survives_saving(path: Path, tmp_path: Path) -> None:
    kind = kind_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    recipe = load(kind, path)
    save(recipe, tmp_path / "saved.yaml")
    assert load(kind, tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_recipe_begins_with_the_command_that_runs_it(path: Path) -> None:
    from refine_control.cli import parser

    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# refine-control ")
    args, rest = parser().parse_known_args(first.removeprefix("# refine-control ").split())
    assert args.recipe == Path("recipes") / path.name
    assert rest == []


# Reading


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_numbers_are_finite(small: Path, value: str) -> None:
    for key in ("stage1.learning_rate", "stage1.weights.output", "stage1.hole_weight", "data.cache_gb"):
        assert f"'{key}' = " in refused(small, {key: value})
    if value == ".inf":  # of this one it means something
        assert load(DistilRecipe, small, {"stage1.max_grad_norm": value}).stage1.max_grad_norm == float("inf")


def test_reads_values_and_fills_in_defaults(small: Path) -> None:
    recipe = load(DistilRecipe, small)
    assert recipe.student.block_out_channels == (16, 32)
    assert recipe.stage1.weights.output == 0.5
    assert recipe.stage1.batch_size == StageConfig().batch_size
    assert recipe.alignment == "auto"


def test_overrides_reach_any_depth(small: Path) -> None:
    overrides = {
        "seed": "7",
        "stage1.weights.feature": "0.25",
        "run.device": "cpu",
        "stage1.learning_rate": "1e-4",
        "student.heads": "[2, 4]",
        "data.unlabelled": "null",
        "alignment": "{module.mid_block: module.mid_block}",
    }
    recipe = load(DistilRecipe, small, overrides)
    assert recipe.seed == 7
    assert (recipe.stage1.weights.output, recipe.stage1.weights.feature) == (0.5, 0.25)
    assert recipe.run.device == "cpu"
    assert recipe.stage1.learning_rate == 1e-4
    assert recipe.student.heads == (2, 4)
    assert recipe.data.unlabelled is None
    assert recipe.alignment == {"module.mid_block": "module.mid_block"}
    assert load(DistilRecipe, small).seed == 3, "the file is as it was"


def test_no_is_a_precision_though_yaml_reads_it_as_false(small: Path) -> None:
    assert load(DistilRecipe, small, {"run.mixed_precision": "no"}).run.mixed_precision == "no"
    assert "'run.mixed_precision' = True" in refused(small, {"run.mixed_precision": "yes"})


def test_what_does_not_go_with_shards(small: Path) -> None:
    for other in ("use_8bit_adam", "compile"):
        assert "do not work on sharded weights" in refused(small, {"run.shard": "true", f"run.{other}": "true"})


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [
        ("output_dir", "runs/try #2", "runs/try #2"),
        ("output_dir", "2024-01-01", "2024-01-01"),
        ("output_dir", "# 1", "# 1"),
        ("output_dir", "'010'", "010"),
        ("stage1.steps", "010", 10),
        ("stage1.steps", "1_000", 1000),
        ("stage1.learning_rate", "1e-3", 1e-3),
        ("data.unlabelled", "[a, 'b #2']", ("a", "b #2")),
        ("data.unlabelled", "null", None),
        ("stage1.max_grad_norm", ".inf", float("inf")),
    ],
)
def test_a_flag_is_what_was_typed(small: Path, key: str, given: str, taken: object) -> None:
    """YAML 1.1 would make 8 of 010, and of a path what stands before the '#'."""
    found: Any = load(DistilRecipe, small, {key: given})
    for name in key.split("."):
        found = getattr(found, name)
    assert found == taken


@pytest.mark.parametrize("odd", ["12:30", "0x10", "100 # more", "1.5 # more", "true # more"])
def test_numbers_of_another_kind_are_refused(small: Path, odd: str) -> None:
    assert f"'stage1.steps' = '{odd}'" in refused(small, {"stage1.steps": odd})


def test_eight_bits_are_adams(small: Path) -> None:
    eight = {"run.use_8bit_adam": "true", "stage2.optimizer": "muon"}
    assert "or stage2.optimizer to adamw, not muon" in refused(small, eight | {"stage2.steps": "1"})
    load(DistilRecipe, small, eight | {"stage2.steps": "0"})


def test_what_is_learnt_for_few_steps_is_drawn_with_them(small: Path, tmp_path: Path) -> None:
    few = {"stage1.num_inference_steps": "2", "stage2.num_inference_steps": "2"}
    assert "stage1.num_inference_steps 2" in refused(small, few)
    recipe = load(DistilRecipe, small, few | {"sample.num_inference_steps": "2"})
    save(recipe, tmp_path / "few.yaml")
    assert load(DistilRecipe, tmp_path / "few.yaml") == recipe
    default = load(DistilRecipe, small)
    assert "num_inference_steps" not in default.model_dump()["stage1"], "what was trained before is still of its recipe"


def test_saved_with_overrides_then_loaded_is_equal(small: Path, tmp_path: Path) -> None:
    recipe = load(DistilRecipe, small, {"stage1.steps": "77", "alignment": "{a: b}", "stage2.snr_gamma": "5"})
    save(recipe, tmp_path / "saved.yaml")
    assert load(DistilRecipe, tmp_path / "saved.yaml") == recipe
    assert recipe != load(DistilRecipe, small)


HOW = {"run.device": "cpu", "sample.seed": "5", "evaluate.images": "7", "data.cache_gb": "0.5", "output_dir": "moved"}


def begin(small: Path, run: Path, contents: dict[str, str] | None = None) -> None:
    claim(load(DistilRecipe, small), run, contents)
    (run / "stage1/checkpoints/step-000001").mkdir(parents=True)


def test_a_folder_holds_one_run_however_it_runs(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(small, run)
    for key, value in HOW.items():
        claim(load(DistilRecipe, small, {key: value}), run)
    assert load(DistilRecipe, run / "recipe.yaml").output_dir == "moved", "the newest is kept"


def test_what_a_folder_says_of_its_run_may_be_damaged(small: Path, tmp_path: Path) -> None:
    begin(small, tmp_path / "run")
    (tmp_path / "run/contents.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"cannot read '.*contents.json' .*; remove the run's folder"):
        claim(load(DistilRecipe, small), tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stage1.steps", "11", "stage1.steps 10, not 11"),
        ("seed", "4", "seed 3, not 4"),
        ("student", "bk-tiny", "student None, not bk-tiny"),
        ("alignment", "{module.mid_block: module.mid_block}", r"alignment.module.mid_block None, not module.mid_block"),
    ],
)
def test_a_folder_refuses_another_run_and_keeps_what_is_there(
    small: Path, tmp_path: Path, key: str, value: str, said: str
) -> None:
    begin(small, tmp_path / "run")
    before = (tmp_path / "run/recipe.yaml").read_text()
    with pytest.raises(RecipeError, match=said):
        claim(load(DistilRecipe, small, {key: value}), tmp_path / "run")
    assert (tmp_path / "run/recipe.yaml").read_text() == before


def test_a_recipe_is_mended_freely_until_something_is_trained(small: Path, tmp_path: Path) -> None:
    claim(load(DistilRecipe, small, {"data.labelled": "mistyped"}), tmp_path / "run")
    claim(load(DistilRecipe, small), tmp_path / "run")
    assert load(DistilRecipe, tmp_path / "run/recipe.yaml").data.labelled == "my/pictures"


def test_other_contents_under_the_same_names_are_another_run(small: Path, tmp_path: Path) -> None:
    begin(small, tmp_path / "run", {"teacher": "abc", "data.labelled": "def"})
    claim(load(DistilRecipe, small), tmp_path / "run", {"teacher": "abc", "data.labelled": "def"})
    with pytest.raises(RecipeError, match="contents of teacher abc, not xyz"):
        claim(load(DistilRecipe, small), tmp_path / "run", {"teacher": "xyz", "data.labelled": "def"})


def test_a_recipe_cannot_be_changed_after_it_was_checked(small: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(DistilRecipe, small).stage1.steps = -1


# Mistakes


def test_a_missing_file(tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere.yaml")
    assert str(tmp_path / "nowhere.yaml") in message
    assert "recipes/" in message


NO_VALUES = ["2020-13-45", "!!int ''", "!!int x", "!!timestamp x", "9" * 5000, "[" * 50_000]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    "content",
    [
        *(b"a: [1", b"- a\n- b\n", b"", b"\xff\xfe\x00", b"!!python/object:os.system {}", b"a: &a [*a]"),
        *(f"seed: {value}".encode() for value in NO_VALUES),
        *(BOMB.encode(), f"{BOMB}seed: *a11".encode()),
    ],
    ids=lambda content: ascii(content[:12]),
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_a_key_that_stands_twice_is_named_with_its_line(small: Path) -> None:
    small.write_text(f"{SMALL}seed: 4\n", encoding="utf-8")
    assert "the key 'seed' stands twice" in refused(small)
    assert "line 9" in refused(small)
    small.write_text(SMALL.replace("steps: 0", "steps: 0, steps: 1"), encoding="utf-8")
    assert "the key 'steps' stands twice" in refused(small)


def test_aliases_and_merged_keys_are_read(small: Path) -> None:
    text = SMALL.replace("stage1: {", "stage1: &one {").replace("stage2: {", "stage2: {<<: *one, ")
    small.write_text(text, encoding="utf-8")
    recipe = load(DistilRecipe, small)
    assert recipe.stage2 == recipe.stage1.model_copy(update={"steps": 0})


def test_an_unreadable_path(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(tmp_path)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("sed", "output_dir, teacher, controlnets, seed"),
        ("stage1.step", "steps, batch_size"),
        ("stage2.weights.feat", "task, output, feature"),
    ],
)
def test_an_unknown_key_is_named_beside_the_known(small: Path, key: str, known: str) -> None:
    message = refused(small, {key: "1"})
    assert f"unknown key '{key}'; known here: " in message
    assert known in message
    assert str(small) in message


def test_an_unknown_key_in_a_config_that_the_user_names() -> None:
    class Rows(Config):
        rows: dict[str, StageConfig]

    for name in ("a", "steps"):
        with pytest.raises(RecipeError, match=rf"unknown key 'rows\.{name}\.step'; known here: steps, batch_size"):
            validate(Rows, {"rows": {name: {"step": 1}}}, "plan")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage1.steps", "-5"),
        ("stage1.steps", "many"),
        ("stage1.labelled_fraction", "1.5"),
        ("stage1.ema_decay", "1"),
        ("feature_norm", "batch"),
        ("stage1.weights.task", "-1"),
        ("stage1.snr_gamma", "0"),
        ("data.resolution", "0"),
        ("run.mixed_precision", "fp8"),
        ("init", "nothing"),
        ("sample.guidance_scale", "0.5"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(small: Path, key: str, value: str) -> None:
    message = refused(small, {key: value})
    assert f"'{key}' = {yaml.safe_load(value)!r}: " in message
    assert str(small) in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(SMALL.replace("output_dir: runs/small", ""), encoding="utf-8")
    assert "'output_dir'" in refused(path)


@pytest.mark.parametrize(
    ("kind", "name", "command"),
    [
        (DistilRecipe, "compare-emoji", "compare"),
        (DistilRecipe, "emoji-teacher", "train-teacher"),
        (TeacherRecipe, "demo", "distill"),
        (CompareRecipe, "demo", "distill"),
    ],
)
def test_a_recipe_of_another_command_is_called_so(kind: type[Config], name: str, command: str) -> None:
    path = SHIPPED[0].parent / f"{name}.yaml"
    with pytest.raises(RecipeError, match=f"is one of `refine-control {command}`"):
        load(kind, path, {"student": "mobile", "denoiser": "{}"})


def test_levels_that_disagree_name_the_student(small: Path) -> None:
    message = refused(small, {"student.attention": "[true]"})
    assert "'student'" in message
    assert "block_out_channels has 2 levels; give attention and heads 2 entries each" in message


def test_an_override_into_a_value(small: Path) -> None:
    assert refused(small, {"seed.more": "1"}) == "--seed.more: 'seed' is a value, not a section"
    assert "'steps' is a value" in refused(small, {"stage1.steps.more": "1"})


@pytest.mark.parametrize(
    "text", ["[1", "a: b: c", "!!python/object:os.system {}", *NO_VALUES], ids=lambda text: text[:12]
)
def test_an_override_that_is_not_yaml(small: Path, text: str) -> None:
    message = refused(small, {"output_dir": text})
    assert "--output_dir" in message
    assert text in message


def test_a_map_that_is_neither_auto_nor_pairs(small: Path) -> None:
    assert "'alignment" in refused(small, {"alignment": "sometimes"})


def test_validate_names_where_it_comes_from() -> None:
    with pytest.raises(RecipeError, match=r"^the server: 'steps' = 'x'"):
        validate(StageConfig, {"steps": "x"}, "the server")
