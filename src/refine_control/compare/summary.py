"""What the runs come to: scores.json, table.md, table.csv, plots and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_control.compare.claims import Claim, claims, gate_failures
from refine_control.compare.plan import TEACHER, CompareRecipe, Run
from refine_control.compare.plots import plot, plot_rows
from refine_control.compare.runs import Workshop, pictures_of, result_of, shown_of
from refine_control.compare.speed import Times, minutes
from refine_control.compare.statistics import LEAST_SEEDS, Results, over_seeds
from refine_control.compare.tables import heading, markdown
from refine_control.data.source import paths_of
from refine_control.evaluate.domains import Domain
from refine_control.evaluate.report import ReportData, Row, text_table, write_report, write_table
from refine_control.files import write_whole

PLOTS = {
    "rows": "Scores in the hole of each row that is trained",
    "macs": "Scores in the hole against the MACs of a picture (all steps)",
    "wall_seconds": "Scores in the hole against the time of training (steps times the measured time of a step)",
}
LEGEND = "red: the method, its spread a band; bars: standard deviation over seeds; an arrow: beyond the axis."


def summarise(plan: CompareRecipe, done: Sequence[Run], times: Times, shop: Workshop) -> str:
    """Writes all that is made of the results of complete runs. Returns the table as plain text."""
    out = Path(plan.output_dir)
    results: dict[str, Results] = {}
    for run in done:
        if (result := result_of(run)) is not None:  # else it was removed just now
            results.setdefault(run.row, {})[run.seed] = result
    if not results:
        return "no run is complete yet\n"
    first = {run.row: run for run in reversed(done)}
    domains = shop.domains
    rows = [_row(name, plan, first[name], results[name], times, shop) for name in results]
    found = claims(plan.ours, results) if plan.proof else []
    failed = gate_failures(results)
    title = plan.title + (f" [the teacher fails its gate: {', '.join(failed)}]" if failed else "")
    provenance = {**_provenance(results, times), "scored": scored_on(shop), "gate_failures": failed}
    table = {
        "title": title, "ours": plan.ours, **provenance, "claims": [claim._asdict() for claim in found],
        "rows": {row.name: _figures(row, results[row.name]) for row in rows},
    }  # fmt: skip
    write_whole(out / "scores.json", json.dumps(table, indent=1))
    write_table(rows, out / "table.csv")
    text = markdown(title, plan, rows, results, found, provenance)
    write_whole(out / "table.md", text)
    plot_rows(rows, plan.ours, out / "rows.png")
    costs = {
        "macs": {row.name: _macs_of_a_picture(row, first[row.name], shop) for row in rows},
        "wall_seconds": {row.name: row.wall_seconds for row in rows},
    }
    for cost, of_rows in costs.items():
        plot(rows, plan.ours, cost, of_rows, out / f"{cost}.png")
    write_report(_page(title, plan, rows, first, domains, found, provenance, results), out / "report.html")
    return text_table(rows)


def _macs_of_a_picture(row: Row, run: Run, shop: Workshop) -> float | None:
    """Of foundation and module, at every step, twice with guidance; a network of a rival's own draws in one forward."""
    rival, sample = shop.rival(run), run.recipe.sample
    calls = 1 if rival and rival.network else sample.num_inference_steps * (2 if sample.guidance_scale > 1 else 1)
    return row.macs * calls if row.macs else None


def _row(name: str, plan: CompareRecipe, run: Run, results: Results, times: Times, shop: Workshop) -> Row:
    scores, spread = over_seeds(results)
    cost = next(iter(results.values()))["cost"] or {}
    taken = minutes(run, times)
    return Row(
        name=name,
        label=plan.label(name),
        scores=scores,
        params=cost.get("params"),
        macs=cost.get("macs"),
        latency_ms=times["forward_ms"].get(name),
        wall_seconds=None if taken is None else taken * 60,
        steps=run.steps if shop.is_trained(run) else None,
        drawn=pictures_of(run, shop.domains),
        spread=spread,
    )


def _figures(row: Row, results: Results) -> dict[str, Any]:
    runs = {seed: {d: s["metrics"] for d, s in result["domains"].items()} for seed, result in results.items()}
    made_by = {seed: {key: result[key] for key in ("identity", "commit")} for seed, result in results.items()}
    cost = {"params": row.params, "macs": row.macs, "latency_ms": row.latency_ms, "wall_seconds": row.wall_seconds}
    return {"label": row.label, "mean": row.scores, "spread": row.spread, "steps": row.steps, **cost, "runs": runs,
            "made_by": made_by}  # fmt: skip


def scored_on(shop: Workshop) -> dict[str, dict[str, Any]]:
    """domain -> {"n": pictures, "data": what they are of, "trained_on"}."""
    return {
        name: {
            "n": len(domain.heldout.true),
            "data": ", ".join(map(str, paths_of(getattr(shop.base.data, name)))),
            "trained_on": domain.trained_on,
        }
        for name, domain in shop.domains.items()
    }


def _provenance(results: Mapping[str, Results], times: Times) -> dict[str, Any]:
    """What made the scores: extractors, samplers (steps, guidance), machines and commits of all runs, seeds."""
    every = [result for some in results.values() for result in some.values()]
    scored = next(iter(every[0]["domains"].values()))["provenance"]
    samples = [result["recipe"]["sample"] for result in every]
    machines = {(m["platform"], m["cores"], m["gpu"] or "no GPU", m["torch"]) for m in (r["machine"] for r in every)}
    return {
        "extractors": scored,
        "samplers": sorted({(sample["num_inference_steps"], sample["guidance_scale"]) for sample in samples}),
        "machines": sorted(map(list, machines)),
        "commits": sorted({result["commit"] for result in every}),
        "seeds": {name: sorted(some) for name, some in results.items()},
        "timed_on": times["machine"],
        "timed_turns": times["rounds"] * times["turns"],
    }


def _page(
    title: str,
    plan: CompareRecipe,
    rows: list[Row],
    first: Mapping[str, Run],
    domains: dict[str, Domain],
    found: list[Claim],
    provenance: dict[str, Any],
    results: Mapping[str, Results],
) -> ReportData:
    out, recipe = Path(plan.output_dir), (first.get(plan.ours) or next(iter(first.values()))).recipe
    chosen = {name: shown_of(len(domain.heldout.true)) for name, domain in domains.items()}
    curves = {name: logs for name, run in first.items() if (logs := _curves(run))}
    counts = sorted({len(results[row.name]) for row in rows if row.steps}) or [1]
    trained_on = any(domain.trained_on for domain in domains.values())
    scored = "pictures of which some were trained on" if trained_on else "held-out pictures"
    return ReportData(
        title=title,
        lead=(
            f"{_distilled(plan, rows)}One sampler draws for all rows that need one, from the same noise, in the same "
            f"holes. Scores, on {scored}, are {_over(counts)}."
        ),
        rows=rows,
        truth={name: domain.heldout.true[chosen[name]] for name, domain in domains.items()},
        mask={name: domain.heldout.batch.mask[chosen[name]] for name, domain in domains.items()},
        captions={n: tuple(d.heldout.batch.captions[i] for i in chosen[n]) for n, d in domains.items()},
        curves=curves,
        provenance=provenance["extractors"][0],
        settings={
            "teacher": recipe.teacher,
            "seeds": provenance["seeds"],
            "stage 1": recipe.stage1.model_dump(mode="json"),
            "stage 2": recipe.stage2.model_dump(mode="json"),
            "student": recipe.model_dump(mode="json")["student"],
            "sampler": recipe.sample.model_dump(mode="json"),
            "machine": provenance["timed_on"],
        },
        domain_labels={name: heading(name, domain.trained_on) for name, domain in domains.items()},
        notes=[
            "The pictures and curves are those of each row's first seed.",
            "Known pixels are pasted back into every result, so 'whole' scores differ by what stands in the hole.",
            "Minutes of training are steps times the time of a step, which was measured for all rows in turns.",
        ],
        plots=[
            (f"{text}; {LEGEND}", out / f"{cost}.png")
            for cost, text in PLOTS.items()
            if (out / f"{cost}.png").is_file()
        ],
        claims=[claim[:3] for claim in found],
    )


def _over(counts: Sequence[int]) -> str:
    """Of how many training seeds scores are, and what that is worth. counts: ascending."""
    of = "of 1 training seed" if counts == [1] else f"means over {' or '.join(map(str, counts))} training seeds"
    return of + ("; on fewer than three a difference may be chance" if counts[0] < LEAST_SEEDS else "")


def _distilled(plan: CompareRecipe, rows: Sequence[Row]) -> str:
    """A sentence of how many parameters became how many; '' where one of the two is not there yet."""
    params = {row.name: row.params for row in rows}
    teacher, student = params.get(TEACHER), params.get(plan.ours)
    if not (teacher and student):
        return ""
    return f"A teacher of {teacher:,} parameters was distilled into a student of {student:,}. "


def _curves(run: Run) -> list[Path]:
    """The losses of each stage, as they are kept beside the result."""
    return [log for stage in run.recipe.stages if (log := run.out / f"{stage}-losses.jsonl").is_file()]
