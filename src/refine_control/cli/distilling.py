"""Commands that train and score: demo, compare, train-teacher, distill, evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from refine_control.command import command, flag
from refine_control.errors import UserError

RECIPE = flag("recipe", type=Path, help="a YAML file; the shipped ones are in recipes/")
SEEDS = "of the training: whole numbers with commas between"


@command(
    "demo",
    "Distil the embedded teacher, train scratch beside it, write a report.",
    ["", "--output_dir /tmp/demo"],
    [
        flag("--recipe", type=Path, default=Path("recipes/demo.yaml"), help="what is trained and scored"),
        flag("--seeds", default="0", help=SEEDS),
    ],
    takes_overrides=True,
)
def _demo(args: argparse.Namespace) -> None:
    args.rows = "scratch,refine-control"
    _compare(args)


@command(
    "compare",
    "Train and score rows of a recipe over several seeds; resumes.",
    ["recipes/demo.yaml --rows scratch,teacher-weights,refine-control --seeds 0,1,2"],
    [
        RECIPE,
        flag(
            "--rows",
            default="scratch,teacher-weights,stage1-continued,refine-control",
            help="what to compare, with commas between; plain-rows-without-task is there too",
        ),
        flag("--seeds", default="0,1,2", help=SEEDS),
    ],
    takes_overrides=True,
)
def _compare(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.evaluate.compare import compare

    if "seed" in args.overrides:
        raise UserError("--seed: rows are compared over several seeds; give --seeds 5, or --seeds 0,1,2")
    loaded = recipe.load(recipe.DistilRecipe, args.recipe, args.overrides)
    table = compare(loaded, args.rows.split(","), [_whole_number(seed, "--seeds") for seed in args.seeds.split(",")])
    print(f"\n{table}\nreport: {loaded.output_dir}/report.html\nscores: {loaded.output_dir}/scores.json")


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
    ["recipes/demo.yaml --labelled my/captioned --unlabelled my/plain"],
    [
        RECIPE,
        flag("--labelled", metavar="DIR", help="captioned pictures: a folder or shards; short for --data.labelled"),
        flag("--unlabelled", metavar="DIR", help="plain pictures for stage 2; short for --data.unlabelled"),
    ],
    takes_overrides=True,
)
def _distill(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.distill.distil import distil

    for name in ("labelled", "unlabelled"):
        if getattr(args, name):
            args.overrides[f"data.{name}"] = getattr(args, name)
    folder = distil(recipe.load(recipe.DistilRecipe, args.recipe, args.overrides))
    print(f"the student is in {folder}; DiffusionPipeline.from_pretrained loads it")


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
    from refine_control.evaluate.compare import evaluate

    args.overrides.setdefault("output_dir", "runs/evaluate")
    loaded = recipe.load(recipe.DistilRecipe, args.recipe, args.overrides)
    print(f"\n{evaluate(loaded, args.models, args.baselines)}\nscores: {loaded.output_dir}/scores.json")


def _whole_number(text: str, flag: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"{flag}: '{text}' is no whole number; give e.g. 0,1,2")
    return int(text)
