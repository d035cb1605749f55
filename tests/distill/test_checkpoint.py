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
from torch import Tensor, nn

from refine_control.distill import checkpoint
from refine_control.errors import DataError

Run = tuple[nn.Module, list[Tensor], torch.optim.Optimizer]


def some_run(seed: int, steps: int = 2, width: int = 3) -> Run:
    torch.manual_seed(seed)
    network = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(steps):
        network(torch.randn(4, width)).sum().backward()
        optimizer.step()
    return network, [p.detach() + 1 for p in network.parameters()], optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(a: Run, b: Run) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    ours, theirs = a[2].state_dict()["state"], b[2].state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i, entry in ours.items():
        assert entry.keys() == theirs[i].keys()
        assert all(torch.equal(value, theirs[i][name]) for name, value in entry.items())


def test_restores_everything(tmp_path: Path) -> None:
    saved, other = some_run(0), some_run(1, steps=1)
    checkpoint.save(tmp_path, 7, *saved)
    found = checkpoint.latest(tmp_path)
    assert found == tmp_path / "step-000007"
    assert checkpoint.restore(found, *other) == 7
    assert_same(saved, other)


def test_an_optimiser_that_has_not_stepped_yet(tmp_path: Path) -> None:
    saved, other = some_run(0, steps=0), some_run(1, steps=0)
    checkpoint.save(tmp_path, 0, *saved)
    assert checkpoint.restore(tmp_path / "step-000000", *other) == 0
    assert_same(saved, other)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, *some_run(0))
    assert {path.suffix for path in (tmp_path / "step-000001").iterdir()} == {".safetensors", ".json"}


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint.save(tmp_path, step, *some_run(step))
        assert names(tmp_path) == [f"step-{step:06d}"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    last = some_run(1)
    checkpoint.save(tmp_path, 2, *some_run(0))
    checkpoint.save(tmp_path, 2, *last)
    other = some_run(2)
    checkpoint.restore(tmp_path / "step-000002", *other)
    assert_same(last, other)


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.latest(tmp_path) is None


def test_what_is_not_whole_is_not_seen(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, *some_run(0))
    aside = tmp_path / ".step-000004.part"
    aside.mkdir()
    save_file({"x": torch.zeros(1)}, aside / "trainable.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": 4, "format": 1}))
    (tmp_path / "step-000001").mkdir()  # half pruned
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    checkpoint.save(tmp_path, 4, *some_run(1))
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
        checkpoint.save(folder, 4, *some_run(1, width=5000))
    assert str(caught.value).startswith(f"cannot write checkpoint '{folder / 'step-000004'}': ")
    assert str(caught.value).endswith("make room, then run the same command")


def assert_older_one_loads(folder: Path, saved: Run) -> None:
    assert names(folder) == ["step-000002"]
    other = some_run(2)
    assert checkpoint.restore(checkpoint.latest(folder), *other) == 2
    assert_same(saved, other)


@pytest.mark.parametrize("failing", ["save_file", "json.dumps", "os.fsync", "os.rename"])
def test_a_failing_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    saved = some_run(0)
    checkpoint.save(tmp_path, 2, *saved)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"refine_control.distill.checkpoint.{failing}", full)
        failing_save(tmp_path)
    assert_older_one_loads(tmp_path, saved)


def test_a_full_disk_leaves_the_older_one(tmp_path: Path) -> None:
    saved = some_run(0)
    checkpoint.save(tmp_path, 2, *saved)
    with small_disk():
        failing_save(tmp_path)
    assert_older_one_loads(tmp_path, saved)
