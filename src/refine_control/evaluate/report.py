"""One page that shows a comparison: tables, pictures, loss curves, settings. One file, nothing loaded from afar."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from torch import Tensor

from refine_control.evaluate.metrics import arrow, sign
from refine_control.evaluate.score import RULES
from refine_control.files import write_whole

__all__ = ["ReportData", "Row", "text_table", "write_report", "write_table"]

PICTURES = 12  # shown of each domain
_SIDE = 192  # pixels; larger pictures are shrunk to it, so that the page stays small
_POINTS = 400  # drawn of each curve
_WIDTH, _HEIGHT = 280, 140  # of a drawing of curves, in SVG units
Values = list[float | None]
_REGIONS = ("whole", "hole")
_COSTS = {  # field of a row: (title, unit shown, how many of the field's are one of them)
    "params": ("Params", "M", 1e6),
    "macs": ("MACs", "M", 1e6),
    "latency_ms": ("Latency", "ms", 1),
    "wall_seconds": ("Training", "min", 60),
}


@dataclass(frozen=True)
class Row:
    """One model. What is None, absent or not finite is shown as an en dash; a row without params is a baseline.

    scores: domain -> {metric: {"whole": x, "hole": y}}, as `score` returns under "metrics".
    macs: of one forward; latency_ms: of the same forward; wall_seconds and steps: of the training.
    drawn: domain -> (N, 3, H, W) in [0, 1], in the order of the true pictures.
    spread: like scores, standard deviations over the seeds, None for one seed.
    """

    name: str
    label: str
    scores: dict[str, dict[str, dict[str, float]]]
    params: int | None
    macs: int | None
    latency_ms: float | None
    wall_seconds: float | None
    steps: int | None
    drawn: dict[str, Tensor]
    spread: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """All that the page shows. The first of `rows` is the teacher, to which the costs of the others are compared.

    truth: domain -> (N, 3, H, W) in [0, 1]; mask: domain -> (N, 1, H, W) in {0, 1}, 1 = hole; captions: domain -> N.
    curves: row name -> losses.jsonl files of its stages, in their order; each counts its steps from 1.
    plots: (caption, PNG file). claims: (text, whether it holds, figures).
    """

    title: str
    lead: str
    rows: list[Row]
    truth: dict[str, Tensor]
    mask: dict[str, Tensor]
    captions: dict[str, tuple[str, ...]]
    curves: dict[str, list[Path]]
    provenance: dict[str, Any]
    settings: dict[str, Any]
    domain_labels: dict[str, str]
    notes: list[str]
    plots: Sequence[tuple[str, Path]] = ()
    claims: Sequence[tuple[str, bool, str]] = ()


@dataclass(frozen=True)
class Column:
    """One quantity of every row: as measured, as shown, what stands small below, which rows are the best student."""

    key: str
    unit: str
    arrow: str
    values: Values
    texts: list[str]
    smalls: list[str]
    best: set[int]


def write_report(data: ReportData, path: Path) -> None:
    """Writes the page to `path`, whole or not at all; ValueError where pictures or names do not fit together."""
    _check(data)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader)
    domains = {name: data.domain_labels.get(name, name) for name in {**data.truth, **_domains(data.rows)}}
    curved = [row for row in data.rows if data.curves.get(row.name)]
    page = environment.get_template("report.html.jinja").render(
        data=data,
        tables=[(label, _columns(data.rows, name, [name])) for name, label in domains.items()],
        grids=[(label, name, _lines(data, name)) for name, label in domains.items() if name in data.truth],
        side=_SIDE,
        curved=curved,
        panels=_panels([[_read(file) for file in data.curves[row.name]] for row in curved]),
        box=(_WIDTH, _HEIGHT),
        plots=[(caption, _png_uri(path.read_bytes())) for caption, path in data.plots],
        costs=_COSTS,
        facts=[("Settings", _flat(data.settings)), ("Provenance", _flat(data.provenance)), ("Rules", _flat(RULES))],
    )
    write_whole(path, page)


def write_table(rows: Sequence[Row], path_csv: Path, path_md: Path | None = None, note: str = "") -> None:
    """Writes the tables of all domains as one: exact numbers as CSV, the page's numbers as Markdown, a note below."""
    domains = _domains(rows)
    tables = {domain: _columns(rows, domain, domains) for domain in domains}
    heads = next(iter(tables.values()), [])
    keys = [f"{c.key} {c.unit}" if c.unit in _REGIONS else c.key for c in heads]
    exact: list[list[Any]] = [["domain", "name", "label", *keys, "steps"]]
    shown = [["domain", "model", *map(_title, heads)]]
    shown.append(["---"] * 2 + ["---:"] * len(heads))
    for domain, columns in tables.items():
        for i, row in enumerate(rows):
            exact.append([domain, row.name, row.label, *(c.values[i] for c in columns), row.steps])
            shown.append([domain, row.label, *(c.texts[i] for c in columns)])
    raw = io.StringIO()
    csv.writer(raw, lineterminator="\n").writerows(exact)
    write_whole(path_csv, raw.getvalue())
    if path_md is None:
        return
    lines = (" | ".join(" ".join(text.split()).replace("|", "\\|") for text in line) for line in shown)
    write_whole(path_md, "".join(f"| {line} |\n" for line in lines) + (f"\n{note}\n" if note else ""))


def _title(column: Column) -> str:
    is_score = column.unit in _REGIONS
    name = f"{column.key} {column.unit}" if is_score else f"{_COSTS[column.key][0]} ({column.unit})"
    return f"{name} {column.arrow}"


def text_table(rows: Sequence[Row]) -> str:
    """The tables as plain text, a line for each quantity and a column for each row: narrow enough for a terminal."""
    blocks = []
    domains = _domains(rows)
    for domain in domains:
        lines = [["", *(row.label if len(row.label) <= 24 else row.name for row in rows)]]
        for c in _columns(rows, domain, domains):
            lines.append([_title(c), *c.texts])
        widths = [max(len(line[i]) for line in lines) for i in range(len(rows) + 1)]
        text = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
        blocks.append("\n".join([domain, *text]))
    return "\n\n".join(blocks) + "\n"


def _check(data: ReportData) -> None:
    names = [row.name for row in data.rows]
    if not names or len(set(names)) < len(names) or not set(data.curves) <= set(names):
        raise ValueError(f"rows need a name each, and curves a row each; got {names} and curves of {list(data.curves)}")
    for domain, truth in data.truth.items():
        pictures = {row.name: row.drawn[domain] for row in data.rows if domain in row.drawn}
        for name, one in {**pictures, "mask": data.mask[domain].expand(-1, 3, -1, -1)}.items():
            if one.shape != truth.shape:
                raise ValueError(f"'{domain}' of {name} is {tuple(one.shape)}; the true one is {tuple(truth.shape)}")


def _domains(rows: Iterable[Row]) -> dict[str, None]:
    return {domain: None for row in rows for domain in row.scores}


def _columns(rows: Sequence[Row], domain: str, metrics_of: Iterable[str]) -> list[Column]:
    """Every metric that a row has in one of the domains `metrics_of`, whole and hole, with its values in `domain`."""
    columns = []
    for name in {metric: None for one in metrics_of for row in rows for metric in row.scores.get(one, {})}:
        for region in _REGIONS:
            values = [_finite(row.scores.get(domain, {}).get(name, {}).get(region)) for row in rows]
            spreads = [row.spread.get(domain, {}).get(name, {}).get(region) for row in rows]
            smalls = ["" if spread is None else f"± {spread:.2g}" for spread in spreads]
            columns.append(_column(rows, name, region, values, 1, smalls))
    steps = ["" if row.steps is None else f"{row.steps:,} steps" for row in rows]
    for key, (_, unit, scale) in _COSTS.items():
        values = [_finite(getattr(row, key)) for row in rows]
        ratios = [f"{v / values[0]:.2f}×" if i and v and values[0] else "" for i, v in enumerate(values)]
        columns.append(_column(rows, key, unit, values, scale, steps if key == "wall_seconds" else ratios))
    return columns


def _column(rows: Sequence[Row], key: str, unit: str, values: Values, scale: float, smalls: list[str]) -> Column:
    """Shows a column with as many decimals as give its largest value four digits, and finds the best of the students.

    Students are the rows after the first that have params. All that read alike are best, unless all do; not of costs.
    """
    is_up = sign(key) > 0
    largest = max((abs(v) / scale for v in values if v is not None), default=0) or 1
    decimals = min(max(3 - math.floor(math.log10(largest)) - (largest < 1), 0), 6)
    texts = ["–" if v is None else f"{v / scale:,.{decimals}f}" for v in values]
    students = {i: v for i, v in enumerate(values) if i and rows[i].params is not None and v is not None}
    best = (max if is_up else min)(students.values(), default=None)
    marked = {i for i in students if texts[i] in {texts[j] for j, v in students.items() if v == best}}
    marked = set() if len(marked) == len(students) or key in _COSTS else marked
    return Column(key, unit, arrow(key), values, texts, smalls, marked)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _lines(data: ReportData, domain: str) -> list[tuple[str, list[str | None]]]:
    """Evenly spaced pictures of a domain, each as (caption, data: URIs from left to right, None for none)."""
    truth, mask, captions = data.truth[domain], data.mask[domain], data.captions.get(domain, ())
    y, x = np.indices(truth.shape[2:]) // max(2, min(truth.shape[2:]) // 8)
    hole = truth.new_tensor(0.56 + 0.1 * ((y + x) % 2))
    columns = [truth * (1 - mask) + hole * mask, *(row.drawn.get(domain) for row in data.rows), truth]
    chosen = np.linspace(0, len(truth) - 1, min(PICTURES, len(truth))).round().astype(int).tolist()
    pictures = [[None if column is None else _uri(column[i]) for column in columns] for i in chosen]
    return [(captions[i] if i < len(captions) else "", line) for i, line in zip(chosen, pictures, strict=True)]


def _uri(image: Tensor) -> str:
    """A picture (3, H, W) in [0, 1] as a PNG in a data: URI."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array)
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    picture.save(png, "PNG")
    return _png_uri(png.getvalue())


def _png_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


Stage = tuple[int, dict[str, list[tuple[int, float]]]]  # the steps it took; term -> (step, value), finite values only


def _read(path: Path) -> Stage:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    terms: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name in line.keys() - {"step", "lr", "seconds", "waited"}:
            if _finite(line[name]) is not None:
                terms.setdefault(name, []).append((line["step"], line[name]))
    return max((line["step"] for line in lines), default=0), terms


def _panels(runs: list[list[Stage]]) -> list[dict[str, Any]]:
    """One drawing a term that was logged more than once, losses first; `runs` are the stages of each row."""
    order = {name: place for place, name in enumerate(("loss", "grad_norm", "task", "output", "feature"))}
    names = {name for stages in runs for _, terms in stages for name, curve in terms.items() if len(curve) > 1}
    keys = {(name.startswith("grad_norm"), order.get(name.removeprefix("grad_norm/"), 9), name) for name in names}
    return [_panel(name, runs) for *_, name in sorted(keys)]


def _panel(name: str, runs: list[list[Stage]]) -> dict[str, Any]:
    """A term's curves, each as SVG points of what was logged and of its rolling mean; ticks; where a stage begins."""
    begins = [np.cumsum([0, *(steps for steps, _ in stages)]).tolist() for stages in runs]
    values = [value for stages in runs for _, terms in stages for _, value in terms.get(name, [])]
    low, high, last = min(values), max(values), max(begin[-1] for begin in begins)
    is_log = low > 0 and high > 5 * low
    bend = np.log10 if is_log else np.asarray

    def down(y: Any) -> Any:
        return _HEIGHT * (1 - (bend(y) - bend(low)) / (float(bend(high) - bend(low)) or 1))

    lines = []
    for number, stages in enumerate(runs):
        for begin, (_, terms) in zip(begins[number], stages, strict=False):
            if name in terms:
                steps, logged = np.array(terms[name], dtype=np.float64).T
                window = np.ones(min(len(logged), max(3, len(logged) // 15)))
                mean = np.convolve(logged, window, "same") / np.convolve(np.ones_like(logged), window, "same")
                x, thin = _WIDTH * (steps + begin) / last, slice(None, None, math.ceil(len(logged) / _POINTS))
                lines.append((number, *(list(zip(x[thin], down(y[thin]), strict=True)) for y in (logged, mean))))
    x_ticks = MaxNLocator(4, integer=True).tick_values(0, last)
    y_ticks = (LogLocator(subs=(1, 2, 5), numticks=5) if is_log else MaxNLocator(4)).tick_values(low, high)
    y_ticks = [y for y in y_ticks if low <= y <= high]
    return {
        "name": name,
        "is_log": is_log,
        "lines": lines,
        "x_ticks": [(_WIDTH * x / last, x) for x in x_ticks if x <= last],
        "y_ticks": list(zip(down(y_ticks), y_ticks, strict=True)),
        "bounds": sorted({_WIDTH * x / last for begin in begins for x in begin[1:-1]}),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text)."""
    flat = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            flat.append((f"{prefix}{key}", "–" if value is None else text or "–"))
    return flat
