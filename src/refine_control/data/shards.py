"""WebDataset tar shards as a map-style dataset: indexed once, read by seek, never extracted."""

import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from refine_control.data.example import (
    Example,
    is_unicode,
    read_json,
    require_caption,
    require_no_faults,
    require_same_size,
)
from refine_control.data.images import MAX_PIXELS, encode_png, encode_webp, most_bytes, read_image, read_mask
from refine_control.errors import DataError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
ENDINGS = (*IMAGE_EXTENSIONS, "json", "txt", "mask.png", "control.png")  # of the members that are read
BLOCK, LONGEST_KEY, LONGEST_HEADER = 512, 80, 1_000_000  # bytes; a plain tar has room for names of a hundred
EXTENDED = (b"L", b"K", b"x", b"g", b"X")  # types of headers: a member's long name or link, or what pax says of it
Members = dict[str, tuple[int, int]]  # ending -> (offset, size)
Encoded = list[tuple[str, bytes]]


class Entries:
    """Where each example's members lie: some 70 bytes an example, a tenth of what dicts take of 10^8 examples."""

    def __init__(self) -> None:
        self._keys, self._key_ends = bytearray(), array("q", [0])
        self._shards = array("I")
        self._endings, self._offsets, self._sizes = array("B"), array("q"), array("q")
        self._member_ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._shards)

    def append(self, key: str, shard: int, members: Members) -> None:
        self._keys += key.encode("utf-8", "surrogatepass")
        self._key_ends.append(len(self._keys))
        self._shards.append(shard)
        for place, ending in enumerate(ENDINGS):
            if ending in members:
                offset, size = members[ending]
                self._endings.append(place)
                self._offsets.append(offset)
                self._sizes.append(size)
        self._member_ends.append(len(self._endings))

    def key(self, index: int) -> str:
        return self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode("utf-8", "surrogatepass")

    def shard(self, index: int) -> int:
        return self._shards[index]

    def members(self, index: int) -> Members:
        places = range(self._member_ends[index], self._member_ends[index + 1])
        return {ENDINGS[self._endings[i]]: (self._offsets[i], self._sizes[i]) for i in places}

    def without(self, rows: set[int]) -> "Entries":
        kept = Entries()
        for row in range(len(self)):
            if row not in rows:
                kept.append(self.key(row), self.shard(row), self.members(row))
        return kept

    def twins(self) -> Iterator[tuple[int, int]]:
        """Pairs of examples with the same key, the earlier first."""
        hashes = np.fromiter((hash(self.key(i)) for i in range(len(self))), np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]):
            first, second = (int(order[place + step]) for step in (0, 1))
            if self.key(first) == self.key(second):
                yield first, second


class ShardDataset:
    """Examples of plain tar shards, in the shards' order.

    Members: `KEY.webp|png|jpg|jpeg`, and optionally `KEY.json` ("text" is the caption, the rest is
    `Example.extra`), `KEY.txt` (the caption where the json has none), `KEY.mask.png`, `KEY.control.png`. As in
    WebDataset, KEY ends at the first dot of the file's name; members with other endings are ignored.

    Raises DataError when opened: a missing, compressed, cut or damaged tar; a member that is absolute, climbs out
    or is not a regular file; a key twice; a key without image; no example at all. Nothing is decoded before `ds[i]`.
    """

    def __init__(self, shards: Sequence[Path], max_pixels: int = MAX_PIXELS, lenient: bool = False) -> None:
        """lenient: examples that cannot be used are left out and listed in `faults`; of a damaged tar, its rest."""
        self.shards = [Path(shard) for shard in shards]
        self.max_pixels = max_pixels
        self.faults: list[str] = []
        self._entries = Entries()
        for number, shard in enumerate(self.shards):
            for key, members in _index(shard, self.faults).items():
                if any(ending in members for ending in IMAGE_EXTENSIONS):
                    self._entries.append(key, number, members)
                else:
                    self.faults.append(f"{shard}: key {key!r} has no image; add {key}.webp, .png or .jpg, or remove it")
        twins = set()
        for first, second in self._entries.twins():
            there, here = (self.shards[self._entries.shard(index)] for index in (first, second))
            key = self._entries.key(first)
            self.faults.append(f"{here}: key {key!r} already stands in {there}; rename or remove one")
            twins.add(second)
        if twins:
            self._entries = self._entries.without(twins)
        require_no_faults(self.faults, lenient)
        if not len(self._entries) and not self.faults:
            raise DataError(f"no example in {[str(shard) for shard in self.shards]}; give shards that hold images")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        key, number, members = self._entry(index)
        label = f"{self.shards[number]}:{key}"
        ending = next(ending for ending in IMAGE_EXTENSIONS if ending in members)
        image = read_image(self._read(number, members[ending]), self.max_pixels, f"{label}.{ending}")
        mask = control = None
        if "mask.png" in members:
            mask = read_mask(self._read(number, members["mask.png"]), self.max_pixels, f"{label}.mask.png")
        if "control.png" in members:
            control = read_image(self._read(number, members["control.png"]), self.max_pixels, f"{label}.control.png")
        require_same_size(label, image, mask, "mask")
        require_same_size(label, image, control, "control")
        text, extra = self._metadata(index)
        return Example(key, image, text, mask, control, extra)

    def keys(self) -> list[str]:
        """Every example's key, in order; decodes nothing."""
        return [self._entries.key(index) for index in range(len(self))]

    def files(self) -> list[Path]:
        """Every file that is read."""
        return self.shards

    def text(self, index: int) -> str | None:
        """The caption, or None; reads the metadata only. Raises DataError for broken metadata."""
        return self._metadata(index)[0]

    def extra(self, index: int) -> dict[str, Any]:
        """The other metadata keys; reads the metadata only. Raises DataError for broken metadata."""
        return self._metadata(index)[1]

    def _entry(self, index: int) -> tuple[str, int, Members]:
        index = range(len(self))[index]
        return self._entries.key(index), self._entries.shard(index), self._entries.members(index)

    def _metadata(self, index: int) -> tuple[str | None, dict[str, Any]]:
        key, number, members = self._entry(index)
        label = f"{self.shards[number]}:{key}"
        extra: dict[str, Any] = {}
        try:
            if "json" in members:
                extra = read_json(self._read(number, members["json"]))
            fallback = self._read(number, members["txt"]).decode("utf-8").strip() if "txt" in members else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{label}: the json or txt is not JSON in UTF-8 ({error}); write it anew") from None
        if not isinstance(extra, dict):
            raise DataError(f"{label}.json: a {type(extra).__name__}; write an object, {{'text': ...}}")
        text = require_caption(extra.pop("text", None), f"{label}.json")
        return (fallback if text is None else text), extra

    def _read(self, number: int, place: tuple[int, int]) -> bytes:
        # Opened anew each time: no handle is shared by threads or forked workers.
        shard, (offset, size) = self.shards[number], place
        if size > most_bytes(self.max_pixels):
            raise DataError(f"{shard}: a member of {size} bytes is larger than a picture may be; remove it")
        try:
            with shard.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{shard}: cannot be read ({error.strerror}); put the shard back") from None
        if len(data) != size:
            raise DataError(f"{shard}: became shorter while in use; put the shard back")
        return data


def write_shards(
    examples: Iterable[Example],
    out_dir: Path,
    name: str,
    max_bytes: int = 32_000_000,
    quality: int | None = None,
) -> list[Path]:
    """Write `out_dir/NAME-000000.tar`, ... and return the paths; equal examples give equal bytes.

    Images are WebP, lossless or at `quality`; masks (as 0 and 255) and controls are PNG. Examples are sorted by key
    and a shard is closed before it would pass `max_bytes`. The encoded examples are held in memory. Shards appear
    under their names only when all are complete.

    Raises DataError: no example, a key twice, a key that is no plain relative path or has a dot, shards of that name
    already there.
    """
    out_dir = Path(out_dir)
    if existing := sorted(out_dir.glob(f"{name}-*.tar")):
        raise DataError(f"{existing[0]}: already there; remove the old {name} shards or choose another name")
    encoded = sorted((_checked_key(example.key), _encode(example, quality)) for example in examples)
    if not encoded:
        raise DataError(f"no example to write as {name} shards; give at least one")
    for (key, _), (following, _) in pairwise(encoded):
        if key == following:
            raise DataError(f"key {key!r} comes twice; make the keys unique")
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"{name}-{number:06d}.tar" for number, _ in enumerate(_groups(encoded, max_bytes))]
    for path, group in zip(paths, _groups(encoded, max_bytes), strict=True):
        with tarfile.open(path.with_suffix(".tar.tmp"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in group:
                for ending, data in members:
                    info = tarfile.TarInfo(f"{key}.{ending}")  # mtime, uid and gid are 0
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for path in paths:
        os.replace(path.with_suffix(".tar.tmp"), path)
    return paths


def _encode(example: Example, quality: int | None) -> Encoded:
    """The members of one example as (ending, bytes), sorted."""
    record = dict(example.extra) if example.text is None else {**example.extra, "text": example.text}
    members = [("webp", encode_webp(example.image, quality))]
    if record:
        text = json.dumps(record, ensure_ascii=False, sort_keys=True)
        members.append(("json", text.encode("utf-8", "backslashreplace")))  # half of a surrogate pair as JSON spells it
    if example.mask is not None:
        members.append(("mask.png", encode_png(example.mask * 255)))
    if example.control is not None:
        members.append(("control.png", encode_png(example.control)))
    return sorted(members)


def _groups(encoded: list[tuple[str, Encoded]], max_bytes: int) -> list[list[tuple[str, Encoded]]]:
    groups: list[list[tuple[str, Encoded]]] = [[]]
    total = 2 * BLOCK
    for key, members in encoded:
        size = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in members)
        if groups[-1] and -(-(total + size) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE > max_bytes:
            groups.append([])
            total = 2 * BLOCK
        groups[-1].append((key, members))
        total += size
    return groups


def _checked_key(key: str) -> str:
    plain = key and not key.startswith("/") and "." not in key and "\0" not in key and is_unicode(key)
    if not plain or PurePosixPath(key).as_posix() != key or len(key.encode()) > LONGEST_KEY:
        raise DataError(f"key {key!r} cannot name a tar member; use a relative path of at most 80 bytes, without dots")
    return key


def _index(shard: Path, faults: list[str]) -> dict[str, Members]:
    """key -> ending -> (offset, size) of a plain tar's members; every member is checked. Faults are added to `faults`;
    their keys are left out: an example that lost a member is another example."""
    index: dict[str, Members] = {}
    spoilt: set[str] = set()
    try:
        if shard.exists() and not shard.is_file():  # to read a pipe is to wait for good
            raise OSError(0, "not a regular file")
        with tarfile.open(shard, "r:", tarinfo=_Header) as tar:
            for member in (member for member in tar if not member.isdir()):  # tar itself writes folders
                key = ""
                try:
                    key, ending = _split(member.name)
                    _require_new_file(member, ending, index.setdefault(key, {}))
                except DataError as error:
                    faults.append(f"{shard}: member {member.name!r} {error}")
                    spoilt.add(key)
                else:
                    index[key][ending] = (member.offset_data, member.size)
            end = tar.offset
        with shard.open("rb") as file:  # tarfile takes a damaged header, or a cut file, for the end
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                faults.append(f"{shard}: cut short or damaged at byte {end}; fetch or write the shard again")
    except (tarfile.TarError, ArithmeticError, LookupError, ValueError, RecursionError) as error:  # of damaged headers
        faults.append(f"{shard}: not a whole, plain tar ({error}); write it again without compression")
    except OSError as error:
        faults.append(f"{shard}: cannot be read ({error.strerror}); check the path and its permissions")
    return {key: members for key, members in index.items() if key not in spoilt}


class _Header(tarfile.TarInfo):
    """Of sizes that may be: tarfile reads a long name or a pax header as a whole, and goes back for a negative one."""

    def _block(self, count: int) -> int:
        if not 0 <= count <= (LONGEST_HEADER if self.type in EXTENDED else 1 << 62):
            raise tarfile.ReadError(f"a header says {count} bytes")
        return super()._block(count)  # type: ignore[misc, no-any-return]


def _split(name: str) -> tuple[str, str]:
    """A member's (key, ending); raises DataError for a name that leads out of the tar, or to nothing."""
    parts = [part for part in name.split("/") if part not in ("", ".")]  # pathlib interns what it splits
    if name.startswith("/") or ".." in parts or not parts:
        raise DataError("leaves the shard; write relative names without '..'")
    if not is_unicode(name):  # so Python spells bytes that are no UTF-8
        raise DataError("has a name that is not UTF-8; rename or remove it")
    stem, _, ending = parts[-1].partition(".")
    if not stem:
        raise DataError("has no key before its first dot; rename or remove it")
    return "/".join([*parts[:-1], stem]), ending.lower()


def _require_new_file(member: tarfile.TarInfo, ending: str, others: Members) -> None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise DataError("is not a regular file; write only files into the tar")
    if ending in others:
        raise DataError("comes twice; remove one")
