"""The tri-level knowledge fusion loss of REFINE-CONTROL (2509.22139).

    L = w_task L_task + w_out L_out + w_feat L_feat

    L_task = E || s(x_t) - y ||^2        y: the true noise, v or x0, as the schedule says
    L_out  = E || s(x_t) - T(x_t) ||^2   T: the frozen teacher, same x_t, t, text and control
    L_feat = mean over points p of E || B_p(s_p) - n_p(T_p) ||^2
                                         B_p: learned bridge on the student's side; n_p: a fixed norm of the teacher's

In inpainting the hole may count more than what is known in L_task and L_out (`by_place`; ours, not the paper's).
The sum itself stands in loop.py; the weights stand in the recipe; B and n in alignment.py. All in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Latents = Float[Tensor, "B c h w"]
RowWeight = Float[Tensor, " B"]
Place = Float[Tensor, "B 1 h w"]
Scalar = Float[Tensor, ""]


def task_loss(student: Latents, target: Latents, row_weight: RowWeight, place: Place | None = None) -> Scalar:
    """L_task. student, target: (B, c, h, w). row_weight: (B,), e.g. min-SNR, 0 for rows that take no task term.

    place: (B, 1, h, w), what each place counts, as `by_place` gives it; None counts all alike.
    """
    return (row_weight * _per_row_mse(student, target, place)).mean()


def output_loss(student: Latents, teacher: Latents, row_weight: RowWeight, place: Place | None = None) -> Scalar:
    """L_out. The same distance, to the teacher's prediction."""
    return (row_weight * _per_row_mse(student, teacher.detach(), place)).mean()


def by_place(mask: Tensor, hole_weight: float, size: torch.Size) -> Place | None:
    """What each place of (h, w) counts: a pixel of the hole `hole_weight` times one that is known; mean 1 in each row.

    mask: (B, 1, H, W), 1 in the hole. None for a weight of 1.
    """
    if hole_weight == 1:
        return None
    weights = 1 + (hole_weight - 1) * F.interpolate(mask.float(), size=size, mode="area")
    return weights / weights.mean((1, 2, 3), keepdim=True)


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Scalar:
    """L_feat. student: point -> bridged feature; teacher: point -> normalised feature, both (B, C, h, w)."""
    return torch.stack([_per_row_mse(student[point], teacher[point].detach()).mean() for point in student]).mean()


def _per_row_mse(a: Latents, b: Latents, place: Place | None = None) -> RowWeight:
    squared = (a.float() - b.float()).square()
    return (squared if place is None else place * squared).mean((1, 2, 3))
