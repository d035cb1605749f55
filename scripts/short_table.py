"""README.md's table, of the labelled domain of the headline comparisons; results_page.py writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_control.compare.claims import LEAST_CLOSED, LEAST_SHARE
from refine_control.compare.tables import cell
from refine_control.evaluate.metrics import arrow

ROOT = Path(__file__).parent.parent
WHOLE = "compare-emoji"  # the one that has all rivals
SHORT = {  # students of two sizes, and the smaller one drawn in a single forward: the rows that README.md shows
    "compare-larger": ("teacher", "scratch", "scratch-same-time", "output-kd", "refine-control", "feedforward-larger"),
    "compare-emoji": ("scratch", "scratch-same-time", "output-kd", "refine-control", "biharmonic"),
    "compare-one-step": ("teacher", "scratch", "output-kd", "refine-control", "feedforward"),
}
MARKS = ("<!-- written by scripts/results_page.py -->", "<!-- up to here -->")


def read(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def in_short() -> list[str]:
    """The labelled domain of the headline comparisons, some rows of each; and how many of their claims hold."""
    measured = {name: one for name in SHORT if (one := read(f"{name}/scores.json"))}
    if not measured:
        return []
    first = next(iter(measured.values()))
    metrics = list(first["rows"]["teacher"]["mean"]["labelled"])
    names = [f"{metric.partition('[')[0]} {arrow(metric)}" for metric in metrics]
    lines = [
        f"| | parameters of the denoiser | forwards | {' | '.join(names)} | seeds |",
        "|---|---:|---:|" + "---:|" * (len(metrics) + 1),
    ]
    held = []
    for name, one in measured.items():
        rows, (steps, guidance) = one["rows"], one["samplers"][0]
        forwards = steps * (2 if guidance > 1 else 1)
        for row in (row for row in SHORT[name] if row in rows):
            label, params = rows[row]["label"], rows[row]["params"]
            if params and row != "teacher":
                label = f"{rows['teacher']['params'] / params:.1f}x smaller: {label}"
            lines.append(_short_line(rows[row], metrics, label, 1 if row.startswith("feedforward") else forwards))
        if one["claims"]:
            held.append(_claimed(one, forwards, measured.get(WHOLE, first)))
    scored = first["extractors"][0]
    said = (
        f"Holes of {scored['n']} pictures of held-out concepts, {scored['image_size'][0]} px; features of "
        f"{scored['extractor']}; mean ± standard deviation over training seeds; the scores: `docs/evaluate.md`. "
        "Sizes are of UNet and ControlNet: autoencoder and text encoder stay the teacher's. Forwards: of the denoiser, "
        "for a picture. Training steps and pictures are the same unless the row's name says otherwise."
    )
    tested = (
        "Two claims are tested, on emoji and on clip art. Above a row: better on average in four of the five scores, "
        "and in none worse beyond the spread over seeds (from scratch: better in all five). Near the teacher, score by "
        f"score: {LEAST_SHARE:.0%} of its PSNR and SSIM, {LEAST_CLOSED:.0%} of the way from scratch to it in LPIPS, "
        "FID and CMMD. What holds:"
    )
    return [*lines, "", said, "", tested, "", *held]


def _claimed(one: Mapping[str, Any], forwards: int, whole: Mapping[str, Any]) -> str:
    """How many claims of a comparison hold, and which rows of the whole one it has not."""
    rows, claims = one["rows"], one["claims"]
    near = [claim for claim in claims if not claim["against"]]
    trained, untrained = (
        [claim for claim in claims if claim["against"] and bool(rows[claim["against"]]["steps"]) is learns]
        for learns in (True, False)
    )
    missed = "; ".join(dict.fromkeys(rows[claim["against"]]["label"] for claim in trained if not claim["holds"]))
    absent = {row["label"] for row in whole["rows"].values()} - {row["label"] for row in rows.values()}
    smaller = rows["teacher"]["params"] / rows[one["ours"]]["params"]
    return (
        f"- {smaller:.1f}x smaller, {forwards} forward{'s' * (forwards > 1)}: above other trained rows {_held(trained)}"
        f"{f' (not above: {missed})' if missed else ''}, above inpainting without training {_held(untrained)}, "
        f"near the teacher {_held(near)}"
        f"{f'; {len(absent)} rows of `{WHOLE}` are not compared' if absent else ''}."
    )


def _held(claims: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(claim['holds'] for claim in claims)} of {len(claims)}"


def _short_line(entry: dict[str, Any], metrics: Sequence[str], label: str, forwards: int) -> str:
    cells = [cell(*(entry[kind]["labelled"][metric]["hole"] for kind in ("mean", "spread"))) for metric in metrics]
    size = (f"{entry['params'] / 1e6:.1f} M", forwards) if entry["params"] else ("–", "–")
    return f"| {label} | {size[0]} | {size[1]} | {' | '.join(cells)} | {len(entry['runs'])} |"


def in_readme(text: str) -> str:
    """README.md with its table written anew. Raises ValueError where a mark is missing, or there twice."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return "\n".join([before + MARKS[0], "", *in_short(), "", MARKS[1] + after])
