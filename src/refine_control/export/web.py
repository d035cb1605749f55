"""The page around exported models: static files, with all that they need, that any web server can host."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

from refine_control import runtime

PAGE = Path(__file__).parent.parent / "serve" / "page"
LIBRARIES = Path(__file__).parent / "libraries"  # of the page, as their makers publish them; see its README


def write_site(out: Path) -> None:
    """Writes page, libraries and examples, and the list of the models in out/models, smallest first."""
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
