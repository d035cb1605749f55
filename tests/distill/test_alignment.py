"""Which student point learns from which teacher point, and the bridges' shapes."""

import pytest
import torch
from torch import nn

from refine_control.diffusion.model import Model
from refine_control.diffusion.taps import feature_shapes
from refine_control.distill.alignment import Bridges, automatic_map, check_map
from refine_control.errors import RecipeError
from refine_control.recipe import DenoiserPlan
from refine_control.student.plan import probe
from tiny import STUDENT, plan, tiny_denoiser, tiny_model

TEACHER = {
    "module.down_blocks.0": (32, 16, 16),
    "module.mid_block": (64, 8, 8),
    "foundation.down_blocks.0": (32, 16, 16),
    "foundation.down_blocks.1": (48, 8, 8),
    "foundation.down_blocks.2": (64, 8, 8),
    "foundation.mid_block": (64, 8, 8),
    "foundation.up_blocks.0": (64, 16, 16),
    "foundation.up_blocks.1": (48, 32, 32),
    "foundation.up_blocks.2": (32, 32, 32),
}


def without(*points: str) -> dict[str, tuple[int, int, int]]:
    return {point: shape for point, shape in TEACHER.items() if point not in points}


def test_the_same_shapes_map_onto_themselves() -> None:
    assert automatic_map(TEACHER, TEACHER) == {point: point for point in TEACHER}


@pytest.mark.parametrize("shape", [plan(16, 32), STUDENT, plan(8, 16, mid_block="none")])
def test_real_networks_of_equal_depth(teacher: Model, shape: DenoiserPlan) -> None:
    student = feature_shapes(tiny_denoiser(shape), probe(teacher))
    mapping = automatic_map(student, feature_shapes(teacher.denoiser, probe(teacher)))
    assert mapping == {point: point for point in student}


def test_fewer_levels_meet_their_resolution() -> None:
    """Two levels for three: the student's last down block, at 8x8, learns from the deeper of the two at 8x8."""
    student = {
        "foundation.down_blocks.0": (8, 16, 16),
        "foundation.down_blocks.1": (16, 8, 8),
        "foundation.up_blocks.0": (16, 32, 32),
        "foundation.up_blocks.1": (8, 32, 32),
    }
    assert automatic_map(student, TEACHER) == {
        "foundation.down_blocks.0": "foundation.down_blocks.0",
        "foundation.down_blocks.1": "foundation.down_blocks.2",
        "foundation.up_blocks.0": "foundation.up_blocks.1",
        "foundation.up_blocks.1": "foundation.up_blocks.2",
    }


def test_another_resolution_takes_the_nearest() -> None:
    student = {"foundation.down_blocks.0": (8, 12, 12), "foundation.down_blocks.1": (8, 4, 4)}
    mapping = automatic_map(student, TEACHER)
    assert mapping["foundation.down_blocks.0"] == "foundation.down_blocks.0"
    assert mapping["foundation.down_blocks.1"] == "foundation.down_blocks.2"


def test_a_point_without_counterpart_is_left_out() -> None:
    assert automatic_map(TEACHER, without("foundation.mid_block")) == {
        point: point for point in without("foundation.mid_block")
    }
    assert automatic_map({"module.mid_block": (8, 8, 8)}, without("module.mid_block")) == {}


def test_parts_and_sides_never_mix() -> None:
    """Shapes that would fit better elsewhere do not tempt."""
    student = dict.fromkeys(TEACHER, (8, 64, 64))
    for ours, theirs in automatic_map(student, TEACHER).items():
        assert ours.split(".")[:2] == theirs.split(".")[:2]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"module.nose": "module.mid_block"}, "the student has no point 'module.nose'; it has: module.down_blocks.0"),
        ({"module.mid_block": "module.nose"}, "the teacher has no point 'module.nose'; it has: module.down_blocks.0"),
        ({}, "no student point is mapped; name at least one, or set alignment to auto"),
    ],
)
def test_maps_that_cannot_be(mapping: dict[str, str], message: str) -> None:
    for check in (check_map, Bridges):
        with pytest.raises(RecipeError) as caught:
            check(mapping, TEACHER, TEACHER)
        assert message in str(caught.value)


def test_bridges_bring_channels_and_resolution() -> None:
    student = {
        "foundation.down_blocks.0": (8, 16, 16),
        "foundation.mid_block": (16, 4, 4),
        "module.mid_block": (5, 9, 9),
    }
    mapping = automatic_map(student, TEACHER)
    bridges = Bridges(mapping, student, TEACHER)
    features = {point: torch.randn(2, *shape) for point, shape in student.items()}
    bridged = bridges(features)
    assert {point: tuple(feature.shape[1:]) for point, feature in bridged.items()} == {
        point: TEACHER[target] for point, target in mapping.items()
    }
    assert len(list(bridges.parameters())) == 2 * len(student)


def test_a_bridge_at_equal_resolution_is_its_projection() -> None:
    point, shapes = "module.mid_block", {"module.mid_block": (4, 8, 8)}
    bridges = Bridges({point: point}, shapes, shapes)
    (projection,) = bridges.projections.values()
    nn.init.dirac_(projection.weight)
    nn.init.constant_(projection.bias, 1)
    feature = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(bridges({point: feature})[point], feature + 1)


def test_downsampling_leaves_out_no_student_pixel() -> None:
    """Antialiased: plain bilinear interpolation from 8x8 to 2x2 would look at 16 of the 64 pixels."""
    point = "module.mid_block"
    bridges = Bridges({point: point}, {point: (1, 8, 8)}, {point: (1, 2, 2)})
    (projection,) = bridges.projections.values()
    nn.init.ones_(projection.weight)
    feature = torch.zeros(1, 1, 8, 8, requires_grad=True)
    bridges({point: feature})[point].sum().backward()
    assert (feature.grad > 0).all()
    torch.testing.assert_close(feature.grad.sum(), torch.tensor(4.0))


def test_targets_are_the_teachers_own_tensors() -> None:
    mapping = {"foundation.down_blocks.0": "foundation.down_blocks.2", "module.mid_block": "module.mid_block"}
    features = {point: torch.randn(1, *shape) for point, shape in TEACHER.items()}
    targets = Bridges(mapping, TEACHER, TEACHER).targets(features)
    assert {ours: id(tensor) for ours, tensor in targets.items()} == {
        ours: id(features[theirs]) for ours, theirs in mapping.items()
    }


def test_bridges_are_no_part_of_the_student() -> None:
    model = tiny_model(STUDENT)
    names = set(model.denoiser.state_dict())
    shapes = feature_shapes(model.denoiser, probe(model))
    bridges = Bridges(automatic_map(shapes, shapes), shapes, shapes)
    assert set(model.denoiser.state_dict()) == names
    assert not {id(p) for p in bridges.parameters()} & {id(p) for p in model.denoiser.parameters()}
