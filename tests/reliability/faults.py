"""Fault injection: a command that is started, killed at a chosen moment, and started again until it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# Forks of a server that has imported everything and computed nothing: they start at once. A fork of this process would
# inherit the locks of torch's threads, and not the threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["refine_control.compare.compare", "refine_control.cli", "diffusers", "tiny"])


@dataclass
class Killer:
    """Runs `refine-control COMMAND` in processes of its own that can be killed.

    kills: where each of them that was killed had come to, by the newest file of the run.
    """

    command: list[str]
    log: Path
    kills: list[str] = field(default_factory=list)

    def start(self) -> ForkServerProcess:
        child = SERVER.Process(target=_run, args=(self.command, self.log))
        child.start()
        return child

    def run(self, kill_after: float = 600) -> int:
        """The exit code, negative for a signal. kill_after: seconds until it is killed."""
        child = self.start()
        child.join(kill_after)
        child.kill()
        child.join()
        assert child.exitcode is not None
        return child.exitcode

    def until_done(self, wanted: int, longest: float, seed: int, folder: Path) -> None:
        """Starts it again and again, killed at random moments up to `longest` seconds; after `wanted`, it may end."""
        draw = random.Random(seed)
        while len(self.kills) < wanted:
            code = self.run(draw.uniform(0, longest))
            if code == 0:
                return
            assert code == -signal.SIGKILL, self.log.read_text(encoding="utf-8")[-3000:]
            self.kills.append(newest(folder))
        assert self.run() == 0, self.log.read_text(encoding="utf-8")[-3000:]


def _run(command: list[str], log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
    from refine_control.cli import main

    code = main(command)
    sys.stdout.flush()
    os._exit(code)


def newest(folder: Path) -> str:
    """The phase that a run is in: the file that was last written to."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    last = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return "start" if last is None else last.relative_to(folder).as_posix()


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run ends with and that may not depend on how it came there: tensors by file, and numbers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[path.relative_to(folder).as_posix()] = load_file(path)
    for path in sorted(folder.rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path.relative_to(folder).as_posix()] = [_timeless(line) for line in lines]
    for path in sorted(folder.rglob("evaluation.json")):
        found[path.relative_to(folder).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("seconds", "waited")}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit by bit."""
    odd = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if name.endswith(".safetensors"):
            same = a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
        else:
            same = a == b
        odd += [] if same else [name]
    return odd
