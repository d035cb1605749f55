"""A folder of pictures -> shards at one resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from refine_control.data.example import Example
from refine_control.data.images import FitMode, fit_square, fit_square_mask
from refine_control.data.shards import write_shards
from refine_control.data.source import open_dataset


def prepare(source: Path, out: Path, split: str, resolution: int, fit: FitMode) -> list[Path]:
    """Writes `out/SPLIT-000000.tar`, ... with every picture of one split, brought to resolution x resolution."""
    dataset = open_dataset(source, split)

    def brought() -> Iterator[Example]:
        for index in tqdm(range(len(dataset)), desc="preparing", unit="image"):
            e = dataset[index]
            yield replace(
                e,
                key=e.key.replace(".", "_"),
                image=fit_square(e.image, resolution, fit),
                mask=None if e.mask is None else fit_square_mask(e.mask, resolution, fit),
                control=None if e.control is None else fit_square(e.control, resolution, fit),
            )

    return write_shards(brought(), out, split)
