"""A path from a recipe -> the dataset that reads it."""

from __future__ import annotations

import bisect
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refine_control.data.example import Example
from refine_control.data.folders import METADATA, FolderDataset, refuse_escape
from refine_control.data.images import MAX_PIXELS, SUFFIXES
from refine_control.data.shards import ShardDataset
from refine_control.errors import DataError
from refine_control.files import cores

SPLITS = ("train", "val", "validation", "test")
SAME = {"val": "validation", "validation": "val"}  # whichever of the two there is
WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
NUMBER = re.compile(r"([-_]?\d+)?(-of-\d+)?$")
AT_ONCE = 1000  # examples handed to threads


class NoSplitError(DataError):
    """A folder holds other splits only."""


def open_dataset(
    path: str | Path, split: str = "train", max_pixels: int = MAX_PIXELS, lenient: bool = False
) -> FolderDataset | ShardDataset:
    """Open `path/SPLIT-*.tar` as shards, else `path/SPLIT` or, where nothing is split, `path` as a folder of images.

    Of shards whose names hold train, val, validation or test somewhere, that is the split, as on the Hugging Face hub;
    val and validation are one.
    A folder without splits (of shards: all have one name but for their numbers, and it is none of these words) gives
    all its images for every split: keep what you test on elsewhere. lenient: as of `FolderDataset`.

    Raises DataError: no such folder; the folder holds other splits only (NoSplitError, they are listed); whatever the
    dataset itself refuses.
    """
    folder = Path(path)
    if not split or "/" in split or split.startswith(".") or any(letter in split for letter in "*?["):
        raise DataError(f"split {split!r} is not a name; use 'train', 'val' or 'test'")
    if not folder.is_dir():
        reason = "is a file; give the folder that it lies in" if folder.exists() else "no such folder; check the path"
        raise DataError(f"{folder}: {reason}")
    split = known_as(split, names := splits_of(folder))
    if tars := _tars(folder):
        beside = [name for name in (METADATA, *SPLITS) if os.path.lexists(folder / name)]
        if beside:
            raise DataError(f"{folder}: holds shards ({tars[0].name}) and {beside[0]}; move one of them elsewhere")
        shards = [tar for tar in tars if tar.stem.startswith(f"{split}-") or (_name(tar) or "train") == split]
        if not shards and len(words := {_name(tar) for tar in tars}) == 1 and words.isdisjoint(SPLITS):
            shards = tars  # nothing is split
        if not shards:
            raise NoSplitError(f"{folder}: no {split!r} shards, only {', '.join(names)}; choose one of these")
        return ShardDataset(shards, max_pixels, lenient)
    if (folder / split).is_dir():
        refuse_escape(folder / split, folder.resolve())
        if os.path.lexists(folder / METADATA) and not os.path.lexists(folder / split / METADATA):
            raise DataError(f"{folder / METADATA}: stands beside {split}/; move it into {split}/ and mend its paths")
        return FolderDataset(folder / split, max_pixels, lenient)
    if others := _split_folders(folder):
        raise NoSplitError(f"{folder}: no {split!r} folder, only {', '.join(others)}; choose one of these")
    return FolderDataset(folder, max_pixels, lenient)


Paths = str | Path | Sequence[str]


def paths_of(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, str | Path) else list(paths)


def open_usable(paths: Paths, split: str, skip_corrupt: bool) -> FolderDataset | ShardDataset | Joined:
    """As `open_dataset`, of one path or several; with skip_corrupt, what cannot be used is listed and left out."""
    parts = [open_dataset(path, split, lenient=skip_corrupt) for path in paths_of(paths)]
    for reason in (reason for part in parts for reason in part.faults):
        print(f"skipped: {reason}", file=sys.stderr)
    return parts[0] if len(parts) == 1 else Joined(parts)


def warn_if_trained_on(paths: Paths, files: Iterable[Path], split: str, lenient: bool = False) -> bool:
    """Whether some of a split's files are training's too, for want of a split of its own; a line on stderr says so."""
    trained: set[Path] = set()
    for path in paths_of(paths):
        with suppress(DataError if lenient else NoSplitError):
            trained.update(open_dataset(path, lenient=lenient).files())
    if found := not trained.isdisjoint(files):
        print(
            f"refine-control: '{', '.join(map(str, paths_of(paths)))}' has no split '{split}' of its own: these scores "
            "are of pictures that were trained on",
            file=sys.stderr,
        )
    return found


class Joined:
    """Several data sets, one behind the other."""

    def __init__(self, parts: Sequence[FolderDataset | ShardDataset]) -> None:
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Example:
        number, own = self._at(index)
        example = self.parts[number][own]
        return replace(example, key=_keyed(number, example.key))

    def text(self, index: int) -> str | None:
        number, own = self._at(index)
        return self.parts[number].text(own)

    def keys(self) -> list[str]:
        """With the number of their part, since two may have the same names."""
        return [_keyed(number, key) for number, part in enumerate(self.parts) for key in part.keys()]  # noqa: SIM118

    def files(self) -> list[Path]:
        return [path for part in self.parts for path in part.files()]

    def _at(self, index: int) -> tuple[int, int]:
        """The number of the part, and the place in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self.ends, index)
        return place, index - (self.ends[place - 1] if place else 0)


def _keyed(part: int, key: str) -> str:
    return f"{part}:{key}"


def known_as(split: str, names: Sequence[str]) -> str:
    """The one of these names that a split has there: its own, or the other of val and validation; else its own."""
    return SAME[split] if split not in names and SAME.get(split) in names else split


def splits_of(path: str | Path) -> list[str]:
    """The names that `open_dataset` knows for a folder: those of its shards, of its folders, or 'train' for all."""
    folder = Path(path)
    shards = {_name(tar) or "train" for tar in _tars(folder)}
    return sorted(shards) or _split_folders(folder) or ["train"]


def beside_splits(path: str | Path) -> int:
    """How many pictures lie in a folder that is split, but in none of its splits: nothing reads them."""
    folder = Path(path)
    if _tars(folder) or not _split_folders(folder):
        return 0
    beside = (child for child in folder.iterdir() if child.name not in SPLITS)
    pictures = (
        found
        for child in beside
        for found in (child, *child.rglob("*"))
        if found.name.lower().endswith(SUFFIXES) and found.is_file()
    )
    return sum(not any(name.startswith(".") for name in found.relative_to(folder).parts) for found in pictures)


def _split_folders(folder: Path) -> list[str]:
    return [name for name in SPLITS if (folder / name).is_dir()]


def _tars(folder: Path) -> list[Path]:
    """Hidden ones, as a Mac leaves beside each file, are none."""
    return sorted(folder.glob("[!.]*.tar"))


def _name(tar: Path) -> str:
    """A shard's split, or where its name tells none, its name without the number, '' of one that is all number."""
    word = WORD.search(tar.stem)
    return word[1] if word else NUMBER.sub("", tar.stem)


def check(dataset: Any) -> list[tuple[str, str]]:
    """Decode every example of a data set (`keys()` and `[i]`) and return each fault as (key, reason), in their order.

    An empty list means that all can be read. As many threads as cores: decoding leaves Python's lock.
    """

    def fault(index: int) -> str | None:
        try:
            dataset[index]
        except DataError as error:
            return str(error)
        return None

    keys, faults = dataset.keys(), []
    with ThreadPoolExecutor(cores()) as pool, tqdm(total=len(keys), desc="checking", unit="image", disable=None) as bar:
        for first in range(0, len(keys), AT_ONCE):
            some = keys[first : first + AT_ONCE]
            reasons = pool.map(fault, range(first, first + len(some)))
            faults += [(key, reason) for key, reason in zip(some, reasons, strict=True) if reason]
            bar.update(len(some))
    return faults
