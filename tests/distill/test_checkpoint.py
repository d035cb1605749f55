"""A checkpoint is whole or invisible, and the last whole one outlives whatever goes wrong after it."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refine_control.distill import checkpoint
from refine_control.errors import DataError


def some_state(seed: int, width: int = 3) -> checkpoint.State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "trainable": {
            "weight": torch.randn(2, width, generator=generator),
            "bias": torch.randn(2, generator=generator),
        },
        "ema": {"0": torch.randn(2, width, generator=generator)},
        "optimizer": {"0.step": torch.tensor(7.0), "0.state1": torch.arange(6, dtype=torch.uint8)},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(a: checkpoint.State, b: checkpoint.State) -> None:
    assert a.keys() == b.keys()
    for name, tensors in a.items():
        assert tensors.keys() == b[name].keys()
        assert all(torch.equal(value, b[name][key]) for key, value in tensors.items())
        assert all(value.dtype == b[name][key].dtype for key, value in tensors.items())


def test_gives_everything_back(tmp_path: Path) -> None:
    saved = some_state(0)
    checkpoint.save(tmp_path, 7, saved)
    found = checkpoint.latest(tmp_path)
    assert found == tmp_path / "step-000007"
    step, state = checkpoint.read(found)
    assert step == 7
    assert_same(saved, state)


def test_an_optimiser_that_has_not_stepped_yet(tmp_path: Path) -> None:
    saved = {**some_state(0), "optimizer": {}}
    checkpoint.save(tmp_path, 0, saved)
    assert_same(checkpoint.read(tmp_path / "step-000000")[1], saved)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, some_state(0))
    assert {path.suffix for path in (tmp_path / "step-000001").iterdir()} == {".safetensors", ".json"}


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint.save(tmp_path, step, some_state(step))
        assert names(tmp_path) == [f"step-{step:06d}"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    last = some_state(1)
    checkpoint.save(tmp_path, 2, some_state(0))
    checkpoint.save(tmp_path, 2, last)
    assert_same(last, checkpoint.read(tmp_path / "step-000002")[1])


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.latest(tmp_path) is None


def test_what_is_not_whole_is_not_seen(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, some_state(0))
    aside = tmp_path / ".step-000004.part"
    aside.mkdir()
    save_file({"x": torch.zeros(1)}, aside / "trainable.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": 4, "format": 1}))
    (tmp_path / "step-000001").mkdir()  # half pruned
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    checkpoint.save(tmp_path, 4, some_state(1))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000004", "a leftover does not stand in the way"


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 4 kB: what a write then meets is what it meets on a full disk, but for its number."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def failing_save(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        checkpoint.save(folder, 4, some_state(1, width=5000))
    assert str(caught.value).startswith(f"cannot write checkpoint '{folder / 'step-000004'}': ")
    assert str(caught.value).endswith("make room, then run the same command")


def assert_older_one_loads(folder: Path, saved: checkpoint.State) -> None:
    assert names(folder) == ["step-000002"]
    step, state = checkpoint.read(checkpoint.latest(folder))
    assert step == 2
    assert_same(saved, state)


@pytest.mark.parametrize("failing", ["save_file", "json.dumps", "os.fsync", "os.rename"])
def test_a_failing_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    saved = some_state(0)
    checkpoint.save(tmp_path, 2, saved)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"refine_control.distill.checkpoint.{failing}", full)
        failing_save(tmp_path)
    assert_older_one_loads(tmp_path, saved)


def test_a_full_disk_leaves_the_older_one(tmp_path: Path) -> None:
    saved = some_state(0)
    checkpoint.save(tmp_path, 2, saved)
    with small_disk():
        failing_save(tmp_path)
    assert_older_one_loads(tmp_path, saved)
