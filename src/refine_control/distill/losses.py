"""The tri-level knowledge fusion loss of REFINE-CONTROL (2509.22139).

    L = w_task L_task + w_out L_out + w_feat L_feat

    L_task = E || s(x_t) - y ||^2        y: the true noise, v or x0, as the schedule says
    L_out  = E || s(x_t) - T(x_t) ||^2   T: the frozen teacher, same x_t, t, text and control
    L_feat = mean over points p of E || B_p(s_p) - n_p(T_p) ||^2
                                         B_p: learned bridge on the student's side; n_p: a fixed norm of the teacher's

The sum itself stands in loop.py; the weights stand in the recipe; B and n in alignment.py. All in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "B c h w"]
RowWeight = Float[Tensor, " B"]
Scalar = Float[Tensor, ""]


def task_loss(student: Latents, target: Latents, row_weight: RowWeight) -> Scalar:
    """L_task. student, target: (B, c, h, w). row_weight: (B,), e.g. min-SNR, 0 for rows that take no task term."""
    return (row_weight * _per_row_mse(student, target)).mean()


def output_loss(student: Latents, teacher: Latents, row_weight: RowWeight) -> Scalar:
    """L_out. The same distance, to the teacher's prediction."""
    return (row_weight * _per_row_mse(student, teacher.detach())).mean()


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Scalar:
    """L_feat. student: point -> bridged feature; teacher: point -> normalised feature, both (B, C, h, w)."""
    return torch.stack([_per_row_mse(student[point], teacher[point].detach()).mean() for point in student]).mean()


def _per_row_mse(a: Latents, b: Latents) -> RowWeight:
    return (a.float() - b.float()).square().mean((1, 2, 3))
