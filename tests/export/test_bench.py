"""The bench measures what it says, of every kind of model, and names what it cannot measure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from export.conftest import write_manifest
from refine_control.errors import DataError, ModelError, UserError
from refine_control.export.bench import BenchConfig, _entries, _told_apart, bench
from refine_control.export.timing import Entry, Worker

QUICK = BenchConfig(num_inference_steps=(1, 2), repeats=2, num_threads=1, data=None)


@pytest.mark.slow
def test_rows_of_every_kind_stand_side_by_side(
    exported: Callable[[str, str], Path], tiny_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    names = [str(tiny_folder), str(exported("onnx", "fp32")), str(exported("web", "fp16"))]
    text = bench(names, QUICK.model_copy(update={"data": str(pictures), "images": 4}), tmp_path)
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert [row["backend"] for row in rows][:3] == ["torch", "onnx", "web"]
    torch_row, onnx_row = rows[0], rows[1]
    for row in rows:
        assert row["label"] in text
        assert 0 < row["forward_ms"]["low"] <= row["forward_ms"]["median"] <= row["forward_ms"]["high"]
        assert set(row["picture_ms"]) == set(row["quality"]) == {"1", "2"}
        assert row["params"] == torch_row["params"]
        assert row["macs"] == torch_row["macs"]
    assert onnx_row["peak_memory_mb"] < torch_row["peak_memory_mb"]
    psnr = [row["quality"]["2"]["psnr"]["hole"] for row in (torch_row, onnx_row)]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.01), "the same pictures, masks and noise"
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert (tmp_path / "bench.md").read_text(encoding="utf-8").startswith("| model")


def test_labels_tell_models_apart_and_claim_no_browser(tiny_folder: Path, tmp_path: Path) -> None:
    one, other = (write_manifest(tmp_path / n, name="tiny", backend="onnx", precision="fp16") for n in ("one", "other"))
    page = write_manifest(tmp_path / "page", name="tiny", backend="web", precision="fp16")
    entries = _told_apart([entry for path in (tiny_folder, one, other, page) for entry in _entries(str(path))])
    assert [entry.label for entry in entries] == [
        "tiny, diffusers fp32",
        f"tiny, onnx fp16, {one}",
        f"tiny, onnx fp16, {other}",
        "tiny, web graphs in onnxruntime fp16",
    ]


def test_pictures_that_are_not_there_are_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data none"):
        bench([str(tiny_folder)], QUICK.model_copy(update={"data": str(tmp_path / "none")}), tmp_path)


def test_controls_are_counted_before_anything_is_measured(
    tiny_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refine_control.export.bench._measure", lambda *_: pytest.fail("measured"))
    config = QUICK.model_copy(update={"data": str(pictures), "controls": ("inpaint", "grey")})
    with pytest.raises(DataError, match=r"--controls names 2 \(inpaint, grey\) but .* has 1 ControlNet"):
        bench([str(tiny_folder)], config, tmp_path)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nothing' is neither"):
        bench(["nothing"], QUICK, tmp_path)


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot measure 'mine'.*refine-control\.json"):
        Worker(Entry("mine", str(tmp_path), "onnx", "fp32"), 2.0, 1)
