"""A folder of pictures -> shards at one resolution."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from refine_control.data.example import Example
from refine_control.data.images import FitMode, fit_square, fit_square_mask, require_side
from refine_control.data.shards import LONGEST_KEY, write_shards
from refine_control.data.source import known_as, open_usable, splits_of
from refine_control.errors import DataError


def prepare(
    source: Path, out: Path, split: str, resolution: int, fit: FitMode, skip_corrupt: bool = False
) -> list[Path]:
    """Writes `out/SPLIT-000000.tar`, ... with every picture of one split, brought to resolution x resolution.

    skip_corrupt: pictures that cannot be used are listed and left out, else the first of them stops it.
    """
    require_side(resolution)
    dataset = open_usable(source, split, skip_corrupt)
    if split != "train" and known_as(split, names := splits_of(source)) not in names:
        print(
            f"'{source}' is not split: all of it becomes '{split}'. Prepare it as no other split too", file=sys.stderr
        )
    out.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()

    def brought() -> Iterator[Example]:
        for index in tqdm(range(len(dataset)), desc="preparing", unit="image"):
            try:
                e = dataset[index]
            except DataError as error:
                if not skip_corrupt:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                continue
            key = _key(e.key)
            if key in taken:
                key = _key(e.key, with_digest=True)
            taken.add(key)
            yield replace(
                e,
                key=key,
                image=fit_square(e.image, resolution, fit),
                mask=None if e.mask is None else fit_square_mask(e.mask, resolution, fit),
                control=None if e.control is None else fit_square(e.control, resolution, fit),
            )

    return write_shards(brought(), out, split)


def _key(name: str, with_digest: bool = False) -> str:
    """One that a shard can hold: without dots, and of a long one the beginning. with_digest: of the whole name, at its
    end, as a long one always has: two names are told apart by it."""
    key = name.replace(".", "_").encode()
    if len(key) <= LONGEST_KEY and not with_digest:
        return key.decode()
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return key[: LONGEST_KEY - 17].decode(errors="ignore") + "-" + digest
