"""Results on the disk: whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from refine_control.errors import BusyError

LEFTOVER_SECONDS = 3600  # after which a file that was being written is being written no more


def write_whole(path: Path, text: str) -> None:
    """A reader never sees half of it, and a failure leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`; synced and renamed to it at the end, gone where writing fails."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # who writes the same file, anywhere, is not met
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """What processes that were killed left of files that they were writing, of this name or any."""
    for old in folder.glob(f".{name}.*tmp"):
        with suppress(FileNotFoundError):  # another process has just renamed it
            if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
                old.unlink()


def put_in_place(new: Path, final: Path) -> None:
    """Renames a folder to `final`. What was there is removed after, and comes back where that fails."""
    before = final.with_name(f".{final.name}.old")
    if final.exists():  # else `before` is all there is: who was killed between the two renames left it
        shutil.rmtree(before, ignore_errors=True)
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
            f"another process is at work in '{folder}'; wait for it, stop it, or choose another output_dir "
            "(of a comparison: work_dir)"
        ) from None


def is_held(folder: Path) -> bool:
    """Whether another process holds a folder that is there."""
    try:
        with hold(folder):
            return False
    except BusyError:
        return True


def is_known(found: Any, newest: int) -> bool:
    """Whether what a file says of its format is one that this version reads: its own, or one before."""
    return isinstance(found, int) and 1 <= found <= newest


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
