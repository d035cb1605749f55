"""What safety costs: the seconds of saving checkpoints against those of the steps between them, in one run.

    python benchmarks/checkpoint.py recipes/demo.yaml --every 100 --steps 300 --out results/benchmark-checkpoint.json

The real loop runs stage 1 of the recipe. Saving stands between two steps and nothing else runs meanwhile, so its time
is what it adds; steps and saves take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from torch import nn

from common import overrides_of, write
from refine_control.data.batch import Batch
from refine_control.distill.distil import Distiller
from refine_control.distill.learner import Learner
from refine_control.distill.loop import Losses, train
from refine_control.distill.stages import Distillation
from refine_control.provenance import machine
from refine_control.recipe import DistilRecipe, load


class Timed(nn.Module):
    """The objective; remembers when its first step began."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.began: float | None = None

    def forward(self, batch: Batch) -> Losses:
        self.began = self.began or time.perf_counter()
        return self.objective(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="what is distilled")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-checkpoint.json"))
    args, rest = parser.parse_known_args()
    overrides = overrides_of(rest) | {"stage1.steps": str(args.steps), "run.checkpoint_every": str(args.every)}
    write(measure(load(DistilRecipe, args.recipe, overrides)), args.out)


def measure(recipe: DistilRecipe) -> dict:
    """On the disk that the recipe's runs are on."""
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run, recipe.controlnets)
    student, bridges = distiller.fresh_student(recipe)
    stage, saves = recipe.stage1, []
    save = Learner.save

    def timed_save(learner: Learner, step: int) -> None:
        began = time.perf_counter()
        save(learner, step)
        saves.append(time.perf_counter() - began)

    objective = Timed(Distillation(student, distiller.teacher, bridges, distiller.encoder, stage))
    loader = distiller.loader(recipe, stage, "benchmark")
    beside = Path(recipe.output_dir).parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside) as name, mock.patch.object(Learner, "save", timed_save):
        train(Path(name), objective, stage.weights.model_dump(), loader, stage, recipe.run)
        assert objective.began is not None
        seconds = time.perf_counter() - objective.began
        size = sum(path.stat().st_size for path in Path(name).rglob("*.safetensors"))
    return {
        "added": sum(saves) / (seconds - sum(saves)),
        "every": recipe.run.checkpoint_every,
        "saves": len(saves),
        "save_ms": statistics.median(saves) * 1e3,
        "step_ms": (seconds - sum(saves)) / stage.steps * 1e3,
        "checkpoint_bytes": size,
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
