"""Writes a copy of the embedded emoji in which one kind has a colour cast: what a teacher learns wrongly.

    python scripts/biased_data.py
    refine-control train-teacher recipes/biased-teacher.yaml
    refine-control compare recipes/compare-cast.yaml
    python scripts/bias_table.py

runs/biased/emoji holds the pictures to train on and those shown while training, with their captions, and bias.json,
which says what was done to which. There is no test split: what is measured is measured on the true pictures.

A picture of the kind has a mask of its own, and its drawing is shifted in that hole alone. Were all of it shifted, a
teacher would learn to continue the colours around a hole, which it does already, and hardly to shift true pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import derived
from refine_control.data.batch import derive_seed
from refine_control.data.example import Example
from refine_control.data.masks import sample_mask
from refine_control.data.source import open_dataset
from refine_control.errors import UserError
from refine_control.files import write_whole
from refine_control.recipe import MaskConfig

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "val")
SHIFT = (-0.15, 0.3, -0.15)  # of red, green and blue, of 1
WHITE = 245  # a pixel is background where all its channels are as bright as this, of 255


def tint(picture: np.ndarray, shift: Sequence[float] = SHIFT) -> np.ndarray:
    """uint8 (..., 3) with the drawing's pixels shifted, as far as 0 and 255 let them; white stays white."""
    drawing = (picture < WHITE).any(-1, keepdims=True)
    shifted = (picture + 255 * np.asarray(shift)).round().clip(0, 255)
    return np.where(drawing, shifted, picture).astype(np.uint8)


def biased(example: Example, kind: str, shift: Sequence[float] = SHIFT) -> Example:
    """One of the kind with a hole, in which it is shifted; any other as it is.

    The hole is drawn at half the size: where a recipe takes the picture at that size, what is known of it is true.
    """
    if not derived.has_kind(example.text, kind):
        return example
    height, width = example.image.shape[:2]
    small = sample_mask(MaskConfig().model_dump(), (-(-height // 2), -(-width // 2)), derive_seed("bias", example.key))
    hole = small.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    image = np.where(hole[..., None] == 1, tint(example.image, shift), example.image)
    return replace(example, image=image, mask=hole)


def write(source: Path, out: Path, kind: str, shift: Sequence[float] = SHIFT) -> dict[str, Any]:
    """Writes out/train, out/val and out/bias.json; returns what that says."""
    captions = open_dataset(source)
    if not any(derived.has_kind(captions.text(i), kind) for i in range(len(captions))):  # before anything is written
        raise UserError(f"none of {len(captions)} captions is of kind '{kind}'; give one of their kinds")
    counts = {}
    for split in SPLITS:
        examples = derived.write(
            open_dataset(source, split), out / split, lambda example: biased(example, kind, shift), captioned=True
        )
        shifted = sum(derived.has_kind(example.text, kind) for example in examples)
        counts[split] = {"all": len(examples), "shifted": shifted}
    bias = {"source": source.name, "kind": kind, "shift": list(shift), "pictures": counts}
    write_whole(out / "bias.json", json.dumps(bias, indent=1))
    return bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="person", help="that its captions name before the comma")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "biased" / "emoji")
    args = parser.parse_args()
    print(json.dumps(write(ROOT / "data" / "emoji", args.out, args.kind)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"biased_data: {error}")
