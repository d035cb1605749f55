"""The one training loop: teacher, scratch, stage 1 and stage 2 all run through it, on one process or many."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from refine_control.data.ahead import Ahead
from refine_control.data.batch import Batch
from refine_control.distill.interrupt import Interrupts
from refine_control.distill.learner import Learner
from refine_control.distill.optimizer import learning_rate
from refine_control.distill.processes import Batches, gather, share_out, unsynchronised
from refine_control.errors import Interrupted, UserError
from refine_control.files import sync, write_whole
from refine_control.recipe import RunConfig, StageConfig

Losses = dict[str, Tensor]


def train(
    folder: Path,
    objective: nn.Module,
    weights: Mapping[str, float],
    batches: Batches,
    stage: StageConfig,
    run: RunConfig,
    preview: Callable[[Path], None] | None = None,
) -> None:
    """Trains what requires gradients in `objective` for stage.steps steps in all, from the newest checkpoint on.

    `objective(batch)` names the terms of the loss, `weights` says how they add up. Afterwards the averaged weights
    (EMA) are in place. `preview` draws samples with the averaged weights into the path it is given; not where the
    weights are sharded. A step's batch is shared out over the processes and, within each, over
    run.gradient_accumulation_steps passes.

    A step whose loss or gradient is not finite changes no weight; its pictures are named in skipped.jsonl.

    Raises:
        UserError: more than run.max_skipped_steps steps were skipped, memory runs out, or processes see different
            checkpoints; the last checkpoint is untouched.
        Interrupted: SIGTERM or Ctrl-C came; all steps until then are in a checkpoint.
    """
    device = next(p.device for p in objective.parameters() if p.requires_grad)
    team = gather(device)
    share = share_out(batches, stage, run, team)
    learner = Learner(objective, weights, stage, run, team, folder / "checkpoints")
    if len(set(gather_object([learner.start]))) > 1:
        raise UserError(f"not every process sees the checkpoints in '{folder}'; put output_dir where all hosts see it")
    log = Log(folder / "losses.jsonl", learner.start, team.is_main_process)
    bar = tqdm(
        range(learner.start, stage.steps), "/".join(folder.parts[-3:]), stage.steps, initial=learner.start, unit="step",
        mininterval=1, disable=not team.is_main_process,
    )  # fmt: skip
    # On a CPU, a second thread's tensor operations take OpenMP's cores from the step: it then takes twice as long.
    workers = run.workers if run.workers is not None else 2 * (device.type != "cpu")
    with Ahead(share, stage.steps, workers) as ahead, Interrupts(team) as interrupts:
        for step in bar:
            asked = time.monotonic()
            passes, done = ahead(step), step + 1
            log.waited += time.monotonic() - asked
            measured = step % run.grad_norm_every == 0 and not learner.sharded
            with _memory_named(step):
                means, norms, norm = take_step(learner, step, passes, weights, measured)
            skipped = not (math.isfinite(norm) or learner.scale.lowered)
            if skipped:
                _skip(folder, step, means, passes, run, team)
            if not skipped and (done % run.log_every == 0 or step == 0 or norms):
                reduced = team.reduce(torch.stack(list(means.values())), "mean").tolist()
                line = {"step": done, **dict(zip(means, reduced, strict=True)), "lr": learning_rate(step, stage)}
                line |= {"grad_norm": norm} if math.isfinite(norm) else {}
                log.write(line | {f"grad_norm/{name}": value for name, value in norms.items()})
                bar.set_postfix(loss=f"{line['loss']:.4f}")
            stopping = interrupts.asked()
            if stopping or done % run.checkpoint_every == 0 or done == stage.steps:
                log.sync()
                learner.save(done)
            if stopping:
                raise Interrupted(stopping)
            drawing = team.is_main_process and not learner.sharded
            if preview and drawing and (done % run.preview_every == 0 or done == stage.steps):
                with learner.averaged():
                    preview(folder / f"preview-{done:06d}.png")
    learner.finish()


def take_step(
    learner: Learner, step: int, passes: list[Batch], weights: Mapping[str, float], measured: bool = False
) -> tuple[Losses, dict[str, float], float]:
    """One step along the gradients of all passes. Returns the mean terms, the norm of each term's own gradient where
    `measured`, and the norm of the whole."""
    means, norms = _accumulate(learner, passes, weights, measured)
    return means, norms, learner.update(step, means["loss"])


def _accumulate(
    learner: Learner, passes: list[Batch], weights: Mapping[str, float], measured: bool
) -> tuple[Losses, dict[str, float]]:
    """The gradients of a step, added up over its passes. Returns the mean of each term and of the loss, and, if
    `measured`, the norm of each term's own gradient in the first pass."""
    means: Losses = {}
    norms: dict[str, float] = {}
    learner.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(passes):
        last = number == len(passes) - 1
        with nullcontext() if last else unsynchronised(learner.team, learner.network):
            with learner.autocast():
                terms = learner.network(batch.to(learner.device))
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            if number == 0 and measured:
                norms = _gradient_norms(terms, learner.parameters, learner.scale.value)
            learner.backward(loss / len(passes))
        for name, term in {"loss": loss, **terms}.items():
            means[name] = means.get(name, 0) + term.detach() / len(passes)
    return means, norms


@contextmanager
def _memory_named(step: int) -> Iterator[None]:
    """Raises UserError where memory runs out inside, with what takes less of it."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in text:  # the latter on a CPU
            raise
        raise UserError(
            f"step {step}: out of memory ({text[:160]}); double run.gradient_accumulation_steps, or set "
            "run.gradient_checkpointing true, or run.teacher_dtype and run.mixed_precision bf16, then run the same "
            "command to go on; run.use_8bit_adam true takes less too, but only from the start, in another output_dir"
        ) from None


def _skip(folder: Path, step: int, means: Losses, passes: list[Batch], run: RunConfig, team: Accelerator) -> None:
    """Writes down a step that could not be taken. Raises UserError where that is one too many."""
    named = ", ".join(f"{name} = {value.item():g}" for name, value in means.items())
    keys = [key for some in gather_object([[key for batch in passes for key in batch.keys]]) for key in some]
    told = f"step {step}: loss or gradient is not finite ({named})"
    skipped = Log(folder / "skipped.jsonl", step - 1, team.is_main_process)
    skipped.write(
        {"step": step, "losses": {name: str(value.item()) for name, value in means.items()}, "pictures": keys}
    )
    skipped.sync()
    count = max(gather_object([skipped.lines]))  # the main process knows
    if count > run.max_skipped_steps:
        raise UserError(
            f"{told}, as in {count - 1} steps before, and run.max_skipped_steps is {run.max_skipped_steps}; "
            f"'{skipped.path}' names the pictures of each. The last checkpoint is as it was: raise "
            "run.max_skipped_steps, or set run.mixed_precision no, then run the same command to go on; with other "
            "pictures, begin anew in another output_dir"
        )
    tqdm.write(f"{told}; skipped, its pictures are in '{skipped.path}'", file=sys.stderr)


def _gradient_norms(terms: Losses, parameters: list[nn.Parameter], scale: float) -> dict[str, float]:
    """The norm of each term's own gradient: which level really steers. scale: as of the loss, for fp16."""
    norms = {}
    for name, term in terms.items():
        if term.requires_grad:
            grads = torch.autograd.grad(term * scale, parameters, retain_graph=True, allow_unused=True)
            norms[name] = math.sqrt(sum(float((g.float() / scale).square().sum()) for g in grads if g is not None))
    return norms


class Log:
    """losses.jsonl: a line of numbers for a step. Only the main process writes; only steps that are kept stay in it."""

    def __init__(self, path: Path, start: int, writes: bool) -> None:
        """Drops odd lines, and steps beyond `start`, of which the checkpoint knows nothing. lines: how many it has."""
        self.path, self.writes, self.lines = path, writes, 0
        self.began, self.waited = time.monotonic(), 0.0
        if not writes:
            return
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
        kept = [line for line in lines if _times(line)[0] <= start]
        write_whole(path, "".join(line + "\n" for line in kept))
        self.lines = len(kept)
        if kept:
            _, seconds, self.waited = _times(kept[-1])
            self.began -= seconds

    def write(self, line: dict[str, Any]) -> None:
        """Adds the seconds of training so far, interruptions not counted, and those of them spent waiting for data."""
        if self.writes:
            line = {**line, "seconds": time.monotonic() - self.began, "waited": self.waited}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.lines += 1

    def sync(self) -> None:
        """Before a checkpoint: it must not outlive, in a power cut, the lines of its steps."""
        if self.writes:
            sync(self.path)


def _times(line: str) -> tuple[float, float, float]:
    """Step, seconds and seconds waited of a line of a log; an infinite step where something else was left."""
    try:
        found = json.loads(line)
        times = found["step"], found["seconds"], found.get("waited", 0.0)
        return times if all(map(math.isfinite, times)) else (math.inf, 0.0, 0.0)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf, 0.0, 0.0
