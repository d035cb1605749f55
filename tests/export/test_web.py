"""What stands around the models of a site."""

import hashlib
import json
from pathlib import Path

import pytest

from export.conftest import write_manifest
from refine_control.export.web import LIBRARIES, write_site
from tiny import write_folder


def test_the_libraries_are_those_that_their_list_names() -> None:
    lines = (LIBRARIES / "VERSIONS.txt").read_text(encoding="utf-8").partition("each file here:\n")[2].splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {
        path.relative_to(LIBRARIES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in LIBRARIES.rglob("*")
        if path.is_file() and path.suffix != ".txt"
    }
    assert found == listed


def add_model(site: Path, name: str, size: int) -> None:
    folder = write_manifest(site / "models" / name, resolution=16, files={"weights": size})
    (folder / "weights").write_bytes(b"0" * size)


def test_models_are_listed_by_their_folders_smallest_first_and_broken_ones_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("large", 900), ("small", 10), ("broken", 50), (".half-written", 5)):
        add_model(tmp_path, name, size)
    (tmp_path / "models" / "broken" / "weights").write_bytes(b"0")
    write_site(tmp_path, None, str(tmp_path / "no-data"))
    assert json.loads((tmp_path / "models.json").read_text(encoding="utf-8")) == ["small", "large"]
    assert "weights' is missing or cut off" in capsys.readouterr().out


def test_examples_stay_unless_others_are_named(tmp_path: Path) -> None:
    site = tmp_path / "site"
    add_model(site, "small", 10)
    listed = site / "examples" / "examples.json"
    write_site(site, str(write_folder(tmp_path / "mine", 3)), "nowhere")
    mine = listed.read_text(encoding="utf-8")
    assert len(json.loads(mine)) >= 1
    write_site(site, None, str(write_folder(tmp_path / "usual", 8)))
    assert listed.read_text(encoding="utf-8") == mine
    write_site(site, str(tmp_path / "usual"), "nowhere")
    assert listed.read_text(encoding="utf-8") != mine


def test_a_picture_that_cannot_be_read_is_no_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_model(tmp_path / "site", "small", 10)
    pictures = write_folder(tmp_path / "mine", 3)
    write_site(tmp_path / "site", str(pictures), "nowhere")
    listed = tmp_path / "site/examples/examples.json"
    assert len({each["prompt"] for each in json.loads(listed.read_text(encoding="utf-8"))}) == 3, "each once"
    (pictures / "1.png").write_bytes(b"no picture")
    write_site(tmp_path / "site", str(pictures), "nowhere")
    assert len(json.loads(listed.read_text(encoding="utf-8"))) == 2
    assert "without an example" in capsys.readouterr().out
