"""The page around exported models: static files, with all that they need, that any web server can host."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

from PIL import Image

from refine_control import runtime
from refine_control.data.images import fit_square
from refine_control.data.source import open_usable
from refine_control.errors import DataError

PAGE = Path(__file__).parent.parent / "serve" / "page"
LIBRARIES = Path(__file__).parent / "libraries"  # of the page, as their makers publish them; see its README


def write_site(out: Path, data: str) -> None:
    """Writes page, libraries, examples from `data`, and the list of the models in out/models, smallest first."""
    shutil.copytree(PAGE, out, dirs_exist_ok=True)
    for source in (path for path in LIBRARIES.rglob("*") if path.is_file()):
        target = out / "lib" / source.relative_to(LIBRARIES)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".gz":
            target.with_suffix("").write_bytes(gzip.decompress(source.read_bytes()))
        else:
            shutil.copyfile(source, target)
    manifests = [runtime.read_manifest(path.parent) for path in (out / "models").glob(f"*/{runtime.MANIFEST}")]
    names = [manifest["name"] for manifest in sorted(manifests, key=lambda each: sum(each["files"].values()))]
    (out / "models.json").write_text(json.dumps(names), encoding="utf-8")
    _write_examples(out, data, min(manifest["resolution"] for manifest in manifests))


def _write_examples(out: Path, data: str, side: int, count: int = 8) -> None:
    """Some pictures of the split test, evenly spread, with their captions; a folder that is not there gives none."""
    examples: list[dict[str, str]] = []
    (out / "examples").mkdir(exist_ok=True)
    try:
        dataset = open_usable(data, "test", skip_corrupt=True)
    except DataError as error:
        print(f"the page has no examples: {error}")
    else:
        for number in range(min(count, len(dataset))):
            example = dataset[number * len(dataset) // count]
            name = f"examples/{number}.png"
            Image.fromarray(fit_square(example.image, side)).save(out / name)
            examples.append({"image": name, "prompt": example.text or ""})
        for licence in sorted(Path(data).parent.glob("LICENSES/*")):
            shutil.copyfile(licence, out / "examples" / f"LICENSE.{licence.name}")
    (out / "examples" / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
