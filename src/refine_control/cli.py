"""The command line: the only room that knows every other. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from refine_control import __version__
from refine_control.errors import UserError

OVERRIDES = "Any key of the recipe can be overridden: --stage1.steps 100 --data.labelled my/folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what we were given, 130 stopped by Ctrl-C; run again to go on."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unknown argument: {rest[0]}; see refine-control {args.command} --help")
    try:
        args.overrides = _overrides(rest)
        args.run(args)
    except UserError as error:
        print(f"refine-control: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrefine-control: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refine-control",
        description="Distil a diffusion foundation and its control module into a small student.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, help: str, examples: str, takes_overrides: bool = False):  # noqa: ANN001, ANN202, A002
        command = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"examples:\n{examples}" + (f"\n\n{OVERRIDES}" if takes_overrides else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, takes_overrides=takes_overrides)
        return command

    teacher = add(
        "train-teacher",
        _train_teacher,
        "Train a teacher: autoencoder, text encoder, foundation and control module.",
        "  refine-control train-teacher recipes/emoji-teacher.yaml",
        takes_overrides=True,
    )
    teacher.add_argument("recipe", type=Path)
    return parser


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or any(not key.startswith("--") for key in words[::2]):
        raise UserError(f"overrides come as '--key value', not '{' '.join(rest)}'")
    for key, value in zip(words[::2], words[1::2], strict=True):
        pairs[key.removeprefix("--")] = value
    return pairs


def _train_teacher(args: argparse.Namespace) -> None:
    from refine_control import recipe
    from refine_control.distill.teacher import train_teacher

    folder = train_teacher(recipe.load(recipe.TeacherRecipe, args.recipe, args.overrides))
    print(f"the teacher is in {folder}")


if __name__ == "__main__":
    sys.exit(main())
