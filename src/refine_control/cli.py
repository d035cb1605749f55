"""The command line: the only room that knows every other. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import yaml

from refine_control.command import command, flag, parser, split_overrides
from refine_control.errors import UserError

RECIPE = flag("recipe", type=Path, help="a YAML file; the shipped ones are in recipes/")
SEEDS = "of the training: whole numbers with commas between"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what we were given, 130 stopped by Ctrl-C; run again to go on."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # their notes on dtypes hide our own messages
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # misses 4-bit kernels that nobody asked for
    whole = parser()
    try:
        words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
        args, rest = whole.parse_known_args(words)
        if rest:
            whole.error(f"unknown argument: {rest[0]}; see refine-control {args.command} --help")
        args.overrides = overrides
        args.run(args)
    except UserError as error:
        print(f"refine-control: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder we may not write to
        place = error.filename or "disk"
        reason = error.strerror or error
        print(f"refine-control: {reason}: {place}; make room or choose another place", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrefine-control: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


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


@command(
    "generate",
    "Fill the white part of a mask in one picture.",
    ["--model zoo:emoji-teacher --image face.png --mask hole.png --prompt 'flat cat face' --out filled.png"],
    [
        flag("--model", default="zoo:emoji-teacher", help="a saved pipeline's folder, or zoo:NAME"),
        flag("--controlnet", action="append", default=[], help="one saved on its own; may be repeated"),
        flag("--image", type=Path, required=True, help="brought to the model's resolution; the square in its middle"),
        flag("--mask", type=Path, required=True, help="white where to fill, of the picture's size"),
        flag("--prompt", default="", help="what to fill in"),
        flag("--out", type=Path, default=Path("filled.png"), help="the picture that is written"),
        flag("--controls", default="inpaint", help="one for each ControlNet: inpaint, edges, grey"),
        flag("--num_inference_steps", default="10", help="of the sampler, DDIM"),
        flag("--guidance_scale", default="2.0", help="1 asks the model once a step, more asks it twice"),
        flag("--seed", default="0", help="of the noise"),
        flag("--device", default="auto", help="auto, cpu, cuda or cuda:N"),
    ],
)
def _generate(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.diffusion.generate import generate
    from refine_control.distill.processes import pick_device

    flags = {name: _plain(getattr(args, name)) for name in ("num_inference_steps", "guidance_scale", "seed")}
    config = recipe.validate(recipe.SampleConfig, flags, "command line")
    kinds = recipe.validate(recipe.DataConfig, {"controls": args.controls.split(",")}, "command line").controls
    device = str(pick_device(args.device))
    side = generate(args.model, args.image, args.mask, args.prompt, args.out, config, device, kinds, args.controlnet)
    print(f"wrote {args.out}, {side}x{side}: the model's resolution")


@command(
    "data",
    "Check a folder of pictures or shards, or prepare one as shards.",
    ["check my/pictures", "prepare my/pictures --out my/shards --resolution 64"],
    [
        flag("action", choices=["check", "prepare"]),
        flag("folder", type=Path),
        flag("--split", help="train, val or test; by default check takes all there are, prepare takes train"),
        flag("--out", type=Path, help="prepare: where the shards go"),
        flag("--resolution", type=int, default=64, help="prepare: pixels a side"),
        flag("--fit", choices=["crop", "pad"], default="crop", help="prepare: how a picture becomes square"),
        flag("--skip_corrupt", action="store_true", help="prepare: leave out, and list, what cannot be used"),
    ],
)
def _data(args: argparse.Namespace) -> None:
    from refine_control.data.prepare import prepare
    from refine_control.data.source import check, open_dataset, splits_of

    if args.action == "prepare":
        if args.out is None:
            raise UserError("data prepare needs --out FOLDER for the shards")
        for path in prepare(args.folder, args.out, args.split or "train", args.resolution, args.fit, args.skip_corrupt):
            print(path)
        return
    unusable = total = 0
    for split in [args.split] if args.split else splits_of(args.folder):
        dataset = open_dataset(args.folder, split, lenient=True)
        lines, broken = dataset.faults, dict(check(dataset))
        faults = [*lines, *broken.values()]
        for reason in faults:
            print(reason)
        usable = (i for i, key in enumerate(dataset.keys()) if key not in broken)
        captions, pictures = sum(dataset.text(i) is not None for i in usable), len(dataset) + len(lines)
        print(f"{split}: {pictures} pictures, {captions} with captions, {len(faults)} cannot be used")
        unusable, total = unusable + len(faults), total + pictures
    if unusable:
        raise UserError(f"{unusable} of {total} pictures cannot be used; replace them, or skip_corrupt leaves them out")


@command(
    "student",
    "Say what a student will cost, before any training: a recipe's, a named one, or the best within a budget.",
    [
        "plan recipes/demo.yaml --student mobile",
        "plan --teacher my/sd15 --controlnet my/inpaint-controlnet --target bk-tiny",
        "plan --teacher zoo:emoji-teacher --macs 20M --params 1M",
    ],
    [
        flag("action", choices=["plan"]),
        flag("recipe", type=Path, nargs="?", help="a recipe; else give --teacher"),
        flag("--teacher", help="a saved pipeline's folder, zoo:NAME or a hub id; only its configs are read"),
        flag("--controlnet", action="append", default=[], help="one saved on its own; may be repeated"),
        flag("--target", help="bk-base, bk-small, bk-tiny, mobile or micro"),
        flag("--macs", help="at most, of foundation and module for one step of one picture, e.g. 60G"),
        flag("--params", help="at most, of foundation and module, e.g. 50M"),
    ],
    takes_overrides=True,
)
def _student(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.distill.footprint import footprint, footprint_table
    from refine_control.plans import StudentName
    from refine_control.student.named import named_plan
    from refine_control.student.outline import plan_teacher
    from refine_control.student.plan import plan_table
    from refine_control.student.search import as_yaml, parse_amount, search, search_table

    flags = {"--teacher": args.teacher, "--target": args.target, "--macs": args.macs, "--params": args.params}
    given = [flag for flag, value in flags.items() if value]
    if args.recipe:
        if given or args.controlnet:
            raise UserError(f"{(given or ['--controlnet'])[0]} and a recipe exclude each other; give one of them")
        loaded = recipe.load(recipe.DistilRecipe, args.recipe, args.overrides)
        teacher = plan_teacher(loaded.teacher, loaded.controlnets)
        print(f"{plan_table(loaded.student, teacher)}\n\ntraining by {args.recipe}:")
        print(footprint_table(footprint(loaded, teacher)))
        return
    if args.overrides:
        raise UserError(f"unknown argument: --{next(iter(args.overrides))}; overrides need a recipe")
    if not args.teacher or not (args.target or args.macs or args.params):
        raise UserError("give a recipe, or --teacher and one of --target, --macs, --params")
    if args.target and (args.macs or args.params):
        raise UserError("--target names a student and --macs or --params searches one; give either")
    budget = {flag: parse_amount(value, flag) for flag in ("--macs", "--params") if (value := flags[flag])}
    known = get_args(StudentName)
    if args.target not in (None, *known):
        raise UserError(f"--target '{args.target}' is no student; there are: {', '.join(known)}")
    teacher = plan_teacher(args.teacher, args.controlnet)
    if args.target:
        print(f"{plan_table(args.target, teacher)}\n\nIn a recipe 'student: {args.target}', or in full:\n")
        print(as_yaml(named_plan(args.target, teacher.denoiser)))
    else:
        print(search_table(search(teacher, budget.get("--macs"), budget.get("--params")), teacher))


@command("env", "Print versions and what this machine offers.", [""])
def _env(args: argparse.Namespace) -> None:
    from refine_control.evaluate.compare import machine

    for key, value in machine().items():
        print(f"{key:16} {value}")


def _plain(text: str) -> object:
    """A number where it reads as one; the config's own check names the rest."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _whole_number(text: str, flag: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"{flag}: '{text}' is no whole number; give e.g. 0,1,2")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
