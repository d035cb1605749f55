"""How a command of the command line is written: its name, help, examples and flags stand above its function."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from refine_control import __version__
from refine_control.errors import UserError
from refine_control.plain import read_flag

OVERRIDES = "Any key of the recipe can be overridden: --stage1.steps 100 --data.labelled my/folder"
Flag = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    name: str
    help: str
    examples: str
    flags: tuple[Flag, ...]
    takes_overrides: bool
    run: Callable[[argparse.Namespace], None]


COMMANDS: list[Command] = []


def flag(*names: str, **options: Any) -> Flag:
    """What argparse's `add_argument` is given."""
    return names, options


CONTROLNET = flag("--controlnet", action="append", default=[], help="one saved on its own; may be repeated")


def command(
    name: str, help: str, examples: Sequence[str], flags: Sequence[Flag] = (), takes_overrides: bool = False
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[argparse.Namespace], None]]:
    """Makes a function of the parsed arguments one of the commands."""

    def register(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        lines = "\n".join(f"  refine-control {name} {example}".rstrip() for example in examples)
        COMMANDS.append(Command(name, help, lines, tuple(flags), takes_overrides, run))
        return run

    return register


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the examples as they are written, and every default that is something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, "", [], False) and action.option_strings
        return super()._get_help_string(action) if shown else action.help


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command line without its overrides, and these: every `--key value` that is no flag of the command.

    Raises UserError for a key without a value.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    mine = next((each for each in COMMANDS if each.name == name and each.takes_overrides), None)
    if mine is None:
        return list(words), {}
    known = {"-h", "--help", *(flag for names, _ in mine.flags for flag in names)}
    kept: list[str] = []
    overrides: dict[str, str] = {}
    waiting = ""  # the last word, where it was a key whose value comes next
    for word in [*words, "--"]:
        if waiting and word.startswith("--"):
            raise UserError(f"'--{waiting}' has no value; overrides come as '--key value'")
        if waiting:
            overrides[waiting], waiting = word, ""
        elif word.startswith("--") and word.partition("=")[0] not in known and word != "--":
            key, equals, value = word.removeprefix("--").partition("=")
            if equals:
                overrides[key] = value
            else:
                waiting = key
        else:
            kept.append(word)
    return kept[:-1], overrides


def parser() -> argparse.ArgumentParser:
    """Of all commands that were registered."""
    whole = argparse.ArgumentParser(
        prog="refine-control",
        description="Distil a diffusion foundation and its control module into a small student.",
    )
    whole.add_argument("--version", action="version", version=__version__)
    parsers = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in COMMANDS:
        added = parsers.add_parser(
            each.name,
            help=each.help,
            description=each.help,
            epilog="examples:\n" + each.examples + (f"\n\n{OVERRIDES}" if each.takes_overrides else ""),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        added.set_defaults(run=each.run)
        for names, options in each.flags:
            added.add_argument(*names, **options)
    return whole


def whole_number(text: str, flag: str, least: int = 0, most: int = 10**9) -> int:
    """Raises UserError, which names the flag, for text that is none within these bounds."""
    given = text.strip()
    if not (given.isascii() and given.isdigit() and len(given) <= len(str(most)) and least <= int(given) <= most):
        raise UserError(f"{flag} '{text[:80]}' is no whole number from {least} to {most}")
    return int(given)


def plain(text: str) -> object:
    """A number where it reads as one; the config's own check names the rest."""
    try:
        return read_flag(text)
    except ValueError:
        return text
