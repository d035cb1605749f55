"""What was written by this version and those before it loads, and means what it meant; what a later one wrote says so.

tests/golden/format-N holds a run's checkpoint of that format, the recipes and a saved model of its day. A new format
brings a new folder, beside those that are there: `python tests/test_upgrade.py` writes it. The first one has no model,
for want of room: those of the zoo are of its day, see test_zoo.py.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from distill.test_loop import Toy, distillation, interrupted_at, toy
from refine_control.diffusion import store
from refine_control.distill import checkpoint
from refine_control.errors import DataError, ModelError, RecipeError
from refine_control.recipe import DistilRecipe, StageConfig, TeacherRecipe, load, save
from refine_control.student.plan import probe
from tiny import RUN, WORDS, plan, tiny_model

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(path.name for path in GOLDEN.glob("format-*"))
HALF, WHOLE = 3, 6  # steps
SMALLEST = plan(4, 4, attention=(False, True), heads=(1, 1))


def predicted(folder: Path) -> float:
    """A number that each part of a saved model but the autoencoder's decoder has a say in."""
    model = store.load(str(folder)).freeze()
    x_t, t, _, control = probe(model)
    latents = model.encode(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))
    with torch.no_grad():
        return float((model.denoiser(x_t + 1, t, model.embed([WORDS[0]]), control) * latents).mean())


def test_there_is_one_of_every_format() -> None:
    assert [f"format-{number}" for number in range(1, checkpoint.FORMAT + 1)] == FORMATS
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN / name / "run", tmp_path / "run")
    model = toy(tmp_path / "run", Toy(), steps=WHOLE)
    assert len(model.seen) == WHOLE - HALF
    torch.testing.assert_close(model.x.detach(), toy(tmp_path / "whole", Toy(), steps=WHOLE).x.detach())


def weights_of_a_distillation() -> dict[str, list[int]]:
    """Name and shape of all that a checkpoint of one holds; averages and moments go by the place in this list."""
    state = distillation(tiny_model(), StageConfig()).state_dict()
    return {name: list(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("name", FORMATS[1:])
def test_the_weights_of_a_distillation_keep_names_shapes_and_places(name: str) -> None:
    kept = json.loads((GOLDEN / name / "weights.json").read_text(encoding="utf-8"))
    assert list(kept.items()) == list(weights_of_a_distillation().items())


@pytest.mark.parametrize("name", FORMATS)
def test_recipes_mean_what_they_meant(name: str) -> None:
    teacher = load(TeacherRecipe, GOLDEN / name / "teacher.yaml")
    student = load(DistilRecipe, GOLDEN / name / "student.yaml")
    assert teacher.denoiser == student.student == SMALLEST
    assert teacher.denoiser_stage == student.stage1 == StageConfig(steps=7, learning_rate=0.5, ema_decay=0.25)
    assert student.stage2 == StageConfig(steps=8, labelled_fraction=0.5)


@pytest.mark.parametrize("name", FORMATS[1:])
def test_a_saved_model_draws_what_it_drew(name: str) -> None:
    expected = json.loads((GOLDEN / name / "model.json").read_text(encoding="utf-8"))["predicted"]
    assert predicted(GOLDEN / name / "model") == pytest.approx(expected, rel=1e-3)


def test_what_we_write_names_its_format(tmp_path: Path) -> None:
    save(load(DistilRecipe, GOLDEN / FORMATS[-1] / "student.yaml"), tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["format"] == 1
    store.save(tiny_model(SMALLEST), tmp_path / "model")
    assert json.loads((tmp_path / "model/model_index.json").read_text())["_refine_control_format"] == 1


@pytest.mark.parametrize("found", [2, "new", None])
def test_what_a_later_version_wrote_says_so(tmp_path: Path, found: object) -> None:
    golden = GOLDEN / FORMATS[-1]
    recipe = yaml.safe_load((golden / "student.yaml").read_text()) | {"format": found, "what": "only later ones know"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=rf"is of format {found!r}, not 1 or before; install a later refine-control"):
        load(DistilRecipe, tmp_path / "recipe.yaml")
    shutil.copytree(golden / "model", tmp_path / "model")
    index = json.loads((golden / "model/model_index.json").read_text()) | {"_refine_control_format": found}
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=rf"it is of format {found!r}, not 1 or before; install a later refine-control"
    ):
        store.load(str(tmp_path / "model"))
    shutil.copytree(golden / "run", tmp_path / "run")
    manifest = tmp_path / f"run/checkpoints/step-{HALF:06d}/state.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    with pytest.raises(DataError, match="is of format 9, later than"):
        toy(tmp_path / "run", Toy(), steps=WHOLE)


@pytest.mark.parametrize("newest", [1, 3])
def test_a_new_format_still_reads_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: int) -> None:
    golden = GOLDEN / FORMATS[-1]
    for where in ("refine_control.recipe", "refine_control.diffusion.store"):
        monkeypatch.setattr(f"{where}.FORMAT", newest)
    load(DistilRecipe, golden / "student.yaml")
    store.load(str(golden / "model"))
    store.save(tiny_model(SMALLEST), tmp_path / "model")
    store.load(str(tmp_path / "model"))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_without_hashes_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    shutil.copytree(GOLDEN / "format-1" / "run", tmp_path / "run")
    path = tmp_path / f"run/checkpoints/step-{HALF:06d}/ema.safetensors"
    whole = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"is damaged: ema\.safetensors: .*; remove '.*' to begin this stage anew"):
        toy(tmp_path / "run", Toy(), steps=WHOLE)


def write(folder: Path) -> None:
    """The set of this version."""
    half = Toy()
    interrupted_at(HALF, half, KeyboardInterrupt)
    with suppress(KeyboardInterrupt):
        toy(folder / "run", half, run=RUN.model_copy(update={"checkpoint_every": HALF}), steps=WHOLE)
    one = StageConfig(steps=7, learning_rate=0.5, ema_decay=0.25)
    two = StageConfig(steps=8, labelled_fraction=0.5)
    save(
        TeacherRecipe(output_dir="a", denoiser=SMALLEST, autoencoder_stage=two, denoiser_stage=one),
        folder / "teacher.yaml",
    )
    save(DistilRecipe(output_dir="a", student=SMALLEST, stage1=one, stage2=two), folder / "student.yaml")
    (folder / "weights.json").write_text(json.dumps(weights_of_a_distillation()) + "\n", encoding="utf-8")
    model = tiny_model(SMALLEST)
    store.save(model, folder / "model", torch.float16)
    (folder / "model.json").write_text(json.dumps({"predicted": predicted(folder / "model")}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(GOLDEN / f"format-{checkpoint.FORMAT}")
