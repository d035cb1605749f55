"""Asymmetric feature alignment: which student point learns from which teacher point, and the bridges between them."""

from __future__ import annotations

from collections.abc import Mapping

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
    """A learned 1x1 projection for each student point, to its teacher point's channels; never saved with a student."""

    def __init__(self, mapping: Mapping[str, str], student: Shapes, teacher: Shapes) -> None:
        super().__init__()
        check_map(mapping, student, teacher)
        self.mapping = dict(mapping)
        self.sizes = {point: teacher[target][1:] for point, target in mapping.items()}
        self.projections = nn.ModuleDict(
            {_key(point): nn.Conv2d(student[point][0], teacher[target][0], 1) for point, target in mapping.items()}
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Student point -> its feature, in the channels and the resolution of its teacher point."""
        bridged = {}
        for point, size in self.sizes.items():
            projected = self.projections[_key(point)](features[point])
            if projected.shape[-2:] != size:
                projected = F.interpolate(projected, size=size, mode="bilinear", antialias=True)
            bridged[point] = projected
        return bridged

    def targets(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Student point -> the teacher feature that it learns from."""
        return {point: features[target] for point, target in self.mapping.items()}


def _key(point: str) -> str:
    return point.replace(".", "-")


def _side(point: str) -> tuple[str, str]:
    part, block = point.split(".")[:2]
    return part, block


def _depth(point: str, shapes: Shapes) -> float:
    peers = [other for other in shapes if _side(other) == _side(point)]
    return (peers.index(point) + 1) / len(peers)
