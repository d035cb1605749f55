"""Starts a student from its teacher's weights: whole layers where it has fewer, the strongest channels where narrower.

Layers, by structure (BK-SDM, 2305.15798): on the way down a level's first ones; on the way up the first ones too, but
for the last, which takes the teacher's last, because that is the one whose skip comes from the level above; of
transformer layers the first ones. Levels count from the top: a student without the deepest lacks its teacher's first
up block.

Channels, as in pruning by weight norm (Li et al. 2017, 1608.08710): a channel's importance is the L2 norm of all
weights that write it, over every tensor that shares its space (`axes`). A student keeps the most important ones, in
the teacher's order: as many of each norm group, so that groups stay groups, and attention heads whole, so that queries
still meet their keys. Keeping all channels is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from refine_control.diffusion.model import Denoiser
from refine_control.plans import DenoiserPlan
from refine_control.student.axes import Axis, Dimension, axes, residuals
from refine_control.student.named import plan_of


@torch.no_grad()
def transplant(student: Denoiser, teacher: Denoiser) -> list[str]:
    """Copies into `student` in place. Returns the names of student tensors that found no source and stay fresh."""
    small, large = plan_of(student), plan_of(teacher)
    channels = Channels(teacher.state_dict(), large)
    fresh = []
    for name, tensor in student.state_dict().items():
        taken = channels.select(origin(name, small, large), axes(name, tensor.shape, small))
        if taken is None:
            fresh.append(name)
        else:
            tensor.copy_(taken)
    return fresh


def origin(name: str, small: DenoiserPlan, large: DenoiserPlan) -> str:
    """The name of the teacher's tensor that a student's comes from; the teacher may lack it."""
    if found := re.search(r"controlnet_down_blocks\.(\d+)", name):
        place, places = residuals(small)[int(found[1])], residuals(large)
        return name.replace(found[0], f"controlnet_down_blocks.{places.index(place) if place in places else 'none'}")
    if found := re.search(r"up_blocks\.(\d+)\.(\w+)\.(\d+)", name):
        level, kind, layer = len(small.layers) - 1 - int(found[1]), found[2], int(found[3])
        if kind != "upsamplers" and layer == small.layers[level] and level < len(large.layers):
            layer = large.layers[level]
        return name.replace(found[0], f"up_blocks.{len(large.layers) - 1 - level}.{kind}.{layer}")
    return name


class Channels:
    """The teacher's tensors, and how much each channel of each space matters."""

    def __init__(self, tensors: Mapping[str, Tensor], plan: DenoiserPlan) -> None:
        self.tensors, self.plan = tensors, plan
        self.importance: dict[str, Tensor] = {}  # space -> sum of squares (channels,)
        for name, tensor in tensors.items():
            if tensor.ndim > 1:
                rows = tensor.float().square().flatten(1).sum(1)
                written = axes(name, tensor.shape, plan)[0]
                for axis, part in zip(written, rows.split([axis.size for axis in written]), strict=True):
                    self.importance[axis.space] = self.importance.get(axis.space, 0) + part

    def select(self, name: str, wanted: tuple[Dimension, ...]) -> Tensor | None:
        """The teacher's tensor of that name, cut to the wanted sizes; None if there is none or it is too small."""
        tensor = self._tensor(name)
        if tensor is None or tensor.ndim != len(wanted):
            return None
        for dim, (theirs, ours) in enumerate(zip(axes(name, tensor.shape, self.plan), wanted, strict=True)):
            kept, start = [], 0
            for their, our in zip(theirs, ours, strict=True):
                if our.size > their.size or (their.choice == "all" and our.size < their.size):
                    return None
                kept.append(start + self.keep(their, our))
                start += their.size
            tensor = tensor.index_select(dim, torch.cat(kept).to(tensor.device))
        return tensor

    def _tensor(self, name: str) -> Tensor | None:
        """As the teacher has it. Where a resnet of its adds its input as it is, its shortcut is the identity."""
        resnet, is_shortcut, kind = name.partition(".conv_shortcut.")
        conv = self.tensors.get(f"{resnet}.conv2.{kind}")
        if name in self.tensors or not is_shortcut or conv is None:
            return self.tensors.get(name)
        return torch.eye(len(conv)).to(conv)[..., None, None] if kind == "weight" else torch.zeros_like(conv)

    def keep(self, their: Axis, our: Axis) -> Tensor:
        """Which of a space's channels a student of our size keeps: their numbers, ascending, int64 (our.size,)."""
        if their.size == our.size:
            return torch.arange(our.size)
        if their.choice == "evenly":
            return torch.arange(our.size) * their.size // our.size
        importance = self.importance[their.space].cpu()
        if their.choice == "groups" and their.size % our.parts == 0:
            return strongest(importance.view(our.parts, -1), our.size // our.parts)
        width, our_width = their.size // their.parts, our.size // our.parts
        if their.choice == "heads" and our.parts <= their.parts and our_width <= width:
            attention = their.space.rsplit(" ", 1)[0]
            both = self.importance[f"{attention} qk"].cpu() + self.importance[f"{attention} v"].cpu()
            heads = strongest(both.view(their.parts, width).sum(1)[None], our.parts)
            within = strongest(importance.view(their.parts, width)[heads], our_width).view(our.parts, our_width)
            return (within % width + heads[:, None] * width).flatten()
        return strongest(importance[None], our.size)


def strongest(importance: Tensor, count: int) -> Tensor:
    """The `count` largest of each row (rows, n), ascending, as numbers in the flattened whole."""
    rows, n = importance.shape
    order = importance.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    return (order + torch.arange(rows)[:, None] * n).flatten()
