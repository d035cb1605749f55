"""What a recipe's training takes, before it starts: memory, arithmetic, disk. Counted on tensors without contents."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.taps import Taps, feature_shapes
from refine_control.diffusion.text import Text
from refine_control.distill.alignment import Bridges
from refine_control.distill.losses import feature_loss
from refine_control.distill.optimizer import moment_bytes
from refine_control.distill.processes import DTYPES
from refine_control.recipe import DistilRecipe
from refine_control.student.plan import build_student, cost, on_meta, plan_cost, probe

LEARNING = 4 * 3  # bytes a parameter: weight, gradient, moving average, all fp32
SUSTAINED = 50  # TFLOP/s, for an example: about a third of what a 24 GB GPU of 2022 promises in bf16
CHECKPOINT = 4 * 2  # weight and moving average, beside the optimiser's moments
FORWARDS = 3  # a forward and its backward cost about three forwards


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process, and multiply-adds of the whole run.

    frozen: weights of the teacher with its VAE and text encoders. learning: the student's and the bridges' weights,
    gradients, moments and moving averages. activations: what one pass of `rows` pictures keeps for its backward.
    checkpoint: one; disk: two of them and the saved student. latents, text: of one version of a picture and of one
    caption, where data.cache_dir keeps them. Not counted: what lives shortly (a layer's workspace, the VAE's
    activations while latents are encoded) and the framework itself.
    """

    rows: int
    frozen: int
    learning: int
    activations: int
    checkpoint: int
    disk: int
    latents: int
    text: int
    macs: int

    @property
    def memory(self) -> int:
        return self.frozen + self.learning + self.activations


def footprint(recipe: DistilRecipe, teacher: Model, processes: int = 1) -> Footprint:
    """teacher: with weights or without them, see `student.outline`. Raises RecipeError as `build_student` does."""
    largest = max([stage.batch_size for stage in recipe.stages.values() if stage.steps], default=1)
    rows = largest // (processes * recipe.run.gradient_accumulation_steps)
    parts = [part for part in (teacher.vae, teacher.text_encoder, teacher.text_encoder_2) if part is not None]
    weight = DTYPES[recipe.run.teacher_dtype].itemsize
    frozen = _parameters(teacher.denoiser) * weight + sum(map(_parameters, parts)) * 4
    learning, moments, activations = _one_pass(recipe, teacher, max(1, rows))
    x_t, _, text, _ = probe(teacher, "meta")
    samples = sum(stage.steps * stage.batch_size for stage in recipe.stages.values())
    student = plan_cost(recipe.student, teacher)
    forwards = FORWARDS + recipe.run.gradient_checkpointing  # which computes activations a second time
    return Footprint(
        rows=max(1, rows),
        frozen=frozen,
        learning=(learning * LEARNING + moments) // (processes if recipe.run.shard else 1),
        activations=activations,
        checkpoint=learning * CHECKPOINT + moments,
        disk=2 * (learning * CHECKPOINT + moments) + 4 * student.parameters + 4 * sum(map(_parameters, parts)),
        latents=4 * x_t.numel(),
        text=4 * sum(part.numel() for part in text if part is not None),
        macs=samples * (cost(teacher.denoiser, teacher).macs + forwards * student.macs),
    )


def footprint_table(f: Footprint) -> str:
    """A few lines to print."""
    lines = {
        "memory": f"{f.memory / 1e9:.1f} GB for one process and passes of {f.rows} pictures:",
        "  frozen": f"{f.frozen / 1e9:.1f} GB, teacher, VAE and text encoder",
        "  learning": f"{f.learning / 1e9:.1f} GB, student and bridges: weights, gradients, optimiser, moving average",
        "  activations": f"{f.activations / 1e9:.1f} GB, kept for the backward pass",
        "disk": f"{f.disk / 1e9:.1f} GB, two checkpoints and the saved student",
        "  caches": f"and {f.latents / 1e3:.0f} kB for each version of a picture, {f.text / 1e3:.0f} kB for each "
        "caption, where data.cache_dir keeps them",
        "arithmetic": f"{2 * f.macs / 1e15:,.3g} PFLOP of both stages' steps, latents and texts being kept: "
        f"{_duration(2 * f.macs / 1e12 / SUSTAINED)} at {SUSTAINED} sustained TFLOP/s, a GPU's work",
    }
    return "\n".join(f"{name:13}  {text}" for name, text in lines.items())


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.2g} hours" if seconds >= 3600 else f"{seconds:,.2g} seconds"


def _one_pass(recipe: DistilRecipe, teacher: Model, rows: int) -> tuple[int, int, int]:
    """Parameters that learn; the most bytes that a stage's optimiser keeps of them, and autograd of `rows`.

    Runs student and bridges on tensors without contents; weights are not counted again, casts of them are.
    """
    half = recipe.run.mixed_precision != "no"
    with FakeTensorMode():
        student = build_student(recipe.student, teacher).train()
        if recipe.run.gradient_checkpointing:
            student.checkpoint_activations()
        inputs = tuple(_repeated(part, rows) for part in probe(teacher))
        bridges = _bridges(recipe, student, teacher)
        weights = [*student.parameters(), *(bridges.parameters() if bridges else ())]
        own = {_storage(weight) for weight in weights}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        points = bridges.mapping if bridges else ()
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16) if half else nullcontext(),
            Taps(student, points) as taps,
        ):
            student(*inputs).square().mean()
            if bridges:
                bridged = bridges(taps.features)
                feature_loss(bridged, {point: torch.empty_like(value) for point, value in bridged.items()})
        activations = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    stages = [stage for stage in recipe.stages.values() if stage.steps] or [recipe.stage1]
    moments = max(sum(moment_bytes(weight, stage, recipe.run) for weight in weights) for stage in stages)
    return sum(weight.numel() for weight in weights), moments, activations


def _bridges(recipe: DistilRecipe, student: Denoiser, teacher: Model) -> Bridges | None:
    if not any(stage.weights.feature for stage in recipe.stages.values() if stage.steps):
        return None
    ours = feature_shapes(student, probe(teacher))
    theirs = feature_shapes(on_meta(teacher.denoiser), probe(teacher, "meta"))
    return Bridges.between(recipe.alignment, ours, theirs)


def _repeated(inputs: Any, rows: int) -> Any:
    """One picture's inputs -> those of several."""
    if isinstance(inputs, Tensor):
        return inputs.expand(rows, *inputs.shape[1:]).contiguous()
    if isinstance(inputs, Text):
        return Text(*(_repeated(part, rows) for part in inputs))
    return inputs


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
