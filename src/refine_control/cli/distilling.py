"""Commands that train and score: demo, compare, train-teacher, distill, evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from refine_control.command import CONTROLNET, command, flag, whole_number
from refine_control.errors import UserError

RECIPE = flag("recipe", type=Path, help="a YAML file; the shipped ones are in recipes/")
SEEDS = "of the training: whole numbers with commas between"


SHARED = [
    flag("--seeds", help=SEEDS + "; by default the recipe's"),
    flag("--dry-run", action="store_true", help="print the plan: rows, seeds, steps, minutes of training"),
]


@command(
    "demo",
    "Distil the embedded teacher, train scratch beside it, write a report.",
    ["", "--output_dir /tmp/demo"],
    [
        flag("--recipe", type=Path, default=Path("recipes/compare-demo.yaml"), help="what is trained and scored"),
        *SHARED,
    ],
    takes_overrides=True,
)
def _demo(args: argparse.Namespace) -> None:
    args.rows, args.rival, args.finished = None, [], False
    _compare(args)


@command(
    "compare",
    "Train and score the rows of a table over several seeds; resumes.",
    [
        "recipes/compare-emoji.yaml --dry-run",
        "recipes/compare-emoji.yaml",
        "recipes/compare-emoji.yaml --finished",
        "recipes/compare-emoji.yaml --rows scratch,refine-control --seeds 0 --output_dir runs/quick "
        "--work_dir runs/quick",
    ],
    [
        RECIPE,
        flag("--rows", help="what is trained, with commas between; tables are of all runs that are complete"),
        *SHARED,
        flag("--finished", action="store_true", help="train nothing; write the tables of the runs that are complete"),
        flag("--rival", type=Path, action="append", default=[], help="a file that defines a rival; may be repeated"),
    ],
    takes_overrides=True,
)
def _compare(args: argparse.Namespace) -> None:
    from refine_control.compare import compare, plan

    if "seed" in args.overrides:
        raise UserError("--seed: rows are compared over several seeds; give --seeds 5, or --seeds 0,1,2")
    loaded, overrides = plan.load(args.recipe, args.overrides)
    seeds = [whole_number(seed, "--seeds", most=2**64 - 1) for seed in args.seeds.split(",")] if args.seeds else None
    if args.finished and (args.rows or args.seeds):
        raise UserError("--finished: the tables are of all runs that are complete; leave --rows and --seeds out")
    part = plan.narrowed(loaded, args.rows.split(",") if args.rows else None, seeds)
    if args.dry_run:
        print(compare.dry_run(part, overrides, args.rival))
        return
    table = compare.compare(loaded, overrides, args.rival, args.finished, part)
    print(f"\n{table}\nreport: {loaded.output_dir}/report.html\ntables: {loaded.output_dir}/table.md")


@command(
    "train-teacher",
    "Train a teacher: autoencoder, text encoder, foundation, module.",
    ["recipes/emoji-teacher.yaml"],
    [RECIPE],
    takes_overrides=True,
)
def _train_teacher(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.distill.teacher import train_teacher

    folder = train_teacher(recipe.load(recipe.TeacherRecipe, args.recipe, args.overrides))
    print(f"the teacher is in {folder}")


@command(
    "distill",
    "Distil a student by a recipe: stage 1, then stage 2; resumes.",
    [
        "recipes/demo.yaml --labelled my/captioned --unlabelled my/plain",
        "recipes/sd15-inpaint.yaml --teacher my/sd --controlnet my/controlnet --student mobile "
        "--labelled my/captioned --unlabelled my/plain --output_dir runs/mine",
    ],
    [
        RECIPE,
        flag("--labelled", metavar="DIR", help="captioned pictures: a folder or shards; short for --data.labelled"),
        flag("--unlabelled", metavar="DIR", help="plain pictures for stage 2; short for --data.unlabelled"),
        CONTROLNET,
    ],
    takes_overrides=True,
)
def _distill(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.distill.distil import distil

    for name in ("labelled", "unlabelled"):
        if getattr(args, name):
            args.overrides[f"data.{name}"] = _as_it_is(getattr(args, name))
    if args.controlnet:
        args.overrides["controlnets"] = f"[{', '.join(map(_as_it_is, args.controlnet))}]"
    folder = distil(recipe.load(recipe.DistilRecipe, args.recipe, args.overrides))
    print(f"the student is in {folder}; DiffusionPipeline.from_pretrained loads it")


def _as_it_is(name: str) -> str:
    """A folder's name as an override that is read as just that, be it a number or with a '#'; a list stays one."""
    return name if name.startswith("[") else "'" + name.replace("'", "''") + "'"


@command(
    "evaluate",
    "Score saved models on held-out pictures, with classical inpainting beside them.",
    [
        "zoo:emoji-teacher runs/mine/student --baselines",
        "runs/mine/student --recipe runs/mine/recipe.yaml --output_dir runs/mine/scores",
    ],
    [
        flag("models", nargs="+", metavar="MODEL", help="a saved pipeline's folder, or zoo:NAME"),
        flag("--recipe", type=Path, default=Path("recipes/demo.yaml"), help="names pictures, masks and sampler"),
        flag("--baselines", action="store_true", help="mean colour, Telea, Navier-Stokes, biharmonic too"),
    ],
    takes_overrides=True,
)
def _evaluate(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.evaluate.saved import evaluate

    args.overrides.setdefault("output_dir", "runs/evaluate")
    loaded = recipe.load(recipe.DistilRecipe, args.recipe, args.overrides)
    print(f"\n{evaluate(loaded, args.models, args.baselines)}\nscores: {loaded.output_dir}/scores.json")
