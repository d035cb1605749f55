"""Quality against sampler steps: saved models on a comparison's held-out pictures, drawn with few steps and with many.

    python scripts/sampler_steps.py
    python scripts/sampler_steps.py --model mine=runs/mine/student --model zoo:emoji-teacher --out runs/steps

Without --model: the teacher of recipes/compare-emoji.yaml, the first three students of some of its rows, and the
embedded student. A name that stands several times is one line over several seeds. Pictures, masks, noise and guidance
are the comparison's. Stopped, it goes on: what a model drew is kept in --work. Writes scores.json, table.md, plot.png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from refine_control.compare import plots
from refine_control.compare.plan import TEACHER, CompareRecipe, base_recipe, load, runs
from refine_control.compare.runs import Workshop
from refine_control.compare.statistics import over_seeds
from refine_control.compare.summary import scored_on
from refine_control.compare.tables import cell, heading, pictures_scored
from refine_control.errors import UserError
from refine_control.evaluate.domains import Domain, controlnets_of, evaluate_model
from refine_control.evaluate.metrics import arrow
from refine_control.files import write_whole
from refine_control.provenance import machine
from refine_control.recipe import DistilRecipe

STEPS = (1, 2, 4, 10)
ROWS = ("scratch", "output-kd", "refine-control")
SEEDS = 3
RECIPE, OUT = Path("recipes/compare-emoji.yaml"), Path("results/sampler-steps")
EMBEDDED = "zoo:emoji-student"
KINDS = ("mean", "spread")
Models = dict[str, list[str]]  # name of a line -> its models, one a seed
Lines = dict[str, dict[int, dict[str, Any]]]  # name -> steps -> {"mean", "spread", "models"}


def default_models(plan: CompareRecipe) -> Models:
    """The teacher, the first students of ROWS that are there, the embedded student."""
    models: Models = {TEACHER: [base_recipe(plan, {}).teacher]}
    for row in ROWS:
        students = [str(run.work / "student") for run in runs(plan, {}) if run.row == row][:SEEDS]
        if there := [student for student in students if Path(student).is_dir()]:
            models[row] = there
        for absent in sorted({*students} - {*there}):
            print(f"sampler_steps: no student in '{absent}'; the table is without it", file=sys.stderr)
    return {**models, EMBEDDED.removeprefix("zoo:"): [EMBEDDED]}


def named_models(words: Sequence[str]) -> Models:
    """['a=folder', 'a=other', 'zoo:b', ...]; a model without a name has its own."""
    models: Models = {}
    for word in words:
        name, _, path = word.rpartition("=")
        models.setdefault(name or path, []).append(path)
    return models


def measure(
    models: Models, steps: Sequence[int], recipe: DistilRecipe, domains: dict[str, Domain], work: Path
) -> Lines:
    """Draws and scores what is not there yet."""
    lines: Lines = {}
    for name, paths in models.items():
        for count in steps:
            sample = recipe.sample.model_copy(update={"num_inference_steps": count})
            results = {
                place: evaluate_model(
                    path,
                    domains,
                    recipe.model_copy(update={"sample": sample}),
                    work / name.replace(":", "-").replace("/", "-") / f"{place}" / f"steps-{count}",
                    controlnets_of(path, recipe),
                )
                for place, path in enumerate(paths)
            }
            mean, spread = over_seeds(results)
            lines.setdefault(name, {})[count] = {"mean": mean, "spread": spread, "models": len(results)}
    return lines


def markdown(lines: Lines, sentence: str, trained_on: Collection[str] = ()) -> str:
    """Scores in the hole, a table for each domain. trained_on: the domains whose pictures were."""
    parts = ["# Quality against sampler steps", "", sentence, ""]
    for domain in _domains(lines):
        metrics = _metrics(lines, domain)
        arrows = [f"{m} {arrow(m)}" for m in metrics]
        parts += [
            f"## {heading(domain, domain in trained_on)}, in the hole",
            "",
            f"| | steps | {' | '.join(arrows)} | seeds |",
        ]
        parts.append("|---|" + "---:|" * (len(metrics) + 2))
        for name, by_steps in lines.items():
            for count, one in by_steps.items():
                cells = [cell(*(one[kind][domain][m]["hole"] for kind in KINDS)) for m in metrics]
                parts.append(f"| {name} | {count} | {' | '.join(cells)} | {one['models']} |")
        parts.append("")
    return "\n".join(parts)


def _domains(lines: Lines) -> list[str]:
    return list(next(iter(next(iter(lines.values())).values()))["mean"])


def _metrics(lines: Lines, domain: str) -> list[str]:
    return list(next(iter(next(iter(lines.values())).values()))["mean"][domain])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--model", action="append", metavar="NAME=PATH", help="a saved pipeline's folder, or zoo:NAME")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--out", type=Path, help=f"by default {OUT}; to be given with whatever is not the default")
    parser.add_argument("--work", type=Path, default=Path("runs/sampler-steps"))
    args = parser.parse_args()
    if args.out is None and (args.model or args.recipe != RECIPE or tuple(args.steps) != STEPS):
        parser.error(f"give --out: {OUT} has the table of {RECIPE}'s own models and of all steps")
    out = args.out or OUT
    plan, _ = load(args.recipe, {})
    shop = Workshop(base_recipe(plan, {}))
    models = named_models(args.model) if args.model else default_models(plan)
    lines = measure(models, args.steps, shop.base, shop.domains, args.work)
    scored = next(iter(shop.domains.values())).provenance()
    result = {
        "command": shlex.join(["python", f"scripts/{Path(__file__).name}", *sys.argv[1:]]),
        "commit": shop.commit, "machine": machine(), "extractors": scored, "models": models,
        "sample": shop.base.sample.model_dump(exclude={"num_inference_steps"}), "rows": lines,
    }  # fmt: skip
    write_whole(out / "scores.json", json.dumps(result, indent=1))
    sentence = (
        f"Mean ± standard deviation over training seeds; {pictures_scored(scored_on(shop))}, the same noise for "
        f"all; guidance {shop.base.sample.guidance_scale:g}, DDIM; features of {scored[0]['extractor']}; "
        f"code at {shop.commit or 'no commit'}."
    )
    text = markdown(lines, sentence, [name for name, domain in shop.domains.items() if domain.trained_on])
    write_whole(out / "table.md", text)
    plots.plot_lines(lines, "sampler steps", out / "plot.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"sampler_steps: {error}")
