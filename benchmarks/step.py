"""One distillation step against its floor: teacher forward + student forward and backward, nothing else.

    python benchmarks/step.py recipes/demo.yaml --steps 60 --out results/benchmark-step.json

The real loop runs; before each of its batches one floor pass of the same size is timed, so that both see the same
machine. The first pass over the data is left out: it decodes pictures and encodes latents that are kept afterwards.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from refine_control.data.batch import Batch
from refine_control.data.loader import Loader
from refine_control.distill.distil import Distiller
from refine_control.distill.loop import train
from refine_control.distill.stages import Distillation
from refine_control.evaluate.compare import machine
from refine_control.recipe import DistilRecipe, load
from refine_control.student.plan import probe


class Interleaved:
    """Hands batches to the loop, times what the loop does with them, and times the floor in between."""

    def __init__(self, loader: Loader, floor, pool: int) -> None:
        self.loader, self.floor, self.pool = loader, floor, pool
        self.steps: list[float] = []
        self.floors: list[float] = []
        self.waits: list[float] = []
        self.began: float | None = None

    def __call__(self, step: int, part: int, parts: int) -> Batch:
        now = time.perf_counter()
        if self.began is not None:
            self.steps.append(now - self.began)
        self.floor()
        self.began = time.perf_counter()
        self.floors.append(self.began - now)
        batch = self.loader(step % self.pool)  # the same few batches again: everything that can be kept is kept
        self.waits.append(time.perf_counter() - self.began)
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--teacher", default=None)
    parser.add_argument("--num_threads", default=None)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-step.json"))
    args = parser.parse_args()
    overrides = {"run.grad_norm_every": "1000000", "run.checkpoint_every": "1000000", "stage1.steps": str(args.steps)}
    overrides |= {"teacher": args.teacher} if args.teacher else {}
    overrides |= {"run.num_threads": args.num_threads} if args.num_threads else {}
    recipe = load(DistilRecipe, args.recipe, overrides)
    result = measure(recipe, args.steps)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


def measure(recipe: DistilRecipe, count: int) -> dict:
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run)
    student, bridges = distiller.fresh_student(recipe)
    stage, teacher = recipe.stage1, distiller.teacher
    inputs = [x.expand(stage.batch_size, *x.shape[1:]).contiguous() for x in probe(teacher, teacher.device)]

    def floor() -> None:
        with torch.no_grad():
            teacher.denoiser(*inputs)
        student(*inputs).square().mean().backward()

    loader = distiller.loader(recipe, stage, "benchmark")
    pool = count // 3
    batches = Interleaved(loader, floor, pool)
    with tempfile.TemporaryDirectory() as folder:
        objective = Distillation(student, teacher, bridges, distiller.encoder, stage)
        train(Path(folder) / "step", objective, stage.weights.model_dump(), batches, stage, recipe.run)
    warm = slice(pool, None)
    steps, floors, waits = (np.array(x[warm]) for x in (batches.steps, batches.floors, batches.waits))
    ratios = steps[: len(floors)] / floors[: len(steps)]
    return {
        "step_ms": float(np.median(steps) * 1e3),
        "floor_ms": float(np.median(floors) * 1e3),
        "step_over_floor": {q: float(np.percentile(ratios, p)) for q, p in (("low", 25), ("median", 50), ("high", 75))},
        "share_waiting_for_data": float(waits.sum() / steps.sum()),
        "steps": len(steps),
        "batch_size": stage.batch_size,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
