"""Bad pictures, folders and shards: each is read right or refused by name, and what is good beside it is still read."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from refine_control.cli import main
from refine_control.data.images import read_image, read_mask
from refine_control.data.source import check, open_dataset
from refine_control.errors import DataError
from reliability.faults import verdict

COLOUR = (200, 100, 50)


def sample_or(long: int, sample: int = 60) -> pytest.MarkDecorator:
    marks = [pytest.mark.long, pytest.mark.timeout(1200)]
    return pytest.mark.parametrize("count", [sample, pytest.param(long, marks=marks)])


def drawn(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def plain(mode: str = "RGB", colour: tuple[int, ...] | int = COLOUR, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new(mode, size, colour)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + b"".join(chunks) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(plain(size=(4, 6)), exif=exif)


ZEROS = zlib.compress(bytes(100_000_000), 9)  # a hundred kilobytes
READ: dict[str, tuple[bytes, tuple[int, int, int]]] = {  # and the colour that is seen
    "mislabelled.png": (saved(plain(), "JPEG", quality=95), COLOUR),
    "cmyk.jpg": (saved(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "grey-16-bit.png": (saved(Image.fromarray(np.full((4, 6), 32896, np.uint16))), (128, 128, 128)),
    "colour-16-bit.png": (
        cv2.imencode(".png", np.full((4, 6, 3), (12850, 25700, 51400), np.uint16))[1].tobytes(),
        COLOUR,
    ),
    "animated.gif": (saved(plain(), "GIF", save_all=True, append_images=[plain(colour=(0, 0, 255))]), COLOUR),
    "animated.webp": (saved(plain(), "WEBP", lossless=True, save_all=True, append_images=[plain(colour=0)]), COLOUR),
    "turned.png": (turned(), COLOUR),
    "alpha.png": (saved(plain("RGBA", (0, 0, 0, 0))), (255, 255, 255)),
    "palette.png": (saved(plain().convert("P", palette=Image.Palette.ADAPTIVE)), COLOUR),
    "é 图.png": (saved(plain()), COLOUR),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "truncated.png": (saved(Image.effect_noise((40, 40), 99))[:900], "cannot be decoded"),
    "truncated.jpg": (saved(Image.effect_noise((40, 40), 99), "JPEG")[:-300], "cannot be decoded"),
    "text.png": (b"<html>not found</html>", "not a PNG"),
    "empty.png": (b"", "empty (0 bytes)"),
    "huge.png": (png_of(30_000, 30_000, chunk(b"IDAT", ZEROS)), "pixels"),
    "bomb-of-text.png": (png_of(6, 4, chunk(b"zTXt", b"a\0\0" + ZEROS)), "cannot be decoded"),
    "floats.tif": (saved(Image.new("F", (6, 4), 0.5), "TIFF"), "floats"),
    "code.png": (saved(plain(), "EPS"), "not a PNG"),  # PIL would start a program for it
    "two\nlines\x1b[2J.png": (b"", "empty (0 bytes)"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such files")
def test_every_kind_is_read_right_or_listed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a plain folder, by `data check`; nothing it prints can move the terminal's cursor."""
    (tmp_path / "secret.png").write_bytes(saved(plain()))
    folder = tmp_path / "set"
    (folder / "dot").mkdir(parents=True)
    for name, (data, _) in (READ | REFUSED).items():
        (folder / name).write_bytes(data)
    (folder / "dot" / "one.png").write_bytes(saved(plain(size=(1, 1))))
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "nowhere.png").symlink_to(folder / "nothing.png")
    os.mkfifo(folder / "pipe.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad-utf-8-\xff.png")).write_bytes(saved(plain()))
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    others = {
        "outside.png": "leaves the folder",
        "nowhere.png": "not a regular file",
        "pipe.png": "not a regular file",
        "bad-utf-8-\\udcff.png": "not UTF-8",
        "sparse.png": "more than a picture may have",
    }
    expected = others | {name.replace("\n", "\\n").replace("\x1b", "\\x1b"): why for name, (_, why) in REFUSED.items()}
    assert main(["data", "check", str(folder)]) == 2
    *lines, summary = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    found = {line.removeprefix(f"{folder}/").partition(".png: ")[0].partition(": ")[0]: line for line in lines}
    for name, why in expected.items():
        (line,) = [line for line in lines if line.startswith(f"{folder}/{name}: ")]
        assert why in line
    assert len(lines) == len(found) == len(expected)
    assert (
        summary == f"train: {len(READ) + 1 + len(expected)} pictures, 0 with captions, {len(expected)} cannot be used"
    )
    for name, (_, colour) in READ.items():
        picture = read_image(folder / name)
        assert picture.shape == (4, 6, 3), name
        assert np.abs(picture.astype(int) - colour).max() < 8, name
    assert read_image(folder / "dot" / "one.png").tolist() == [[list(COLOUR)]]


def tar_of(path: Path, members: list[tuple[str, bytes, bytes]]) -> None:
    """members: name, type, content."""
    with tarfile.open(path, "w") as file:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            file.addfile(info, io.BytesIO(data))


def test_every_fault_of_shards_is_listed_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, file = saved(plain()), tarfile.REGTYPE
    first = [
        *[("good.png", file, png), ("../out.png", file, png), ("/etc/a.png", file, png), ("link.png", b"2", b"")],
        *[("pipe.png", b"6", b""), ("twice.png", file, png), ("twice.png", file, png), (".png", file, png)],
        *[
            ("bad-\udcff.png", file, png),
            ("lonely.json", file, b"{}"),
            ("odd.png", file, png),
            ("odd.json", file, b"["),
        ],
        *[("empty.png", file, b""), ("masked.png", file, png), ("masked.mask.png", b"2", b"")],
    ]
    tar_of(tmp_path / "train-0.tar", first)
    tar_of(tmp_path / "train-1.tar", [("good.png", file, png), ("other.png", file, png)])
    tar_of(tmp_path / "train-2.tar", [("third.png", file, png), ("fourth.png", file, png)])
    (tmp_path / "train-2.tar").write_bytes((tmp_path / "train-2.tar").read_bytes()[:1100])
    with pytest.raises(DataError, match=r"\(and \d+ more: data check lists them\)"):
        open_dataset(tmp_path)
    assert main(["data", "check", str(tmp_path)]) == 2
    *lines, _ = capsys.readouterr().out.splitlines()
    named = ["'../out.png'", "'/etc/a.png'", "'link.png'", "'pipe.png'", "'twice.png'", "'.png'", "bad-\\udcff.png"]
    named += ["'lonely' has no image", ":odd: the json", ":empty.png", "'masked.mask.png'", "'good' already", "train-2"]
    assert [sum(name in line for line in lines) for name in named] == [1] * len(named), lines
    assert len(lines) == len(named)
    dataset = open_dataset(tmp_path, lenient=True)
    keys, broken = dataset.keys(), dict(check(dataset))
    assert [key for key in keys if key not in broken] == ["good", "other", "third"]
    assert (dataset[0].image == COLOUR).all()


NAMES = st.sampled_from(["0.png", "1.png", "sub/2.png", "../secret.png", "/etc/passwd", "", ".", "a" * 300, "link.png"])
VALUES = (
    NAMES
    | st.text("aé图\n\x1b\u202e\ud800", max_size=9)
    | st.integers()
    | st.none()
    | st.lists(st.integers(), max_size=3)
    | st.booleans()
)
KEYS = st.sampled_from(["file_name", "text", "mask_file_name", "conditioning_image_file_name", "more"])
LINES = (
    st.dictionaries(KEYS, VALUES, max_size=4).map(lambda record: json.dumps(record).encode())
    | st.builds(lambda name: json.dumps({"file_name": name, "text": "t"}).encode(), NAMES)
    | st.binary(max_size=40)
    | st.just(b"[" * 50_000)
)


@sample_or(long=2000)
def test_any_metadata_is_read_or_refused_line_by_line(tmp_path: Path, count: int, tally: Callable[..., None]) -> None:
    """Whatever stands in the other lines, the last one, a good one, is read, and no picture from elsewhere is."""
    (tmp_path / "secret.png").write_bytes(saved(plain(colour=(1, 2, 3))))
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for name in ("0.png", "1.png", "sub/2.png", "last.png"):
        (folder / name).write_bytes(saved(plain()))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    seen: Counter[str] = Counter()

    @drawn(count)
    @given(st.lists(LINES, max_size=5))
    def holds(lines: list[bytes]) -> None:
        content = [line.replace(b"\n", b"").replace(b"last", b"") for line in lines]
        (folder / "metadata.jsonl").write_bytes(b"\n".join([*content, b'{"file_name": "last.png", "text": "last"}\n']))
        dataset = open_dataset(folder, lenient=True)
        broken = dict(check(dataset))
        assert "last.png" in set(dataset.keys())
        for index, key in enumerate(dataset.keys()):
            if key not in broken:
                assert (dataset[index].image == COLOUR).all()
        assert all(f"{folder}" in fault for fault in dataset.faults)
        seen.update(folders=1, refused_lines=len(dataset.faults) + len(broken), read_lines=len(dataset) - len(broken))

    holds()
    tally("metadata of any kind", **seen)
    assert seen["refused_lines"]
    assert seen["read_lines"] > seen["folders"]


EDITS = st.lists(st.tuples(st.integers(0, 10_239), st.integers(0, 255)), max_size=4)
CUTS = st.just(0) | st.integers(0, 10_240)  # bytes off the end
GOOD = [data for data, _ in READ.values()] + [saved(plain(), kind) for kind in ("BMP", "TIFF", "GIF")]
GOOD += [saved(Image.effect_noise((40, 30), 99), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF")]


@sample_or(long=6000, sample=200)
def test_any_bytes_are_a_picture_or_refused(count: int, tally: Callable[..., None]) -> None:
    """Pictures with bytes changed or cut off; little memory is taken, whatever the header asks for."""
    seen: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @drawn(count)
    @given(st.sampled_from(GOOD), EDITS, CUTS)
    def holds(data: bytes, edits: list[tuple[int, int]], cut: int) -> None:
        changed = bytearray(data)
        for place, value in edits:
            changed[place % len(changed)] = value
        source = bytes(changed[: max(0, len(changed) - cut)])
        for read, shape in ((read_image, 3), (read_mask, 2)):
            array, told = None, "some.png: "
            try:
                array = read(source, max_pixels=1_000_000, name="some.png")
            except DataError as error:
                told = str(error)
            assert told.startswith("some.png: ")
            assert told.isprintable()
            assert array is None or (array.dtype == np.uint8 and array.ndim == shape)
            seen["refused" if array is None else "read"] += 1

    holds()
    tally("pictures of any bytes", **seen)
    assert seen["refused"] > count / 4
    assert seen["read"] > count / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


def mended(data: bytes) -> bytes:
    """With the checksum of each header right, so that damage gets past it."""
    blocks = bytearray(data)
    for start in range(0, len(blocks), 512):
        if blocks[start + 257 : start + 262] == b"ustar":
            blocks[start + 148 : start + 156] = b" " * 8
            blocks[start + 148 : start + 156] = b"%06o\0 " % (sum(blocks[start : start + 512]) % 0o777777)
    return bytes(blocks)


def number(size: int) -> bytes:
    """A header's size, in tar's own digits, or in the binary that it has for what is larger or negative."""
    return b"%011o\0" % size if 0 <= size < 8**11 else (size % 256**12 | 128 << 88).to_bytes(12, "big")


HUGE = [-512, -1 << 40, 10_241, 7_000_000_000, 1 << 62, 1 << 70]


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X", b"0", b"S"])
def test_a_header_of_an_impossible_size_is_refused_by_name(tmp_path: Path, kind: bytes, size: int) -> None:
    tar_of(tmp_path / "train-0.tar", [("a.png", tarfile.REGTYPE, saved(plain())), ("b.png", kind, b"")])
    changed = bytearray((tmp_path / "train-0.tar").read_bytes())
    changed[1024 + 124 : 1024 + 136] = number(size)
    (tmp_path / "train-0.tar").write_bytes(mended(bytes(changed)))

    def use() -> None:
        dataset = open_dataset(tmp_path, lenient=True)
        assert dataset.faults, "nothing is refused"
        raise DataError("; ".join(dataset.faults))

    assert verdict(use, "train-0.tar: ", seconds=5) == "refused"


def test_a_chain_of_headers_is_refused_by_name(tmp_path: Path) -> None:
    tar_of(tmp_path / "train-0.tar", [("a.png", b"L", b"")] * 3000)
    with pytest.raises(DataError, match=r"train-0\.tar: not a whole, plain tar"):
        open_dataset(tmp_path)


@sample_or(long=1500)
def test_any_shard_is_read_or_refused_member_by_member(tmp_path: Path, count: int, tally: Callable[..., None]) -> None:
    png, file = saved(plain()), tarfile.REGTYPE
    members = [("a.png", file, png), ("a.json", file, b'{"text": "t"}'), ("b" * 120 + ".png", file, png)]
    tar_of(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    tar_of(tmp_path / "train-1.tar", [("good.png", file, png)])
    headers = [start for start in range(0, len(whole), 512) if whole[start + 257 : start + 262] == b"ustar"]
    seen: Counter[str] = Counter()

    @drawn(count)
    @given(EDITS, CUTS, st.none() | st.tuples(st.sampled_from(headers), st.sampled_from(HUGE)))
    def holds(edits: list[tuple[int, int]], cut: int, huge: tuple[int, int] | None) -> None:
        changed = bytearray(whole)
        for place, value in edits:
            changed[place] = value
        if huge:
            changed[huge[0] + 124 : huge[0] + 136] = number(huge[1])
        (tmp_path / "train-0.tar").write_bytes(mended(bytes(changed))[: len(whole) - cut])
        dataset = open_dataset(tmp_path, lenient=True)
        broken = dict(check(dataset))
        assert "good" in set(dataset.keys())
        assert "good" not in broken
        seen.update(shards=1, refused=len(dataset.faults) + len(broken), read=len(dataset) - len(broken) - 1)

    holds()
    tally("shards of any bytes", **seen)
    assert seen["refused"]
    assert seen["read"]
