"""The one training loop: teacher, scratch, stage 1 and stage 2 all run through it, on one process or many."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from refine_control.data.ahead import Ahead
from refine_control.data.batch import Batch
from refine_control.distill import checkpoint
from refine_control.errors import RecipeError, UserError
from refine_control.recipe import RunConfig, StageConfig

Losses = dict[str, Tensor]


class Batches(Protocol):
    """A step's batch, or every `parts`-th row of it from row `part` on."""

    def __call__(self, step: int, part: int, parts: int, /) -> Batch: ...


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
    (EMA) are in place. `preview` draws samples with the averaged weights into the path it is given. A step's batch is
    shared out over the processes and, within each, over run.gradient_accumulation_steps passes.

    Raises:
        UserError: a loss or gradient is not finite; step and pictures are named, the last checkpoint is untouched.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    device = parameters[0].device
    unused = DistributedDataParallelKwargs(find_unused_parameters=not (weights.get("task") or weights.get("output")))
    team = Accelerator(
        device_placement=False,
        mixed_precision=run.mixed_precision,
        cpu=device.type == "cpu",
        kwargs_handlers=[unused],  # features alone do not reach a network's last layer
    )
    share = share_out(batches, stage, run, team)
    optimizer = torch.optim.AdamW(  # fused: one pass over the weights, on CPU too
        parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = [p.detach().clone() for p in parameters]
    newest = checkpoint.latest(folder / "checkpoints")
    start = checkpoint.restore(newest, objective, average, optimizer) if newest else 0
    shared = team.prepare_model(objective)
    log = Log(folder / "losses.jsonl", start, team.is_main_process)
    objective.train()
    bar = tqdm(
        range(start, stage.steps), "/".join(folder.parts[-3:]), stage.steps, initial=start, unit="step", mininterval=1,
        disable=not team.is_main_process,
    )  # fmt: skip
    # On a CPU, a second thread's tensor operations take OpenMP's cores from the step: it then takes twice as long.
    workers = run.workers if run.workers is not None else 2 * (device.type != "cpu")
    with Ahead(share, stage.steps, workers) as ahead:
        for step in bar:
            asked = time.monotonic()
            done, passes = step + 1, ahead(step)
            log.waited += time.monotonic() - asked
            logging = done % run.log_every == 0 or step == 0
            norms: dict[str, float] = {}
            sums: dict[str, Tensor] = {}
            optimizer.zero_grad(set_to_none=True)
            for number, batch in enumerate(passes):
                with nullcontext() if number == len(passes) - 1 else team.no_sync(shared):
                    terms = shared(batch.to(device))
                    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
                    if number == 0 and step % run.grad_norm_every == 0:
                        norms = _gradient_norms(terms, parameters)
                    team.backward(loss / len(passes))
                for name, term in {"loss": loss, **terms}.items():
                    sums[name] = sums.get(name, 0) + term.detach() / len(passes)
            norm = clip(parameters, stage.max_grad_norm)
            if not math.isfinite(norm) or not math.isfinite(sums["loss"]):
                named = ", ".join(f"{name} = {value.item():g}" for name, value in sums.items())
                keys = ", ".join(key for batch in passes for key in batch.keys)
                raise UserError(f"step {step}: loss or gradient is not finite ({named}); its pictures: {keys}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, stage)
            optimizer.step()
            get_ema_multi_avg_fn(_ema_decay(step, stage))(average, parameters, None)
            if logging or norms:
                means = team.reduce(torch.stack(list(sums.values())), "mean").tolist()
                line = {"step": done, **dict(zip(sums, means, strict=True)), "grad_norm": norm}
                line |= {"lr": learning_rate(step, stage), **{f"grad_norm/{k}": v for k, v in norms.items()}}
                log.write(line)
                bar.set_postfix(loss=f"{line['loss']:.4f}")
            if done % run.checkpoint_every == 0 or done == stage.steps:
                if team.is_main_process:
                    checkpoint.save(folder / "checkpoints", done, objective, average, optimizer)
                team.wait_for_everyone()
            if preview and team.is_main_process and (done % run.preview_every == 0 or done == stage.steps):
                objective.eval()
                with averaged(parameters, average):
                    preview(folder / f"preview-{done:06d}.png")
                objective.train()
    _copy(average, parameters)
    objective.eval()
    team.free_memory()


def share_out(batches: Batches, stage: StageConfig, run: RunConfig, team: Accelerator) -> Callable[[int], list[Batch]]:
    """step -> this process's parts of its batch, one for each pass. All parts of all processes have equally many rows.

    Raises:
        RecipeError: the batch does not divide.
    """
    parts = team.num_processes * run.gradient_accumulation_steps
    if stage.batch_size % parts:
        raise RecipeError(
            f"batch_size {stage.batch_size} does not divide into {team.num_processes} processes x "
            f"{run.gradient_accumulation_steps} gradient_accumulation_steps; use a multiple of {parts}"
        )
    mine = range(team.process_index, parts, team.num_processes)
    return lambda step: [batches(step, part, parts) for part in mine]


@contextmanager
def averaged(parameters: list[nn.Parameter], average: list[Tensor]) -> Iterator[None]:
    """Inside, the averaged weights are in place."""
    kept = [p.detach().clone() for p in parameters]
    _copy(average, parameters)
    try:
        yield
    finally:
        _copy(kept, parameters)


def _copy(source: list[Tensor], parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for value, parameter in zip(source, parameters, strict=True):
            parameter.copy_(value)


def _ema_decay(step: int, stage: StageConfig) -> float:
    """0 at the first step, so that the random start is forgotten, then (1 + k) / (10 + k) up to the recipe's."""
    return min(stage.ema_decay, (1 + step) / (10 + step)) if step else 0.0


def clip(parameters: list[nn.Parameter], largest: float) -> float:
    """Scales the gradients down to a common norm of `largest` where they exceed it. Returns the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if largest < norm < math.inf:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm.item()


def learning_rate(step: int, stage: StageConfig) -> float:
    """Linear warm-up, then a cosine down to final_learning_rate of the peak."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    low = stage.final_learning_rate
    return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def pick_device(name: str) -> torch.device:
    """'auto' is this process's GPU where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"run.device = '{name}' is no device; give auto, cpu, cuda or cuda:N") from None
    team = PartialState(cpu=device.type == "cpu")  # joins the other processes, where torchrun or accelerate began them
    if device.type == "cuda":
        device = torch.device("cuda", team.local_process_index if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def set_threads(run: RunConfig) -> None:
    """As many threads as cores we may use, shared with this machine's other processes: too many can cost five times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(run.num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def refuse_processes(command: str) -> None:
    """Raises UserError where a command that is one process's work was launched as several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{command} runs as one process, only distill is shared by several; start it without a launcher"
        )


def _gradient_norms(terms: Losses, parameters: list[nn.Parameter]) -> dict[str, float]:
    """The norm of each term's own gradient: which level really steers."""
    norms = {}
    for name, term in terms.items():
        if term.requires_grad:
            grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norms[name] = math.sqrt(sum(float(g.float().square().sum()) for g in grads if g is not None))
    return norms


class Log:
    """losses.jsonl: a line of numbers for a step. Only the main process writes; only steps that are kept stay in it."""

    def __init__(self, path: Path, start: int, writes: bool) -> None:
        """Drops torn lines and steps beyond `start`, of which the checkpoint knows nothing."""
        self.path, self.writes = path, writes
        self.began, self.waited = time.monotonic(), 0.0
        if not writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        if kept:
            last = json.loads(kept[-1])
            self.began, self.waited = self.began - last["seconds"], last.get("waited", 0.0)

    def write(self, line: dict[str, float]) -> None:
        """Adds the seconds of training so far, interruptions not counted, and those of them spent waiting for data."""
        if self.writes:
            line = {**line, "seconds": time.monotonic() - self.began, "waited": self.waited}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
