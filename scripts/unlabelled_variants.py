"""Writes the plain data sets of recipes/compare-unlabelled.yaml: worse in quality, or poor in kinds.

    python scripts/unlabelled_variants.py

runs/unlabelled/openclipart-jpeg10 and -blur hold the embedded clip art after JPEG of quality 10, or a Gaussian blur of
5 % of a side; runs/unlabelled/emoji-people holds the emoji of one kind, persons.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import derived
from refine_control.data.source import open_dataset

ROOT = Path(__file__).parent.parent
Change = Callable[[Image.Image], Image.Image]


def jpeg10(picture: Image.Image) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=10)
    return Image.open(data)


def blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.05 * max(picture.size)))


def changed(change: Change) -> derived.Make:
    return lambda example: replace(example, image=np.asarray(change(Image.fromarray(example.image)).convert("RGB")))


def of_kind(kind: str) -> derived.Make:
    return lambda example: example if derived.has_kind(example.text, kind) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "unlabelled")
    out = parser.parse_args().out
    clip_art, emoji = (open_dataset(ROOT / "data" / name, "train") for name in ("openclipart", "emoji"))
    derived.write(clip_art, out / "openclipart-jpeg10", changed(jpeg10))
    derived.write(clip_art, out / "openclipart-blur", changed(blur))
    derived.write(emoji, out / "emoji-people", of_kind("person"))


if __name__ == "__main__":
    main()
