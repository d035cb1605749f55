"""The comparison as Markdown: scores in the hole, the method against each row, claims, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refine_control.compare.claims import Claim
from refine_control.compare.plan import TEACHER, CompareRecipe
from refine_control.compare.statistics import Results, beyond_spread, duel, metrics_of
from refine_control.evaluate.metrics import arrow
from refine_control.evaluate.report import Row

NAMES = {"labelled": "the labelled domain", "unlabelled": "the plain domain"}


def heading(domain: str, trained_on: bool = False) -> str:
    """What a table of a domain's scores is headed by."""
    of = f"ictures of {NAMES.get(domain, domain)}"
    return f"P{of}, which were trained on" if trained_on else f"Held-out p{of}"


def _cell_text(label: str) -> str:
    """A label as it can stand in a table."""
    return label.replace("|", r"\|")


def markdown(
    title: str,
    plan: CompareRecipe,
    rows: Sequence[Row],
    results: Mapping[str, Results],
    found: Sequence[Claim],
    provenance: Mapping[str, Any],
) -> str:
    """All tables. Whole-image scores stand in table.csv and on the page."""
    lines = [f"# {title}", "", *_how(provenance), ""]
    for domain in dict.fromkeys(domain for row in rows for domain in row.scores):
        trained_on = provenance["scored"][domain]["trained_on"]
        lines += [f"## {heading(domain, trained_on)}, in the hole", "", *_scores(rows, domain, results), ""]
    if plan.ours in results and results.keys() - {plan.ours, TEACHER}:
        lines += [f"## {plan.label(plan.ours)} against each row, in the hole", "", *_duels(plan, results), ""]
    if found:
        lines += ["## Claims", "", "| claim | | figures |", "|---|---|---|"]
        lines += [f"| {c.text} | {'holds' if c.holds else '**does not hold**'} | {c.figures} |" for c in found]
        lines.append("")
    lines += ["## What it costs", "", *_costs(rows, provenance), ""]
    return "\n".join(lines)


def _how(provenance: Mapping[str, Any]) -> list[str]:
    extractor = provenance["extractors"][0]
    machines = "; ".join(
        dict.fromkeys(f"{cores} cores, {gpu}, torch {torch}" for _, cores, gpu, torch in provenance["machines"])
    )
    samplers = " or ".join(f"{steps} sampler step(s), guidance {scale:g}" for steps, scale in provenance["samplers"])
    return [
        f"Mean ± standard deviation over training seeds; {samplers}; {pictures_scored(provenance['scored'])}; "
        f"features of {extractor['extractor']}; {machines}; "
        f"code at {', '.join(provenance['commits']) or 'no commit'}. {_gate(provenance['gate_failures'])}",
    ]


def pictures_scored(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """scored: as of `summary.scored_on`."""
    return "pictures scored: " + ", ".join(f"{one['n']} of {one['data']}" for one in scored.values())


def _gate(failures: Sequence[str] | None) -> str:
    if failures is None:
        return "The teacher's gate is not checked here: it takes the teacher and a row of classical inpainting."
    beaten = f"fails: {', '.join(failures)}" if failures else "holds"
    return (
        f"The teacher's gate (better than classical inpainting in LPIPS, FID and CMMD of the labelled domain) {beaten}."
    )


def _scores(rows: Sequence[Row], domain: str, results: Mapping[str, Results]) -> list[str]:
    metrics = list(dict.fromkeys(m for row in rows for m in row.scores.get(domain, {})))
    lines = [
        "| | " + " | ".join(f"{m} {arrow(m)}" for m in metrics) + " | seeds |",
        "|---|" + "---:|" * (len(metrics) + 1),
    ]
    for row in rows:
        cells = []
        for m in metrics:
            cells.append(cell(row.scores[domain][m]["hole"], row.spread[domain][m]["hole"]))
        lines.append(f"| {_cell_text(row.label)} | {' | '.join(cells)} | {len(results[row.name])} |")
    return lines


def cell(mean: float, spread: float | None) -> str:
    """A score over seeds; without a spread where there is one seed."""
    return f"{mean:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def _duels(plan: CompareRecipe, results: Mapping[str, Results]) -> list[str]:
    """Gains: above 0 the method is better, in every column."""
    ours = results[plan.ours]
    metrics = list(dict.fromkeys(m for some in metrics_of(ours).values() for m in some))
    lines = [
        "How much better (above 0) or worse, on the seeds that both have (the means above may be over more): mean ± "
        "standard deviation over seeds, seeds won; with three seeds or more bold beyond that spread, which alone is "
        "weak evidence: with three it can be p 0.2. p: of a paired t-test over seeds, of a Wilcoxon test over images; "
        "of so many tests some are below 0.05 by chance.",
        "",
        "| against | domain | " + " | ".join(metrics) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for rival in (name for name in results if name not in (plan.ours, TEACHER)):
        for domain in metrics_of(ours):
            found = [duel(ours, results[rival], domain, m) for m in metrics]
            cells = ["–" if one is None else _gain(one) for one in found]
            lines.append(f"| {_cell_text(plan.label(rival))} | {domain} | " + " | ".join(cells) + " |")
    return lines


def _gain(found: Mapping[str, Any]) -> str:
    spread = "" if found["sd"] is None else f" ± {found['sd']:.2g}"
    text = f"{found['mean']:+.3g}{spread}"
    text = f"**{text}**" if beyond_spread(found) else text
    tests = [f", {name} p {p:.2g}" for name in ("seeds", "images") if (p := found[f"p_{name}"]) is not None]
    return f"{text} ({found['won']}/{found['n']}{''.join(tests)})"


def _costs(rows: Sequence[Row], provenance: Mapping[str, Any]) -> list[str]:
    on, turns = provenance["timed_on"], provenance["timed_turns"]
    timed = (
        f"Minutes of training: steps times the fastest of {turns} turns of a step, nothing of the teacher's kept from "
        f"earlier; {on['threads']} thread(s) of {on['cores']} cores, {on['processor']}, {on['gpu'] or 'no GPU'}."
    )
    lines = [
        "Parameters, MACs and ms are of foundation and module, without the autoencoder and the text encoder, which are "
        f"the teacher's; of a rival's own network, of all of it. {timed if turns else 'Times are not measured yet.'}",
        "",
        "| | in plots and claims | parameters | MACs of a forward | ms of a forward | steps | minutes of training |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            row.name,
            f"{row.params:,}" if row.params else "–",
            f"{row.macs:,}" if row.macs else "–",
            f"{row.latency_ms:.1f}" if row.latency_ms else "–",
            f"{row.steps:,}" if row.steps else "–",
            f"{row.wall_seconds / 60:.1f}" if row.wall_seconds else "–",
        ]
        lines.append(f"| {_cell_text(row.label)} | {' | '.join(cells)} |")
    return lines
