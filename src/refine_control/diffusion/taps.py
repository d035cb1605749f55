"""Reads intermediate features of a network while it runs, and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from refine_control.errors import RecipeError


class Taps:
    """Inside `with`, every forward of `network` fills `features`: point -> (B, C, h, w). Outside, no hook is left.

    A point is the dotted name of a submodule, e.g. 'foundation.down_blocks.0' or 'module.mid_block'.

    Raises:
        RecipeError: a point names no submodule.
    """

    def __init__(self, network: nn.Module, points: Iterable[str]) -> None:
        self.network, self.points = network, tuple(points)
        self.features: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        known = dict(network.named_modules())
        for point in self.points:
            if point not in known:
                raise RecipeError(f"no feature point '{point}'; there are: {', '.join(block_points(network))}")

    def __enter__(self) -> Taps:
        modules = dict(self.network.named_modules())
        for point in self.points:
            self._handles.append(modules[point].register_forward_hook(self._keeper(point)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keeper(self, point: str):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            self.features[point] = output[0] if isinstance(output, tuple) else output

        return keep


def block_points(network: nn.Module) -> list[str]:
    """The blocks of a denoiser, module and foundation, in the order in which a picture passes them.

    With several ControlNets the module's are 'module.nets.0.down_blocks.0' and so on; without a module there are none.
    """
    points = []
    several = getattr(network.module, "nets", None)
    nets = [f"module.nets.{i}" for i in range(len(several))] if several else ["module"] if network.module else []
    for part in (*nets, "foundation"):
        owner: Any = network.get_submodule(part)
        points += [f"{part}.down_blocks.{i}" for i in range(len(owner.down_blocks))]
        points += [f"{part}.mid_block"] if owner.mid_block is not None else []
        points += [f"{part}.up_blocks.{i}" for i in range(len(getattr(owner, "up_blocks", [])))]
    return points


@torch.no_grad()
def feature_shapes(network: nn.Module, inputs: tuple[Any, ...]) -> dict[str, tuple[int, int, int]]:
    """Runs the network once and returns point -> (C, h, w) of every block."""
    with Taps(network, block_points(network)) as taps:
        network(*inputs)
    return {point: tuple(feature.shape[1:]) for point, feature in taps.features.items()}  # type: ignore[misc]
