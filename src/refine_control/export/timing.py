"""One model in a process of its own, timed on request: libraries, threads and memory of two never mix.

Nothing here imports torch unless the model needs it, so the memory of an exported one is what a device would see.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control import runtime
from refine_control.errors import ModelError

PROMPT = "flat cat face"


class Entry(NamedTuple):
    """What is measured. backend: onnx, openvino, or torch for a pipeline; source: its folder or name."""

    label: str
    source: str
    backend: str
    precision: str


class Timed(NamedTuple):
    """forward(): one evaluation of foundation + module. picture(steps): a masked picture and a prompt to pixels."""

    forward: Callable[[], object]
    picture: Callable[[int], object]


class Worker:
    """A model loaded in another process.

    Raises:
        ModelError: it could not be loaded there.
    """

    def __init__(self, entry: Entry, guidance: float, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.entry = entry
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, entry, guidance, threads), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is heard
        self._answer()

    def seconds(self, what: str, *arguments: int) -> float:
        """Of one call of `Timed.forward` or `Timed.picture`."""
        self._pipe.send((what, *arguments))
        return self._answer()

    def close(self) -> float:
        """Ends the process and returns the most memory that it ever took, in bytes."""
        self._pipe.send(("peak",))
        peak = self._answer()
        self._process.join(10)
        return peak

    def _answer(self) -> Any:
        try:
            done, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ModelError(f"'{self.entry.label}' ended while it was measured; is there memory enough?") from None
        if not done:
            raise ModelError(f"cannot measure '{self.entry.label}': {value}")
        return value


def _serve(pipe: Connection, entry: Entry, guidance: float, threads: int) -> None:
    try:
        timed = (_pipeline if entry.backend == "torch" else _exported)(entry.source, guidance, threads)
        if entry.backend != "torch" and "torch" in sys.modules:
            raise ModelError("the script that measures imports torch where a new process does; its memory would count")
        pipe.send((True, None))
        while (order := pipe.recv())[0] != "peak":
            began = time.perf_counter()
            getattr(timed, order[0])(*order[1:])
            pipe.send((True, time.perf_counter() - began))
        pipe.send((True, peak_memory()))
    except Exception as error:  # whatever it is, who waits is told
        pipe.send((False, " ".join(str(error).split())[:300] or type(error).__name__))


def _exported(folder: str, guidance: float, threads: int) -> Timed:
    student = runtime.Student(Path(folder), threads)
    picture, hole = _masked(student.side)
    seen: dict[str, Any] = {}
    run = student.run

    def keep_inputs(graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        seen[graph] = {name: array[:1] for name, array in inputs.items()}
        return run(graph, **inputs)

    student.run = keep_inputs  # type: ignore[method-assign]
    student.fill(picture, hole, PROMPT, student.manifest.get("only_steps") or 1, guidance, 0)
    student.run = run  # type: ignore[method-assign]
    return Timed(
        lambda: run("denoiser", **seen["denoiser"]),
        lambda steps: student.fill(picture, hole, PROMPT, steps, guidance, 0),
    )


def _pipeline(name: str, guidance: float, threads: int) -> Timed:
    """The stock pipeline, as its user would run it."""
    import torch

    from refine_control.diffusion.store import load
    from refine_control.student.plan import probe

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = load(name).freeze()
    inputs, pipeline = probe(model), model.pipeline()
    picture, hole = _masked(model.resolution)
    known = np.where(hole[..., None] == 1, -1, picture / 255).transpose(2, 0, 1)[None]
    control = {"image": torch.from_numpy(known).float()} if model.denoiser.nets else {}

    def draw(steps: int) -> object:
        generator = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, **control}
        return pipeline(PROMPT, output_type="np", **how).images

    return Timed(lambda: model.denoiser(*inputs), draw)


def _masked(side: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture that is a slope of colour, and a hole in its middle: uint8 (side, side, 3), (side, side)."""
    slope = np.linspace(0, 255, side).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(slope[:, None], slope[None], np.uint8(128)), axis=-1)
    hole = np.zeros((side, side), np.uint8)
    hole[side // 4 : side * 3 // 4, side // 4 : side * 3 // 4] = 1
    return np.ascontiguousarray(picture), hole


def peak_memory() -> int:
    """Bytes, the most that this process ever held. ru_maxrss would count the parent's where there is fork and exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    return os.cpu_count() or 1
