"""A path from a recipe -> the dataset that reads it."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refine_control.data.folders import METADATA, FolderDataset
from refine_control.data.images import MAX_PIXELS
from refine_control.data.shards import ShardDataset
from refine_control.errors import DataError, printable
from refine_control.files import cores

SPLITS = ("train", "val", "validation", "test")
AT_ONCE = 1000  # examples handed to threads


def open_dataset(
    path: str | Path, split: str = "train", max_pixels: int = MAX_PIXELS, lenient: bool = False
) -> FolderDataset | ShardDataset:
    """Open `path/SPLIT-*.tar` as shards, else `path/SPLIT` or, where nothing is split, `path` as a folder of images.

    A folder without splits gives all its images for every split: keep what you test on elsewhere. lenient: as of
    `FolderDataset`.

    Raises DataError: no such folder; the folder holds other splits only (they are listed); whatever the dataset
    itself refuses.
    """
    folder = Path(path)
    if not split or "/" in split or split.startswith(".") or any(letter in split for letter in "*?["):
        raise DataError(f"split {split!r} is not a name; use 'train', 'val' or 'test'")
    if not folder.is_dir():
        reason = "is a file; give the folder that it lies in" if folder.exists() else "no such folder; check the path"
        raise DataError(f"{folder}: {reason}")
    if shards := sorted(folder.glob(f"{split}-*.tar")):
        return ShardDataset(shards, max_pixels, lenient)
    if tars := sorted(folder.glob("*.tar")):
        found = sorted({tar.stem.rpartition("-")[0] or tar.stem for tar in tars})
        raise DataError(f"{folder}: no {split!r} shards, only {', '.join(found)}; choose one of these")
    if (folder / split).is_dir():
        if (folder / METADATA).is_file() and not (folder / split / METADATA).is_file():
            raise DataError(f"{folder / METADATA}: stands beside {split}/; move it into {split}/ and mend its paths")
        return FolderDataset(folder / split, max_pixels, lenient)
    if others := [name for name in SPLITS if (folder / name).is_dir()]:
        raise DataError(f"{folder}: no {split!r} folder, only {', '.join(others)}; choose one of these")
    return FolderDataset(folder, max_pixels, lenient)


def open_usable(path: str | Path, split: str, skip_corrupt: bool) -> FolderDataset | ShardDataset:
    """As `open_dataset`; with skip_corrupt, what the metadata, folder or shards name wrongly is listed and left out."""
    dataset = open_dataset(path, split, lenient=skip_corrupt)
    for reason in dataset.faults:
        print(f"skipped: {printable(reason)}", file=sys.stderr)
    return dataset


def splits_of(path: str | Path) -> list[str]:
    """The names that `open_dataset` knows for a folder: those of its shards, of its folders, or 'train' for all."""
    folder = Path(path)
    shards = {tar.stem.rpartition("-")[0] for tar in folder.glob("*-*.tar")}
    return sorted(shards) or [name for name in SPLITS if (folder / name).is_dir()] or ["train"]


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
