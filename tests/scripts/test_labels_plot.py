"""Rows of compare-labels.yaml as lines over the share of captions."""

from pathlib import Path

import labels_plot
from refine_control.compare.plan import load

RECIPE = Path(__file__).parents[2] / "recipes/compare-labels.yaml"


def test_each_method_is_a_line_over_the_same_shares() -> None:
    plan, _ = load(RECIPE, {})
    found = labels_plot.lines({name: {"label": row.label} for name, row in plan.rows.items()})
    assert set(found) == {"teacher-weights", "output-kd", "stage1", "refine-control"}
    for by_percent in found.values():
        assert list(by_percent) == [100, 30, 10, 3]
        assert all(row["label"].startswith(f"{percent} %") for percent, row in by_percent.items())
