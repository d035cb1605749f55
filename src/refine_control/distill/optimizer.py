"""How a step follows its gradients: optimiser, learning rate, clipping, averaging, the scale of an fp16 loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refine_control.distill.muon import Muon, is_matrix
from refine_control.distill.processes import whole
from refine_control.errors import RecipeError
from refine_control.recipe import RunConfig, StageConfig


class LossScale:
    """Keeps small fp16 gradients from vanishing (Micikevicius et al. 2018, 1710.03740): the loss is multiplied by it.

    Halved where a gradient overflows, doubled after 2,000 steps without. Always 1 unless enabled.
    lowered: the last step was left out because the scale was too large for it.
    """

    KEY, PATIENCE = "loss_scale", 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.value, self.good, self.lowered = enabled, 2.0**16 if enabled else 1.0, 0, False

    def update(self, finite: bool) -> None:
        """finite: were the last step's gradients? At a scale of 1 the scale is not to blame."""
        self.lowered = self.enabled and not finite and self.value > 1
        if self.lowered:
            self.value, self.good = self.value / 2, 0
        elif self.enabled:
            self.good += 1
            self.value *= 2 if self.good % self.PATIENCE == 0 else 1

    def state(self) -> dict[str, Tensor]:
        numbers = {"value": self.value, "good": self.good} if self.enabled else {}
        return {f"{self.KEY}.{name}": torch.tensor(float(number)) for name, number in numbers.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self.enabled and state:
            self.value, self.good = float(state[f"{self.KEY}.value"]), int(state[f"{self.KEY}.good"])


def build_optimizer(parameters: list[nn.Parameter], stage: StageConfig, run: RunConfig) -> torch.optim.Optimizer:
    """Muon, or AdamW (Loshchilov & Hutter 2019, 1711.05101), in 8 bits (Dettmers et al. 2022, 2110.02861) if asked.

    Raises:
        RecipeError: 8 bits were asked for and bitsandbytes is not there.
    """
    settings: dict[str, Any] = {"lr": stage.learning_rate, "weight_decay": stage.weight_decay, "betas": (0.9, 0.99)}
    if stage.optimizer == "muon":
        return Muon(parameters, **settings)
    if not run.use_8bit_adam:
        return torch.optim.AdamW(parameters, **settings, fused=True)  # one pass over the weights, on CPU too
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise RecipeError(
            "run.use_8bit_adam needs bitsandbytes: pip install -e '.[8bit]' in the clone, or set it to false"
        ) from None
    return AdamW8bit(parameters, **settings)


def moment_bytes(weight: Tensor, stage: StageConfig, run: RunConfig) -> int:
    """What the optimiser keeps of a weight: AdamW two numbers each, in fp32 or 8 bits, Muon one of a matrix."""
    if stage.optimizer == "muon" and is_matrix(weight):
        return 4 * weight.numel()
    return (2 if run.use_8bit_adam else 8) * weight.numel()


def clip(parameters: list[nn.Parameter], largest: float) -> float:
    """Scales the gradients down to a common norm of `largest` where they exceed it. Returns the norm before."""
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    if largest < norm < math.inf:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm.item()


def learning_rate(step: int, stage: StageConfig) -> float:
    """Linear warm-up, then a cosine down to final_learning_rate of the peak."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    low = stage.final_learning_rate
    return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(step: int, stage: StageConfig) -> float:
    """0 at the first step, so that the random start is forgotten, then (1 + k) / (10 + k) up to the recipe's."""
    return min(stage.ema_decay, (1 + step) / (10 + step)) if step else 0.0
