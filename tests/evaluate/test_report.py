"""The report is one file that needs nothing else, says every number, trusts no text, and is never left half-written."""

import csv
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from refine_control.evaluate.report import ReportData, Row, text_table, write_report, write_table

METRICS = ("psnr", "ssim", "lpips[efficientnet-lite0]", "fid[efficientnet-lite0]", "cmmd[efficientnet-lite0]")
HOSTILE = '<script>alert("x")</script>'


def row(name: str, start: float, params: int | None = None, **other: Any) -> Row:
    """Its scores are start, start + 0.5, start + 1 ...: whole and hole of each metric in turn."""
    metrics = {m: {"whole": start + i, "hole": start + i + 0.5} for i, m in enumerate(METRICS)}
    costs = {"macs": None, "latency_ms": None, "wall_seconds": None, "steps": None}
    given = {"scores": {"labelled": metrics}, "drawn": {"labelled": torch.rand(3, 3, 16, 16)}, **costs, **other}
    return Row(name=name, label=name.title(), params=params, **given)


def rows() -> list[Row]:
    return [
        row("teacher", 40.0, 8_000_000, macs=300_000_000, latency_ms=40.0, wall_seconds=28_800.0, steps=60_000),
        row("telea", 90.0, scores={"labelled": {"psnr": {"whole": 91.25, "hole": float("nan")}}}, drawn={}),
        row("scratch", 21.0, 2_000_000, macs=75_000_000, latency_ms=12.0, wall_seconds=5400.0, steps=20_000),
        row("ours", 26.0, 2_000_000, macs=75_000_000, latency_ms=10.0, wall_seconds=7200.0, steps=20_000),
    ]


def test_the_spread_over_seeds_stands_below_a_score(data: ReportData, tmp_path: Path) -> None:
    spread = {"labelled": {METRICS[0]: {"whole": 0.1234, "hole": None}}}
    write_report(replace(data, rows=[*data.rows[:-1], replace(data.rows[-1], spread=spread)]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<small>± ") == 1
    assert "<small>± 0.12</small>" in page


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    stages = [
        [
            {"step": 1, "loss": 3.0, "task": 1.0, "grad_norm/task": 0.4, "grad_norm/loss": 1.0},
            {"step": 4, "loss": 3.0, "task": 0.5, "grad_norm/task": 0.2},
            {"step": 8, "loss": float("nan")},
        ],
        [
            {"step": 1, "loss": 0.5, "feature": 0.25, "odd": -2.0, "lr": 1e-3, "seconds": 1.0},
            {"step": 2, "feature": 0.2, "odd": -1.0},
        ],
    ]
    files = [tmp_path / f"{number}.jsonl" for number in (1, 2)]
    for file, lines in zip(files, stages, strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    mask = torch.zeros(3, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    return ReportData(
        title="A & B",
        lead="Why.",
        rows=rows(),
        truth={"labelled": torch.rand(3, 3, 16, 16)},
        mask={"labelled": mask},
        captions={"labelled": ("a cat", HOSTILE, "")},
        curves={"ours": files},
        provenance={"sha256": "abc123", "nested": {"n": 3}},
        settings={"student": {"widths": [32, 64]}, "init_from": None},
        domain_labels={"labelled": "With captions"},
        notes=["One seed.", HOSTILE],
    )


class Page(HTMLParser):
    """The page's tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def written(data: ReportData, folder: Path) -> Page:
    write_report(data, folder / "report.html")
    return Page(folder / "report.html")


def cells(page: Page, label: str) -> str:
    """The HTML of one table row."""
    found = re.search(rf'<th scope="row">{label}<.*?</tr>', page.raw, re.DOTALL)
    assert found, f"no row {label}"
    return found[0]


def test_the_page_is_one_file_that_loads_nothing(data: ReportData, tmp_path: Path) -> None:
    page = written(data, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["report.html"]
    loads = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "xlink:href", "srcset") if key in attrs]
    assert loads
    assert all(load and load.startswith("data:image/png;base64,") for load in loads)
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.raw)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "@import" not in page.raw
    assert "url(" not in page.raw


def test_every_name_number_and_section_is_there_in_order(data: ReportData, tmp_path: Path) -> None:
    page = written(data, tmp_path)
    for one in data.rows:
        assert one.name in page.texts
        for region in (r for scores in one.scores.values() for metric in scores.values() for r in metric.values()):
            assert region != region or f"{region:.2f}" in cells(page, one.label)
    for text in ("8.000", "2.000", "0.25×", "300.0", "40.00", "0.30×", "480.0", "60,000 steps"):
        assert text in page.texts
    headings = [page.texts.index(t) for t in ("A & B", "Why.", "Scores", "Pictures", "Loss curves", "Notes")]
    headings += [page.texts.index(text) for text in ("Settings", "Provenance", "Rules")]
    assert headings == sorted(headings)
    for text in ("student.widths", "32, 64", "nested.n", "abc123", "hole, paired", "With captions"):
        assert text in page.texts


def test_hostile_text_stays_text(data: ReportData, tmp_path: Path) -> None:
    page = written(data, tmp_path)
    assert HOSTILE not in page.raw
    assert page.texts.count(HOSTILE) == 2  # the caption and the note, as they were given


def test_the_best_student_is_bold_and_no_baseline_or_teacher_is(data: ReportData, tmp_path: Path) -> None:
    page = written(data, tmp_path)
    ours, scratch = cells(page, "Ours"), cells(page, "Scratch")
    assert "<b>26.00</b>" in ours, "psnr: higher is better"
    assert "<b>23.00</b>" in scratch, "lpips: lower is better"
    assert "<b>10.00</b>" not in ours, "costs are no contest"
    assert "<b>" not in cells(page, "Teacher") + cells(page, "Telea")
    assert page.raw.count('aria-label="higher is better"') == 2
    assert page.raw.count('aria-label="lower is better"') == 3


def test_a_lone_student_is_not_marked(data: ReportData, tmp_path: Path) -> None:
    page = written(replace(data, rows=[data.rows[0], data.rows[3]]), tmp_path)
    assert "<b>" not in cells(page, "Ours")


def test_what_was_not_measured_is_an_en_dash(data: ReportData, tmp_path: Path) -> None:
    page = written(data, tmp_path)
    assert cells(page, "Telea").count(">–<") == 13  # 9 scores, one of them not a number, and 4 costs
    assert "nan" not in cells(page, "Telea")
    assert page.raw.count('<span class="tile">–</span>') == 3
    assert page.texts[page.texts.index("init_from") + 1] == "–"


def test_curves_take_what_a_line_has_and_append_the_stages(data: ReportData, tmp_path: Path) -> None:
    page = written(data, tmp_path)
    drawn = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    # No grad_norm/loss: one point is no curve.
    assert drawn == [f"{n} over steps" for n in ("loss", "task", "feature", "odd", "grad_norm/task")]
    assert page.raw.count('class="bound"') == 5
    points = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    # Steps 1 and 4, of the highest loss, and 8 + 1, of the lowest, of 8 + 2.
    assert points[:2] == ["28.0,0.0 112.0,0.0 ", "252.0,140.0 "]


def test_no_curves_and_a_domain_without_pictures(data: ReportData, tmp_path: Path) -> None:
    page = written(replace(data, curves={}, truth={}, mask={}), tmp_path)
    assert "Loss curves" not in page.texts
    assert not {tag for tag, _ in page.tags} & {"svg", "img"}


def test_large_pictures_are_shrunk(data: ReportData, tmp_path: Path) -> None:
    truth, mask = {"labelled": torch.rand(1, 3, 300, 200)}, {"labelled": torch.ones(1, 1, 300, 200)}
    page = written(replace(data, rows=[replace(r, drawn={}) for r in data.rows], truth=truth, mask=mask), tmp_path)
    assert "200 × 300 pixels, shrunk to 192" in page.raw


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": [row("same", 1.0), row("same", 2.0)], "curves": {}},
        {"curves": {"stranger": []}},
        {"mask": {"labelled": torch.ones(3, 1, 8, 8)}},
        {"rows": [row("ours", 1.0, drawn={"labelled": torch.rand(2, 3, 16, 16)})]},
    ],
)
def test_what_does_not_fit_is_refused(data: ReportData, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got|true one"):
        write_report(replace(data, **change), tmp_path / "report.html")


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_failed_write_leaves_what_was_there(
    data: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("before", encoding="utf-8")
    write_text = Path.write_text

    def half(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[:100], **options)
        raise OSError("disk full")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*((Path, "write_text", half) if broken == "write" else (os, "replace", refuse)))
    with pytest.raises(OSError, match="disk full"):
        write_report(data, out / "report.html")
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text(encoding="utf-8") == "before"


def test_the_table_as_text(data: ReportData) -> None:
    lines = text_table(data.rows).splitlines()
    assert lines[0] == "labelled"
    assert lines[1].split() == [row.label for row in data.rows]
    (line,) = (line for line in lines if line.startswith("psnr whole ↑"))
    assert "26.00" in line
    assert len({len(line) for line in lines[1:] if line}) == 1, "columns stand below each other"


def test_the_table_as_csv_and_markdown(tmp_path: Path) -> None:
    given = [*rows(), replace(row("odd", 1.0), label="a | b\nc")]
    write_table(given, tmp_path / "table.csv", tmp_path / "table.md")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        read = {line["name"]: line for line in csv.DictReader(file)}
    assert list(read) == [one.name for one in given]
    assert read["ours"]["fid[efficientnet-lite0] hole"] == "29.5"
    assert (read["ours"]["params"], read["ours"]["wall_seconds"], read["ours"]["steps"]) == (
        "2000000",
        "7200.0",
        "20000",
    )
    assert (read["telea"]["psnr hole"], read["telea"]["params"]) == ("", "")
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(given)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "psnr whole ↑" in lines[0]
    assert "| Ours | 26.00 |" in lines[5]
    assert "a \\| b c" in lines[6]
    assert "| – |" in lines[3]
