"""Weak scaling: one process with a batch, two with twice the batch, each process with one thread; plain and sharded.

    python benchmarks/scaling.py recipes/demo.yaml --processes 1,2 --rows 8

The ways take turns, --repeats times. What is lost is the exchange of gradients (and, sharded, of weights), and what the
processes take from each other: memory bandwidth, on one machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import write
from refine_control.provenance import machine

WARM = 10  # steps left out: they meet every picture, and encode latents and captions that are kept afterwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--rows", type=int, default=8, help="of a batch, for each process")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-scaling.json"))
    args, rest = parser.parse_known_args()
    counts = [int(count) for count in args.processes.split(",")]
    ways = [(count, shard) for count in counts for shard in (False, True) if count > 1 or not shard]
    taken: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            taken[way].append(seconds_per_step(args.recipe, *way, args.rows, args.steps, rest))
    alone = taken[ways[0]]
    result = {
        "ways": [
            {
                "processes": count,
                "sharded": shard,
                "step_ms": statistics.median(taken[count, shard]) * 1e3,
                "efficiency": [one / many for one, many in zip(alone, taken[count, shard], strict=True)],
            }
            for count, shard in ways
        ],
        "rows_per_process": args.rows,
        "threads_per_process": 1,
        "steps": args.steps - WARM,
        "machine": machine(),
    }
    write(result, args.out)


def seconds_per_step(recipe: Path, count: int, shard: bool, rows: int, steps: int, rest: list[str]) -> float:
    """Median of the steps of one run, by its log."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "output_dir": folder,
            "stage1.steps": steps,
            "stage1.batch_size": rows * count,
            "stage2.steps": 0,
            "data.labelled_limit": WARM * rows,
            "data.variants": 1,
            "run.num_threads": 1,
            "run.workers": 0,
            "run.log_every": 1,
            "run.preview_every": 10**6,
            "run.grad_norm_every": 10**6,
            "run.checkpoint_every": 10**6,
            "run.shard": str(shard).lower(),
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        command = [*launch, "-m", "refine_control", "distill", str(recipe), *words, *rest]
        subprocess.run(command, check=True, capture_output=True)
        log = (Path(folder) / "stage1/losses.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [json.loads(line)["seconds"] for line in log][WARM:]
    return statistics.median(later - earlier for earlier, later in pairwise(ends))


if __name__ == "__main__":
    main()
