"""What `check` calls usable, `prepare` can write, and it comes back."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine_control.data.images import encode_png
from refine_control.data.prepare import prepare
from refine_control.data.source import check, open_dataset

PNG = encode_png(np.zeros((4, 4, 3), np.uint8))


def test_long_names_are_kept_apart(tmp_path: Path) -> None:
    names = [
        "é" * 60 + "-a.png",
        "é" * 60 + "-b.png",
        "short.png",
        "f" * 100 + "/" + "g" * 200 + ".png",
        "x" * 250 + ".png",
    ]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(PNG)
    assert check(open_dataset(tmp_path / "in")) == []
    prepare(tmp_path / "in", tmp_path / "out", "train", 8, "crop")
    keys = open_dataset(tmp_path / "out").keys()
    assert len(keys) == len(names)
    assert "short_png" in keys
    assert sum(key.startswith("é" * 31 + "-") for key in keys) == 2
    prepare(tmp_path / "in", tmp_path / "again", "train", 8, "crop")
    assert open_dataset(tmp_path / "again").keys() == keys


def test_a_folder_without_splits_is_said_to_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(PNG)
    prepare(tmp_path / "in", tmp_path / "out", "test", 8, "crop")
    assert "is not split: all of it becomes 'test'" in capsys.readouterr().err
    (tmp_path / "split/val").mkdir(parents=True)
    (tmp_path / "split/val/a.png").write_bytes(PNG)
    prepare(tmp_path / "split", tmp_path / "out", "validation", 8, "crop")
    assert len(open_dataset(tmp_path / "out", "val")) == 1
    prepare(tmp_path / "in", tmp_path / "out", "train", 8, "crop")
    assert "is not split" not in capsys.readouterr().err


def test_names_that_a_shard_would_make_one_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.b.png", "a_b.png", "c.png"):
        (tmp_path / "in" / name).write_bytes(PNG)
    prepare(tmp_path / "in", tmp_path / "out", "train", 8, "crop")
    keys = open_dataset(tmp_path / "out").keys()
    assert len(set(keys)) == 3
    assert {"a_b_png", "c_png"} < set(keys)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé图\n\x1b\u202e\ud800\udfff", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("a\ud800", max_size=2), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.text("abé图 -_\n", min_size=1, max_size=70).filter(lambda name: len(name.encode()) <= 240)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, st.dictionaries(st.sampled_from(["text", "more", "b"]), VALUES), min_size=1, max_size=4))
def test_whatever_can_be_read_can_be_prepared(lines: dict[str, dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "in", Path(name) / "out"
        source.mkdir()
        (source / "last.png").write_bytes(PNG)
        records = [{"file_name": "last.png"}]
        for stem, record in lines.items():
            (source / f"{stem}.png").write_bytes(PNG)
            records.append({**record, "file_name": f"{stem}.png"})
        (source / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        read = open_dataset(source, lenient=True)
        prepare(source, out, "train", 8, "crop", skip_corrupt=True)
        written = open_dataset(out)
        assert check(written) == []
        told = [
            sorted(json.dumps([d.text(i), d.extra(i)], sort_keys=True) for i in range(len(d))) for d in (read, written)
        ]
        assert told[0] == told[1]
