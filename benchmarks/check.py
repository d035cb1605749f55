"""How many pictures a second `refine-control data check` looks at.

    python benchmarks/check.py --out results/benchmark-check.json

Captioned folders of small pictures: squares out of the colour photographs that scikit-image brings along.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from common import write
from refine_control.data.source import check, open_dataset
from refine_control.provenance import machine

KINDS = [(64, "png"), (128, "jpg"), (256, "jpg")]
COUNT = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-check.json"))
    args = parser.parse_args()
    rates = {f"{side} px {ending}": rate(side, ending, COUNT) for side, ending in KINDS}
    write({"pictures_per_second": rates, "pictures": COUNT, "machine": machine()}, args.out)


def rate(side: int, ending: str, count: int) -> float:
    """Opening included."""
    draw = np.random.default_rng(0)
    photo = data.astronaut()
    with tempfile.TemporaryDirectory() as name:
        lines = []
        for i in range(count):
            top, left = draw.integers(0, 512 - side + 1, 2)
            Image.fromarray(photo[top : top + side, left : left + side]).save(f"{name}/{i}.{ending}")
            lines.append(json.dumps({"file_name": f"{i}.{ending}", "text": "a face"}) + "\n")
        (Path(name) / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        began = time.perf_counter()
        assert check(open_dataset(name)) == []
        return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
