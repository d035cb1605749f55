"""A table on disk is whole or not read, goes on where it stopped, and is another table when its key is another."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from refine_control import files
from refine_control.data import table
from refine_control.data.table import Steps, Table, fingerprint
from refine_control.errors import DataError

KEY = {"model": "abc", "resolution": 32}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK_BYTES", 4 * 6 * 4)  # four rows of six float32


def some_table(root: Path, rows: int = 10, **changes: object) -> Table:
    return Table(root, "latents", {**KEY, **changes}, rows, (2, 3), "float32")


def value(rows: range) -> np.ndarray:
    return np.stack([np.full((2, 3), row, np.float32) for row in rows])


def filled(root: Path, **changes: object) -> Table:
    made = some_table(root, **changes)
    made.fill(value, batch=3)
    made.finish()
    return made


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path)
    read = some_table(tmp_path)
    assert read.chunks == 3
    assert np.array_equal(read[[9, 0, 4, 4]], np.stack([value(range(10))[i] for i in (9, 0, 4, 4)]))


@pytest.mark.parametrize("change", [{"model": "abd"}, {"resolution": 64}, {"variants": 2}, {"rows": 11}])
def test_another_key_is_another_table(tmp_path: Path, change: dict[str, object]) -> None:
    filled(tmp_path)
    assert some_table(tmp_path).is_complete()
    assert not some_table(tmp_path, **change).is_complete()


def test_a_table_is_not_read_before_it_is_finished(tmp_path: Path) -> None:
    made = some_table(tmp_path)
    made.fill(value, batch=4)
    with pytest.raises(DataError, match="is not complete; run the same command to fill it, or remove it"):
        made[[0]]


@pytest.mark.parametrize("at", [0, 4, 7, 9])
def test_stopped_and_filled_again_computes_only_what_is_missing(tmp_path: Path, at: int) -> None:
    def stopping(rows: range) -> np.ndarray:
        if at in rows:
            raise KeyboardInterrupt
        return value(rows)

    with pytest.raises(KeyboardInterrupt):
        some_table(tmp_path).fill(stopping, batch=2)
    computed: list[int] = []
    again = some_table(tmp_path)
    again.fill(lambda rows: computed.extend(rows) or value(rows), batch=2)
    again.finish()
    assert computed == list(range(at // 4 * 4, 10))
    assert np.array_equal(again[range(10)], value(range(10)))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_processes_share_the_filling_without_overlap(tmp_path: Path, parts: int) -> None:
    computed: list[int] = []
    for part in range(parts):
        some_table(tmp_path).fill(lambda rows: computed.extend(rows) or value(rows), 4, part, parts)
    assert sorted(computed) == list(range(10))
    made = some_table(tmp_path)
    made.finish()
    assert np.array_equal(made[range(10)], value(range(10)))


def test_a_table_that_lacks_a_chunk_is_not_finished(tmp_path: Path) -> None:
    made = some_table(tmp_path)
    made.fill(value, 4, part=0, parts=2)
    with pytest.raises(DataError, match=r"rows-000001\.npy' cannot be read"):
        made.finish()
    assert not made.is_complete()


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "other"])
def test_a_damaged_chunk_is_named(tmp_path: Path, damage: bytes | str) -> None:
    path = filled(tmp_path).folder / "rows-000001.npy"
    if damage == "other":
        np.save(path, np.zeros((4, 9), np.float32))
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"rows-000001\.npy"):
        some_table(tmp_path)[[5]]


def test_a_full_disk_leaves_no_half_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DataError, match=r"No space left on device; make room, or set data\.cache_dir null"):
            some_table(tmp_path).fill(value, batch=4)
    assert list(some_table(tmp_path).folder.iterdir()) == []
    assert np.array_equal(filled(tmp_path)[[3]], value(range(3, 4)))


def test_what_killed_runs_left_of_it_does_not_pile_up(tmp_path: Path) -> None:
    kept = Steps(tmp_path, "teacher", {"a": 1}, limit_gb=1)
    table = some_table(tmp_path)
    table.folder.mkdir(parents=True)
    for folder in (kept.folder, table.folder):
        for number, age in ((1, 2 * files.LEFTOVER_SECONDS), (2, 0)):
            left = folder / f".rows-000000.npy.{number}.tmp"
            left.write_bytes(b"half")
            os.utime(left, (time.time() - age,) * 2)
    Steps(tmp_path, "teacher", {"a": 1}, limit_gb=1)
    table.fill(value, batch=4)
    for folder in (kept.folder, table.folder):
        assert [path.name for path in folder.glob(".*")] == [".rows-000000.npy.2.tmp"], "2 may still be writing"


def test_a_fingerprint_sees_names_sizes_and_times(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("12345")
    first = fingerprint(sorted(tmp_path.iterdir()))
    assert fingerprint(sorted(tmp_path.iterdir(), reverse=True)) != first, "the rows come in another order"
    (tmp_path / "a").rename(tmp_path / "c")
    renamed = fingerprint(sorted(tmp_path.iterdir()))
    (tmp_path / "c").write_text("123456")
    assert len({first, renamed, fingerprint(sorted(tmp_path.iterdir()))}) == 3


# Steps


def test_a_step_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    arrays = {"output": np.arange(6, dtype=np.float16).reshape(2, 3), "foundation.mid_block": np.ones((1, 2))}
    Steps(tmp_path, "teacher", KEY, 1.0).put("7", arrays)
    kept = Steps(tmp_path, "teacher", KEY, 1.0).get("7", list(arrays))
    assert kept is not None
    assert kept.keys() == arrays.keys()
    assert all(np.array_equal(kept[name], array) and kept[name].dtype == array.dtype for name, array in arrays.items())
    assert Steps(tmp_path, "teacher", {**KEY, "seed": 1}, 1.0).get("7", ["output"]) is None


def test_a_run_reads_what_it_needs_and_adds_what_others_did_not(tmp_path: Path) -> None:
    one, two, other = (np.full(3, n) for n in (1.0, 2.0, 3.0))
    steps = Steps(tmp_path, "teacher", KEY, 1.0)
    steps.put("7", {"output": one, "a": two})
    assert steps.get("7", ["output", "b"]) is None
    used = steps.put("7", {"output": other, "b": other})
    assert np.array_equal(used["output"], one), "the first run may meet it again, after a resume"
    kept = steps.get("7", ["output", "a", "b"])
    assert kept is not None
    assert [kept[name][0] for name in ("output", "a", "b")] == [1, 2, 3]
    assert list(steps.get("7", ["b"]) or ()) == ["b"]


def test_no_more_steps_are_kept_than_asked(tmp_path: Path) -> None:
    array = {"output": np.zeros(25_000, np.float32)}  # 100 kB
    for _ in range(2):
        steps = Steps(tmp_path, "teacher", KEY, 250_000 / 2**30)
        for number in range(4):
            steps.put(str(number), array)
    assert [steps.get(str(number), ["output"]) is not None for number in range(4)] == [True, True, False, False]


def test_a_damaged_step_is_computed_again(tmp_path: Path) -> None:
    steps = Steps(tmp_path, "teacher", KEY, 1.0)
    steps.put("7", {"output": np.zeros(3)})
    path = steps.folder / "7.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert steps.get("7", ["output"]) is None
    assert not path.exists()
    path.mkdir()
    assert steps.get("7", ["output"]) is None, "nor is what is no file read"


def test_processes_share_the_limit(tmp_path: Path) -> None:
    array = {"output": np.zeros(25_000, np.float32)}  # 100 kB
    both = [Steps(tmp_path, "teacher", KEY, 450_000 / 2**30, parts=2) for _ in range(2)]
    for number in range(8):
        both[number % 2].put(str(number), array)
    assert sum(both[0].get(str(number), ["output"]) is not None for number in range(8)) == 4
