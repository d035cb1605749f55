"""The page around exported models: static files, with all that they need, that any web server can host."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from refine_control import runtime
from refine_control.data.images import fit_square
from refine_control.data.source import open_usable
from refine_control.errors import DataError

PAGE = Path(__file__).parent.parent / "serve" / "page"
LIBRARIES = Path(__file__).parent / "libraries"  # of the page, as their makers publish them; see the VERSIONS there
MARK = Path("lib") / "VERSIONS.txt"  # of a folder that is such a page


def write_site(out: Path, data: str | None, default: str) -> None:
    """Writes page, libraries, and the list of the models in out/models, smallest first; a broken one is left out.

    data: a folder to take examples from. None keeps those that are there, or takes them from `default`.
    """
    shutil.copytree(PAGE, out, dirs_exist_ok=True)
    for source in (path for path in LIBRARIES.rglob("*") if path.is_file()):
        target = out / "lib" / source.relative_to(LIBRARIES)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".gz":
            target.with_suffix("").write_bytes(gzip.decompress(source.read_bytes()))
        else:
            shutil.copyfile(source, target)
    models: dict[str, dict[str, Any]] = {}
    for path in (out / "models").glob(f"[!.]*/{runtime.MANIFEST}"):
        try:
            models[path.parent.name] = runtime.read_manifest(path.parent)
        except runtime.ExportError as error:
            print(f"left out of the page: {error}")
    names = sorted(models, key=lambda name: sum(models[name]["files"].values()))
    (out / "models.json").write_text(json.dumps(names), encoding="utf-8")
    if data is not None or not (out / "examples" / "examples.json").is_file():
        _write_examples(out, data or default, min(manifest["resolution"] for manifest in models.values()))


def _write_examples(out: Path, data: str, side: int, count: int = 8) -> None:
    """Some pictures of the split test, evenly spread, with their captions; a folder that is not there gives none, and a
    picture that cannot be read is left out."""
    examples: list[dict[str, str]] = []
    (out / "examples").mkdir(exist_ok=True)
    try:
        dataset = open_usable(data, "test", skip_corrupt=True)
    except DataError as error:
        print(f"the page has no examples: {error}")
    else:
        count = min(count, len(dataset))
        for number in range(count):
            try:
                example = dataset[number * len(dataset) // count]
            except DataError as error:
                print(f"the page is without an example: {error}")
                continue
            name = f"examples/{number}.png"
            Image.fromarray(fit_square(example.image, side)).save(out / name)
            examples.append({"image": name, "prompt": example.text or ""})
        for licence in sorted(path for path in Path(data).parent.glob("LICENSES/*") if path.is_file()):
            shutil.copyfile(licence, out / "examples" / f"LICENSE.{licence.name}")
    (out / "examples" / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
