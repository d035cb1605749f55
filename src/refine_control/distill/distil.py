"""Distillation as the user runs it: stage 1, stage 2, and a student saved as a stock pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from refine_control.claim import claim, known_commits
from refine_control.data.batch import derive_seed
from refine_control.data.loader import Loader
from refine_control.data.table import Steps
from refine_control.diffusion import store
from refine_control.diffusion.cache import EncoderCache, digest, settings
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Denoiser
from refine_control.diffusion.noise import at_few_steps, sampler_at
from refine_control.diffusion.taps import feature_shapes
from refine_control.distill.alignment import Bridges
from refine_control.distill.loop import train
from refine_control.distill.preview import Preview
from refine_control.distill.processes import DTYPES, pick_device, set_threads
from refine_control.distill.stages import VERSION, Distillation, Method, teacher_features
from refine_control.distill.teacher import check_resolution, check_stage, contents, open_pictures, open_shown
from refine_control.errors import RecipeError
from refine_control.files import hold
from refine_control.recipe import DataConfig, DistilRecipe, RunConfig, StageConfig
from refine_control.student.plan import build_student, probe
from refine_control.student.transplant import transplant

OURS = Method()
MEASURED_ROWS = 256  # that the norms of the teacher's features are measured on, or as many as are trained on


class Distiller:
    """A teacher, its data and what was computed of them, shared by every student that is trained on them."""

    def __init__(self, teacher: str, data: DataConfig, run: RunConfig, controlnets: Sequence[str] = ()) -> None:
        set_threads(run)
        self.name, self.controlnets = store.pin(teacher), tuple(store.pin(name) for name in controlnets)
        device = pick_device(run.device)
        if device.type == "cpu" and {run.teacher_dtype, run.mixed_precision} == {"fp16", "bf16"}:
            raise RecipeError("run.teacher_dtype and run.mixed_precision are fp16 and bf16: on a CPU give one type")
        self.teacher = store.load(self.name, controlnets=self.controlnets).freeze()
        self._weights = [digest(network) for network in self.teacher.parts]  # as they are on the disk, whatever follows
        self.dtype = run.teacher_dtype
        self.teacher.denoiser.to(DTYPES[self.dtype])
        self.teacher.to(device)  # at last: so that no more than its own type is ever there
        self.team = PartialState()
        self._open(data)

    def on(self, data: DataConfig) -> Distiller:
        """The same teacher, in memory once, with other data."""
        other = copy(self)
        vars(other).pop("_contents", None)
        other._open(data)
        return other

    def _open(self, data: DataConfig) -> None:
        check_resolution(self.teacher, self.name, data)
        nets = self.teacher.denoiser.nets
        if nets and len(nets) != len(data.controls):
            raise RecipeError(
                f"data.controls names {len(data.controls)} controls ({', '.join(data.controls)}) but teacher "
                f"'{self.name}' has {len(nets)} ControlNets; name one for each, in their order"
            )
        self.data = data
        self.labelled, self.unlabelled = open_pictures(data)
        self.validation = open_shown(data)
        root = Path(data.cache_dir) if data.cache_dir else None
        on_disk = EncoderCache(self.teacher, self.labelled, self.unlabelled, root) if root else None
        self.encoder = Encoder(self.teacher, data.cache_gb, on_disk)

    def run(self, recipe: DistilRecipe, folder: Path, method: Method = OURS) -> Path:
        """Trains both stages, or goes on where they stopped. Returns the folder of the saved student."""
        with hold(folder) if self.team.is_main_process else nullcontext():
            return self.run_held(recipe, folder, method)

    def run_held(self, recipe: DistilRecipe, folder: Path, method: Method = OURS) -> Path:
        """As `run`, in a folder that this process holds already."""
        recipe = self.pinned(recipe)
        _agree(recipe)
        self._within_what_the_teacher_learnt(recipe)
        sampler_at(self.teacher.scheduler, recipe.sample.num_inference_steps)  # now, not at the first preview
        loaders = {  # of both stages now: a mistake in the second should not cost the first
            name: self.loader(recipe, stage, name) for name, stage in recipe.stages.items() if stage.steps
        }
        for name, loader in loaders.items():
            check_stage(name, recipe.stages[name], recipe.run, loader, self.teacher.scheduler)
        if self.team.is_main_process:
            self.claim(recipe, folder, method)
        student, bridges = self.fresh_student(recipe)
        for name, loader in loaders.items():
            self._train(folder / name, student, bridges, recipe.stages[name], loader, recipe, method)
        if self.team.is_main_process:
            only = recipe.only_steps
            scheduler = at_few_steps(self.teacher.scheduler, only)
            learnt = replace(self.teacher, denoiser=student, usual=recipe.sample, only_steps=only, scheduler=scheduler)
            store.save(learnt, folder / "student")
        self.team.wait_for_everyone()
        return folder / "student"

    def _within_what_the_teacher_learnt(self, recipe: DistilRecipe) -> None:
        """Raises RecipeError where a stage would ask it at timesteps that it never met."""
        spacing = self.teacher.scheduler["timestep_spacing"]
        for name, stage in recipe.stages.items():
            asked = stage.steps and (stage.weights.output or stage.weights.feature)
            if asked and self.teacher.only_steps and spacing != "trailing":
                raise RecipeError(
                    f"teacher '{self.name}' has learnt few steps at '{spacing}' timesteps; distil it anew"
                )
            if asked and self.teacher.only_steps not in (None, stage.num_inference_steps):
                raise RecipeError(
                    f"teacher '{self.name}' has learnt the timesteps of {self.teacher.only_steps} step(s) alone; set "
                    f"{name}.num_inference_steps and sample.num_inference_steps to that"
                )

    def pinned(self, recipe: DistilRecipe) -> DistilRecipe:
        """The recipe with the commits of what came from the hub."""
        return recipe.model_copy(update={"teacher": self.name, "controlnets": self.controlnets})

    def claim(self, recipe: DistilRecipe, folder: Path, method: Method = OURS) -> None:
        """Makes the folder this run's. Raises RecipeError where it holds another one's."""
        claim(recipe, folder, self.contents(recipe, method), self.settings())

    def fresh_student(self, recipe: DistilRecipe, measure: bool = True) -> tuple[Denoiser, Bridges]:
        """The student at step 0, and its bridges; the recipe's seed decides every random weight.

        measure: fix the bridges' norms, for which the teacher is run.
        """
        torch.manual_seed(recipe.seed)
        student = build_student(recipe.student, self.teacher)
        if recipe.init == "teacher":
            half = recipe.run.teacher_dtype != "fp32"  # the student starts from the weights as they are on the disk
            teacher = store.load(self.name, controlnets=self.controlnets) if half else self.teacher
            transplant(student, teacher.denoiser)
        student.to(self.teacher.device)
        if recipe.run.gradient_checkpointing:
            student.checkpoint_activations()
        inputs = probe(self.teacher, self.teacher.device)
        ours, theirs = feature_shapes(student, inputs), feature_shapes(self.teacher.denoiser, inputs)
        bridges = Bridges.between(recipe.alignment, ours, theirs).to(self.teacher.device)
        if measure and any(stage.weights.feature for stage in recipe.stages.values()):
            self._measure(bridges, recipe)
        return student, bridges

    def _measure(self, bridges: Bridges, recipe: DistilRecipe) -> None:
        stage = recipe.stage1 if recipe.stage1.steps else recipe.stage2
        loader, passes = self.loader(recipe, stage, "norms"), recipe.run.gradient_accumulation_steps
        longer = max(recipe.stage1.steps, recipe.stage2.steps, 1)
        steps = range(min(-(-MEASURED_ROWS // stage.batch_size), longer))
        batches = (loader(step, part, passes) for step in steps for part in range(passes))
        features = teacher_features(bridges.teacher_points, self.teacher, self.encoder, stage, batches)
        bridges.measure(features, recipe.feature_norm)

    def loader(self, recipe: DistilRecipe, stage: StageConfig, purpose: str) -> Loader:
        """The batches of a stage: each stage and each seed sees its own."""
        seed = derive_seed(recipe.seed, purpose)
        return Loader(self.labelled, self.unlabelled, recipe.masks, stage.batch_size, stage.labelled_fraction, seed)

    def _train(
        self,
        folder: Path,
        student: Denoiser,
        bridges: Bridges,
        stage: StageConfig,
        loader: Loader,
        recipe: DistilRecipe,
        method: Method,
    ) -> None:
        if recipe.run.compile:  # not before: probes of one picture would be compiled too
            student.compile_blocks()
            self.teacher.denoiser.compile_blocks()
        kept = self._kept_steps(recipe, stage, loader.seed)
        scheduler = at_few_steps(self.teacher.scheduler, stage.num_inference_steps)
        drawn = replace(self.teacher, denoiser=student, only_steps=None, scheduler=scheduler)
        train(
            folder,
            Distillation(student, self.teacher, bridges, self.encoder, stage, kept, method.losses),
            stage.weights.model_dump(),
            loader,
            stage,
            recipe.run,
            Preview(drawn, self.validation, recipe.masks, recipe.sample),
        )

    def contents(self, recipe: DistilRecipe, method: Method = OURS) -> dict[str, str]:
        """What the recipe names, by what it holds; a rival's code; and where few steps' timesteps are not the teacher's
        own, or our version is not the first, that."""
        version = {"version": str(VERSION)} if VERSION > 1 else {}
        few = any(stage.steps and stage.num_inference_steps for stage in recipe.stages.values())
        spaced = {"timesteps": "trailing"} if few and self.teacher.scheduler["timestep_spacing"] != "trailing" else {}
        return self._contents | version | spaced | ({"method": method.digest} if method.digest else {})

    @cached_property
    def _contents(self) -> dict[str, str]:
        teacher = hashlib.sha256("".join(self._weights).encode()).hexdigest()
        return {"teacher": teacher, **contents(self.labelled, self.unlabelled)}

    def settings(self, steps: int | None = None) -> dict[str, Any]:
        """What else decides the teacher's answers. steps: see `at_few_steps`."""
        asked = replace(self.teacher, scheduler=at_few_steps(self.teacher.scheduler, steps))
        return settings(asked, ["", *self.labelled.captions()])

    def _kept_steps(self, recipe: DistilRecipe, stage: StageConfig, seed: int) -> Steps | None:
        """What the teacher made of the steps of a stage, for other students that meet the same steps."""
        if not (self.data.cache_dir and self.data.teacher_cache_gb):
            return None
        sets = [pictures.fingerprint() for pictures in (self.labelled, self.unlabelled) if pictures is not None]
        key = {
            "teacher": [self._weights, self.dtype, self.settings(stage.num_inference_steps)],
            "precision": recipe.run.mixed_precision,
            "controls": self.data.controls,
            "pictures": sets,
            "masks": recipe.masks.model_dump(),
            "stage": stage.model_dump(
                include={"batch_size", "labelled_fraction", "caption_dropout", "word_dropout", "num_inference_steps"}
            ),
            "seed": seed,
        }
        return Steps(Path(self.data.cache_dir), "teacher", key, self.data.teacher_cache_gb, self.team.num_processes)


def _agree(recipe: DistilRecipe) -> None:
    """Raises RecipeError, in every process, where processes that train together were given different recipes."""
    recipes = gather_object([recipe.model_dump_json(exclude={"run"})])
    if len(set(recipes)) > 1:
        odd = next(i for i, other in enumerate(recipes) if other != recipes[0])
        raise RecipeError(f"processes 0 and {odd} were given different recipes; start all with the same file and flags")


def with_known_commits(recipe: DistilRecipe, folder: Path) -> DistilRecipe:
    """The recipe with the commits that the run in a folder began with, where it names the hub's models without one."""
    known = known_commits(DistilRecipe, folder, lambda begun: [begun.teacher, *begun.controlnets])
    nets = tuple(known.get(name, name) for name in recipe.controlnets)
    return recipe.model_copy(update={"teacher": known.get(recipe.teacher, recipe.teacher), "controlnets": nets})


def distil(recipe: DistilRecipe) -> Path:
    """`refine-control distill`."""
    recipe = with_known_commits(recipe, Path(recipe.output_dir))
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run, recipe.controlnets)
    return distiller.run(recipe, Path(recipe.output_dir))
