"""The command line: the only room that knows every other. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from refine_control.cli import distilling, edge, models  # noqa: F401  each registers its commands
from refine_control.command import parser, split_overrides
from refine_control.errors import Interrupted, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what we were given, 130 ended by Ctrl-C, 143 by SIGTERM; then run it again."""
    _end_by_exception(signal.SIGTERM)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # their notes on dtypes hide our own messages
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
    except (KeyboardInterrupt, Interrupted) as stopped:
        print("\nrefine-control: stopped; the same command goes on where this one was", file=sys.stderr)
        return 128 + (stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT)
    return 0


def _end_by_exception(number: int) -> None:
    """As Ctrl-C does: what is written aside is removed, locks are given back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(number, stop)
