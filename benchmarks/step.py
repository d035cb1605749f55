"""One distillation step against its floor: teacher forward + student forward and backward, nothing else.

    python benchmarks/step.py recipes/demo.yaml --steps 60 --out results/benchmark-step.json

The real loop runs; before each of its steps one floor pass of the same size is timed, so that both see the same
machine. The first pass over the data is left out: it decodes pictures and encodes latents that are kept afterwards.
Any key of the recipe can be overridden: --teacher my/teacher --student mobile --run.num_threads 4. With
`--run.workers 0` batches are made between steps, not beside them: a step then bears their whole cost.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import overrides_of, quartiles, write
from refine_control.data.batch import Batch
from refine_control.diffusion.text import Text
from refine_control.distill.distil import Distiller
from refine_control.distill.loop import Losses, train
from refine_control.distill.stages import Distillation
from refine_control.provenance import machine
from refine_control.recipe import DistilRecipe, load
from refine_control.student.plan import probe


class Interleaved(nn.Module):
    """The objective, with one timed floor pass before each of its calls; a step lasts from there to the next call."""

    def __init__(self, objective: nn.Module, floor: Callable[[], None]) -> None:
        super().__init__()
        self.objective, self.floor = objective, floor
        self.steps: list[float] = []
        self.floors: list[float] = []
        self.began: float | None = None

    def forward(self, batch: Batch) -> Losses:
        now = clock()
        if self.began is not None:
            self.steps.append(now - self.began)
        self.floor()
        self.began = clock()
        self.floors.append(self.began - now)
        return self.objective(batch)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="what is distilled")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-step.json"))
    args, rest = parser.parse_known_args()
    overrides = overrides_of(rest)
    overrides |= {"run.grad_norm_every": "1000000", "run.checkpoint_every": "1000000", "run.log_every": "1"}
    recipe = load(DistilRecipe, args.recipe, overrides | {"stage1.steps": str(args.steps), "stage2.steps": "0"})
    result = measure(recipe, args.steps)
    write(result, args.out)


def measure(recipe: DistilRecipe, count: int) -> dict:
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run, recipe.controlnets)
    student, bridges = distiller.fresh_student(recipe)
    stage, teacher = recipe.stage1, distiller.teacher

    def repeated(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(stage.batch_size, *x.shape[1:]).contiguous()

    x_t, t, text, control = probe(teacher, teacher.device)
    inputs = (repeated(x_t), repeated(t), Text(*map(repeated, text)), repeated(control))

    def floor() -> None:
        with torch.no_grad():
            teacher.denoiser(*inputs)
        student(*inputs).square().mean().backward()
        student.zero_grad(set_to_none=True)  # else the step would add to these gradients instead of writing its own

    loader = distiller.loader(recipe, stage, "benchmark")
    pool = count // 3  # the same few batches again: everything that can be kept is kept
    timed = Interleaved(Distillation(student, teacher, bridges, distiller.encoder, stage), floor)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "step"
        weights = stage.weights.model_dump()
        train(folder, timed, weights, lambda step, part, parts: loader(step % pool, part, parts), stage, recipe.run)
        log = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    waited = log[-1]["waited"] - log[pool]["waited"]
    warm = slice(pool, None)
    steps, floors = (np.array(x[warm]) for x in (timed.steps, timed.floors))
    ratios = steps / floors[: len(steps)]
    return {
        "step_ms": float(np.median(steps) * 1e3),
        "floor_ms": float(np.median(floors) * 1e3),
        "step_over_floor": quartiles(ratios),
        "share_waiting_for_data": float(waited / steps.sum()),
        "peak_memory_gb": peak_memory_gb(),
        "workers": recipe.run.workers,
        "steps": len(steps),
        "batch_size": stage.batch_size,
        "machine": machine(),
    }


def peak_memory_gb() -> float:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kibibytes, on Linux


if __name__ == "__main__":
    main()
