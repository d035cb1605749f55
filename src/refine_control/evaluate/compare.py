"""The main job from end to end: distil, train the controls beside it, score all of them, write tables and a page.

`refine-control demo` is `compare` with one seed and the scratch row.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refine_control import __version__
from refine_control.diffusion.model import Model
from refine_control.diffusion.store import load
from refine_control.distill.distil import Distiller, with_known_commits
from refine_control.distill.preview import mask_out, save_grid
from refine_control.distill.processes import refuse_processes, set_threads
from refine_control.evaluate import baselines
from refine_control.evaluate.captions import caption_losses
from refine_control.evaluate.domains import Domain, drawn, evaluate_model, open_domains
from refine_control.evaluate.heldout import latency_ms
from refine_control.evaluate.report import ReportData, Row, text_table, write_report, write_table
from refine_control.evaluate.rows import check_rows, train_row, wall_seconds
from refine_control.files import hold, write_whole
from refine_control.recipe import DistilRecipe

LABELS = {
    "teacher": "Teacher",
    "scratch": "From scratch, task loss only",
    "teacher-weights": "Teacher's weights, task loss only",
    "stage1-continued": "Stage 1, then stage 1 continued",
    "plain-rows-without-task": "Stages 1 and 2, plain rows without the task term",
    "refine-control": "Refine-Control, stages 1 and 2",
}
BASELINES = ("mean_fill", "telea", "navier_stokes", "biharmonic")
DOMAIN_LABELS = {"labelled": "Held-out concepts of the labelled domain", "unlabelled": "Held-out plain images"}


def compare(recipe: DistilRecipe, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Trains and scores every row with every seed, resuming what is there. Returns the table, to be printed.

    Writes, in recipe.output_dir: ROW/seed-N/ (student, losses, previews, evaluation.json), scores.json (mean over seeds
    and spread), latency.json, table.csv, table.md and report.html.
    """
    refuse_processes("compare")
    out = Path(recipe.output_dir)
    check_rows(rows)
    with hold(out):
        return _compare(recipe, rows, seeds, out)


def _compare(recipe: DistilRecipe, rows: Sequence[str], seeds: Sequence[int], out: Path) -> str:
    recipe = with_known_commits(recipe, out / rows[0] / f"seed-{seeds[0]}")
    distiller = Distiller(recipe.teacher, recipe.data, recipe.run, recipe.controlnets)
    folders = {(row, seed): out / row / f"seed-{seed}" for seed in seeds for row in rows}
    for (row, seed), folder in folders.items():
        train_row(distiller, recipe, row, seed, folder)
    domains = open_domains(recipe.data, recipe.masks, recipe.evaluate)
    name, nets = distiller.name, distiller.controlnets
    results = {("teacher", 0): evaluate_model(name, domains, recipe, out / "teacher", nets)}
    for key, folder in folders.items():
        results[key] = evaluate_model(str(folder / "student"), domains, recipe, folder)
    models: dict[str, Callable[[], Model]] = {"teacher": lambda: load(name, controlnets=nets)}
    for row in rows:
        models[row] = partial(load, str(out / row / f"seed-{seeds[0]}/student"))
    timed = [("teacher", 0), *((row, seeds[0]) for row in rows)]
    weights = [results[key]["settings"]["model"] for key in timed]
    latency = _latency_once(out / "latency.json", models, {"rows": list(models), "weights": weights, "on": machine()})
    scores = {name: _summary(name, results, latency[name]) for name in ("teacher", *rows)}
    first = results["teacher", 0]["domains"]["labelled"]
    table: dict[str, Any] = {name: _flat(summary) for name, summary in scores.items()}
    table["extractor"] = first["provenance"]
    table["other_domain"] = {name: summary["domains"].get("unlabelled") for name, summary in scores.items()}
    table["runs"] = {name: _runs(name, results) for name in scores}
    table["wall_seconds"] = {row: [wall_seconds(folders[row, seed]) for seed in seeds] for row in rows}
    table["spread"] = {name: summary["spread"] for name, summary in scores.items()}
    table["seeds"] = list(seeds)
    table["machine"] = machine()
    table["recipe"] = recipe.model_dump(mode="json")
    write_whole(out / "scores.json", json.dumps(table, indent=1))
    teacher = scores["teacher"]
    report_rows = [_row("teacher", teacher["domains"], teacher, None, None, drawn(out / "teacher"))]
    report_rows += [_trained_row(name, scores[name], recipe, out, seeds[0]) for name in rows]
    write_table(report_rows, out / "table.csv", out / "table.md")
    write_report(_report(report_rows, domains, recipe, out, seeds, first), out / "report.html")
    return text_table(report_rows)


def _latency_once(path: Path, models: dict[str, Callable[[], Model]], key: dict[str, Any]) -> dict[str, dict]:
    """The latency of each model, measured once on a machine: run again, a comparison says what it said before."""
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return kept["latency"]
    latency = latency_ms({name: read() for name, read in models.items()})
    write_whole(path, json.dumps({"key": key, "latency": latency}, indent=1))
    return latency


def evaluate(recipe: DistilRecipe, models: Sequence[str], with_baselines: bool) -> str:
    """Scores saved models, and classical inpainting where asked, on a recipe's held-out pictures.

    Writes scores.json, table.csv, table.md and for each model a sheet of pictures of each domain in recipe.output_dir.
    The models' task losses under the right, the empty and a stranger's caption stand in scores.json too. Returns the
    table, to be printed.
    """
    refuse_processes("evaluate")
    set_threads(recipe.run)
    out = Path(recipe.output_dir)
    domains = open_domains(recipe.data, recipe.masks, recipe.evaluate)
    table: dict[str, Any] = {}
    rows = []
    for name in models:
        folder = out / name.replace(":", "-").replace("/", "-").strip("-.")
        result = evaluate_model(name, domains, recipe, folder)
        model = load(name).freeze()
        summary = _summary(name, {(name, 0): result}, latency_ms({name: model})[name])
        table[name] = summary | {"caption_losses": caption_losses(model, domains["labelled"].heldout)}
        pictures = drawn(folder)
        rows.append(_row(name, summary["domains"], summary, None, None, pictures))
        for key, domain in domains.items():
            _save_sheet(folder / f"{key}.png", domain, pictures[key])
    for name in BASELINES if with_baselines else ():
        filled = {key: getattr(baselines, name)(d.heldout.true, d.heldout.batch.mask) for key, d in domains.items()}
        scores = {key: d.score(filled[key])["metrics"] for key, d in domains.items()}
        table[name] = {"domains": scores}
        rows.append(_row(name, scores, {}, None, None, filled))
    table["provenance"] = [reference.provenance() for reference in domains["labelled"].references]
    table["machine"] = machine()
    out.mkdir(parents=True, exist_ok=True)
    write_table(rows, out / "table.csv", out / "table.md")
    write_whole(out / "scores.json", json.dumps(table, indent=1))
    return text_table(rows)


def _save_sheet(path: Path, domain: Domain, pictures: Tensor, count: int = 64, columns: int = 16) -> None:
    """Some of the held-out pictures, evenly spread, to be looked at: three rows each of input, drawn and truth."""
    batch = domain.heldout.batch
    columns = min(columns, len(batch))
    shown = np.linspace(0, len(batch) - 1, min(count, len(batch)) // columns * columns).round().astype(int)
    kinds = (mask_out(batch.image, batch.mask), pictures * 2 - 1, batch.image)
    save_grid(path, [kind[list(part)] for part in shown.reshape(-1, columns) for kind in kinds])


def _runs(name: str, results: dict[tuple[str, int], dict[str, Any]]) -> dict[int, Any]:
    """{seed: {domain: {metric: {"whole", "hole"}}}}: rows are compared seed by seed."""
    return {
        seed: {domain: scored["metrics"] for domain, scored in result["domains"].items()}
        for (row, seed), result in results.items()
        if row == name
    }


def _summary(name: str, results: dict[tuple[str, int], dict[str, Any]], latency: dict[str, float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of one row, by domain, metric and region."""
    runs = [result for (row, _), result in results.items() if row == name]
    domains: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for domain, scored in runs[0]["domains"].items():
        domains[domain], spread[domain] = {}, {}
        for metric in scored["metrics"]:
            values = {r: [run["domains"][domain]["metrics"][metric][r] for run in runs] for r in ("whole", "hole")}
            domains[domain][metric] = {region: statistics.mean(v) for region, v in values.items()}
            spread[domain][metric] = {r: statistics.stdev(v) if len(v) > 1 else None for r, v in values.items()}
    return {"domains": domains, "spread": spread, "latency_ms": latency["median"], **runs[0]["cost"]}


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary["domains"]["labelled"], **{key: summary[key] for key in ("params", "macs", "latency_ms")}}


def _trained_row(name: str, summary: dict[str, Any], recipe: DistilRecipe, out: Path, seed: int) -> Row:
    folder = out / name / f"seed-{seed}"
    return _row(
        name,
        summary["domains"],
        summary,
        wall_seconds(folder),
        recipe.stage1.steps + recipe.stage2.steps,
        drawn(folder),
    )


def _row(
    name: str,
    scores: dict[str, Any],
    cost: dict[str, Any],
    wall_seconds: float | None,
    steps: int | None,
    pictures: dict[str, Tensor],
) -> Row:
    figures = {key: cost.get(key) for key in ("params", "macs", "latency_ms")}
    label = LABELS.get(name, name)
    return Row(
        name=name,
        label=label,
        scores=scores,
        **figures,
        wall_seconds=wall_seconds,
        steps=steps,
        drawn=pictures,
        spread=cost.get("spread", {}),
    )


def _report(
    rows: list[Row],
    domains: dict[str, Domain],
    recipe: DistilRecipe,
    out: Path,
    seeds: Sequence[int],
    first: dict[str, Any],
) -> ReportData:
    stages = [name for name in ("stage1", "stage2") if getattr(recipe, name).steps]
    return ReportData(
        title="Refine-Control: from a teacher to a student",
        lead=(
            f"A teacher of {rows[0].params or 0:,} parameters was distilled into a student of {rows[1].params or 0:,}. "
            "Every student saw the same pictures, masks and noise for the same number of steps, and is drawn with the "
            f"same sampler from the same noise. Scores are means over {len(seeds)} seed(s), on held-out pictures."
        ),
        rows=rows,
        truth={name: domain.heldout.true for name, domain in domains.items()},
        mask={name: domain.heldout.batch.mask for name, domain in domains.items()},
        captions={name: domain.heldout.batch.captions for name, domain in domains.items()},
        curves={r.name: [out / r.name / f"seed-{seeds[0]}" / s / "losses.jsonl" for s in stages] for r in rows[1:]},
        provenance=first["provenance"][0],
        settings={
            "teacher": recipe.teacher,
            "seeds": list(seeds),
            "stage 1": recipe.stage1.model_dump(mode="json"),
            "stage 2": recipe.stage2.model_dump(mode="json"),
            "student": recipe.model_dump(mode="json")["student"],
            "sampler": recipe.sample.model_dump(mode="json"),
            "machine": machine(),
        },
        domain_labels=DOMAIN_LABELS,
        notes=[
            "The pictures and curves are those of the first seed.",
            "Known pixels are pasted back into every result, so 'whole' scores differ by what stands in the hole.",
        ],
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "refine_control": __version__,
    }
