"""What keeping things saves: a distillation step that computes all, and the same with latents, texts and teacher kept.

    python benchmarks/cache.py recipes/demo.yaml --data.labelled_limit 512 --data.unlabelled null

The ways take turns on each batch of the second pass over the batches; the first pass fills what is kept.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from common import overrides_of, quartiles, write
from refine_control.diffusion.encode import Encoder
from refine_control.distill.distil import Distiller
from refine_control.distill.stages import Distillation
from refine_control.provenance import machine
from refine_control.recipe import DistilRecipe, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-cache.json"))
    args, rest = parser.parse_known_args()
    overrides = overrides_of(rest)
    with tempfile.TemporaryDirectory() as folder:
        overrides |= {"data.cache_dir": folder, "data.teacher_cache_gb": "4"}
        result = measure(load(DistilRecipe, args.recipe, overrides), args.steps)
    write(result, args.out)


def measure(recipe: DistilRecipe, count: int) -> dict:
    """Seconds to fill the tables, and by what is kept the ratio of a step to one that computes everything."""
    began = time.perf_counter()
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run, recipe.controlnets)
    opened = time.perf_counter() - began
    student, bridges = distiller.fresh_student(recipe)
    stage, teacher = recipe.stage1, distiller.teacher
    loader = distiller.loader(recipe, stage, "benchmark")
    in_memory, on_disk = Encoder(teacher, recipe.data.cache_gb), distiller.encoder
    steps = distiller._kept_steps(recipe, stage, loader.seed, bridges)
    ways = {
        "nothing": Distillation(student, teacher, bridges, Encoder(teacher, 1e-12), stage),
        "latents and texts in memory": Distillation(student, teacher, bridges, in_memory, stage),
        "latents and texts on disk": Distillation(student, teacher, bridges, on_disk, stage),
        "the teacher's outputs too": Distillation(student, teacher, bridges, on_disk, stage, steps),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(2 * count):
        batch = loader(turn % count)
        for name, objective in ways.items():
            began = time.perf_counter()
            sum(objective(batch).values()).backward()
            if turn >= count:
                taken[name].append(time.perf_counter() - began)
            student.zero_grad(set_to_none=True)
    everything = np.array(taken["nothing"])
    return {
        "open_and_fill_seconds": opened,
        "step_ms": {name: float(np.median(seconds) * 1e3) for name, seconds in taken.items()},
        "step_over_nothing_kept": {name: quartiles(seconds / everything) for name, seconds in taken.items()},
        "steps": count,
        "batch_size": stage.batch_size,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
