"""Scores against the share of captions, from what `refine-control compare recipes/compare-labels.yaml` wrote.

python scripts/labels_plot.py    # writes labels.png beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from refine_control.compare.plots import plot_lines

FOLDER = Path(__file__).parent.parent / "results/compare-labels"


def lines(rows: dict[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """method -> percent of the captions -> its row, of rows that are named METHOD-PERCENT; others are left out."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, row in rows.items():
        method, _, percent = name.rpartition("-")
        if percent.isdigit():
            found.setdefault(method, {})[int(percent)] = row
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    scores = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))
    plot_lines(lines(scores["rows"]), "captions (%)", FOLDER / "labels.png")


if __name__ == "__main__":
    main()
