"""The tri-level knowledge fusion loss of REFINE-CONTROL (2509.22139).

    L = w_task L_task + w_out L_out + w_feat L_feat

    L_task = E || s(x_t) - y ||^2        y: the true noise, v or x0, as the schedule says
    L_out  = E || s(x_t) - T(x_t) ||^2   T: the frozen teacher, same x_t, t, text and control
    L_feat = mean over points p of || B_p(s_p) - norm(T_p) ||^2     B_p: learned bridge on the student's side

The sum itself stands in loop.py; the weights stand in the recipe. All in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def task_loss(student: Tensor, target: Tensor, row_weight: Tensor) -> Tensor:
    """L_task. student, target: (B, c, h, w). row_weight: (B,), e.g. min-SNR, 0 for rows that take no task term."""
    return (row_weight * _per_row_mse(student, target)).mean()


def output_loss(student: Tensor, teacher: Tensor, row_weight: Tensor) -> Tensor:
    """L_out. The same distance, to the teacher's prediction."""
    return (row_weight * _per_row_mse(student, teacher.detach())).mean()


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], norm: str) -> Tensor:
    """L_feat: mean over points of the mean squared distance to the normalised teacher feature.

    Un-normalised feature terms are ten to a thousand times the others and do not track quality (BK-SDM issues 21, 33).

    Args:
        student: point -> bridged student feature, (B, C, h, w) as the teacher's.
        teacher: point -> teacher feature.
        norm: 'channel' (PKD: each channel to mean 0, variance 1 over the batch), 'l2' (LAPTOP-Diff: divided by the
            teacher feature's root mean square), 'none' (BK-SDM).
    """
    distances = [_feature_distance(student[point], teacher[point].detach(), norm) for point in student]
    return torch.stack(distances).mean()


def _feature_distance(student: Tensor, teacher: Tensor, norm: str) -> Tensor:
    student, teacher = student.float(), teacher.float()
    if norm == "channel":
        mean = teacher.mean((0, 2, 3), keepdim=True)
        std = teacher.std((0, 2, 3), keepdim=True)
        return ((student - (teacher - mean) / (std + 1e-5)) ** 2).mean()
    distance = ((student - teacher) ** 2).mean()
    return distance / teacher.square().mean().clamp_min(1e-12) if norm == "l2" else distance


def _per_row_mse(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().mean((1, 2, 3))
