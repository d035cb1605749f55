"""Being asked to stop: the first SIGTERM or Ctrl-C lets a step end and be saved, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 2.0  # seconds in which a launcher passes on what the terminal has sent us already


class Interrupts:
    """Inside, the first signal is remembered, in the main thread of a process; the second acts as it always does."""

    def __init__(self, team: Accelerator) -> None:
        self.team = team
        self._asked, self._when = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """The signal that any process of the team was sent, or 0. Every process must call it, after the same step."""
        if self.team.num_processes == 1:
            return self._asked
        return int(self.team.gather(torch.tensor([self._asked], device=self.team.device)).max())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked, self._when = number, time.monotonic()
            if self.team.is_main_process:
                os.write(2, b"\nrefine-control: stopping after this step; once more stops at once\n")
        elif self.team.num_processes == 1 or time.monotonic() - self._when > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
