"""Batches made ahead are the batches that would have been made on demand."""

import threading
from concurrent.futures import Future

import pytest

from refine_control.data.ahead import Ahead


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_step_is_made_once_and_handed_out_in_order(workers: int) -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with Ahead(make, 7, workers) as ahead:
        assert [ahead(step) for step in range(2, 7)] == [4, 9, 16, 25, 36]
    assert sorted(made) == [2, 3, 4, 5, 6], "none twice, none beyond the last"


def test_the_next_step_is_made_while_this_one_is_used() -> None:
    next_one: Future[None] = Future()

    def make(step: int) -> int:
        if step == 1:
            next_one.set_result(None)
        return step

    with Ahead(make, 5, 1) as ahead:
        ahead(0)
        next_one.result(timeout=10)


def test_without_workers_nothing_runs_elsewhere() -> None:
    with Ahead(lambda step: threading.current_thread(), 5, 0) as ahead:
        assert ahead(0) is threading.current_thread()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_its_step_is_asked_for(workers: int) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("no such picture")
        return step

    with Ahead(make, 5, workers) as ahead:
        assert [ahead(0), ahead(1)] == [0, 1]
        with pytest.raises(ValueError, match="no such picture"):
            ahead(2)
