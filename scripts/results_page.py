"""Writes docs/results.md and README.md's table from the JSON under results/: no number in them is typed by hand.

python scripts/results_page.py
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_control.compare.statistics import LEAST_SEEDS
from refine_control.evaluate.metrics import arrow
from refine_control.export.bench import table as table_of_bench
from short_table import ROOT, in_readme, read

COMPARISONS = (
    "compare-larger",
    "compare-emoji",
    "compare-one-step",
    "compare-terms",
    "compare-features",
    "compare-labels",
    "compare-unlabelled",
    "compare-schedule",
    "compare-rivals",
    "compare-cast",
)
EXPORT = "refine-control export zoo:emoji-student --to onnx|openvino --precision fp32|fp16|int8 --out runs/edge/..."
FIRST = {  # what a comparison needs
    "compare-unlabelled": ["python scripts/unlabelled_variants.py"],
    "compare-cast": ["python scripts/biased_data.py", "refine-control train-teacher recipes/biased-teacher.yaml"],
}
THEN = {"compare-labels": ["python scripts/labels_plot.py"]}
ALL_COMPARED = (*COMPARISONS, "demo")  # as they follow each other on the page
PROTOCOL = (
    "All comparisons are CPU variants, trimmed to what some hours of two cores allow: pictures of 32 px, students of 3 "
    "to 8 million parameters, for ablations half of the proof's steps, for the larger student and the one of a single "
    "forward some of the rows; where claims are made five seeds for the method, output distillation and from scratch "
    "(three in the demo), for most other rows three. The same grid at 64 px on a GPU has not been run. A row claims "
    f"nothing on fewer than {LEAST_SEEDS} seeds; rows of one seed are of searches.",
    "",
    "All rows of a table see the same batches, masks and noise, but for those that are about pictures or batches; all "
    "are drawn with the same sampler, but for networks that have none; student and steps are the same unless a row's "
    "name says otherwise, and wall time stands beside steps. What is scored shows concepts that no training picture "
    "shows. Of each run `results/COMPARISON/ROW/seed-N/run.json` has its scores picture by picture, recipe, commit and "
    "machine; `scores.json` has the digest of what decided it. The rate was chosen on validation pictures for the "
    "method and from scratch (`recipes/compare-schedule.yaml`), and distillation rivals take it; their weights are "
    "their papers' or the best of two or three there (`recipes/compare-rivals.yaml`). On the scored ones were chosen "
    "the rate of the feed-forward rival (decision 33) and, for all models alike, the sampler's steps; of two against "
    "ten validation pictures say the same (`results/sampler-steps-val`).",
    "",
    "The commands go on from what is there: with the results of this repository they write the tables anew, from its "
    "runs. With `--output_dir runs/anew --work_dir runs/anew` a comparison is trained anew, and its other scripts need "
    "the students of such a run.",
)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """rows: name -> {metric: {"whole", "hole"}}."""
    metrics = [m for m, v in next(iter(rows.values())).items() if isinstance(v, dict) and "hole" in v]
    lines = ["| | " + " | ".join(f"{m} {arrow(m)} whole / hole" for m in metrics) + " |"]
    lines.append("|---|" + "---|" * len(metrics))
    for name, scores in rows.items():
        cells = [" / ".join(f"{scores[m][region]:.4g}" for region in ("whole", "hole")) for m in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def by_domain(rows: dict[str, dict[str, Any]]) -> list[str]:
    """rows: name -> domain -> {metric: {"whole", "hole"}}; one table for each domain below its heading."""
    lines = []
    for domain in next(iter(rows.values())):
        lines += [f"{domain}:", "", *table({name: domains[domain] for name, domains in rows.items()})]
    return lines


def written(path: str, commands: Sequence[str], pictures: Mapping[str, str]) -> list[str]:
    """A table in Markdown as a command wrote it, headings one level lower; pictures beside it: file -> text."""
    file = ROOT / "results" / path
    if not file.is_file():
        return []
    title, *rest = file.read_text(encoding="utf-8").splitlines()
    lines = [f"#{title}", "", ", then ".join(f"`{command}`" for command in commands)]
    lines += [*(f"#{line}" if line.startswith("#") else line for line in rest), ""]
    for name, text in pictures.items():
        if file.with_name(name).is_file():
            lines += [f"![{text}](../results/{Path(path).with_name(name).as_posix()})", ""]
    return lines


def compared(name: str, commands: Sequence[str]) -> list[str]:
    """What `refine-control compare` wrote."""
    plots = {
        "labels.png": "scores against the share of captions",
        "rows.png": "scores of each row",
        "macs.png": "scores against the MACs of a picture",
        "wall_seconds.png": "scores against the time of training",
    }
    lines = written(f"{name}/table.md", commands, plots)
    if (ROOT / "results" / name / "report.html").is_file():
        lines += [f"Pictures and losses: [results/{name}/report.html](../results/{name}/report.html).", ""]
    return lines


def overview() -> list[str]:
    """A line for each comparison: its rows, their seeds where they are trained, how much of what it claims holds."""
    here = [one for name in ALL_COMPARED if (one := read(f"{name}/scores.json"))]
    lines = ["| comparison | rows | seeds | claims that hold |", "|---|---:|---:|---:|"]
    for one in here:
        counts = [len(row["runs"]) for row in one["rows"].values() if row["steps"]]
        seeds = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
        claims = [claim["holds"] for claim in one["claims"]]
        held = f"{sum(claims)} of {len(claims)}" if claims else "–"
        lines.append(f"| [{one['title']}](#{anchor(one['title'])}) | {len(one['rows'])} | {seeds} | {held} |")
    return [*lines, ""]


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def edge(title: str, measured: dict[str, Any], picture: str) -> list[str]:
    """What `refine-control bench` measured."""
    how, on = measured["settings"], measured["machine"]
    lines = [f"## {title}", "", f"`{measured['command']}`, of exports by", "", f"`{EXPORT}`", ""]
    lines.append(table_of_bench(measured, " | "))
    scored = measured["rows"][0].get("provenance")
    said = f"scores in the hole of {scored['n']} held-out pictures ({scored['extractor']})" if scored else "no scores"
    lines += [
        f"One picture a time, guidance {how['guidance_scale']}, {how['num_threads']} threads of {on['cores']} cores; "
        f"medians and quartiles of {how['repeats']} turns, the models in turns, each in a process of its own; faster "
        f"than the slowest line; size is that of the files; {said}.",
        "",
        f"![time of a picture]({picture})",
        "",
    ]
    return lines


def full_size(measured: dict[str, Any]) -> list[str]:
    """What benchmarks/edge.py measured."""
    how, on = measured["settings"], measured["machine"]
    return [
        "## On the edge, at Stable Diffusion's size",
        "",
        "`python benchmarks/edge.py`",
        "",
        "Random weights of the published shapes (SD 1.5 + ControlNet and students of them, 512 px): time and memory do "
        "not depend on training, and quality is not claimed. "
        f"Guidance {how['guidance_scale']}, {how['num_threads']} threads of {on['cores']} cores; "
        f"medians and quartiles of {how['repeats']} turns, one model in memory at a time. "
        "The autoencoder and the text encoder are the teacher's own, and most of a small student's time and size.",
        "",
        table_of_bench(measured, " | "),
        *(
            [f"Not exported, for want of memory: {', '.join(absent)}.", ""]
            if (absent := measured["not_exported"])
            else []
        ),
        "![time of a picture](../results/edge-full-size/bench.png)",
        "",
    ]


def on_what(scores: dict[str, Any]) -> str:
    """scores: what `evaluate` wrote."""
    count, sample = scores["provenance"][0]["n"], scores["sample"]
    return (
        f"On {count} held-out pictures of each domain; {sample['num_inference_steps']} sampler steps, "
        f"guidance {sample['guidance_scale']:g}."
    )


def on_where(scores: dict[str, Any]) -> str:
    """The machine and the commit of what `evaluate` wrote."""
    machine = scores["machine"]
    return (
        f"{machine['cores']} cores, {machine['gpu'] or 'no GPU'}, torch {machine['torch']}; code at {scores['commit']}."
    )


def page() -> str:
    """docs/results.md."""
    lines = ["# Results", "", "Written by `scripts/results_page.py` from the JSON files under `results/`.", ""]
    lines += [*PROTOCOL, "", *overview()]
    if gate := read("teacher-gate/scores.json"):
        lines += ["## The embedded teacher against classical inpainting", ""]
        lines += ["`refine-control evaluate zoo:emoji-teacher --baselines`", ""]
        lines += [f"{on_what(gate)} {on_where(gate)}", ""]
        rows = {Path(k).name if "/" in k else k: v["domains"] for k, v in gate.items() if "domains" in v}
        lines += by_domain(rows)
    if student := read("emoji-student/scores.json"):
        lines += ["## The embedded student beside its teacher", ""]
        lines += [
            "`refine-control evaluate zoo:emoji-student zoo:emoji-teacher`",
            "",
            f"One seed, no spread. {on_what(student)} {on_where(student)}",
            "",
        ]
        rows = {Path(k).parent.name if "/" in k else k: v["domains"] for k, v in student.items() if "domains" in v}
        lines += by_domain(rows)
    for name in COMPARISONS:
        command = f"refine-control compare recipes/{name}.yaml"
        lines += compared(name, [*FIRST.get(name, []), command, *THEN.get(name, [])])
    passed = {"pictures.png": "some of the pictures"}
    lines += written("compare-cast/bias.md", ["python scripts/bias_table.py"], passed)
    plot = {"plot.png": "scores in the hole against sampler steps"}
    drawn = read("sampler-steps/scores.json") or {}
    commands = ["refine-control compare recipes/compare-emoji.yaml", drawn.get("command", "")]
    lines += written("sampler-steps/table.md", commands, plot)
    lines += compared("demo", ["refine-control demo --seeds 0,1,2 --output_dir results/demo"])
    if measured := read("bench/bench.json"):
        lines += edge("On the edge", measured, "../results/bench/bench.png")
    if full := read("edge-full-size/bench.json"):
        lines += full_size(full)
    if browser := read("benchmark-page.json"):
        lines += [
            "## In the browser",
            "",
            "`python benchmarks/page.py runs/edge/site`, its first lines say of what",
            "",
        ]
        lines += [f"| | a picture, {browser['steps']} steps (ms) | a step (ms) |", "|---|---|---|"]
        for name, taken in browser["models"].items():
            cells = [
                f"{t['median']:.0f} ({t['low']:.0f}-{t['high']:.0f})" for t in (taken["picture_ms"], taken["step_ms"])
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", *dict.fromkeys(taken["runs_on"] for taken in browser["models"].values()), ""]
        lines += [f"{browser['browser']}, {browser['turns']} turns, medians and quartiles, previews included.", ""]
    if step := read("benchmark-step.json"):
        ratio = step["step_over_floor"]
        lines += ["## One distillation step against its floor", "", "`python benchmarks/step.py recipes/demo.yaml`", ""]
        lines += ["The floor: the teacher's forward, the student's forward and backward, and nothing else.", ""]
        lines.append(
            f"{ratio['median']:.2f} times the floor (quartiles {ratio['low']:.2f} and {ratio['high']:.2f}, "
            f"{step['steps']} steps of {step['batch_size']}, {step['machine']['threads']} threads); "
            f"{100 * step['share_waiting_for_data']:.1f} % of the step waits for data."
        )
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    (ROOT / "docs" / "results.md").write_text(page(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
