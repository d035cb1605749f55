"""The tri-level loss against answers worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refine_control.distill.losses import feature_loss, output_loss, task_loss

NORMS = ("channel", "l2", "none")
ONES = torch.ones(2)
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normalised(feature: Tensor) -> Tensor:
    """Each channel to mean 0 and variance 1 over the batch, written out once more."""
    rows = feature.transpose(0, 1).flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / rows.var(1, keepdim=True).sqrt()
    return rows.unflatten(1, (feature.shape[0], *feature.shape[2:])).transpose(0, 1)


@pytest.mark.parametrize("distance", [task_loss, output_loss])
def test_a_constant_offset_costs_its_square(distance: Distance) -> None:
    x = some(2, 4, 3, 3)
    torch.testing.assert_close(distance(x + 3, x, ONES), torch.tensor(9.0))
    assert distance(x, x, ONES) == 0


@pytest.mark.parametrize("distance", [task_loss, output_loss])
def test_rows_are_weighed_then_averaged(distance: Distance) -> None:
    target = torch.zeros(3, 1, 2, 2)
    student = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1).expand_as(target)
    torch.testing.assert_close(distance(student, target, torch.ones(3)), torch.tensor((1 + 4 + 25) / 3))
    torch.testing.assert_close(distance(student, target, torch.tensor([1, 0.5, 0])), torch.tensor((1 + 2 + 0) / 3))


@pytest.mark.parametrize("distance", [task_loss, output_loss])
def test_half_precision_is_summed_in_float32(distance: Distance) -> None:
    x = torch.full((2, 4, 64, 64), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
    loss = distance(x, torch.zeros_like(x), ONES)
    assert loss.dtype == torch.float32
    assert loss == 90000


def test_no_gradient_to_the_teacher() -> None:
    student, teacher = (some(2, 4, 3, 3, seed=i).requires_grad_() for i in (0, 1))
    losses = [output_loss(student, teacher, ONES)]
    losses += [feature_loss({"p": student}, {"p": teacher}, norm) for norm in NORMS]
    for loss in losses:
        ours, theirs = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
        assert ours.abs().sum() > 0
        assert theirs is None


def test_without_normalisation_it_is_plain_mse() -> None:
    student, teacher = some(2, 4, 3, 3), some(2, 4, 3, 3, seed=1)
    loss = feature_loss({"p": student}, {"p": teacher}, "none")
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student, teacher))
    torch.testing.assert_close(feature_loss({"p": teacher + 3}, {"p": teacher}, "none"), torch.tensor(9.0))


def test_points_are_averaged() -> None:
    teacher = {"a": some(2, 4, 3, 3), "b": some(2, 8, 5, 5)}
    student = {"a": teacher["a"] + 1, "b": teacher["b"] + 3}
    torch.testing.assert_close(feature_loss(student, teacher, "none"), torch.tensor((1 + 9) / 2.0))


def test_channel_norm_wants_the_normalised_feature() -> None:
    teacher = some(3, 4, 5, 5) * 7 + 2
    assert feature_loss({"p": normalised(teacher)}, {"p": teacher}, "channel") < 1e-8
    loss = feature_loss({"p": normalised(teacher) + 2}, {"p": teacher}, "channel")
    torch.testing.assert_close(loss, torch.tensor(4.0), rtol=1e-4, atol=0)


def test_channel_norm_does_not_see_scale_and_shift_of_teacher_channels() -> None:
    student, teacher = some(3, 4, 5, 5), some(3, 4, 5, 5, seed=1)
    scale, shift = torch.tensor([0.1, 1, 10, 1000]).view(1, 4, 1, 1), torch.tensor([5, -3, 0, 1]).view(1, 4, 1, 1)
    plain, other = (feature_loss({"p": student}, {"p": t}, "channel") for t in (teacher, teacher * scale + shift))
    torch.testing.assert_close(plain, other, rtol=1e-3, atol=0)


def test_channel_norm_bears_a_dead_channel() -> None:
    loss = feature_loss({"p": torch.zeros(2, 3, 4, 4)}, {"p": torch.full((2, 3, 4, 4), 5.0)}, "channel")
    assert loss == 0


def test_l2_does_not_see_a_common_scale() -> None:
    student, teacher = some(3, 4, 5, 5), some(3, 4, 5, 5, seed=1)
    plain, scaled = (feature_loss({"p": student * k}, {"p": teacher * k}, "l2") for k in (1, 1000))
    torch.testing.assert_close(plain, scaled)
    torch.testing.assert_close(plain, (student - teacher).square().mean() / teacher.square().mean())
    torch.testing.assert_close(feature_loss({"p": 0 * teacher}, {"p": teacher}, "l2"), torch.tensor(1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_extra_teacher_points_are_not_looked_at(norm: str) -> None:
    student, teacher = some(2, 4, 3, 3), some(2, 4, 3, 3, seed=1)
    alone = feature_loss({"p": student}, {"p": teacher}, norm)
    assert feature_loss({"p": student}, {"p": teacher, "q": teacher}, norm) == alone
