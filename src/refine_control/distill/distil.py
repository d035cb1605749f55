"""Distillation as the user runs it: stage 1, stage 2, and a student saved as a stock pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from refine_control.data.loader import Loader, Pictures, derive_seed
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Denoiser, Model, load
from refine_control.diffusion.taps import feature_shapes
from refine_control.distill.alignment import Bridges, automatic_map
from refine_control.distill.loop import pick_device, set_threads, train
from refine_control.distill.preview import Preview
from refine_control.distill.stages import distillation_losses
from refine_control.distill.teacher import open_pictures
from refine_control.errors import ModelError
from refine_control.recipe import DistilRecipe, StageConfig, save
from refine_control.student.plan import build_student, probe
from refine_control.student.transplant import transplant


class Distillation:
    """One recipe's teacher, data and caches, shared by every student that is trained on them."""

    def __init__(self, recipe: DistilRecipe) -> None:
        set_threads(recipe.run)
        self.recipe = recipe
        self.teacher = load(recipe.teacher, pick_device(recipe.run.device)).freeze()
        if recipe.data.resolution != self.teacher.resolution:
            raise ModelError(
                f"data.resolution is {recipe.data.resolution} but teacher '{recipe.teacher}' works at "
                f"{self.teacher.resolution}; set data.resolution {self.teacher.resolution}"
            )
        self.labelled, self.unlabelled = open_pictures(recipe.data)
        self.encoder = Encoder(self.teacher, recipe.data.cache_gb)

    def run(self, folder: Path) -> Path:
        """Trains both stages, or goes on where they stopped. Returns the folder of the saved student."""
        folder.mkdir(parents=True, exist_ok=True)
        save(self.recipe, folder / "recipe.yaml")
        student, bridges = self.fresh_student()
        for number, (name, stage) in enumerate({"stage1": self.recipe.stage1, "stage2": self.recipe.stage2}.items()):
            if stage.steps:
                self._train(folder / name, student, bridges, stage, derive_seed(self.recipe.seed, number))
        model = self.as_model(student)
        _save_whole(model, folder / "student")
        return folder / "student"

    def fresh_student(self) -> tuple[Denoiser, Bridges]:
        """The student at step 0, and its bridges; the recipe's seed decides every random weight."""
        torch.manual_seed(self.recipe.seed)
        student = build_student(self.recipe.student, self.teacher)
        if self.recipe.init == "teacher":
            transplant(student, self.teacher.denoiser)
        student.to(self.teacher.device)
        inputs = probe(self.teacher, self.teacher.device)
        ours, theirs = feature_shapes(student, inputs), feature_shapes(self.teacher.denoiser, inputs)
        mapping = automatic_map(ours, theirs) if self.recipe.alignment == "auto" else self.recipe.alignment
        return student, Bridges(mapping, ours, theirs).to(self.teacher.device)

    def as_model(self, student: Denoiser) -> Model:
        """The student with the teacher's autoencoder and text encoder."""
        return replace(self.teacher, denoiser=student)

    def _train(self, folder: Path, student: Denoiser, bridges: Bridges, stage: StageConfig, seed: int) -> None:
        trainable = nn.ModuleDict({"student": student})
        if stage.weights.feature:
            trainable["bridges"] = bridges
        train(
            folder,
            distillation_losses(student, self.teacher, bridges, self.encoder, stage),
            stage.weights.model_dump(),
            Loader(
                self.labelled, self.unlabelled, self.recipe.masks, stage.batch_size, stage.labelled_fraction, seed
            ),
            trainable,
            stage,
            self.recipe.run,
            Preview(self.as_model(student), self._validation(), self.recipe.masks, self.recipe.sample),
        )

    def _validation(self) -> tuple[Pictures, Pictures | None]:
        return open_pictures(self.recipe.data, "val", variants=1)


def distil(recipe: DistilRecipe) -> Path:
    """`refine-control distill`."""
    return Distillation(recipe).run(Path(recipe.output_dir))


def _save_whole(model: Model, folder: Path) -> None:
    """Written aside, then renamed: a half-written student is never seen."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
