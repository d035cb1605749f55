"""Which dataset a path gives, and the check of all images."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine_control.data.example import Example
from refine_control.data.folders import FolderDataset
from refine_control.data.images import encode_png
from refine_control.data.shards import ShardDataset, write_shards
from refine_control.data.source import beside_splits, check, open_dataset, open_usable, splits_of
from refine_control.errors import DataError

IMAGE = np.zeros((4, 4, 3), np.uint8)


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(IMAGE))


def test_every_fault_of_the_metadata_is_listed_and_the_first_stops_training(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    lines = ['{"file_name": "a.png"}', "{broken", '{"file_name": "../b.png"}', '{"file_name": "c.png"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: not JSON .* \(and 2 more: data check lists them\)"):
        open_dataset(tmp_path)
    dataset = open_dataset(tmp_path, lenient=True)
    assert dataset.keys() == ["a.png"]
    assert [reason.split(": ")[0].rsplit(", ")[-1] for reason in dataset.faults] == ["line 2", "line 3", "line 4"]


def test_several_folders_are_one_behind_the_other(tmp_path: Path) -> None:
    for name in ("one/a.png", "one/b.png", "two/a.png"):
        put(tmp_path / name)
    (tmp_path / "two/metadata.jsonl").write_text('{"file_name": "a.png", "text": "an a"}', encoding="utf-8")
    joined = open_usable([str(tmp_path / "one"), str(tmp_path / "two")], "train", skip_corrupt=False)
    assert joined.keys() == ["0:a.png", "0:b.png", "1:a.png"]
    assert [joined.text(i) for i in range(len(joined))] == [None, None, "an a"]
    assert [joined[i].key for i in range(3)] == joined.keys()
    assert len(joined.files()) == len(open_dataset(tmp_path / "one").files()) + len(
        open_dataset(tmp_path / "two").files()
    )
    with pytest.raises(IndexError):
        joined[3]
    with pytest.raises(DataError, match="no such folder"):
        open_usable([str(tmp_path / "one"), str(tmp_path / "three")], "train", skip_corrupt=False)


def test_the_splits_that_there_are(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert splits_of(tmp_path) == ["train"]
    assert beside_splits(tmp_path) == 0
    put(tmp_path / "test/a.png")
    put(tmp_path / "train/a.png")
    assert splits_of(tmp_path) == ["train", "test"]
    assert beside_splits(tmp_path) == 1
    for split in ("train", "val"):
        write_shards([Example("a", IMAGE)], tmp_path / "shards", split)
    assert splits_of(tmp_path / "shards") == ["train", "val"]


def test_shards_of_the_split_come_first(tmp_path: Path) -> None:
    put(tmp_path / "loose.png")
    for split in ("train", "test"):
        write_shards([Example(f"{split}{i}", IMAGE) for i in range(2)], tmp_path, split, max_bytes=1)
    dataset = open_dataset(str(tmp_path), "test")
    assert isinstance(dataset, ShardDataset)
    assert dataset.keys() == ["test0", "test1"]


@pytest.mark.parametrize("beside", ["metadata.jsonl", "test"])
def test_shards_beside_pictures_in_folders_are_no_guess(tmp_path: Path, beside: str) -> None:
    """A backup that somebody left would be trained on, and the pictures not."""
    put(tmp_path / "test" / "a.png") if beside == "test" else (tmp_path / beside).write_text("{}")
    write_shards([Example("a", IMAGE)], tmp_path, "backup")
    with pytest.raises(DataError, match=rf"holds shards \(backup-000000\.tar\) and {beside}; move one of them"):
        open_dataset(tmp_path, "test")


def test_absent_split_lists_the_others(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shards([Example("a", IMAGE)], tmp_path, split)
    with pytest.raises(DataError, match="no 'test' shards, only train, val"):
        open_dataset(tmp_path, "test")


def test_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "train/a.png")
    put(tmp_path / "val/b.png")
    assert open_dataset(tmp_path, "val").keys() == ["b.png"]
    with pytest.raises(DataError, match="no 'test' folder, only train, val"):
        open_dataset(tmp_path, "test")


def test_val_and_validation_are_one(tmp_path: Path) -> None:
    put(tmp_path / "folders/validation/a.png")
    write_shards([Example("a", IMAGE)], tmp_path / "shards", "validation")
    for kind in ("folders", "shards"):
        for split in ("val", "validation"):
            assert len(open_dataset(tmp_path / kind, split)) == 1
    put(tmp_path / "folders/val/b.png")
    assert open_dataset(tmp_path / "folders", "val").keys() == ["b.png"]
    assert open_dataset(tmp_path / "folders", "validation").keys() == ["a.png"]


def test_a_split_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/a.png")
    put(tmp_path / "set/val/b.png")
    (tmp_path / "set/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/test").symlink_to("val")
    with pytest.raises(DataError, match="train: a link that leaves the folder"):
        open_dataset(tmp_path / "set", lenient=True)
    assert open_dataset(tmp_path / "set", "test").keys() == ["b.png"]


def test_metadata_in_the_split_folder_and_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "train/a.png")
    line = '{"file_name": "a.png", "text": "t"}\n'
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match="stands beside train/"):
        open_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "train/metadata.jsonl")
    assert open_dataset(tmp_path).text(0) == "t"


def test_unsplit_folder_serves_every_split(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for split in ("train", "test"):
        dataset = open_dataset(tmp_path, split)
        assert isinstance(dataset, FolderDataset)
        assert dataset.keys() == ["a.png"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train-000", "._train-000", ".hidden"], {"train": 1}),
        (["train"], {"train": 1}),
        (["000000", "000001"], {"train": 2, "val": 2, "test": 2}),
        (["cats_0", "cats_1"], {"cats": 2, "train": 2, "val": 2}),
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], {"train": 2, "test": 1}),
        (["imagenet-train-0", "imagenet-train-1", "imagenet-val-0"], {"train": 2, "val": 1, "imagenet-train": 2}),
        (["0", "val-0"], {"train": 1, "val": 1}),
        (["cats-0", "dogs-0"], {"cats": 1, "dogs": 1}),
    ],
)
def test_the_split_is_in_a_shards_name(tmp_path: Path, names: list[str], found: dict[str, int]) -> None:
    for number, name in enumerate(names):
        (shard,) = write_shards([Example(str(number), IMAGE)], tmp_path / "made", str(number))
        shard.rename(tmp_path / f"{name}.tar")
    for split, count in found.items():
        assert len(open_dataset(tmp_path, split).files()) == count, split
    assert set(splits_of(tmp_path)) <= set(found)
    if not {"val", "cats"} & set(found):
        with pytest.raises(DataError, match="no 'val' shards, only"):
            open_dataset(tmp_path, "val")


STEMS = st.lists(st.sampled_from(["train", "val", "test", "cats", "0", "007", "of", "Train"]), min_size=1, max_size=3)
JOINED = st.tuples(st.sampled_from(["-", "_", ".", ""]), STEMS).map(lambda drawn: drawn[0].join(drawn[1]))


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sets(JOINED, min_size=1, max_size=4))
def test_every_split_that_is_listed_opens_and_no_shard_is_passed_over(stems: set[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, stem in enumerate(sorted(stems)):
            (shard,) = write_shards([Example(str(number), IMAGE)], folder / "made", str(number))
            shard.rename(folder / f"{stem}.tar")
            (folder / f"._{stem}.tar").write_bytes(b"Mac OS X")
        opened = {path.stem for split in splits_of(folder) for path in open_dataset(folder, split).files()}
        assert opened == stems
        try:
            open_dataset(folder, "val")
        except DataError as error:
            (told,) = re.findall("only (.*); choose", str(error))
            assert told.split(", ") == splits_of(folder)


@pytest.mark.parametrize("split", ["", "../x", "*", ".hidden", "tr?in"])
def test_split_must_be_a_name(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="is not a name"):
        open_dataset(tmp_path, split)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder"):
        open_dataset(tmp_path / "gone")


def test_check_lists_every_fault_and_only_faults(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        put(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    faults = check(open_dataset(tmp_path))
    assert [key for key, _ in faults] == ["b.png", "d.png"]
    assert "empty" in faults[0][1]
    (tmp_path / "b.png").unlink()
    (tmp_path / "d.png").unlink()
    assert check(open_dataset(tmp_path)) == []
