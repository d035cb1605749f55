"""What learns: the weights, their moving average and the optimiser. A checkpoint holds just this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from refine_control.distill import checkpoint
from refine_control.distill.optimizer import LossScale, build_optimizer, clip, ema_decay, learning_rate
from refine_control.distill.processes import DTYPES, own_part, sharded, spread_like, whole
from refine_control.errors import DataError, UserError
from refine_control.recipe import RunConfig, StageConfig


class Learner:
    """Steps the weights of an objective that require gradients, and keeps their average.

    objective: as it was given; sharded processes train a twin of it. network: what a step calls.
    """

    def __init__(
        self,
        objective: nn.Module,
        weights: Mapping[str, float],
        stage: StageConfig,
        run: RunConfig,
        team: Accelerator,
        folder: Path,
    ) -> None:
        """Goes on from the newest checkpoint in `folder`, else starts from the weights as they are.

        Raises:
            DataError: the checkpoint is of another model or another optimiser.
        """
        self.given, self.stage, self.run, self.team, self.folder = objective, stage, run, team, folder
        self.device = next(p.device for p in objective.parameters() if p.requires_grad)
        self.scale = LossScale(run.mixed_precision == "fp16")
        newest = checkpoint.latest(folder)
        self.start, state = checkpoint.read(newest) if newest else (0, {})
        if newest:
            _load(objective, state["trainable"], newest)
            if team.is_main_process:
                checkpoint.prune(newest)
        self.sharded = run.shard and team.num_processes > 1
        if self.sharded:
            self.network = self.objective = sharded(objective, self.device)
        else:
            self.objective = objective
            features_alone = not (weights.get("task") or weights.get("output"))  # reach no network's last layer
            team.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=features_alone)
            self.network = team.prepare_model(objective)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer: Any = build_optimizer(self.parameters, stage, run)
        if newest:
            self._restore(state, newest)
        self.objective.train()

    def autocast(self) -> torch.autocast:
        """Inside, matrix products and convolutions run in the recipe's mixed precision. Losses are float32 anyway."""
        half = DTYPES.get(self.run.mixed_precision)  # None of 'no'
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value).backward()

    def update(self, step: int, loss: Tensor) -> float:
        """One step along the gradients that `backward` added up to. Returns their norm before clipping.

        Where that, or the loss, is not finite no weight is changed; if the gradients alone are not, an fp16 loss is
        scaled down from then on (`scale.lowered`). Every process must call it.
        """
        if self.scale.value != 1:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.scale.value)
        norm = clip(self.parameters, self.stage.max_grad_norm)
        if self.team.num_processes > 1:  # all step, or none
            loss = self.team.reduce(loss.detach().clone(), "mean")
        if not math.isfinite(loss):
            self.scale.lowered = False
            return math.nan
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.stage)
            self.optimizer.step()
            get_ema_multi_avg_fn(ema_decay(step, self.stage))(self.average, self.parameters, None)
        self.scale.update(math.isfinite(norm))
        return norm

    def save(self, step: int) -> None:
        """Writes a checkpoint after `step` steps. Every process must call it; the main one writes, whole tensors.

        Raises:
            UserError: a weight is not finite; the last checkpoint is as it was.
        """
        finite = torch.stack([own_part(p.detach()).isfinite().all() for p in self.parameters]).all()
        if not all(gather_object([bool(finite)])):
            raise UserError(
                f"after step {step} weights are not finite; the last checkpoint is as it was. The learning rate, "
                f"{self.stage.learning_rate:g}, is too high: begin with a lower one in another output_dir"
            )
        state = {
            "trainable": self._gathered(self.objective.state_dict()),
            "ema": self._gathered({str(i): value for i, value in enumerate(self.average)}),
            "optimizer": self._gathered(self._moments() | self.scale.state()),
        }
        if self.team.is_main_process:
            checkpoint.save(self.folder, step, state)
        self.team.wait_for_everyone()

    def finish(self) -> None:
        """Puts the averaged weights in place, in the objective as it was given. Nothing else can be called after."""
        _copy(map(whole, self.average), [p for p in self.given.parameters() if p.requires_grad])
        del self.optimizer, self.parameters, self.average, self.objective, self.network
        self.team.free_memory()  # shards too, which refer to each other
        self.given.to(self.device).eval()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the averaged weights are in place, in eval mode."""
        kept = [p.detach().clone() for p in self.parameters]
        _copy(self.average, self.parameters)
        self.objective.eval()
        try:
            yield
        finally:
            _copy(kept, self.parameters)
            self.objective.train()

    def _moments(self) -> dict[str, Any]:
        """The optimiser's state by the place of the parameter, without bitsandbytes' constant tables."""
        return {
            f"{i}.{name}": value
            for i, parameter in enumerate(self.parameters)
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if not name.startswith("qmap")
        }

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """One after the other, so that only the main process ever holds more than its shards and one whole tensor."""
        gathered = {}
        for name, value in tensors.items():
            value = whole(value.detach() if isinstance(value, Tensor) else torch.tensor(value))
            if self.team.is_main_process:
                gathered[name] = (value.cpu() if self.sharded else value).contiguous()
        return gathered

    def _restore(self, state: checkpoint.State, path: Path) -> None:
        for i, (value, parameter) in enumerate(zip(self.average, self.parameters, strict=True)):
            value.copy_(spread_like(state["ema"][str(i)], parameter))
        numbers = {key: value for key, value in state["optimizer"].items() if key.startswith(LossScale.KEY)}
        self.scale.load(numbers)
        moments = {key: value for key, value in state["optimizer"].items() if key not in numbers}
        eight_bits = any(key.endswith(".state1") for key in moments)
        if moments and eight_bits != self.run.use_8bit_adam:
            raise DataError(
                f"checkpoint '{path}' was written with run.use_8bit_adam {str(eight_bits).lower()}; "
                "go on with that, or choose another output_dir"
            )
        for key, value in moments.items():
            place, name = key.split(".", 1)
            parameter = self.parameters[int(place)]
            kept = self.optimizer.state[parameter]
            if eight_bits and not kept:
                self.optimizer.init_state(self.optimizer.param_groups[0], parameter, 0, int(place))  # its tables
            kept[name] = int(value) if eight_bits and name == "step" else spread_like(value, parameter)


def _load(objective: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        objective.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"checkpoint '{path}' is of another model; choose another output_dir or remove it") from None


def _copy(source: Iterable[Tensor], parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for value, parameter in zip(source, parameters, strict=True):
            parameter.copy_(value)
