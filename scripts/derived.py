"""Data sets made of an embedded one, picture by picture; used by unlabelled_variants.py and biased_data.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from refine_control.data.example import Example
from refine_control.data.folders import METADATA
from refine_control.data.images import encode_png
from refine_control.data.loader import Dataset
from refine_control.files import put_in_place

Make = Callable[[Example], Example | None]  # what is written for an example; None leaves it out


def has_kind(caption: str | None, kind: str) -> bool:
    """Whether a caption, 'STYLE KIND, NAME', names this kind: 'person' of '3d person role, cook'."""
    return f" {kind}" in f" {caption}".split(",")[0]


def write(dataset: Dataset, out: Path, make: Make, captioned: bool = False) -> list[Example]:
    """A folder of PNGs, whole or not there. Returns what was written.

    captioned: captions and masks come along, by the folder's metadata.jsonl.
    """
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    lines, written = [], []
    for index in tqdm(range(len(dataset)), desc=out.name, unit="picture"):
        example = make(dataset[index])
        if example is None:
            continue
        written.append(example)
        record = {"file_name": f"{index:06d}.png", "text": example.text}
        (aside / f"{index:06d}.png").write_bytes(encode_png(example.image))
        if captioned and example.mask is not None:
            record["mask_file_name"] = f"{index:06d}.mask.png"
            (aside / f"{index:06d}.mask.png").write_bytes(encode_png(example.mask * 255))
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if captioned:
        (aside / METADATA).write_text("".join(lines), encoding="utf-8")
    put_in_place(aside, out)
    return written
