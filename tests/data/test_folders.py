"""Both folder layouts, and every way a folder can be wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_control.data.folders import FolderDataset
from refine_control.data.images import encode_png
from refine_control.errors import DataError


def put(path: Path, value: int = 0, size: tuple[int, int] = (4, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.full((*size, 3), value, np.uint8)))


def describe(folder: Path, *records: Any) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_metadata_gives_text_mask_control_and_the_rest(tmp_path: Path) -> None:
    put(tmp_path / "b.png", 10)
    put(tmp_path / "sub/a.png", 20)
    put(tmp_path / "m.png", 255)
    put(tmp_path / "c.png", 40)
    full = {"mask_file_name": "m.png", "conditioning_image_file_name": "c.png", "source": "x"}
    describe(tmp_path, {"file_name": "sub/a.png", "text": "é thing", **full}, "", {"file_name": "b.png"})
    dataset = FolderDataset(tmp_path)
    assert dataset.keys() == ["sub/a.png", "b.png"]
    assert [dataset.text(i) for i in range(len(dataset))] == ["é thing", None]
    assert dataset.extra(0) == {"source": "x"}
    first, second = dataset[0], dataset[1]
    assert (first.key, first.text, first.extra) == ("sub/a.png", "é thing", {"source": "x"})
    assert (first.image == 20).all()
    assert (first.control == 40).all()
    assert first.mask.shape == (4, 6)
    assert first.mask.all()
    assert second.mask is None
    assert second.control is None
    with pytest.raises(IndexError):
        dataset[2]


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png", "text": "t"}\r\n')
    assert FolderDataset(tmp_path).text(0) == "t"


def test_plain_folder_is_recursive_sorted_and_ignores_case_and_hidden_files(tmp_path: Path) -> None:
    for name in ("z.PNG", "a/b.Jpg", "a/c/d.webp", ".hidden.png", ".dir/e.png", "notes.txt"):
        put(tmp_path / name)
    dataset = FolderDataset(tmp_path)
    assert dataset.keys() == ["a/b.Jpg", "a/c/d.webp", "z.PNG"]
    assert dataset.text(0) is None
    assert dataset[2].image.shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ('{"file_name": "a.png", "file_name": "b.png"}', "line 2: not JSON .the key 'file_name' stands twice"),
        ("[" * 100_000, "line 2: not JSON"),
        ({"text": "t"}, "line 2: no file_name"),
        ({"file_name": 3}, "line 2: file_name is 3"),
        ({"file_name": ""}, "line 2: file_name is ''"),
        ({"file_name": "a\0.png"}, "line 2: file_name is"),
        ({"file_name": "a" * 5000}, "no such file"),
        ({"file_name": "a/" * 5000}, "no such file"),
        ('{"file_name": "\\ud800.png"}', r"line 2: file_name is '\\ud800\.png'"),
        ('{"file_name": "b.png", "text": "\\ud83d alone"}', "line 2: text .* half of a surrogate pair"),
        ({"file_name": "../a.png"}, r"'\.\./a\.png' leaves the folder"),
        ({"file_name": "x/../../a.png"}, "leaves the folder"),
        ({"file_name": "/etc/a.png"}, "leaves the folder"),
        ({"file_name": "gone.png"}, "'gone.png': no such file"),
        ({"file_name": "a.png"}, "already stands in line 1"),
        ({"file_name": "./a.png"}, "already stands in line 1"),
        ({"file_name": "b.png", "text": 5}, "line 2: text is 5"),
        ({"file_name": "b.png", "mask_file_name": "../m.png"}, "mask_file_name '../m.png' leaves"),
        ({"file_name": "b.png", "conditioning_image_file_name": "no.png"}, "conditioning_image_file_name 'no.png'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    folder = tmp_path / "set"
    for name in ("set/a.png", "set/b.png", "a.png", "m.png"):
        put(tmp_path / name)
    describe(folder, {"file_name": "a.png"}, line)
    with pytest.raises(DataError, match=message):
        FolderDataset(folder)


def test_bad_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n{"file_name": "\xff.png"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        FolderDataset(tmp_path)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_link_that_leaves_the_folder_is_refused(tmp_path: Path, with_metadata: bool) -> None:
    put(tmp_path / "secret.png")
    folder = tmp_path / "set"
    put(folder / "real.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    if with_metadata:
        describe(folder, {"file_name": "link.png"})
    with pytest.raises(DataError, match="leaves the folder"):
        FolderDataset(folder)


def test_linked_folder_that_leaves_is_refused_and_a_link_inside_is_not(tmp_path: Path) -> None:
    put(tmp_path / "outside/x.png")
    folder = tmp_path / "set"
    put(folder / "real.png", 7)
    (folder / "again.png").symlink_to(folder / "real.png")
    assert FolderDataset(folder).keys() == ["again.png", "real.png"]
    (folder / "away").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="leaves the folder"):
        FolderDataset(folder)


def test_missing_empty_and_csv_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        FolderDataset(tmp_path / "gone")
    with pytest.raises(DataError, match="no image found"):
        FolderDataset(tmp_path)
    describe(tmp_path)
    with pytest.raises(DataError, match="no image found"):
        FolderDataset(tmp_path)
    for name in ("metadata.parquet", "metadata.csv"):
        (tmp_path / "metadata.jsonl").replace(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}: only metadata\.jsonl is read"):
            FolderDataset(tmp_path)
        describe(tmp_path)


def make_pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(path)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_pipe, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (lambda path: path.symlink_to("gone.jsonl"), "not a regular file"),
        (lambda path: path.symlink_to(path), "not a regular file"),
        (make_sparse, r"1099511627776 bytes are more than 1000000000;"),
    ],
    ids=["pipe", "folder", "broken link", "link to itself", "sparse"],
)
@pytest.mark.parametrize("lenient", [True, False])
def test_metadata_that_is_no_file_of_lines_is_an_error_not_no_captions(
    tmp_path: Path, make: Callable[[Path], None], message: str, lenient: bool
) -> None:
    put(tmp_path / "a.png")
    make(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match=rf"metadata\.jsonl: {message}"):
        FolderDataset(tmp_path, lenient=lenient)


def test_pictures_of_kinds_that_are_not_read_are_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.HEIC", "sub/c.avif", ".hidden.heic", "d.jfif", "e.JPE", "notes.txt"):
        put(tmp_path / name)
    dataset = FolderDataset(tmp_path, lenient=True)
    assert dataset.keys() == ["a.png", "d.jfif", "e.JPE"]
    told = "not read; save it as PNG or JPEG, or remove it"
    assert dataset.faults == [f"{tmp_path / 'b.HEIC'}: {told}", f"{tmp_path / 'sub/c.avif'}: {told}"]
    with pytest.raises(DataError, match=r"b\.HEIC: not read"):
        FolderDataset(tmp_path)


@pytest.mark.parametrize("lenient", [False, True])
def test_metadata_in_a_subfolder_is_not_passed_over(tmp_path: Path, lenient: bool) -> None:
    put(tmp_path / "train/a.png")
    describe(tmp_path / "train", {"file_name": "a.png", "text": "a cat"})
    with pytest.raises(DataError, match=r"train/metadata\.jsonl: not read below"):
        FolderDataset(tmp_path, lenient=lenient)
    assert FolderDataset(tmp_path / "train").text(0) == "a cat"
    (tmp_path / "train/metadata.jsonl").rename(tmp_path / "train/metadata.csv")
    with pytest.raises(DataError, match=r"train/metadata\.csv: not read below"):
        FolderDataset(tmp_path, lenient=lenient)


def test_escaped_emoji_is_a_caption(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    describe(tmp_path, r'{"file_name": "a.png", "text": "a \ud83d\ude00"}')
    assert FolderDataset(tmp_path).text(0) == "a \N{GRINNING FACE}"


@pytest.mark.parametrize("key", ["mask_file_name", "conditioning_image_file_name"])
def test_other_size_is_refused_when_read(tmp_path: Path, key: str) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "m.png", 255, (5, 6))
    describe(tmp_path, {"file_name": "a.png", key: "m.png"})
    dataset = FolderDataset(tmp_path)
    with pytest.raises(DataError, match=r"a\.png: .* is 6x5 but the image is 6x4"):
        dataset[0]
