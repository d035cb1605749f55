"""Write and read back, the same bytes each time, and tars that must be refused."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from refine_control.data.example import Example
from refine_control.data.images import encode_png
from refine_control.data.shards import Entries, ShardDataset, write_shards
from refine_control.errors import DataError

PNG = encode_png(np.full((4, 4, 3), 9, np.uint8))


def example(key: str, seed: int = 0, size: int = 8) -> Example:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = rng.integers(0, 2, (size, size), dtype=np.uint8)
    return Example(key, image, f"text {key}", mask, image[::-1].copy(), {"concept": key})


def tar(path: Path, *members: tuple[str | tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_round_trip_is_exact_and_sorted(tmp_path: Path) -> None:
    written = [example("b", 1), example("a/c", 2), Example("z", np.zeros((3, 5, 3), np.uint8))]
    dataset = ShardDataset(write_shards(written, tmp_path, "train"))
    assert dataset.keys() == ["a/c", "b", "z"]
    for read, true in zip((dataset[1], dataset[0]), written[:2], strict=True):
        assert (read.key, read.text, read.extra) == (true.key, true.text, true.extra)
        for name in ("image", "mask", "control"):
            assert np.array_equal(getattr(read, name), getattr(true, name))
    bare = dataset[2]
    assert (bare.text, bare.mask, bare.control, bare.extra) == (None, None, None, {})
    assert (dataset.text(0), dataset.extra(0)) == ("text a/c", {"concept": "a/c"})


def test_equal_examples_give_equal_bytes(tmp_path: Path) -> None:
    pair = [example("a", 1), example("b", 2)]
    (first,) = write_shards(pair, tmp_path / "1", "t")
    (second,) = write_shards(pair[::-1], tmp_path / "2", "t")
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as file:
        assert {(member.mtime, member.uid, member.gid) for member in file} == {(0, 0, 0)}


def test_shards_respect_max_bytes_and_leave_no_temporary_file(tmp_path: Path) -> None:
    paths = write_shards([example(f"k{i:02d}", i) for i in range(20)], tmp_path, "t", max_bytes=25_000)
    assert len(paths) > 1
    assert [path.name for path in paths] == [f"t-{i:06d}.tar" for i in range(len(paths))]
    assert sorted(tmp_path.iterdir()) == paths
    assert all(path.stat().st_size <= 25_000 for path in paths)  # as files: a tar is padded to 10240 bytes
    assert ShardDataset(paths).keys() == [f"k{i:02d}" for i in range(20)]


def test_dataset_survives_pickling(tmp_path: Path) -> None:
    dataset = ShardDataset(write_shards([example("a")], tmp_path, "t"))
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[0].image, dataset[0].image)


def test_other_image_kinds_txt_and_unknown_members(tmp_path: Path) -> None:
    members = [("./a.png", PNG), ("a.txt", b" hello\n"), ("a.cls", b"3"), ("b.png", PNG), ("b.txt", b"no")]
    dataset = ShardDataset([tar(tmp_path / "x.tar", *members, ("b.json", json.dumps({"text": "yes"}).encode()))])
    assert dataset.keys() == ["a", "b"]
    assert [dataset.text(0), dataset.text(1)] == ["hello", "yes"]
    assert (dataset[0].image == 9).all()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("/etc/a.png", PNG)], "'/etc/a.png' leaves"),
        ([("../a.png", PNG)], "'../a.png' leaves"),
        ([("x/../../a.png", PNG)], "leaves the shard"),
        ([special("a.png", tarfile.SYMTYPE, "/etc/passwd")], "'a.png' is not a regular file"),
        ([("b.png", PNG), special("a.png", tarfile.LNKTYPE, "b.png")], "'a.png' is not a regular file"),
        ([special("dev.png", tarfile.CHRTYPE)], "'dev.png' is not a regular file"),
        ([special("pipe.png", tarfile.FIFOTYPE)], "not a regular file"),
        ([("a.png", PNG), ("a.png", PNG)], "'a.png' comes twice"),
        ([("a.png", PNG), ("._a.png", b"made by a Mac")], r"'\._a\.png' has no key"),
        ([("a/.png", PNG)], "'a/.png' has no key"),
        ([("a.json", b"{}")], "'a' has no image"),
        ([], "no example"),
    ],
)
def test_odd_members_are_refused_by_name(tmp_path: Path, members: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShardDataset([tar(tmp_path / "x.tar", *members)])


def test_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = [tar(tmp_path / f"{name}.tar", ("a.png", PNG)) for name in "xy"]
    with pytest.raises(DataError, match=r"y\.tar: key 'a' already stands in .*x\.tar"):
        ShardDataset(shards)


@pytest.mark.parametrize("keep", [100, 512, 700, 1024, 1536])
def test_cut_tar_is_refused(tmp_path: Path, keep: int) -> None:
    path = tar(tmp_path / "x.tar", ("a.png", PNG), ("b.png", PNG))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.tar: (cut short|not a whole)"):
        ShardDataset([path])


def test_a_tar_cut_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", ("a.png", PNG), ("b.png", PNG))
    data = path.read_bytes()
    refused = 0
    for keep in range(0, len(data), 64):
        path.write_bytes(data[:keep])
        try:
            dataset = ShardDataset([path])
        except DataError:
            refused += 1
        else:
            assert [(dataset[i].key, int(dataset[i].image.min())) for i in range(len(dataset))] == [("a", 9), ("b", 9)]
    assert refused >= 2048 / 64  # two headers with a block of data each: nothing less can be whole


def test_a_place_takes_few_bytes() -> None:
    """A hundred million examples are indexed by every process: dicts of them would take 60 GB."""
    entries = Entries()
    tracemalloc.start()
    for i in range(2000):
        entries.append(f"folder/picture-{i:08d}", i // 500, {"webp": (i * 1536, 900), "json": (i * 1536 + 1024, 40)})
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / 2000 < 120
    assert entries.key(1234) == "folder/picture-00001234"
    assert entries.shard(1234) == 2
    assert entries.members(1234) == {"webp": (1234 * 1536, 900), "json": (1234 * 1536 + 1024, 40)}
    assert list(entries.twins()) == []


def test_random_damage_is_the_users_error_and_nothing_else(tmp_path: Path) -> None:
    """With the checksum of each header mended, so that the damage gets past it."""
    path = tar(tmp_path / "x.tar", ("a.png", PNG), ("a.json", b'{"text": "t"}'), ("b" * 120 + ".png", PNG))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 5120, 3):
            data[place] = rng.integers(0, 256)
        for start in range(0, 5120, 512):
            if data[start + 257 : start + 262] == b"ustar":
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        path.write_bytes(data)
        try:
            dataset = ShardDataset([path])
            outcomes.add(len([dataset[i] for i in range(len(dataset))]))
        except DataError:
            outcomes.add(0)
    assert {0, 2} <= outcomes, "some damage was refused and some harmless"


def test_threads_read_at_once(tmp_path: Path) -> None:
    dataset = ShardDataset(write_shards([example(f"k{i}", i, 32) for i in range(8)], tmp_path, "t", max_bytes=20_480))
    alone = [dataset[i].image for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: dataset[i % 8].image, range(200)))
    assert all(np.array_equal(image, alone[i % 8]) for i, image in enumerate(together))


def test_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", ("a.png", PNG), ("b.png", PNG))
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged at byte 1024"):
        ShardDataset([path])


def test_compressed_empty_and_missing_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without compression"):
        ShardDataset([tar(tmp_path / "x.tar", ("a.png", PNG), mode="w:gz")])
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.tar"):
        ShardDataset([tmp_path / "empty.tar"])
    with pytest.raises(DataError, match="cannot be read"):
        ShardDataset([tmp_path / "gone.tar"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match=r"pipe\.tar: cannot be read \(not a regular file\)"):
        ShardDataset([tmp_path / "pipe.tar"])


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[]", b'{"text": 4}', rb'{"text": "\ud800"}', b'{"a": 1, "a": 2}'])
def test_broken_json_is_named_when_read(tmp_path: Path, data: bytes) -> None:
    dataset = ShardDataset([tar(tmp_path / "x.tar", ("a.png", PNG), ("a.json", data))])
    for read in (dataset.text, dataset.extra, dataset.__getitem__):
        with pytest.raises(DataError, match=r"x\.tar:a"):
            read(0)


def test_shard_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", ("a.png", PNG))
    dataset = ShardDataset([path])
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(DataError, match="became shorter"):
        dataset[0]


@pytest.mark.parametrize("key", ["", "a.b", "/a", "../a", "a/", "a//b", "\ud800", "k" * 81])
def test_keys_that_would_not_come_back_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="cannot name"):
        write_shards([example(key)], tmp_path, "t")


def test_writing_refuses_doubles_nothing_and_old_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' comes twice"):
        write_shards([example("a", 1), example("a", 2)], tmp_path, "t")
    with pytest.raises(DataError, match="no example"):
        write_shards([], tmp_path, "t")
    assert list(tmp_path.iterdir()) == []
    write_shards([example("a")], tmp_path, "t")
    with pytest.raises(DataError, match="already there"):
        write_shards([example("b")], tmp_path, "t")


def test_folders_that_tar_itself_writes_are_passed_over(tmp_path: Path) -> None:
    members = [special(".", tarfile.DIRTYPE), special("sub", tarfile.DIRTYPE), ("sub/a.png", PNG)]
    shard = tar(tmp_path / "train-0.tar", *members)
    assert ShardDataset([shard]).keys() == ["sub/a"]
