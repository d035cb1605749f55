"""Starts a student from its teacher's weights where shapes allow.

Weight selection (Xu et al. 2024, 2311.18823): each student tensor takes evenly spaced rows and columns of the teacher
tensor of the same name. Channel k of a width w always comes from channel floor(k W / w) of the teacher's width W, so
that layers which share a residual stream keep the same channels; with all widths cut by one ratio this also holds
across the skip connections that up blocks concatenate. Keeping all channels is the identity. Teacher and student
should have equal layers_per_block: the module numbers its outputs flat, so other layers would meet.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from refine_control.diffusion.model import Denoiser


@torch.no_grad()
def transplant(student: Denoiser, teacher: Denoiser) -> list[str]:
    """Copies into `student` in place. Returns the names of student tensors that found no source and stay fresh."""
    source = teacher.state_dict()
    shift = len(teacher.foundation.up_blocks) - len(student.foundation.up_blocks)
    fresh = []
    for name, tensor in student.state_dict().items():
        origin = source.get(_teacher_name(name, shift))
        if (
            origin is None
            or origin.ndim != tensor.ndim
            or any(o < s for o, s in zip(origin.shape, tensor.shape, strict=True))
        ):
            fresh.append(name)
        else:
            tensor.copy_(select(origin, tensor.shape))
    return fresh


def select(origin: Tensor, shape: torch.Size) -> Tensor:
    """Evenly spaced entries of `origin` along every dimension."""
    for dim, size in enumerate(shape):
        index = torch.arange(size, device=origin.device) * origin.shape[dim] // size
        origin = origin.index_select(dim, index)
    return origin


def _teacher_name(name: str, shift: int) -> str:
    """Up blocks are counted from the bottom; a student with fewer levels lacks the deepest, the first of them."""
    return re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{int(m[1]) + shift}", name)
