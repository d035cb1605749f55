"""A checkpoint is whole or invisible, and the last whole one outlives whatever goes wrong after it."""

import errno
import itertools
import json
import os
import pkgutil
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from refine_control.distill import checkpoint
from refine_control.errors import DataError
from reliability.faults import full_disk, no_privileges


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
    (aside / "state.json").write_text(json.dumps({"step": 4, "format": 2, "sha256": {}}))
    (tmp_path / "step-000001").mkdir()  # half pruned
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    checkpoint.save(tmp_path, 4, some_state(1))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000004", "a leftover does not stand in the way"


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


@pytest.mark.parametrize("failing", ["save_file", "json.dumps", "sync", "put_in_place"])
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
    with full_disk(4096):
        failing_save(tmp_path)
    assert_older_one_loads(tmp_path, saved)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_folder_that_may_not_be_written_to_leaves_the_older_one(tmp_path: Path) -> None:
    saved = some_state(0)
    checkpoint.save(tmp_path, 2, saved)
    tmp_path.chmod(0o555)

    def save() -> None:
        with no_privileges():
            failing_save(tmp_path)

    assert ending_of(save) == 0
    tmp_path.chmod(0o755)
    assert_older_one_loads(tmp_path, saved)


def ending_of(do: Callable[[], object]) -> int:
    """Of a fork that does it: 0, or the signal that killed it, negative."""
    child = os.fork()
    if not child:
        try:
            do()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Killed anywhere


CALLS = [
    *(f"refine_control.distill.checkpoint.{name}" for name in ("save_file", "sync", "_sha256")),
    *("refine_control.files.sync", "shutil.rmtree"),
    *(f"pathlib.Path.{name}" for name in ("rename", "write_text", "mkdir")),
]


@contextmanager
def killed_at(moment: int) -> Iterator[None]:
    """SIGKILL at the moment-th call to the disk: before it, or half-way through what it writes or removes."""
    left = iter(range(moment, -1, -1))

    def dying(true: Callable, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                if name == "save_file":  # half a file
                    true(*args, **kwargs)
                    Path(args[1]).write_bytes(Path(args[1]).read_bytes()[:-7])
                if name == "write_text":
                    true(args[0], args[1][: len(args[1]) // 2], **kwargs)
                if name == "rmtree" and Path(args[0]).is_dir():  # half a folder
                    sorted(Path(args[0]).iterdir())[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place in CALLS:
            owner, _, name = place.rpartition(".")
            patch.setattr(pkgutil.resolve_name(owner), name, dying(pkgutil.resolve_name(place), name))
        yield


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("over", ["nothing", "a damaged one"])
def test_killed_at_any_moment_of_saving_the_newest_whole_one_loads(tmp_path: Path, over: str) -> None:
    """Every moment once; after each, the newest that is seen is the old or the new one, whole, and saving goes on."""
    states = {step: some_state(step) for step in (2, 4, 6)}
    seen = set()
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        checkpoint.save(folder, 2, states[2])
        if over == "a damaged one":
            shutil.copytree(folder / "step-000002", folder / "step-000004")
            (folder / "step-000004" / "ema.safetensors").write_bytes(b"")

        def save(folder: Path = folder, moment: int = moment) -> None:
            with killed_at(moment):
                checkpoint.save(folder, 4, states[4])

        ended = ending_of(save)
        assert ended in (0, -signal.SIGKILL)
        step, state = checkpoint.read(checkpoint.latest(folder))
        assert_same(state, states[step])
        seen.add(step)
        checkpoint.prune(checkpoint.latest(folder))
        damaged = {"step-000004"} if step == 2 and over == "a damaged one" else set()
        assert set(names(folder)) - damaged == {f"step-{step:06d}"}, "nothing else is left of it"
        checkpoint.save(folder, 6, states[6])
        assert_same(checkpoint.read(checkpoint.latest(folder))[1], states[6])
        assert names(folder) == ["step-000006"]
        if ended == 0:
            break
    assert seen == {2, 4}
    assert moment > 15, "so many moments there are at least"


# Damaged after it was written


def two(folder: Path) -> None:
    """Checkpoints of steps 2 and 4, as they stand before the older one is pruned."""
    checkpoint.save(folder, 2, some_state(2))
    checkpoint.save(folder / "aside", 4, some_state(4))
    (folder / "aside" / "step-000004").rename(folder / "step-000004")


@pytest.mark.parametrize("name", ["trainable.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "empty"])
def test_a_damaged_one_is_named_and_passed_over(
    tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    two(tmp_path)
    path = tmp_path / "step-000004" / name
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1 << (3 if name != "state.json" else 7)  # the latter is no UTF-8
    path.write_bytes({"flipped": content, "cut": content[:-3], "gone": b"", "empty": b""}[how])
    if how == "gone":
        path.unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    told = capsys.readouterr().err
    assert f"{tmp_path / 'step-000004'}' is damaged: {name}" in told
    assert "going on from 'step-000002'" in told


@pytest.mark.parametrize("name", ["ema.safetensors", "state.json"])
def test_where_all_are_damaged_nothing_begins_anew_unasked(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, 2, some_state(2))
    (tmp_path / "step-000002" / name).unlink()
    with pytest.raises(DataError, match=rf"is damaged: {name}: .*No such file or directory.*; remove"):
        checkpoint.latest(tmp_path)


def test_no_flipped_bit_of_the_manifest_makes_another_checkpoint_of_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 4, some_state(4))
    path = tmp_path / "step-000004" / "state.json"
    manifest = path.read_bytes()
    for bit in range(8 * len(manifest)):
        flipped = bytearray(manifest)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with suppress(DataError):
            assert checkpoint.read(checkpoint.latest(tmp_path))[0] == 4
            (tmp_path / "step-000004" / "ema.safetensors").rename(tmp_path / "kept")
            with pytest.raises(DataError):
                checkpoint.latest(tmp_path)
            (tmp_path / "kept").rename(tmp_path / "step-000004" / "ema.safetensors")


@pytest.mark.parametrize("hashes", [[], {}, None, {"ema.safetensors": "0"}, "x"])
def test_a_manifest_that_knows_no_hashes_is_damaged(tmp_path: Path, hashes: object) -> None:
    checkpoint.save(tmp_path, 2, some_state(2))
    (tmp_path / "step-000002" / "state.json").write_text(json.dumps({"step": 2, "format": 2, "sha256": hashes}))
    with pytest.raises(DataError, match=r"ema\.safetensors has changed since it was written; remove"):
        checkpoint.latest(tmp_path)


def test_a_failing_disk_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two(tmp_path)
    true = checkpoint._sha256

    def failing(path: Path) -> str:
        if path.parent.name == "step-000004":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true(path)

    monkeypatch.setattr(checkpoint, "_sha256", failing)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    assert "Input/output error; going on from 'step-000002'" in capsys.readouterr().err


def test_a_damaged_one_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "step-000004" / "ema.safetensors").write_bytes(b"")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000002"
    checkpoint.save(tmp_path, 4, some_state(7))
    assert_same(checkpoint.read(checkpoint.latest(tmp_path))[1], some_state(7))


def test_one_without_hashes_of_an_older_version_loads(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, some_state(2))
    (tmp_path / "step-000002" / "state.json").write_text('{"step": 2, "format": 1}')
    assert_same(checkpoint.read(checkpoint.latest(tmp_path))[1], some_state(2))


def test_one_of_a_later_version_says_so(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, some_state(2))
    (tmp_path / "step-000002" / "state.json").write_text('{"step": 2, "format": 3, "sha256": {}}')
    with pytest.raises(DataError, match="format 3, later than 2"):
        checkpoint.latest(tmp_path)
