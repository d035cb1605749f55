"""What a student will cost, before any training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from refine_control.diffusion.build import build_foundation, build_net, module_of
from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.text import Text
from refine_control.errors import RecipeError
from refine_control.plans import DenoiserPlan, StudentName
from refine_control.student.named import named_plan


@dataclass(frozen=True)
class Cost:
    """parameters: numbers in foundation and module. macs: multiply-adds of one forward of both, one picture."""

    foundation_parameters: int
    module_parameters: int
    macs: int

    @property
    def parameters(self) -> int:
        return self.foundation_parameters + self.module_parameters


def build_student(plan: DenoiserPlan | StudentName, teacher: Model) -> Denoiser:
    """A fresh student that speaks the teacher's latents, text embeddings and resolution, on torch's default device.

    What the plan does not say (embeddings of time and size, projections, kernels, the control's channels and their
    order) is copied from the teacher's configs. Of a teacher with several ControlNets the student has as many.

    Raises:
        RecipeError: the plan's conditioning does not lead from the teacher's pictures to its latents.
    """
    plan = named_plan(plan, teacher.denoiser) if isinstance(plan, str) else plan
    levels = teacher.downscale.bit_length()
    if teacher.denoiser.nets and len(plan.conditioning_channels) != levels:
        raise RecipeError(
            f"conditioning_channels has {len(plan.conditioning_channels)} entries; the teacher's latents are "
            f"{teacher.downscale}x smaller than its pictures, so give {levels}"
        )
    foundation = build_foundation(plan, teacher.denoiser.foundation.config)
    nets = [build_net(plan, net.config) for net in teacher.denoiser.nets]
    return Denoiser(foundation, module_of(nets), teacher.denoiser.downscale)


def cost(denoiser: Denoiser, teacher: Model) -> Cost:
    """Counts on the meta device: nothing is computed, so the largest model takes a second."""
    twin = on_meta(denoiser)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(*probe(teacher, "meta"))

    def count(network: nn.Module | None) -> int:
        return 0 if network is None else sum(p.numel() for p in network.parameters())

    return Cost(count(twin.foundation), count(twin.module), counter.get_total_flops() // 2)


def plan_cost(plan: DenoiserPlan | StudentName, teacher: Model) -> Cost:
    with torch.device("meta"):
        student = build_student(plan, teacher)
    return cost(student, teacher)


def plan_table(plan: DenoiserPlan | StudentName, teacher: Model) -> str:
    """Parameters and MACs of teacher and student, as lines to print."""
    t, s = cost(teacher.denoiser, teacher), plan_cost(plan, teacher)
    ratio = f"the student has {t.parameters / s.parameters:.1f}x fewer parameters, {t.macs / s.macs:.1f}x fewer MACs"
    return "\n".join([cost_table({"teacher": t, "student": s}), ratio])


def cost_table(costs: dict[str, Cost]) -> str:
    """One line for each name; the first is the one that MACs are compared with."""
    width = max(8, *map(len, costs))
    lines = [f"{'':{width}}  {'foundation':>13}  {'module':>13}  {'parameters':>13}  {'MACs':>16}  {'of its MACs':>11}"]
    first = next(iter(costs.values()))
    for name, c in costs.items():
        lines.append(
            f"{name:{width}}  {c.foundation_parameters:13,}  {c.module_parameters:13,}  {c.parameters:13,}  "
            f"{c.macs:16,}  {c.macs / first.macs:11.1%}"
        )
    return "\n".join(lines)


def probe(model: Model, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Text, Tensor | None]:
    """One input of a denoiser at the model's own resolution: x_t, t, text, control (None without a module)."""
    foundation = model.denoiser.foundation.config
    side, channels = foundation.sample_size, model.denoiser.control_channels
    pooled = None
    if foundation.addition_embed_type == "text_time":  # SDXL: pooled text beside six embedded sizes
        pooled_width = foundation.projection_class_embeddings_input_dim - 6 * foundation.addition_time_embed_dim
        pooled = torch.zeros(1, pooled_width, device=device)
    tokens = torch.zeros(1, model.tokenizer.model_max_length, foundation.cross_attention_dim, device=device)
    return (
        torch.zeros(1, foundation.in_channels, side, side, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
        Text(tokens, pooled),
        torch.zeros(1, channels, model.resolution, model.resolution, device=device) if channels else None,
    )


def on_meta(denoiser: Denoiser) -> Denoiser:
    """A twin by its configs, without contents."""
    with torch.device("meta"):
        foundation = type(denoiser.foundation).from_config(denoiser.foundation.config)
        nets = [type(net).from_config(net.config) for net in denoiser.nets]
        return Denoiser(foundation, module_of(nets), denoiser.downscale).eval()
