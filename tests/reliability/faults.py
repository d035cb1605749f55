"""Fault injection: commands that are killed at a chosen moment and started again, disks that fill up, folders that may
not be written to, and strangers' files that are used where they can do no harm."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from refine_control.errors import UserError

# Forks of a server that has imported everything and computed nothing: they start at once. A fork of this process would
# inherit the locks of torch's threads, and not the threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["refine_control.compare.compare", "refine_control.cli", "diffusers", "tiny"])

MEMORY = 512 << 20  # bytes that a stranger's files may take
Fault = Callable[[], AbstractContextManager[None]]


@dataclass
class Killer:
    """Runs `refine-control COMMAND` in processes of its own that can be killed.

    ranks: how many processes share the work. kills: where each run that was killed had come to, by the newest file.
    """

    command: list[str]
    log: Path
    ranks: int = 1
    kills: list[str] = field(default_factory=list)

    def start(self, fault: Fault | None = None) -> list[ForkServerProcess]:
        """fault: what each process runs in."""
        teams = _teams(self.ranks)
        children = [SERVER.Process(target=_run, args=(self.command, self.log, team, fault)) for team in teams]
        for child in children:
            child.start()
        return children

    def run(
        self,
        kill_after: float = 600,
        kill_when: Callable[[], bool] = lambda: False,
        fault: Fault | None = None,
    ) -> int:
        """The exit code, negative for a signal. Killed after some seconds, or when something has come true."""
        children = self.start(fault)
        end = time.monotonic() + kill_after
        while any(child.is_alive() for child in children) and time.monotonic() < end and not kill_when():
            time.sleep(0.002)
        for child in children:
            child.kill()
        return code_of(children)

    def until_done(self, wanted: int, longest: float, seed: int, folder: Path, last: Sequence[str]) -> None:
        """Starts it again and again, killed at random moments up to `longest` seconds; after `wanted`, it may end.

        last: the files in `folder` that end what can be lost; when all are there, it may end too.
        """
        draw = random.Random(seed)
        while len(self.kills) < wanted:
            at_stake = not all((folder / name).is_file() for name in last)
            code = self.run(draw.uniform(0, longest)) if at_stake else self.run()
            if code == 0:
                return
            assert code == -signal.SIGKILL, self.told()
            self.kills.append(newest(folder))
        assert self.run() == 0, self.told()

    def told(self) -> str:
        return self.log.read_text(encoding="utf-8")[-3000:]


def code_of(children: list[ForkServerProcess]) -> int:
    """Waits for all of them; 0 where all ended well."""
    for child in children:
        child.join()
    return next((child.exitcode for child in children if child.exitcode), 0)


def _teams(ranks: int) -> list[dict[str, str]]:
    """The environment of each process, as torchrun makes it."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _run(command: list[str], log: Path, team: dict[str, str], fault: Fault | None) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
    os.environ.update(team)
    from refine_control.cli import main

    with fault() if fault else nullcontext():
        code = main(command)
    sys.stdout.flush()
    os._exit(code)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a write then meets is what it meets on a full disk, but for its
    number."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def no_privileges() -> Iterator[None]:
    """Permissions hold, for root too: Linux's capabilities are given up, for as long as the process lives."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
    yield


@contextmanager
def not_finite(call: int, rank: int) -> Iterator[None]:
    """One process's loss is no number when it is asked for the call-th time."""
    from refine_control.distill.stages import Distillation

    true, calls = Distillation.forward, itertools.count()

    def forward(self: Distillation, *args: Any) -> Any:
        terms = true(self, *args)
        if int(os.environ.get("RANK", "0")) == rank and next(calls) == call:
            return {name: term * torch.nan for name, term in terms.items()}
        return terms

    Distillation.forward = forward  # type: ignore[method-assign]
    yield


def verdict(
    use: Callable[[], object], *named: str, memory: int = MEMORY, most: int = 4 * MEMORY, seconds: int = 20
) -> str:
    """What using a stranger's files comes to, in a fork that may take little memory and time.

    memory: bytes that it may take beyond those that it has; wanting more is wrong, refused or not. most: there it ends.
    Returns 'read', 'refused' (in one line that has one of `named` in it), or what went wrong.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        used = _most_memory()
        resource.setrlimit(resource.RLIMIT_AS, (used + most, used + most))
        torch.set_num_threads(1)  # OpenMP's threads are not in a fork: it would wait for them for ever
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler needs Python to run
        signal.alarm(seconds)
        try:
            use()
            said = "read"
        except UserError as error:
            text = str(error)
            good = text.isprintable() and any(name in text for name in named) and len(text) < 1000
            said = "refused" if good and "memory" not in text else f"odd: {text[:300]}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:300]
        if (taken := _most_memory() - used) > memory:
            said = f"took {taken >> 20} MB: {said}"
        os.write(write, said.encode(errors="replace"))
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    return said or f"ended with {os.waitstatus_to_exitcode(status)}"


def _most_memory() -> int:
    """Bytes of addresses that this process ever had at once, those that it never wrote to too."""
    return int(Path("/proc/self/status").read_text().partition("VmPeak:")[2].split()[0]) << 10


def newest(folder: Path) -> str:
    """The phase that a run is in: the file that was last written to."""
    given = (".lock", "speed.json")  # the latter from another run
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in given]
    last = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return "start" if last is None else last.relative_to(folder).as_posix()


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run ends with and that may not depend on how it came there: bytes of tensors, and numbers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[path.relative_to(folder).as_posix()] = path.read_bytes()
    for path in sorted(folder.rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path.relative_to(folder).as_posix()] = [_timeless(line) for line in lines]
    for path in sorted(folder.rglob("evaluation.json")):
        found[path.relative_to(folder).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(folder.rglob("run.json")):  # its recipe names folders; its identity says what of it counts
        result = json.loads(path.read_text(encoding="utf-8"))
        found[path.relative_to(folder).as_posix()] = _timeless(result, "trained_seconds", "machine", "commit", "recipe")
    return found


def _timeless(line: dict[str, Any], *others: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("seconds", "waited", *others)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit by bit."""
    return sorted(name for name in one.keys() | other.keys() if name not in one or one[name] != other.get(name))
