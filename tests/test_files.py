"""Results are whole or not there, and a folder has one writer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine_control import files
from refine_control.errors import UserError
from refine_control.files import put_in_place


def test_a_failing_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_whole(tmp_path / "a.json", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(OSError, match="No space"):
                files.write_whole(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old"


def test_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process begins, and ends, while this one has its text aside."""
    path, true = tmp_path / "a.json", files.sync

    def meanwhile(aside: Path) -> None:
        true(aside)
        monkeypatch.setattr(files, "sync", true)
        files.write_whole(path, "theirs")

    monkeypatch.setattr(files, "sync", meanwhile)
    files.write_whole(path, "ours")
    assert path.read_text(encoding="utf-8") == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_who_was_killed_while_a_folder_was_replaced_loses_neither(tmp_path: Path) -> None:
    """Between the two renames what was there is only aside."""
    (tmp_path / ".final.old").mkdir()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", tmp_path / "final")
    assert (tmp_path / "final").is_dir(), "back again"
    (tmp_path / "new").mkdir()
    put_in_place(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_killed_writers_left_does_not_pile_up(tmp_path: Path) -> None:
    for number, age in ((1, 2 * files.LEFTOVER_SECONDS), (2, 0)):
        left = tmp_path / f".a.json.{number}.tmp"
        left.write_text("half", encoding="utf-8")
        os.utime(left, (time.time() - age,) * 2)
    files.write_whole(tmp_path / "a.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.2.tmp", "a.json"], "2 may still be writing"


def holding(folder: Path, then: str) -> subprocess.Popen[str]:
    """Another process that holds the folder, says so, and goes on."""
    code = f"""
import sys
import time
from pathlib import Path
from refine_control.files import hold
with hold(Path({str(folder)!r})):
    print("held", flush=True)
    {then}
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with holding(tmp_path, "sys.stdin.read()") as process:
        with pytest.raises(UserError, match="another process is at work"), files.hold(tmp_path):
            pass
        process.communicate()
    with files.hold(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "kill"), reason="no signals here")
def test_a_process_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    with holding(tmp_path, "sys.stdin.read()") as process:
        process.kill()
        process.wait()
    with files.hold(tmp_path):
        pass


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.hold(tmp_path):
        1 / 0  # noqa: B018
    with files.hold(tmp_path):
        pass
