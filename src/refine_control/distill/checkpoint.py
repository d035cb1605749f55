"""Checkpoints that are whole or invisible: written aside, then renamed into place; safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from refine_control.errors import DataError

State = dict[str, dict[str, Tensor]]  # name of a file -> name of a tensor -> its value


def save(folder: Path, step: int, state: State) -> None:
    """Writes `folder/step-NNNNNN` and prunes older ones, after.

    Raises:
        DataError: the disk is full or not writable; an older checkpoint is still there.
    """
    target, aside = folder / f"step-{step:06d}", folder / f".step-{step:06d}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in state.items():
            save_file(tensors, aside / f"{name}.safetensors")
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


def read(path: Path) -> tuple[int, State]:
    """The number of steps done and everything that `save` wrote."""
    step = int(json.loads((path / "state.json").read_text(encoding="utf-8"))["step"])
    return step, {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
