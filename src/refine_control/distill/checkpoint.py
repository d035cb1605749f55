"""Checkpoints that are whole or invisible. Written aside, synced, a manifest of hashes last, renamed into place; older
ones go only after. safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from refine_control.errors import DataError
from refine_control.files import put_in_place, sync

State = dict[str, dict[str, Tensor]]  # name of a file -> name of a tensor -> its value
MANIFEST, FORMAT = "state.json", 2  # format 1 had no hashes
FILES = ("trainable.safetensors", "ema.safetensors", "optimizer.safetensors")


def save(folder: Path, step: int, state: State) -> None:
    """Writes `folder/step-NNNNNN` and prunes older ones, after.

    Raises:
        DataError: the disk is full or not writable; an older checkpoint is still there.
    """
    target, aside = folder / f"step-{step:06d}", folder / f".step-{step:06d}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        hashes = {}
        for name, tensors in state.items():
            path = aside / f"{name}.safetensors"
            save_file(tensors, path)
            sync(path)
            hashes[path.name] = _sha256(path)
        manifest = aside / MANIFEST
        manifest.write_text(json.dumps({"format": FORMAT, "step": step, "sha256": hashes}), encoding="utf-8")
        sync(manifest)
        sync(aside)
        put_in_place(aside, target)  # there may be a damaged one that was passed over
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(f"cannot write checkpoint '{target}': {error}; make room, then run the same command") from None
    prune(target, later=True)


def prune(kept: Path, later: bool = False) -> None:
    """Removes checkpoints older than one, what was half written beside it and, if asked, later ones that were passed
    over as damaged. `save` does; a run that goes on does what a `save` that was killed did not."""
    for path in kept.parent.iterdir():
        old = 0 <= step_of(path) < step_of(kept) or (later and step_of(path) > step_of(kept))
        if old or path.name.startswith(".step-"):
            shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. What is damaged is named on stderr and passed over.

    Raises:
        DataError: there are checkpoints, and all are damaged or of a later format.
    """
    faults = []
    for path in sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of, reverse=True):
        try:
            _check(path)
        except DataError as error:
            faults.append(str(error))
        else:
            for fault in faults:
                print(f"refine-control: {fault}; going on from '{path.name}'", file=sys.stderr)
            return path
    if faults:
        raise DataError(f"{faults[0]}; remove '{folder}' to begin this stage anew")
    return None


def read(path: Path) -> tuple[int, State]:
    """The number of steps done and everything that `save` wrote."""
    return _manifest(path)["step"], {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}


def _check(path: Path) -> None:
    """Raises DataError where a checkpoint is not as it was written."""
    manifest = _manifest(path)
    if manifest["format"] == 1:
        return _check_unhashed(path)
    hashes = manifest.get("sha256")
    hashes = hashes if isinstance(hashes, dict) else {}
    for name in sorted({*hashes, *FILES}):
        try:
            found = _sha256(path / name)
        except OSError as error:  # missing, or on a failing disk
            raise DataError(f"checkpoint '{path}' is damaged: {name}: {error.strerror}") from None
        if found != hashes.get(name):
            raise DataError(f"checkpoint '{path}' is damaged: {name} has changed since it was written")


def _check_unhashed(path: Path) -> None:
    """Of a checkpoint of format 1: that its files are there, and as long as they say."""
    for name in FILES:
        try:
            safe_open(path / name, "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"checkpoint '{path}' is damaged: {name}: {error}") from None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, found = int(manifest["step"]), int(manifest["format"])
        if step != step_of(path) or found < 1:
            raise ValueError(f"step {step} of format {found} is not what was written")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"checkpoint '{path}' is damaged: {MANIFEST}: {error}") from None
    if found > FORMAT:
        raise DataError(
            f"checkpoint '{path}' is of format {found}, later than {FORMAT}; install a later refine-control"
        )
    return {**manifest, "step": step, "format": found}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(path: Path) -> int:
    """By its name; -1 of what is no checkpoint."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1
