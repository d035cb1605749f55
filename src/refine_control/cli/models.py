"""Commands around models and data: generate, data, student, env."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from refine_control.command import CONTROLNET, command, flag, plain
from refine_control.errors import UserError, printable


@command(
    "generate",
    "Fill the white part of a mask in one picture.",
    ["--model zoo:emoji-teacher --image face.png --mask hole.png --prompt 'flat cat face' --out filled.png"],
    [
        flag("--model", default="zoo:emoji-teacher", help="a saved pipeline's folder, or zoo:NAME"),
        CONTROLNET,
        flag("--image", type=Path, required=True, help="brought to the model's resolution; the square in its middle"),
        flag("--mask", type=Path, required=True, help="white where to fill, of the picture's size"),
        flag("--prompt", default="", help="what to fill in"),
        flag("--out", type=Path, default=Path("filled.png"), help="the picture that is written"),
        flag("--controls", default="inpaint", help="one for each ControlNet: inpaint, edges, grey"),
        flag("--num_inference_steps", help="of the sampler, DDIM; without, as the model asks"),
        flag("--guidance_scale", help="likewise; 1 asks the model once a step, more asks it twice"),
        flag("--seed", default="0", help="of the noise"),
        flag("--device", default="auto", help="auto, cpu, cuda or cuda:N"),
    ],
)
def _generate(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.diffusion.generate import generate
    from refine_control.distill.processes import pick_device

    flags = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
    given = {name: plain(value) for name, value in flags.items() if value is not None}
    config = recipe.validate(recipe.SampleConfig, given, "command line")
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
    from refine_control.data.source import beside_splits, check, open_dataset, splits_of

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
            print(printable(reason))
        usable = (i for i, key in enumerate(dataset.keys()) if key not in broken)
        captions, pictures = sum(dataset.text(i) is not None for i in usable), len(dataset) + len(lines)
        print(f"{split}: {pictures} pictures, {captions} with captions, {len(faults)} cannot be used")
        unusable, total = unusable + len(faults), total + pictures
    if beside := beside_splits(args.folder):
        print(f"{beside} pictures lie beside {', '.join(splits_of(args.folder))}, not read; move them into one")
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
        CONTROLNET,
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
    from refine_control.provenance import machine

    for key, value in machine().items():
        print(f"{key:16} {value}")
