"""Writes the plain data sets of recipes/compare-unlabelled.yaml: worse in quality, or poor in kinds.

    python scripts/unlabelled_variants.py

runs/unlabelled/openclipart-jpeg10 and -blur hold the embedded clip art after JPEG of quality 10, or a Gaussian blur of
5 % of a side; runs/unlabelled/emoji-people holds the emoji of one kind, persons.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from refine_control.data.images import encode_png
from refine_control.data.source import open_dataset

ROOT = Path(__file__).parent.parent
Change = Callable[[Image.Image], Image.Image]


def jpeg10(picture: Image.Image) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=10)
    return Image.open(data)


def blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.05 * max(picture.size)))


def write(source: str, out: Path, change: Change | None = None, kind: str | None = None) -> None:
    dataset = open_dataset(ROOT / "data" / source, "train")
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for index in tqdm(range(len(dataset)), desc=out.name, unit="picture"):
        if kind and f" {kind}" not in f" {dataset.text(index)}".split(",")[0]:
            continue
        picture = Image.fromarray(dataset[index].image)
        changed = change(picture).convert("RGB") if change else picture
        (aside / f"{index:06d}.png").write_bytes(encode_png(np.asarray(changed)))
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "unlabelled")
    out = parser.parse_args().out
    write("openclipart", out / "openclipart-jpeg10", jpeg10)
    write("openclipart", out / "openclipart-blur", blur)
    write("emoji", out / "emoji-people", kind="person")


if __name__ == "__main__":
    main()
