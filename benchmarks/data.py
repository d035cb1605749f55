"""What pictures cost at 512 px: bytes of a prepared picture, pictures read a second by one core, places in an index.

    python benchmarks/data.py --out results/benchmark-data.json

The pictures are the colour photographs that scikit-image brings along.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from skimage import data

from common import write
from refine_control.data.example import Example
from refine_control.data.images import encode_webp, fit_square
from refine_control.data.loader import Pictures
from refine_control.data.shards import ShardDataset, write_shards
from refine_control.provenance import machine
from refine_control.recipe import DataConfig

SIDE = 512
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-data.json"))
    args = parser.parse_args()
    photos = [getattr(data, name)() for name in PHOTOS]
    result = {
        "pictures": list(PHOTOS),
        "bytes": {str(quality): bytes_each(photos, quality) for quality in (None, 95, 85)},
        "pictures_per_second_and_core": reading_rate(photos),
        **index_cost(20_000),
        "machine": machine(),
    }
    write(result, args.out)


def bytes_each(photos: list[np.ndarray], quality: int | None) -> float:
    """Of a picture of 512 px, by the bits a pixel of the photographs' middle: none is enlarged."""
    squares = [fit_square(photo, min(SIDE, *photo.shape[:2])) for photo in photos]
    return sum(len(encode_webp(square, quality)) / square[..., 0].size for square in squares) / len(squares) * SIDE**2


def reading_rate(photos: list[np.ndarray], repeats: int = 20) -> float:
    """From a shard to a picture of the recipe's size, each read anew; one thread."""
    with tempfile.TemporaryDirectory() as name:
        examples = [Example(str(i), photo, "a caption") for i, photo in enumerate(photos)]
        shards = ShardDataset(write_shards(examples, Path(name), "train", quality=95))
        pictures = Pictures(shards, DataConfig(resolution=SIDE, cache_gb=1e-12), 1)
        began = time.perf_counter()
        for turn in range(repeats * len(photos)):
            pictures[turn % len(photos)]
        return repeats * len(photos) / (time.perf_counter() - began)


def index_cost(count: int) -> dict[str, float]:
    """Seconds and bytes to know where each of 10^6 captioned examples lies."""

    def examples() -> Iterator[Example]:
        dot = np.zeros((1, 1, 3), np.uint8)
        for i in range(count):
            yield Example(f"part/picture-{i:09d}", dot, "a caption")

    with tempfile.TemporaryDirectory() as name:
        shards = write_shards(examples(), Path(name), "train")
        began = time.perf_counter()
        ShardDataset(shards)
        seconds = time.perf_counter() - began
        tracemalloc.start()
        kept = ShardDataset(shards)
        gc.collect()  # tarfile's objects refer to each other
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(kept) == count
    return {"index_seconds_per_million": seconds / count * 1e6, "index_bytes_each": size / count}


if __name__ == "__main__":
    main()
