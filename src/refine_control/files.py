"""Results on the disk: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from refine_control.errors import BusyError


def write_whole(path: Path, text: str) -> None:
    """Writes aside, then renames: a reader never sees half of it, and a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def put_in_place(new: Path, final: Path) -> None:
    """Renames a folder to `final`. What was there is removed after, and comes back where that fails."""
    before = final.with_name(f".{final.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    try:
        new.rename(final)
    except BaseException:
        if before.exists():
            before.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Inside, no other process may write to the folder. The lock goes with the process that holds it, however it ends.

    Raises:
        BusyError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0)
        with lock:
            yield
    except Timeout:
        raise BusyError(
            f"another process is at work in '{folder}'; wait for it, stop it, or choose another output_dir"
        ) from None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk. Where folders cannot be synced, they are not."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # of a folder, on Windows
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)
