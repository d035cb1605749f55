"""The page where something is wrong: files that are no pictures, broken models, browsers that lack something."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from serve.conftest import MODEL, Look

pytestmark = pytest.mark.slow
Looking = Callable[..., Look]


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "no picture of pixels"),
        ("text.png", b"a text, whatever its name says", "no picture of pixels"),
        ("half.png", png((64, 64))[:60], "cannot be decoded"),
        ("huge.png", png((9000, 8000), "1"), "9000×8000"),
        ("empty.png", b"", "no picture of pixels"),
    ],
    ids=["drawing", "text", "half", "huge", "empty"],
)
def test_what_is_no_picture_is_refused_and_the_old_one_stays(
    site: Path, look: Looking, tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    seen = look(site)
    seen.wait("ready")
    before = seen.pixels("#hole")
    (tmp_path / name).write_bytes(content)
    seen.page.set_input_files("#file", tmp_path / name)
    seen.page.wait_for_selector("#message:not([hidden])")
    assert name in seen.text("#message")
    assert why in seen.text("#message")
    assert (seen.pixels("#hole") == before).all()
    assert seen.page.get_attribute("body", "data-state") == "ready"


def test_a_file_too_heavy_is_refused_unread(site: Path, look: Looking, tmp_path: Path) -> None:
    seen = look(site)
    seen.wait("ready")
    with (tmp_path / "heavy.png").open("wb") as file:
        os.truncate(file.fileno(), 51_000_000)
    seen.page.set_input_files("#file", tmp_path / "heavy.png")
    seen.page.wait_for_selector("#message:not([hidden])")
    assert "51 MB" in seen.text("#message")


def test_a_model_cut_off_is_named(copy_of_site: Path, look: Looking) -> None:
    path = copy_of_site / "models" / MODEL / "denoiser.onnx"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1000])
    seen = look(copy_of_site)
    seen.wait("error")
    assert "denoiser.onnx" in seen.text("#message")
    assert "cut off" in seen.text("#message")


def test_a_broken_graph_is_tried_humbly_then_told(copy_of_site: Path, look: Looking) -> None:
    path = copy_of_site / "models" / MODEL / "denoiser.onnx"
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(os.urandom(size))
    seen = look(copy_of_site, cores=4)
    seen.wait("error")
    assert f"“{MODEL}” does not run here" in seen.text("#message")
    seen.page.locator("#models label").nth(1).click()
    assert "twin is ready" in seen.wait("ready")
    seen.fill()


@pytest.mark.parametrize("name", ["models.json", f"models/{MODEL}/refine-control.json", "worker.js"])
def test_a_missing_file_leaves_a_message(copy_of_site: Path, look: Looking, name: str) -> None:
    (copy_of_site / name).unlink()
    seen = look(copy_of_site, bare=True)  # our own server would not start without models.json
    seen.page.wait_for_selector("#message:not([hidden])")
    assert len(seen.text("#message")) > 20
    seen.wait("error", "failed", "ready")  # ready with the other model, where one is broken


def test_where_webgpu_fails_webassembly_goes_on(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    seen.page.evaluate("document.querySelector('#engine [value=webgpu]').disabled = false")
    seen.page.select_option("#engine", "webgpu")
    seen.page.wait_for_selector("#message:not([hidden])")
    assert "WebGPU failed" in seen.text("#message")
    seen.wait("ready")
    assert "runs on WebAssembly" in seen.text("#runs")
    seen.fill()


def test_without_javascript_it_says_what_it_needs(site: Path, look: Looking) -> None:
    seen = look(site, java_script_enabled=False)
    assert seen.page.locator("noscript p").is_visible()
