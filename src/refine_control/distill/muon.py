"""Muon: a matrix of weights moves along the orthogonal matrix nearest to its momentum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from refine_control.distill.processes import spread_like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at 0, and all it meets ends near 1
ITERATIONS = 5
MOMENTUM = 0.95
THINNEST = 16  # rows and columns of what counts as a matrix
STEP_RMS = 0.2  # of a step over the learning rate, about what AdamW's steps have
TOGETHER = 2**22  # numbers that are made orthogonal at once


def is_matrix(weight: Tensor) -> bool:
    """Linear weights and convolutions, (out, in * h * w); not vectors, nor thin ends, as a last convolution is."""
    return weight.ndim > 1 and min(weight.shape[0], math.prod(weight.shape[1:])) >= THINNEST


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> the same singular vectors with all singular values near 1, in 0.7 to 1.2; tiny ones less.

    Newton-Schulz: X <- (a + b G + c G^2) X with G = X X'. All iterates are a polynomial of the first G times the first
    X, so that the iteration runs on the small square G, and X is touched twice.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    polynomial = identity.expand_as(gram)
    for _ in range(ITERATIONS):
        factor = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        polynomial = factor @ polynomial
        gram = factor @ gram @ factor
    return polynomial @ x


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, AdamW for all other weights.

    A matrix's step is scaled to the size of AdamW's (Liu et al. 2025, 2502.16982, section 2.2), so that one learning
    rate and one weight decay serve both. On sharded weights every process computes every matrix's step.
    """

    def __init__(self, parameters: list[nn.Parameter], **settings: Any) -> None:
        """settings: torch.optim.AdamW's."""
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for parameter in parameters:
            groups[is_matrix(parameter)].append(parameter)
        super().__init__([{"params": groups[False]}, {"params": groups[True]}], **settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients; a weight without one stays."""
        rest, matrices = self.param_groups
        rate, decay = matrices["lr"], matrices["weight_decay"]
        for alike in _by_shape(matrices["params"]):
            momenta = [whole(self._momentum(weight, gradient)).flatten(1) for weight, gradient in alike]
            steps = orthogonal(torch.stack(momenta))
            size = STEP_RMS * max(steps.shape[1:]) ** 0.5  # an orthogonal matrix's own is 1 over that root
            for (weight, _), step in zip(alike, steps, strict=True):
                weight.mul_(1 - rate * decay)
                weight.add_(spread_like(step.reshape(weight.shape), weight), alpha=-rate * size)
        self.param_groups = [rest]
        super().step()
        self.param_groups = [rest, matrices]

    def _momentum(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """The gradient's moving average, looked one step ahead (Nesterov's)."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return gradient.lerp(state["momentum"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM)


def _by_shape(weights: list[nn.Parameter]) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """Weights and their gradients, of one shape each time and no more than TOGETHER numbers."""
    shapes: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
    for weight in weights:
        if weight.grad is not None:
            shapes.setdefault(weight.shape, []).append((weight, weight.grad))
    for shape, alike in shapes.items():
        few = max(1, TOGETHER // math.prod(shape))
        yield from (alike[first : first + few] for first in range(0, len(alike), few))
