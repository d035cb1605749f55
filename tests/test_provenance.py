"""Which code made a figure."""

import subprocess
from pathlib import Path

import pytest

from refine_control import provenance


def test_the_commit_is_not_that_of_a_repository_in_which_an_environment_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    file = tmp_path / ".venv/refine_control/provenance.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit.__wrapped__() == ""
