"""What a message advises works: the run goes on. What would make it another run is refused, of older folders too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refine_control.distill import checkpoint
from refine_control.distill.distil import distil
from refine_control.errors import DataError, RecipeError
from refine_control.recipe import DistilRecipe
from tiny import RUN, distil_recipe, stage


@pytest.fixture
def recipe(tmp_path: Path) -> DistilRecipe:
    run = RUN.model_copy(update={"checkpoint_every": 1})
    return distil_recipe(tmp_path, 5, 4, stage1=stage(3), stage2=stage(0), run=run)


def stopped(recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run after one step."""
    true = checkpoint.save

    def save_then_stop(*args: Any) -> None:
        true(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            distil(recipe)
    return Path(recipe.output_dir)


def changed(recipe: DistilRecipe, part: str, **keys: object) -> DistilRecipe:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=keys)})


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"teacher_dtype": "bf16", "mixed_precision": "bf16"},
        {"max_skipped_steps": 20},
        {"mixed_precision": "no"},
    ],
    ids=str,
)
def test_a_run_goes_on_with_what_is_advised(
    recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    if change == {"mixed_precision": "no"}:
        recipe = changed(recipe, "run", mixed_precision="fp16")
    stopped(recipe, monkeypatch)
    assert (distil(changed(recipe, "run", **change)) / "model_index.json").is_file()


def test_a_run_that_met_a_corrupt_picture_goes_on_without_it(
    recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch)
    picture = Path(recipe.data.labelled) / "3.png"
    picture.write_bytes(picture.read_bytes()[:60].ljust(picture.stat().st_size, b"\0"))
    with pytest.raises(DataError, match=r"3\.png: cannot be decoded .* goes on with data\.skip_corrupt true"):
        distil(recipe)
    assert (distil(changed(recipe, "data", skip_corrupt=True)) / "model_index.json").is_file()


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type"),
        (
            lambda folder: edit(folder / "unet/config.json", act_fn="gelu"),
            r"UNet2DConditionModel 0\.act_fn silu, not gelu",
        ),
        (lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=4), "words"),
    ],
)
def test_a_teacher_that_answers_otherwise_is_another(
    recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], said: str
) -> None:
    folder = stopped(recipe, monkeypatch)
    change(Path(recipe.teacher))
    with pytest.raises(RecipeError, match=said):
        distil(recipe)
    (folder / "settings.json").unlink()  # as of earlier versions, which cannot know
    distil(recipe)


def test_a_library_may_learn_new_settings(recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped(recipe, monkeypatch)
    kept = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    del kept["scheduler"]["prediction_type"]
    (folder / "settings.json").write_text(json.dumps(kept), encoding="utf-8")
    distil(recipe)


@pytest.mark.parametrize("part", ["teacher", "data.labelled"])
def test_digests_that_earlier_versions_made_otherwise_are_not_compared(
    recipe: DistilRecipe, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    recipe = changed(changed(recipe, "run", teacher_dtype="bf16"), "data", skip_corrupt=True)
    folder = stopped(recipe, monkeypatch)
    edit(folder / "contents.json", **{part: "of something else"})
    with pytest.raises(RecipeError, match=f"contents of {part}"):
        distil(recipe)
    (folder / "settings.json").unlink()
    distil(recipe)
