"""Plots are there where they can show something."""

from __future__ import annotations

from pathlib import Path

from refine_control.compare.plots import plot
from refine_control.evaluate.report import Row


def row(name: str) -> Row:
    scores = {"labelled": {"psnr": {"whole": 20.0, "hole": 15.0}}}
    return Row(name, name, scores, 10, 10, 1.0, 60.0, 3, {}, {"labelled": {"psnr": {"whole": None, "hole": 0.1}}})


def test_a_plot_against_a_cost_that_all_students_share_is_not_there(tmp_path: Path) -> None:
    rows, path = [row(name) for name in ("teacher", "small", "large")], tmp_path / "macs.png"
    plot(rows, "macs", {"teacher": 30.0, "small": 10.0, "large": 20.0}, path)
    assert path.is_file()
    plot(rows, "macs", {"teacher": 30.0, "small": 10.0, "large": 10.0}, path)
    assert not path.exists(), "nor one of before"
