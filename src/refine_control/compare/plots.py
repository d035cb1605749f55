"""Quality row by row, and against what it costs: MACs of a picture, the time of training. Spread as bars."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from refine_control.compare.plan import TEACHER
from refine_control.evaluate.metrics import arrow, sign
from refine_control.evaluate.report import Row
from refine_control.files import written_aside

COSTS = {"macs": ("the denoiser's MACs for a picture", 1e6, "M"), "wall_seconds": ("training", 60, "min")}
MARKERS = "osD^"


def plot(rows: list[Row], ours: str, cost: str, costs: Mapping[str, float | None], path: Path) -> None:
    """One panel for each domain and metric, in the hole; a point for each row that has this cost.

    An arrow stands for a row so much worse that the others would lie on one spot. ours is larger, and alone in red.
    cost: one of COSTS. costs: row -> what it costs, None for nothing.
    """
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    shown = {row.name: (row, x) for row in rows if (x := costs[row.name])}
    domains, metrics = _panels([row for row, _ in shown.values()])
    if len({x for row, x in shown.values() if row.name != TEACHER}) < 2:  # all students on one line
        path.unlink(missing_ok=True)
        return
    title, scale, unit = COSTS[cost]
    size = (3.0 * len(metrics), 2.9 * len(domains) + 0.9)
    figure, axes = plt.subplots(len(domains), len(metrics), figsize=size, squeeze=False)
    looks = _looks([row for row in rows if row.params], ours)
    for i, domain in enumerate(domains):
        for j, metric in enumerate(metrics):
            far = _far_off([row for row, _ in shown.values()], domain, metric)
            for row, x in shown.values():
                _point(axes[i, j], row, domain, metric, x / scale, looks[row.name], far=row.name in far)
            axes[i, j].set_title(f"{metric} {arrow(metric)}\n{domain}", fontsize=8)
            axes[i, j].tick_params(labelsize=7)
            if cost == "macs":
                axes[i, j].set_xscale("log")
                axes[i, j].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes[i, j].xaxis.set_major_formatter(ScalarFormatter())
                axes[i, j].xaxis.set_minor_formatter(NullFormatter())
            if i == len(domains) - 1:
                axes[i, j].set_xlabel(f"{title} ({unit})", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.06 + 0.025 * (len(shown) // 5), 1, 1))
    save(figure, path)
    plt.close(figure)


def plot_rows(rows: list[Row], ours: str, path: Path) -> None:
    """One panel for each domain and metric, in the hole; a line for each row that is trained, a band for `ours`.

    An arrow with its score stands for a row so much worse that the others would lie on one spot.
    """
    plt = pyplot()
    shown = [row for row in rows if row.steps]
    domains, metrics = _panels(shown)
    if not shown:
        path.unlink(missing_ok=True)
        return
    size = (2.6 * len(metrics) + 3.5, (0.22 * len(shown) + 0.9) * len(domains))
    figure, axes = plt.subplots(len(domains), len(metrics), figsize=size, squeeze=False, sharey=True)
    for i, domain in enumerate(domains):
        for j, metric in enumerate(metrics):
            _rows_panel(axes[i, j], shown, ours, domain, metric)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    save(figure, path)
    plt.close(figure)


def plot_lines(lines: Mapping[str, Mapping[int, Mapping[str, Any]]], what: str, path: Path) -> None:
    """One panel for each domain and metric, in the hole; a line for each name, standard deviations as bars.

    lines: name -> x -> {"mean", "spread"}, each domain -> metric -> {"hole"}. what: the name of x, on a
    logarithmic axis.
    """
    plt = pyplot()
    from matplotlib.ticker import NullLocator

    first = next(iter(next(iter(lines.values())).values()))["mean"]
    metrics = list(next(iter(first.values())))
    ticks = sorted({x for line in lines.values() for x in line})
    size = (3.0 * len(metrics), 2.9 * len(first) + 0.6)
    figure, axes = plt.subplots(len(first), len(metrics), figsize=size, squeeze=False)
    for i, domain in enumerate(first):
        for j, metric in enumerate(metrics):
            axis = axes[i, j]
            for name, line in lines.items():
                mean, spread = (
                    [one[kind][domain][metric]["hole"] or 0 for one in line.values()] for kind in ("mean", "spread")
                )
                axis.errorbar(list(line), mean, yerr=spread, label=name, marker=".", capsize=2)
            axis.set_title(f"{metric} {arrow(metric)}\n{domain}", fontsize=8)
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(x) for x in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.tick_params(labelsize=7)
            if i == len(first) - 1:
                axis.set_xlabel(what, fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=8, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, path)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, which draws to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """As a PNG, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})


def _panels(rows: list[Row]) -> tuple[list[str], list[str]]:
    """The domains and the metrics of any of the rows."""
    domains = dict.fromkeys(domain for row in rows for domain in row.scores)
    metrics = dict.fromkeys(metric for row in rows for scores in row.scores.values() for metric in scores)
    return list(domains), list(metrics)


def _rows_panel(axis: Any, rows: list[Row], ours: str, domain: str, metric: str) -> None:
    far, higher = _far_off(rows, domain, metric), sign(metric) > 0
    for place, row in enumerate(rows):
        score, spread = _score(row, domain, metric)
        if score is None:
            continue
        colour = "tab:red" if row.name == ours else "tab:blue"
        if row.name in far:
            edge, side = (0.02, "left") if higher else (0.98, "right")
            text = f"← {score:.4g}" if higher else f"{score:.4g} →"
            at_edge = axis.get_yaxis_transform()
            axis.text(edge, place, text, transform=at_edge, ha=side, va="center", fontsize=7, color=colour)
            continue
        axis.errorbar(score, place, xerr=spread, fmt="o", ms=4, color=colour, capsize=2)
        if row.name == ours:
            axis.axvspan(score - (spread or 0), score + (spread or 0), color=colour, alpha=0.2, lw=1)
    better = "→" if higher else "←"
    axis.set_title(f"{metric} {better}\n{domain}", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.locator_params(axis="x", nbins=5)  # or the numbers of CMMD overlap
    axis.tick_params(labelsize=7)
    axis.grid(axis="y", lw=0.3)


def _looks(rows: list[Row], ours: str) -> dict[str, dict[str, Any]]:
    """Colour, marker and size of each row, alike in every plot of a comparison."""
    colours = [colour for place, colour in enumerate(pyplot().get_cmap("tab20").colors) if place not in (6, 7)]  # reds
    looks = {}
    for place, row in enumerate(rows):
        marker = MARKERS[place // len(colours) % len(MARKERS)]
        looks[row.name] = {"color": colours[place % len(colours)], "fmt": marker, "ms": 5}
    return looks | {TEACHER: {"color": "black", "fmt": "*", "ms": 9}, ours: {"color": "tab:red", "fmt": "o", "ms": 7}}


def _point(axis: Any, row: Row, domain: str, metric: str, x: float, look: dict[str, Any], far: bool) -> None:
    score, spread = _score(row, domain, metric)
    if score is None:
        return
    if far:
        edge, marker = (0.05, "$\\downarrow$") if sign(metric) > 0 else (0.95, "$\\uparrow$")
        at_edge = axis.get_xaxis_transform()
        axis.plot(x, edge, marker=marker, ms=8, color=look["color"], ls="", transform=at_edge)
        axis.errorbar([], [], **look, label=row.name)  # for the legend
        return
    axis.errorbar(x, score, yerr=spread, **look, label=row.name, capsize=2)


def _far_off(rows: list[Row], domain: str, metric: str) -> set[str]:
    """The worst rows, as long as one alone would take three quarters of the axis; three or more are not far off."""
    scores = {row.name: sign(metric) * score for row in rows if (score := _score(row, domain, metric)[0]) is not None}
    near = sorted((name for name in scores if isfinite(scores[name])), key=scores.__getitem__, reverse=True)
    while len(near) > 3 and scores[near[0]] - scores[near[-2]] < (scores[near[0]] - scores[near[-1]]) / 4:
        near.pop()
    return scores.keys() - near


def _score(row: Row, domain: str, metric: str) -> tuple[float | None, float | None]:
    """In the hole: mean and spread, None for what is not there."""
    mean, spread = (part.get(domain, {}).get(metric, {}).get("hole") for part in (row.scores, row.spread))
    return mean, spread
