"""Muon: orthogonal steps for matrices, AdamW's for the rest."""

import pytest
import torch
from torch import Tensor, nn

from refine_control.distill.muon import MOMENTUM, NEWTON_SCHULZ, STEP_RMS, Muon, is_matrix, orthogonal

SETTINGS = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.99)}


def plain_newton_schulz(x: Tensor) -> Tensor:
    """The iteration as it is published, on one matrix that is not taller than wide."""
    a, b, c = NEWTON_SCHULZ
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def stepped(start: Tensor, gradients: list[Tensor], **changes: float) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], **{**SETTINGS, **changes})
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 24, 100), (2, 100, 24)], ids=str)
def test_it_is_newton_schulz(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    tall = shape[1] > shape[2]
    expected = torch.stack([plain_newton_schulz(m.T).T if tall else plain_newton_schulz(m) for m in x])
    torch.testing.assert_close(orthogonal(x), expected)
    torch.testing.assert_close(orthogonal(x.float()).double(), expected, atol=1e-4, rtol=0)


def test_singular_values_end_near_one_and_their_vectors_stay() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in range(2))
    ends = u.T @ orthogonal((u @ torch.diag(torch.linspace(0.05, 1, 16, dtype=torch.float64)) @ v.T)[None])[0] @ v
    values = ends.diagonal()
    assert (values.min() > 0.65) & (values.max() < 1.25)
    torch.testing.assert_close(ends, torch.diag(values))


def test_nothing_is_left_as_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 16, 20)), torch.zeros(1, 16, 20))


def test_the_first_step_is_as_large_whatever_the_gradient() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(32, 64), torch.randn(32, 64)
    small, large = (start - stepped(start, [factor * gradient]) for factor in (1e-3, 1e3))
    torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-3)
    assert small.square().mean().sqrt().item() == pytest.approx(SETTINGS["lr"] * STEP_RMS, rel=0.3)


def test_a_convolution_is_the_matrix_of_its_filters() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(16, 4, 3, 3), [torch.randn(16, 4, 3, 3) for _ in range(3)]
    as_matrix = stepped(start.flatten(1), [gradient.flatten(1) for gradient in gradients])
    assert torch.equal(stepped(start, gradients).flatten(1), as_matrix)


def test_momentum_looks_ahead_and_weights_decay() -> None:
    torch.manual_seed(0)
    start, first, second = (torch.randn(1, 16, 16, dtype=torch.float64) for _ in range(3))
    momentum = (1 - MOMENTUM) * first
    then = MOMENTUM * momentum + (1 - MOMENTUM) * second
    size = SETTINGS["lr"] * STEP_RMS * 16**0.5
    expected = start
    for ahead in ((1 - MOMENTUM) * first + MOMENTUM * momentum, (1 - MOMENTUM) * second + MOMENTUM * then):
        expected = expected * (1 - SETTINGS["lr"] * 0.5) - size * orthogonal(ahead)
    torch.testing.assert_close(stepped(start[0], [first[0], second[0]], weight_decay=0.5), expected[0])


def test_vectors_and_thin_ends_step_as_under_adamw() -> None:
    torch.manual_seed(0)
    shapes = [(64,), (4, 40, 3, 3), (40, 1, 3, 3), ()]
    starts = [torch.randn(shape) for shape in shapes]
    assert not any(map(is_matrix, starts))
    ends = []
    for kind in (Muon, torch.optim.AdamW):
        torch.manual_seed(1)
        weights = [nn.Parameter(start.clone()) for start in [*starts, torch.randn(16, 16)]]
        optimizer = kind(weights, **{**SETTINGS, "weight_decay": 0.01})
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        ends.append([weight.detach() for weight in weights])
    for muon, adamw in zip(*(end[:-1] for end in ends), strict=True):
        torch.testing.assert_close(muon, adamw)
    assert not torch.equal(ends[0][-1], ends[1][-1])


def test_equal_shapes_step_as_each_alone_does() -> None:
    torch.manual_seed(0)
    starts, gradients = torch.randn(3, 16, 32), torch.randn(3, 16, 32)
    weights = [nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon(weights, **SETTINGS)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    weights[1].grad = None
    optimizer.step()
    assert torch.equal(weights[1], starts[1])
    for i in (0, 2):
        torch.testing.assert_close(weights[i].detach(), stepped(starts[i], [gradients[i]]), atol=1e-5, rtol=1e-4)
