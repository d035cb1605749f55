"""The tri-level loss against answers worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refine_control.distill.losses import by_place, feature_loss, output_loss, task_loss

ONES = torch.ones(2)
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def test_the_hole_counts_as_many_times_as_said_and_a_rows_mean_stays_one() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4], mask[1, :, :, :2] = 1, 1
    place = by_place(mask, 3.0, torch.Size((4, 4)))
    assert place is not None
    torch.testing.assert_close(place.mean((1, 2, 3)), ONES)
    torch.testing.assert_close(place[:, 0, 0, 0], 3 * place[:, 0, 3, 3])
    torch.testing.assert_close(place[0, 0, 0, 0], torch.tensor(1.5))  # half of the row: 3 / ((3 + 1) / 2)
    assert by_place(mask, 1.0, torch.Size((4, 4))) is None


@pytest.mark.parametrize("distance", [task_loss, output_loss])
def test_an_error_in_the_hole_costs_more_than_the_same_one_beside_it(distance: Callable[..., Tensor]) -> None:
    place = by_place(torch.eye(2).view(1, 1, 2, 2), 4.0, torch.Size((2, 2)))
    off = torch.zeros(4, 1, 2, 2)
    off.view(4, 4)[range(4), range(4)] = 1  # in each row at another place
    at = torch.stack([distance(row[None], torch.zeros(1, 1, 2, 2), torch.ones(1), place) for row in off])
    torch.testing.assert_close(at, torch.tensor([4.0, 1, 1, 4]) / 2.5 / 4)


@pytest.mark.parametrize("distance", [task_loss, output_loss])
def test_half_precision_is_summed_in_float32(distance: Distance) -> None:
    x = torch.full((2, 4, 64, 64), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
    loss = distance(x, torch.zeros_like(x), ONES)
    assert loss.dtype == torch.float32
    assert loss == 90000


def test_no_gradient_to_the_teacher() -> None:
    student, teacher = (some(2, 4, 3, 3, seed=i).requires_grad_() for i in (0, 1))
    for loss in (output_loss(student, teacher, ONES), feature_loss({"p": student}, {"p": teacher})):
        ours, theirs = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
        assert ours.abs().sum() > 0
        assert theirs is None


def test_a_feature_term_is_a_plain_mean_square() -> None:
    student, teacher = some(2, 4, 3, 3), some(2, 4, 3, 3, seed=1)
    loss = feature_loss({"p": student}, {"p": teacher})
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student, teacher))
    torch.testing.assert_close(feature_loss({"p": teacher + 3}, {"p": teacher}), torch.tensor(9.0))


def test_points_are_averaged_however_large() -> None:
    teacher = {"a": some(2, 4, 3, 3), "b": some(2, 8, 5, 5)}
    student = {"a": teacher["a"] + 1, "b": teacher["b"] + 3}
    torch.testing.assert_close(feature_loss(student, teacher), torch.tensor((1 + 9) / 2.0))


def test_extra_teacher_points_are_not_looked_at() -> None:
    student, teacher = some(2, 4, 3, 3), some(2, 4, 3, 3, seed=1)
    alone = feature_loss({"p": student}, {"p": teacher})
    assert feature_loss({"p": student}, {"p": teacher, "q": teacher}) == alone
