"""Batches made before they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(step)` for step < last, by `workers` threads, one step ahead each; 0 makes each when it is asked for.

    Threads, not processes: decoding and resizing leave Python's lock, and a step's result does not depend on who makes
    it. An exception in `make` is raised where its step is asked for.
    """

    def __init__(self, make: Callable[[int], T], last: int, workers: int) -> None:
        self.make, self.last, self.workers = make, last, workers
        self._pool = ThreadPoolExecutor(workers, "batch") if workers else None
        self._coming: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        if self._pool is None:
            return self.make(step)
        for later in range(step, min(step + self.workers + 1, self.last)):
            if later not in self._coming:
                self._coming[later] = self._pool.submit(self.make, later)
        return self._coming.pop(step).result()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
