"""Rows that differ in one thing, trained and scored alike: the method, its controls, and the teacher above them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refine_control.diffusion.model import Model, load
from refine_control.distill.distil import Distillation
from refine_control.distill.teacher import open_pictures
from refine_control.errors import RecipeError
from refine_control.evaluate.features import efficientnet_lite0
from refine_control.evaluate.heldout import HeldOut
from refine_control.evaluate.score import Reference
from refine_control.recipe import DataConfig, DistilRecipe, EvaluateConfig, LossWeights, MaskConfig, SampleConfig
from refine_control.student.plan import cost

TASK_ONLY = LossWeights(task=1)


def _task_only(recipe: DistilRecipe, init: str) -> DistilRecipe:
    stages = {name: getattr(recipe, name).model_copy(update={"weights": TASK_ONLY}) for name in ("stage1", "stage2")}
    return recipe.model_copy(update={**stages, "init": init})


def _stage1_continued(recipe: DistilRecipe) -> DistilRecipe:
    """Stage 2's steps, batch size and learning rate, spent on what stage 1 does: its data and its weights."""
    keep = {"labelled_fraction", "weights", "task_on_unlabelled", "caption_dropout", "feature_norm", "snr_gamma"}
    stage2 = recipe.stage2.model_copy(update={name: getattr(recipe.stage1, name) for name in keep})
    return recipe.model_copy(update={"stage2": stage2})


ROWS: dict[str, Callable[[DistilRecipe], DistilRecipe]] = {
    "scratch": lambda recipe: _task_only(recipe, "random"),
    "teacher-weights": lambda recipe: _task_only(recipe, "teacher"),
    "stage1-continued": _stage1_continued,
    "refine-control": lambda recipe: recipe,
}


@dataclass
class Domain:
    """One held-out set and the features of its true pictures."""

    heldout: HeldOut
    reference: Reference

    def score(self, model: Model, config: SampleConfig) -> tuple[dict[str, Any], Tensor]:
        drawn = self.heldout.draw(model, config)
        return self.reference.score(drawn), drawn


def open_domains(data: DataConfig, masks: MaskConfig, config: EvaluateConfig) -> dict[str, Domain]:
    """The held-out sets of a recipe: 'labelled', and 'unlabelled' where there is one."""
    extractor = efficientnet_lite0()
    domains = {}
    for name, pictures in zip(("labelled", "unlabelled"), open_pictures(data, config.split, variants=1), strict=True):
        if pictures is not None:
            heldout = HeldOut.choose(name, pictures, name == "labelled", masks, config)
            domains[name] = Domain(heldout, Reference(heldout.true, heldout.batch.mask, extractor))
    return domains


def train_row(recipe: DistilRecipe, row: str, seed: int, folder: Path) -> Path:
    """Trains one row with one seed, or takes it as it is when it is complete. Returns the saved student."""
    if row not in ROWS:
        raise RecipeError(f"no row '{row}'; there are: {', '.join(ROWS)}")
    varied = ROWS[row](recipe).model_copy(update={"seed": seed, "output_dir": str(folder)})
    wanted = varied.model_dump(mode="json")
    done = folder / "done.json"
    if done.is_file():
        if json.loads(done.read_text(encoding="utf-8"))["recipe"] == wanted:
            return folder / "student"
        raise RecipeError(f"'{folder}' holds a run of another recipe; remove it or choose another output_dir")
    began = time.monotonic()
    student = Distillation(varied).run(folder)
    done.write_text(json.dumps({"recipe": wanted, "wall_seconds": time.monotonic() - began}), encoding="utf-8")
    return student


def evaluate_folder(
    name: str, domains: dict[str, Domain], config: SampleConfig, folder: Path, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Scores a saved model on every domain, once: the result is kept in `folder` beside its pictures."""
    kept = folder / "evaluation.json"
    settings = {"model": name, "sample": config.model_dump(), "images": {d: len(v.heldout.batch) for d, v in domains.items()}}
    if kept.is_file():
        result = json.loads(kept.read_text(encoding="utf-8"))
        if result["settings"] == settings:
            return result
    model = load(name, device).freeze()
    result = {"settings": settings, "domains": {}, "cost": _cost(model)}
    folder.mkdir(parents=True, exist_ok=True)
    for domain_name, domain in domains.items():
        began = time.monotonic()
        scores, drawn = domain.score(model, config)
        result["domains"][domain_name] = scores | {"seconds": time.monotonic() - began}
        torch.save((drawn * 255).round().byte(), folder / f"drawn-{domain_name}.pt")
    kept.write_text(json.dumps(result), encoding="utf-8")
    return result


def _cost(model: Model) -> dict[str, int]:
    counted = cost(model.denoiser, model)
    return {"params": counted.parameters, "macs": counted.macs}
