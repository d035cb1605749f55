"""Plots are there where they can show something."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_control.compare.plots import _far_off, _point, _rows_panel, plot, pyplot
from refine_control.evaluate.report import Row


def row(name: str, score: float | None = 15.0, metric: str = "psnr") -> Row:
    scores = {"labelled": {metric: {"whole": 20.0, "hole": score}}}
    return Row(name, name, scores, 10, 10, 1.0, 60.0, 3, {}, {"labelled": {metric: {"whole": None, "hole": 0.1}}})


def test_a_plot_against_a_cost_that_all_students_share_is_not_there(tmp_path: Path) -> None:
    rows, path = [row(name) for name in ("teacher", "small", "large")], tmp_path / "macs.png"
    plot(rows, "small", "macs", {"teacher": 30.0, "small": 10.0, "large": 20.0}, path)
    assert path.is_file()
    plot(rows, "small", "macs", {"teacher": 30.0, "small": 10.0, "large": 10.0}, path)
    assert not path.exists(), "nor one of before"


@pytest.mark.parametrize(
    ("scores", "far"),
    [
        ([17.9, 17.5, 16.8, 11.0], {3}),  # 0.7 and 1.1 of 6.9
        ([17.9, 17.5, 16.8, 15.0], set()),  # half of the axis
        ([17.9, 17.5, 17.4, 11.0, -20.0], {3, 4}),  # one after the other
        ([25.0, 17.9, 17.8, 17.7], set()),  # far better is to be seen
        ([17.9, 17.89, 11.0], set()),  # too few to lie on one spot
        ([17.9, float("-inf"), 17.8, float("-inf"), None], {1, 3}),
        ([11.0, float("nan"), 17.9, 17.8, 17.7], {0, 1}),
        ([17.9, 17.9, 17.9], set()),
    ],
)
def test_rows_that_are_so_much_worse_that_the_others_would_lie_on_one_spot(scores: list, far: set[int]) -> None:
    higher = [row(str(n), score) for n, score in enumerate(scores)]
    lower = [row(str(n), None if score is None else -score, "fid") for n, score in enumerate(scores)]
    assert _far_off(higher, "labelled", "psnr") == {str(n) for n in far}
    assert _far_off(lower, "labelled", "fid") == {str(n) for n in far}


@pytest.mark.parametrize(("metric", "text"), [("psnr", "← 11"), ("fid", "-11 →")])
def test_an_arrow_points_to_a_row_that_is_far_off(metric: str, text: str) -> None:
    scores = [17.9, 17.5, 16.8, 11.0] if metric == "psnr" else [-17.9, -17.5, -16.8, -11.0]
    rows = [row(str(n), score, metric) for n, score in enumerate(scores)]
    figure, (beside, below) = pyplot().subplots(1, 2)
    _rows_panel(beside, rows, "0", "labelled", metric)
    for n, one in enumerate(rows):
        _point(below, one, "labelled", metric, 1.0 + n, {"color": "red", "fmt": "o"}, far=n == 3)
    assert [(one.get_text(), one.get_position()[1]) for one in beside.texts] == [(text, 3)]
    arrow = next(line for line in below.lines if str(line.get_marker()).startswith("$"))
    assert arrow.get_marker() == ("$\\downarrow$" if metric == "psnr" else "$\\uparrow$")
    assert below.get_legend_handles_labels()[1] == ["0", "1", "2", "3"]
    for low, high in (beside.get_xlim(), below.get_ylim()):
        assert not low < scores[3] < high, "the others have the axis to themselves"
    pyplot().close(figure)
