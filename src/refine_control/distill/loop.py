"""The one training loop: teacher, scratch, stage 1 and stage 2 all run through it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from refine_control.data.batch import Batch
from refine_control.distill import checkpoint
from refine_control.errors import UserError
from refine_control.recipe import RunConfig, StageConfig

Losses = dict[str, Tensor]


def train(
    folder: Path,
    objective: nn.Module,
    weights: Mapping[str, float],
    batches: Callable[[int], Batch],
    stage: StageConfig,
    run: RunConfig,
    preview: Callable[[Path], None] | None = None,
) -> None:
    """Trains what requires gradients in `objective` for stage.steps steps in all, from the newest checkpoint on.

    `objective(batch)` names the terms of the loss, `weights` says how they add up. Afterwards the averaged weights
    (EMA) are in place. `preview` draws samples with the averaged weights into the path it is given.

    Raises:
        UserError: a loss is not finite; the step and its pictures are named, the last checkpoint is untouched.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(  # fused: one pass over the weights, on CPU too
        parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay, betas=(0.9, 0.99), fused=True
    )
    ema = EMAModel(parameters, decay=stage.ema_decay, foreach=True)
    newest = checkpoint.latest(folder / "checkpoints")
    start = checkpoint.restore(newest, objective, ema.shadow_params, optimizer) if newest else 0
    ema.optimization_step = start
    device = parameters[0].device
    log = folder / "losses.jsonl"
    seconds_before = _trim_log(log, start)
    objective.train()
    name = "/".join(folder.parts[-3:])
    bar = tqdm(range(start, stage.steps), name, initial=start, total=stage.steps, unit="step", mininterval=1)
    began = time.monotonic() - seconds_before
    for step in bar:
        batch = batches(step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.mixed_precision == "bf16"):
            terms = objective(batch)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if not torch.isfinite(loss):
            named = ", ".join(f"{name} = {term.item():g}" for name, term in terms.items())
            raise UserError(f"step {step}: loss is not finite ({named}); its pictures: {', '.join(batch.keys)}")
        logging = (step + 1) % run.log_every == 0 or step == 0
        norms = _gradient_norms(terms, parameters) if step % run.grad_norm_every == 0 else {}
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        optimizer.step()
        ema.step(parameters)
        done = step + 1
        if logging or norms:
            line = {"step": done, "loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
            line |= {"grad_norm": norm.item(), "lr": learning_rate(step, stage), "seconds": time.monotonic() - began}
            line |= {f"grad_norm/{name}": value for name, value in norms.items()}
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if done % run.checkpoint_every == 0 or done == stage.steps:
            checkpoint.save(folder / "checkpoints", done, objective, ema.shadow_params, optimizer)
        if preview and (done % run.preview_every == 0 or done == stage.steps):
            ema.store(parameters)
            ema.copy_to(parameters)
            objective.eval()
            preview(folder / f"preview-{done:06d}.png")
            objective.train()
            ema.restore(parameters)
    ema.copy_to(parameters)
    objective.eval()


def learning_rate(step: int, stage: StageConfig) -> float:
    """Linear warm-up, then a cosine down to final_learning_rate of the peak."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    low = stage.final_learning_rate
    return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def pick_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"run.device = '{name}' is no device; give auto, cpu, cuda or cuda:N") from None


def set_threads(run: RunConfig) -> None:
    """As many threads as cores we may use; an oversubscribed machine can be five times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(run.num_threads or cores)


def _gradient_norms(terms: Losses, parameters: list[nn.Parameter]) -> dict[str, float]:
    """The norm of each term's own gradient: which level really steers."""
    norms = {}
    for name, term in terms.items():
        if term.requires_grad:
            grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norms[name] = math.sqrt(sum(float(g.float().square().sum()) for g in grads if g is not None))
    return norms


def _trim_log(path: Path, start: int) -> float:
    """Keeps only whole lines, of steps that the checkpoint knows of. Returns the seconds spent so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= start]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return json.loads(kept[-1])["seconds"] if kept else 0.0
