"""Rows of which stage 1 is the same train it once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from refine_control.claim import learnt, rounding
from refine_control.distill.distil import Distiller
from refine_control.distill.stages import Method
from refine_control.errors import BusyError
from refine_control.files import hold
from refine_control.recipe import DistilRecipe, load


def share_stage1(recipe: DistilRecipe, folder: Path, method: Method, distiller: Distiller) -> None:
    """Copies the finished stage 1 of another row, ROW/seed-N beside ours, that began as this one does."""
    if not recipe.stage1.steps or (folder / "stage1").exists():
        return
    ours = beginning(recipe, distiller.contents(recipe, method), distiller.settings())
    for begun, theirs, contents in finished(folder.parent.parent):
        settings = json.loads((begun / "settings.json").read_text())
        if begun == folder or beginning(theirs, contents, settings) != ours:
            continue
        with suppress(BusyError), hold(begun):  # who trains there prunes checkpoints under our hands
            aside = folder / ".stage1.part"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(begun / "stage1", aside)
            distiller.claim(recipe, folder, method)
            aside.rename(folder / "stage1")
            return


def finished(work: Path) -> Iterator[tuple[Path, DistilRecipe, dict[str, str]]]:
    """(folder, recipe, contents) of each ROW/seed-N in `work` of which stage 1 is finished."""
    for path in sorted(work.glob("*/seed-*/recipe.yaml")):
        recipe, kept = load(DistilRecipe, path), [path.with_name(name) for name in ("contents.json", "settings.json")]
        last = path.parent / f"stage1/checkpoints/step-{recipe.stage1.steps:06d}"
        if last.is_dir() and all(file.is_file() for file in kept):
            yield path.parent, recipe, json.loads(kept[0].read_text())


def beginning(recipe: DistilRecipe, contents: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """All that decides stage 1: not stage 2, nor the plain pictures where stage 1 takes none of them."""
    learns = {key: value for key, value in learnt(recipe).items() if key != "stage2"} | rounding(recipe.run)
    if recipe.stage1.labelled_fraction == 1:
        learns["data"] = {key: value for key, value in learns["data"].items() if key != "unlabelled"}
        contents = {key: value for key, value in contents.items() if key != "data.unlabelled"}
    return json.dumps([learns, contents, settings], sort_keys=True)


def planned_beginning(recipe: DistilRecipe, method: str | None) -> str:
    """`beginning`, as far as it is known before teacher and data are read. method: digest of a rival's losses."""
    return beginning(recipe, {"method": method} if method else {}, {})
