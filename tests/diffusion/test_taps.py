"""Taps read what the blocks put out, leave nothing behind, and name what they cannot find."""

import pytest
import torch
from torch import Tensor, nn

from refine_control.diffusion.model import Model
from refine_control.diffusion.taps import Taps, block_points, feature_shapes
from refine_control.diffusion.text import Text
from refine_control.errors import RecipeError
from refine_control.student.plan import probe
from tiny import TEACHER, plan, tiny_denoiser, tiny_model


def hooks(network: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in network.modules() for kind in kinds)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return 2 * x, "what else a block returns"


class Chain(nn.Module):
    """x -> 2x -> 2x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = Twice()
        self.plus = nn.Linear(1, 1)
        nn.init.ones_(self.plus.weight)
        nn.init.ones_(self.plus.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.plus(self.twice(x)[0])


def test_known_features() -> None:
    network = Chain()
    with Taps(network, ["twice", "plus"]) as taps:
        network(torch.tensor([[1.0]]))
        assert {point: feature.item() for point, feature in taps.features.items()} == {"twice": 2, "plus": 3}
        network(torch.tensor([[5.0]]))
        assert {point: feature.item() for point, feature in taps.features.items()} == {"twice": 10, "plus": 11}
    network(torch.tensor([[7.0]]))
    assert taps.features["plus"].item() == 11, "a forward outside `with` is not read"


def test_every_block_of_a_denoiser(teacher: Model) -> None:
    denoiser = tiny_denoiser()
    true: dict[str, Tensor] = {}

    def spied(point: str, forward):
        def run(*args: object, **kwargs: object) -> object:
            output = forward(*args, **kwargs)
            true[point] = output[0] if isinstance(output, tuple) else output
            return output

        return run

    for point in block_points(denoiser):
        block = denoiser.get_submodule(point)
        block.forward = spied(point, block.forward)
    x_t, t, text, control = probe(teacher)
    inputs = (torch.randn_like(x_t), t, Text(torch.randn_like(text.tokens)), torch.randn_like(control))
    with Taps(denoiser, block_points(denoiser)) as taps:
        tapped = denoiser(*inputs)
    assert list(taps.features) == list(true) == block_points(denoiser)
    assert all(taps.features[point] is true[point] for point in true)
    assert torch.equal(tapped, denoiser(*inputs)), "taps change no output"


def test_no_hook_is_left() -> None:
    denoiser = tiny_denoiser()
    with Taps(denoiser, block_points(denoiser)):
        assert hooks(denoiser) == len(block_points(denoiser)) == 8
    assert hooks(denoiser) == 0
    Taps(denoiser, ["module.mid_block"])
    assert hooks(denoiser) == 0, "nothing hangs on before `with`"


def test_no_hook_is_left_by_a_forward_that_fails() -> None:
    network = Chain()

    def fail(taps: Taps) -> None:
        with taps:
            assert hooks(network) == 2
            network(torch.zeros(1, 7))  # the linear layer takes one column

    taps = Taps(network, ["twice", "plus"])
    with pytest.raises(RuntimeError):
        fail(taps)
    assert list(taps.features) == ["twice"]
    assert hooks(network) == 0


def test_an_unknown_point_is_named_beside_the_known() -> None:
    with pytest.raises(RecipeError, match=r"no feature point 'foundation\.down_blocks\.9'") as caught:
        Taps(tiny_denoiser(), ["module.mid_block", "foundation.down_blocks.9"])
    assert "foundation.down_blocks.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_feature_shapes(teacher: Model) -> None:
    """8x8 latents: the first level halves them on its way down, the deepest does not; up blocks mirror that."""
    assert TEACHER.block_out_channels == (16, 32)
    down = {0: (16, 4, 4), 1: (32, 4, 4)}
    assert feature_shapes(teacher.denoiser, probe(teacher)) == {
        **{f"module.down_blocks.{i}": shape for i, shape in down.items()},
        "module.mid_block": (32, 4, 4),
        **{f"foundation.down_blocks.{i}": shape for i, shape in down.items()},
        "foundation.mid_block": (32, 4, 4),
        "foundation.up_blocks.0": (32, 8, 8),
        "foundation.up_blocks.1": (16, 8, 8),
    }


def test_a_foundation_without_mid_block_has_no_such_point() -> None:
    model = tiny_model(plan(16, 32, mid_block="none"))
    points = list(feature_shapes(model.denoiser, probe(model)))
    assert points == block_points(model.denoiser)
    assert "foundation.mid_block" not in points
    assert "module.mid_block" in points
