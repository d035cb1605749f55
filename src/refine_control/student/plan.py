"""What a student will cost, before any training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from refine_control.diffusion.build import build_denoiser
from refine_control.diffusion.model import Denoiser, Model
from refine_control.errors import RecipeError
from refine_control.recipe import DenoiserPlan


@dataclass(frozen=True)
class Cost:
    """parameters: numbers in foundation and module. macs: multiply-adds of one forward of both, one picture."""

    foundation_parameters: int
    module_parameters: int
    macs: int

    @property
    def parameters(self) -> int:
        return self.foundation_parameters + self.module_parameters


def build_student(plan: DenoiserPlan, teacher: Model) -> Denoiser:
    """A fresh student that speaks the teacher's latents, text embeddings and resolution."""
    foundation = teacher.denoiser.foundation.config
    levels = teacher.downscale.bit_length()
    if len(plan.conditioning_channels) != levels:
        raise RecipeError(
            f"conditioning_channels has {len(plan.conditioning_channels)} entries; the teacher's latents are "
            f"{teacher.downscale}x smaller than its pictures, so give {levels}"
        )
    return build_denoiser(plan, foundation.in_channels, foundation.cross_attention_dim, foundation.sample_size)


def cost(denoiser: Denoiser, teacher: Model) -> Cost:
    """Counts on the meta device: nothing is computed, so the largest model takes a second."""
    twin = _on_meta(denoiser)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(*probe(teacher, "meta"))

    def count(network: torch.nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    return Cost(count(twin.foundation), count(twin.module), counter.get_total_flops() // 2)


def plan_table(plan: DenoiserPlan, teacher: Model) -> str:
    """Parameters and MACs of teacher and student, as lines to print."""
    costs = {"teacher": cost(teacher.denoiser, teacher), "student": cost(build_student(plan, teacher), teacher)}
    lines = [f"{'':8}  {'foundation':>12}  {'module':>12}  {'parameters':>12}  {'MACs':>14}"]
    for name, c in costs.items():
        lines.append(
            f"{name:8}  {c.foundation_parameters:12,}  {c.module_parameters:12,}  {c.parameters:12,}  {c.macs:14,}"
        )
    t, s = costs["teacher"], costs["student"]
    lines.append(
        f"the student has {t.parameters / s.parameters:.1f}x fewer parameters, {t.macs / s.macs:.1f}x fewer MACs"
    )
    return "\n".join(lines)


def probe(model: Model, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One input of a denoiser at the model's own resolution: x_t, t, text, control."""
    foundation = model.denoiser.foundation.config
    side = foundation.sample_size
    return (
        torch.zeros(1, foundation.in_channels, side, side, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
        torch.zeros(1, model.tokenizer.model_max_length, foundation.cross_attention_dim, device=device),
        torch.zeros(1, 3, model.resolution, model.resolution, device=device),
    )


def _on_meta(denoiser: Denoiser) -> Denoiser:
    with torch.device("meta"):
        foundation = type(denoiser.foundation).from_config(denoiser.foundation.config)
        module = type(denoiser.module).from_config(denoiser.module.config)
        return Denoiser(foundation, module).eval()
