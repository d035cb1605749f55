"""Checkpoints that are whole or invisible: written aside, then renamed into place; safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refine_control.errors import DataError


def save(folder: Path, step: int, trainable: nn.Module, ema: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Writes `folder/step-NNNNNN` and prunes older ones, after.

    Raises:
        DataError: the disk is full or not writable; an older checkpoint is still there.
    """
    target, aside = folder / f"step-{step:06d}", folder / f".step-{step:06d}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_contiguous(trainable.state_dict()), aside / "trainable.safetensors")
        save_file({str(i): t.contiguous() for i, t in enumerate(ema)}, aside / "ema.safetensors")
        save_file(_flatten(optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, "format": 1}), encoding="utf-8")
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(f"cannot write checkpoint '{target}': {error}; make room, then run the same command") from None
    for old in sorted(folder.glob("step-*"), key=_step)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    found = [path.parent for path in folder.glob("step-*/state.json")]
    return max(found, key=_step, default=None)


def restore(path: Path, trainable: nn.Module, ema: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Loads everything that `save` wrote into the given objects and returns the number of steps done."""
    try:
        trainable.load_state_dict(load_file(path / "trainable.safetensors"))
    except RuntimeError:
        raise DataError(f"checkpoint '{path}' is of another model; choose another output_dir or remove it") from None
    kept = load_file(path / "ema.safetensors")
    for i, tensor in enumerate(ema):
        tensor.copy_(kept[str(i)])
    _unflatten(optimizer, load_file(path / "optimizer.safetensors"))
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return int(state["step"])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()}


def _unflatten(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
