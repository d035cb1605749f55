"""Rows that differ in one thing: the method, and the controls that it is measured against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from refine_control.distill.distil import Distiller
from refine_control.errors import RecipeError
from refine_control.files import write_whole
from refine_control.recipe import DistilRecipe, LossWeights, learnt, load

TASK_ONLY = LossWeights(task=1)


def _task_only(recipe: DistilRecipe, init: str) -> DistilRecipe:
    stages = {name: getattr(recipe, name).model_copy(update={"weights": TASK_ONLY}) for name in ("stage1", "stage2")}
    return recipe.model_copy(update={**stages, "init": init})


def _stage1_continued(recipe: DistilRecipe) -> DistilRecipe:
    """Stage 2's steps, batch size and learning rate, spent on what stage 1 does: its data and its weights."""
    keep = {"labelled_fraction", "weights", "task_on_unlabelled", "caption_dropout", "word_dropout", "snr_gamma"}
    stage2 = recipe.stage2.model_copy(update={name: getattr(recipe.stage1, name) for name in keep})
    return recipe.model_copy(update={"stage2": stage2})


def _plain_rows_without_task(recipe: DistilRecipe) -> DistilRecipe:
    """In stage 2, rows without a caption learn from the teacher alone."""
    return recipe.model_copy(update={"stage2": recipe.stage2.model_copy(update={"task_on_unlabelled": False})})


ROWS: dict[str, Callable[[DistilRecipe], DistilRecipe]] = {
    "scratch": lambda recipe: _task_only(recipe, "random"),
    "teacher-weights": lambda recipe: _task_only(recipe, "teacher"),
    "stage1-continued": _stage1_continued,
    "plain-rows-without-task": _plain_rows_without_task,
    "refine-control": lambda recipe: recipe,
}


def train_row(distiller: Distiller, recipe: DistilRecipe, row: str, seed: int, folder: Path) -> Path:
    """Trains one row with one seed, or takes it as it is when it is complete. Returns the saved student.

    Rows of a comparison that begin alike share their first stage: it is computed once.
    """
    varied = distiller.pinned(ROWS[row](recipe).model_copy(update={"seed": seed, "output_dir": str(folder)}))
    done = folder / "done.json"
    distiller.claim(varied, folder)
    if done.is_file():
        return folder / "student"
    _share_stage1(varied, folder)
    student = distiller.run(varied, folder)
    write_whole(done, json.dumps({"wall_seconds": wall_seconds(folder)}))
    return student


def check_rows(rows: Sequence[str]) -> None:
    """Raises RecipeError for a name that is no row, before anything is trained."""
    for row in rows:
        if row not in ROWS:
            raise RecipeError(f"no row '{row}'; there are: {', '.join(ROWS)}")


def _share_stage1(recipe: DistilRecipe, folder: Path) -> None:
    """Copies the finished stage 1 of another row, ROW/seed-N beside ours, whose recipe is the same so far."""
    finished = f"stage1/checkpoints/step-{recipe.stage1.steps:06d}"
    for begun in sorted(folder.parent.parent.glob("*/seed-*/recipe.yaml")):
        theirs = load(DistilRecipe, begun).model_copy(update={"stage2": recipe.stage2})
        alike = learnt(theirs) == learnt(recipe) and _contents(begun.parent) == _contents(folder)
        if alike and (begun.parent / finished).is_dir() and not (folder / "stage1").exists():
            aside = folder / ".stage1.part"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(begun.parent / "stage1", aside)
            aside.rename(folder / "stage1")


def _contents(folder: Path) -> str:
    path = folder / "contents.json"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def wall_seconds(folder: Path) -> float:
    """Training time of all stages, by their logs; interruptions do not count."""
    logs = [log.read_text(encoding="utf-8").splitlines() for log in sorted(folder.glob("stage*/losses.jsonl"))]
    return sum(json.loads(lines[-1])["seconds"] for lines in logs if lines)
