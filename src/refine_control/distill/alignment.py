"""Asymmetric feature alignment: which student point learns from which teacher point, the bridges between them, and the
fixed norms of the teacher's features."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refine_control.errors import RecipeError

Shapes = Mapping[str, tuple[int, int, int]]  # point -> (C, h, w)


def automatic_map(student: Shapes, teacher: Shapes) -> dict[str, str]:
    """Student point -> teacher point: same part, same side of the network, nearest resolution, then nearest depth.

    Part is foundation or module; side is down, mid or up. Depth is the relative place among the points of that side,
    so that the last student block learns from the last teacher block. A student point with no counterpart (a mid
    block that the teacher lacks) is left out.
    """
    mapping = {}
    for point, (_, height, _) in student.items():
        rivals = [other for other in teacher if _side(other) == _side(point)]
        if rivals:
            mapping[point] = min(
                rivals,
                key=lambda other: (
                    abs(teacher[other][1] / height - height / teacher[other][1]),
                    abs(_depth(other, teacher) - _depth(point, student)),
                ),
            )
    return mapping


def check_map(mapping: Mapping[str, str], student: Shapes, teacher: Shapes) -> None:
    """Raises RecipeError for a point that does not exist, on either side, and for an empty map."""
    for whose, points, shapes in (("student", mapping.keys(), student), ("teacher", mapping.values(), teacher)):
        for point in points:
            if point not in shapes:
                raise RecipeError(f"alignment: the {whose} has no point '{point}'; it has: {', '.join(shapes)}")
    if not mapping:
        raise RecipeError("alignment: no student point is mapped; name at least one, or set alignment to auto")


class Bridges(nn.Module):
    """For each student point a learned 1x1 projection B_p to its teacher point's channels, and that point's norm n_p.

    Neither is saved with a student.
    """

    def __init__(self, mapping: Mapping[str, str], student: Shapes, teacher: Shapes) -> None:
        super().__init__()
        check_map(mapping, student, teacher)
        self.mapping = dict(mapping)
        self.sizes = {point: teacher[target][1:] for point, target in mapping.items()}
        self.projections = nn.ModuleDict(
            {_key(point): nn.Conv2d(student[point][0], teacher[target][0], 1) for point, target in mapping.items()}
        )
        self.norms = nn.ModuleDict({_key(target): Norm(teacher[target][0]) for target in self.teacher_points})

    @classmethod
    def between(cls, alignment: str | Mapping[str, str], student: Shapes, teacher: Shapes) -> Bridges:
        """By a recipe's `alignment`: 'auto', or student point -> teacher point."""
        mapping = automatic_map(student, teacher) if isinstance(alignment, str) else alignment
        return cls(mapping, student, teacher)

    @property
    def teacher_points(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.mapping.values()))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Student point -> B_p(s_p), in the channels and the resolution of its teacher point."""
        bridged = {}
        for point, size in self.sizes.items():
            projected = self.projections[_key(point)](features[point])
            if projected.shape[-2:] != size:
                projected = F.interpolate(projected.float(), size=size, mode="bilinear", antialias=True)
            bridged[point] = projected
        return bridged

    def targets(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Student point -> n_p(T_p), the normalised teacher feature that it learns from."""
        normalised = {target: self._norm(target)(features[target]) for target in self.teacher_points}
        return {point: normalised[target] for point, target in self.mapping.items()}

    def measure(self, features: Iterable[Mapping[str, Tensor]], kind: str) -> None:
        """Fixes every norm from some batches of teacher features (which a resumed run takes from its checkpoint).

        kind: 'channel' (PKD: each channel to mean 0, variance 1), 'l2' (LAPTOP-Diff, 2404.11098: divided by the root
        mean square), 'none' (BK-SDM). Un-normalised feature terms are ten to a thousand times the others and do not
        track quality (BK-SDM issues 21, 33). Fixed, not by batch: so the loss does not depend on how a batch is
        composed or shared out.
        """
        count, sums, squares = 0, dict[str, Tensor](), dict[str, Tensor]()
        for batch in features:
            count += 1
            for point in self.teacher_points:
                feature = batch[point].double()
                sums[point] = sums.get(point, 0) + feature.mean((0, 2, 3))
                squares[point] = squares.get(point, 0) + feature.square().mean((0, 2, 3))
        for point in self.teacher_points:
            mean, square = sums[point] / count, squares[point] / count
            if kind == "channel":
                self._norm(point).fix(mean, (square - mean.square()).clamp_min(0).sqrt())
            elif kind == "l2":
                self._norm(point).fix(torch.zeros_like(mean), square.mean().sqrt().expand_as(mean))

    def _norm(self, point: str) -> Norm:
        return cast(Norm, self.norms[_key(point)])


class Norm(nn.Module):
    """n_p: (B, C, h, w) -> (T - shift) * scale, by channel. Until it is fixed it changes nothing."""

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))

    def fix(self, mean: Tensor, std: Tensor) -> None:
        self.shift.copy_(mean.view_as(self.shift))
        self.scale.copy_(1 / (std + 1e-5).view_as(self.scale))

    def forward(self, feature: Tensor) -> Tensor:
        return (feature.float() - self.shift) * self.scale


def _key(point: str) -> str:
    return point.replace(".", "-")


def _side(point: str) -> str:
    """'module.nets.1.down_blocks.2' -> 'module.nets.1.down_blocks': all of the name but a number at its end."""
    return re.sub(r"\.\d+$", "", point)


def _depth(point: str, shapes: Shapes) -> float:
    peers = [other for other in shapes if _side(other) == _side(point)]
    return (peers.index(point) + 1) / len(peers)
