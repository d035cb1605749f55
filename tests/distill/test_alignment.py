"""Which student point learns from which teacher point, and the bridges' shapes."""

import pytest
import torch
from torch import Tensor, nn

from refine_control.diffusion.model import Model
from refine_control.diffusion.taps import feature_shapes
from refine_control.distill.alignment import Bridges, automatic_map, check_map
from refine_control.errors import RecipeError
from refine_control.plans import DenoiserPlan
from refine_control.student.plan import probe
from tiny import STUDENT, plan, tiny_denoiser

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


def test_targets_are_those_of_the_mapped_teacher_points() -> None:
    mapping = {"foundation.down_blocks.0": "foundation.down_blocks.2", "module.mid_block": "module.mid_block"}
    features = {point: torch.randn(1, *shape) for point, shape in TEACHER.items()}
    targets = Bridges(mapping, TEACHER, TEACHER).targets(features)
    assert targets.keys() == mapping.keys()
    for ours, theirs in mapping.items():
        assert torch.equal(targets[ours], features[theirs])


# Norms

POINT, SHAPES = "module.mid_block", {"module.mid_block": (4, 5, 5)}


def measured(kind: str, *features: Tensor) -> Bridges:
    bridges = Bridges({POINT: POINT}, SHAPES, SHAPES)
    bridges.measure([{POINT: feature} for feature in features], kind)
    return bridges


def some_features() -> list[Tensor]:
    """Two batches whose channels have means 5, -3, 0, 1 and deviations 0.1, 1, 10, 1000."""
    scale, shift = torch.tensor([0.1, 1, 10, 1000]).view(1, 4, 1, 1), torch.tensor([5.0, -3, 0, 1]).view(1, 4, 1, 1)
    return [torch.randn(3, 4, 5, 5) * scale + shift for _ in range(2)]


def test_channel_norm_gives_each_channel_mean_0_and_variance_1() -> None:
    features = some_features()
    bridges = measured("channel", *features)
    normalised = (
        torch.cat([bridges.targets({POINT: feature})[POINT] for feature in features]).transpose(0, 1).flatten(1)
    )
    torch.testing.assert_close(normalised.mean(1), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(normalised.var(1, correction=0), torch.ones(4), rtol=1e-3, atol=0)


def test_l2_norm_gives_the_feature_a_mean_square_of_1() -> None:
    features = some_features()
    bridges = measured("l2", *features)
    normalised = torch.cat([bridges.targets({POINT: feature})[POINT] for feature in features])
    torch.testing.assert_close(normalised.square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(normalised * (torch.cat(features) / normalised).mean(), torch.cat(features))


def test_no_norm_changes_nothing() -> None:
    feature = some_features()[0]
    assert torch.equal(measured("none", feature).targets({POINT: feature})[POINT], feature)


def test_a_dead_channel_is_borne() -> None:
    dead = torch.full((2, 4, 5, 5), 5.0)
    assert torch.equal(measured("channel", dead).targets({POINT: dead})[POINT], torch.zeros_like(dead))


def test_a_rows_target_does_not_depend_on_its_neighbours() -> None:
    """As it would if the batch's own mean and variance were taken."""
    batch, other = some_features()
    bridges = measured("channel", batch)
    whole = bridges.targets({POINT: torch.cat([batch[:1], other])})[POINT]
    assert torch.equal(bridges.targets({POINT: batch[:1]})[POINT], whole[:1])


def test_norms_are_kept_with_the_bridges_and_learn_nothing() -> None:
    bridges, fresh = measured("channel", *some_features()), measured("none", *some_features())
    fresh.load_state_dict(bridges.state_dict())
    feature = some_features()[0]
    assert torch.equal(fresh.targets({POINT: feature})[POINT], bridges.targets({POINT: feature})[POINT])
    assert all(name.startswith("projections") for name, _ in bridges.named_parameters())


def test_half_precision_meets_another_resolution() -> None:
    """On a CPU too, where no half-precision kernel resizes with antialiasing."""
    point = "foundation.down_blocks.1"
    bridges = Bridges({point: "foundation.up_blocks.1"}, {point: (8, 4, 4)}, TEACHER)
    with torch.autocast("cpu", torch.bfloat16):
        assert bridges({point: torch.randn(2, 8, 4, 4)})[point].shape == (2, 48, 32, 32)
