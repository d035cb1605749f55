"""A folder of pictures, with a Hugging Face `metadata.jsonl` or without captions, as a map-style dataset."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from refine_control.data.example import (
    Example,
    is_unicode,
    read_json,
    require_caption,
    require_no_faults,
    require_same_size,
)
from refine_control.data.images import MAX_PIXELS, SUFFIXES, UNREAD, read_image, read_mask
from refine_control.errors import DataError

METADATA = "metadata.jsonl"
FOREIGN = ("metadata.csv", "metadata.parquet")  # Hugging Face reads them
MOST_BYTES = 1_000_000_000  # of the metadata, that of millions of pictures
LONGEST_LINE = 1_000_000  # bytes


@dataclass(frozen=True)
class _Entry:
    key: str
    image: Path
    text: str | None = None
    mask: Path | None = None
    control: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class FolderDataset:
    """`folder/metadata.jsonl` (Hugging Face image-folder) or, without it, every picture below `folder`, sorted.

    Metadata keys: `file_name` (relative to the folder), `text`, and optionally `mask_file_name` and
    `conditioning_image_file_name`; the others are kept in `Example.extra`. A plain folder is searched recursively,
    hidden files and folders (a leading dot) left out. The key of an example is its image's path below the folder.

    Raises DataError when opened: missing or empty folder, a picture of a kind that is not read, metadata that lies
    deeper where there is none above it, is no file or is larger than MOST_BYTES, a broken line of it, a path that is
    absolute, climbs out or leaves the folder through a link, a duplicate or missing file. Images are decoded only by
    `ds[i]`, which raises DataError for a broken one and for a mask or control of another size.
    """

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS, lenient: bool = False) -> None:
        """lenient: lines of the metadata, and files, that cannot be used are left out and listed in `faults`."""
        self.folder = Path(folder)
        self.max_pixels = max_pixels
        self.faults: list[str] = []
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; check the path")
        if os.path.lexists(self.folder / METADATA):
            self._entries = _read_metadata(self.folder, self.faults)
        elif foreign := [name for name in FOREIGN if os.path.lexists(self.folder / name)]:
            raise DataError(f"{self.folder / foreign[0]}: only {METADATA} is read; convert it, one object a line")
        else:
            self._entries = [_Entry(_key(path, self.folder), path) for path in _find_images(self.folder, self.faults)]
        require_no_faults(self.faults, lenient)
        if not self._entries and not self.faults:
            raise DataError(f"{self.folder}: no image found; put {', '.join(SUFFIXES)} files there or a {METADATA}")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        entry = self._entries[index]
        image = read_image(entry.image, self.max_pixels)
        mask = read_mask(entry.mask, self.max_pixels) if entry.mask else None
        control = read_image(entry.control, self.max_pixels) if entry.control else None
        require_same_size(entry.key, image, mask, "mask")
        require_same_size(entry.key, image, control, "conditioning image")
        return Example(entry.key, image, entry.text, mask, control, dict(entry.extra))

    def keys(self) -> list[str]:
        """Every example's key, in order; decodes nothing."""
        return [entry.key for entry in self._entries]

    def files(self) -> list[Path]:
        """Every file that is read."""
        parts = [path for e in self._entries for path in (e.image, e.mask, e.control) if path]
        return [*parts, *self.folder.glob(METADATA)]

    def text(self, index: int) -> str | None:
        """The caption, or None; decodes nothing."""
        return self._entries[index].text

    def extra(self, index: int) -> dict[str, Any]:
        """The other metadata keys; decodes nothing."""
        return dict(self._entries[index].extra)


def _read_metadata(folder: Path, faults: list[str]) -> list[_Entry]:
    """Every line of `folder/metadata.jsonl`, checked; blank lines are skipped, those at fault added to `faults`."""
    path = folder / METADATA
    entries: list[_Entry] = []
    seen: dict[str, int] = {}
    root = folder.resolve()
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = _entry(_parse_line(line, where), folder, root, where)
            if entry.key in seen:
                raise DataError(f"{where}: file_name {entry.key!r} already stands in line {seen[entry.key]}; keep one")
        except DataError as error:
            faults.append(str(error))
            continue
        seen[entry.key] = number
        entries.append(entry)
    return entries


def _lines(path: Path) -> Iterator[bytes]:
    """Of a file that may be larger than the memory."""
    if not path.is_file():  # to read a pipe is to wait for good
        raise DataError(f"{path}: not a regular file; put the captions there, or remove it to do without")
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
                raise DataError(f"{path}: {size} bytes are more than {MOST_BYTES}; write the pictures as shards")
            while line := file.readline(LONGEST_LINE):
                yield line.removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    if len(line) == LONGEST_LINE:
        raise DataError(f"{where}: longer than {LONGEST_LINE} bytes; write one JSON object a line")
    try:
        record = read_json(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise DataError(f"{where}: not JSON ({reason}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: a {type(record).__name__} where an object is needed; write {{"file_name": ...}}')
    return record


def _entry(record: dict[str, Any], folder: Path, root: Path, where: str) -> _Entry:
    record = dict(record)
    if "file_name" not in record:
        raise DataError(f"{where}: no file_name; add the image's path, relative to {folder}")
    image = _inside(record.pop("file_name"), folder, root, f"{where}: file_name")
    text = require_caption(record.pop("text", None), where)
    mask = record.pop("mask_file_name", None)
    control = record.pop("conditioning_image_file_name", None)
    return _Entry(
        key=_key(image, folder),
        image=image,
        text=text,
        mask=None if mask is None else _inside(mask, folder, root, f"{where}: mask_file_name"),
        control=None if control is None else _inside(control, folder, root, f"{where}: conditioning_image_file_name"),
        extra=record,
    )


def _inside(name: Any, folder: Path, root: Path, where: str) -> Path:
    """`folder/name`, once it is sure to be a file that lies in `root` (the folder, resolved)."""
    if not isinstance(name, str) or not name or "\0" in name or not is_unicode(name):
        raise DataError(f"{where} is {name!r}; write a path relative to {folder}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where} {name!r} leaves the folder; write a path relative to {folder}, without '..'")
    path = folder.joinpath(*relative.parts)
    refuse_escape(path, root)
    if not os.path.isfile(path):  # Path.is_file raises an OSError for a name that is too long
        raise DataError(f"{where} {name!r}: no such file in {folder}; add the file or remove the line")
    return path


def _find_images(folder: Path, faults: list[str]) -> list[Path]:
    """Every picture below `folder`, sorted; what cannot be used is added to `faults`."""
    root = folder.resolve()
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        faults.append(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

    def usable(parent: str, names: list[str]) -> Iterator[str]:
        for name in names:
            try:
                _require_usable(Path(parent) / name, root)
            except DataError as error:
                faults.append(str(error))
            else:
                yield name

    for parent, folders, files in os.walk(folder, onerror=unreadable):  # does not follow linked folders
        folders[:] = usable(parent, [name for name in folders if not name.startswith(".")])
        shown = [name for name in files if not name.startswith(".")]
        if told := [name for name in (METADATA, *FOREIGN) if name in shown]:  # or its masks would be pictures
            raise DataError(f"{Path(parent) / told[0]}: not read below {folder}; open its own folder (or list several)")
        pictures = [name for name in shown if name.lower().endswith(SUFFIXES)]
        others = sorted(name for name in shown if name.lower().endswith(UNREAD))
        faults += [f"{Path(parent) / name}: not read; save it as PNG or JPEG, or remove it" for name in others]
        found += [Path(parent) / name for name in usable(parent, pictures)]
    return sorted(found, key=lambda path: _key(path, folder))


def _require_usable(path: Path, root: Path) -> None:
    if path.is_symlink():
        refuse_escape(path, root)
    if not is_unicode(path.name):  # so Python spells bytes that are no UTF-8
        raise DataError(f"{path}: its name is not UTF-8; rename it")
    if not os.path.isfile(path) and not os.path.isdir(path):  # to read a pipe is to wait for good
        raise DataError(f"{path}: not a regular file; remove it")


def refuse_escape(path: Path, root: Path) -> None:
    """Raises DataError where a path leads, through a link, to what does not lie in `root` (resolved)."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):
        raise DataError(f"{path}: a link that leads nowhere; remove it or put the file there") from None
    if not resolved.is_relative_to(root):
        raise DataError(f"{path}: a link that leaves the folder (to {resolved}); copy the file into the folder")


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
