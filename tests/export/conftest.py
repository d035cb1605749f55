"""One tiny model, exported once in each form that the tests look at."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refine_control.diffusion import store
from refine_control.export import onnx
from refine_control.export.export import export_model
from refine_control.export.graph import Graph
from refine_control.recipe import SampleConfig
from refine_control.runtime import FORMAT, MANIFEST, MUST_HAVE
from tiny import least, tiny_model, write_folder


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tracing takes nearly all of an export's time; models of the same plans and weights share what it gives."""
    graphs = tmp_path_factory.mktemp("graphs")

    def write_once(graph: Graph, path: Path) -> None:
        told = [*graph.inputs.values(), *graph.expected()]
        kept = graphs / f"{graph.name}-{hashlib.sha256(b''.join(t.numpy().tobytes() for t in told)).hexdigest()}.onnx"
        if not kept.is_file():
            onnx.write_fp32(graph, kept)
        shutil.copyfile(kept, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refine_control.export.export.write_fp32", write_once)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    store.save(replace(tiny_model(), usual=SampleConfig(num_inference_steps=5)), folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.fixture(scope="session")
def exported(tiny_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(to, precision) -> the exported folder; each is written once."""
    written: dict[tuple[str, str], Path] = {}

    def export(to: str, precision: str) -> Path:
        if (to, precision) not in written:
            out = tmp_path_factory.mktemp("exported") / f"{to}-{precision}"
            export_model(str(tiny_folder), to, precision, out, str(pictures))  # type: ignore[arg-type]
            written[to, precision] = out
        return written[to, precision]

    return export


def write_manifest(folder: Path, **known: Any) -> Path:
    """A folder of an export that has its description, and none of the graphs."""
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(least(MUST_HAVE) | {"format": FORMAT} | known), encoding="utf-8")
    return folder
