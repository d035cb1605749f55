"""A comparison of few rows and steps, and what of its table has to be alike."""

import json
from pathlib import Path
from typing import Any

import tiny
from refine_control.compare.plan import CompareRecipe, load

SCRATCH = {"set": {"init": "random", "stage1.weights": {"task": 1}, "stage2.weights": {"task": 1}}}
ROWS: dict[str, Any] = {"scratch": SCRATCH, "telea": {"rival": "telea"}, "refine-control": {}}
CONTINUED = {"set": {"stage2.labelled_fraction": 1}}


def plan_of(
    base: Path, out: Path, rows: dict[str, Any] | None = None, seeds: tuple[int, ...] = (0, 1)
) -> CompareRecipe:
    path = tiny.write_comparison(base, rows or ROWS, seeds=list(seeds))
    return load(path, {"output_dir": str(out / "results"), "work_dir": str(out / "work")})[0]


def scores(out: Path) -> dict[str, Any]:
    """All of a table that may not depend on how it came about."""
    table = json.loads((out / "results/scores.json").read_text())
    rows = {
        name: {k: v for k, v in row.items() if k in ("mean", "spread", "runs")} for name, row in table["rows"].items()
    }
    return {"rows": rows, "claims": table["claims"], "seeds": table["seeds"]}
