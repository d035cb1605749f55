"""The page where something is wrong: files that are no pictures, broken models, browsers that lack something."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refine_control.runtime import MANIFEST
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
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "is no PNG"),
        ("text.png", b"a text, whatever its name says", "is no PNG"),
        ("half.png", png((64, 64))[:60], "cannot be decoded"),
        ("huge.png", png((9000, 8000), "1"), "9000×8000"),
        ("empty.png", b"", "is no PNG"),
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


def test_on_a_phone_a_refusal_comes_into_sight(site: Path, look: Looking) -> None:
    seen = look(site, viewport={"width": 360, "height": 600}, is_mobile=True)
    seen.wait("ready")
    seen.page.set_input_files("#file", {"name": "text.png", "mimeType": "image/png", "buffer": b"a text"})
    seen.page.wait_for_selector("#message:not([hidden])")
    box = seen.page.locator("#message").bounding_box()
    assert box is not None
    assert 0 <= box["y"] <= 600 - box["height"]


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


def change_manifest(site: Path, model: str, **change: object) -> None:
    path = site / "models" / model / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) | change
    path.unlink()
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_a_model_worth_a_gpu_says_that_there_is_none(copy_of_site: Path, look: Looking) -> None:
    change_manifest(copy_of_site, "twin", macs=2_000_000_000)
    seen = look(copy_of_site)
    seen.wait("ready")
    seen.page.locator("#models label").nth(1).click()
    seen.until(lambda: "twin runs on WebAssembly" in seen.text("#runs"))
    small, large = seen.text("#runs").split("twin")
    assert "no WebGPU" in large
    assert "WebGPU" not in small
    assert seen.page.locator("#engine [value=webgpu]").is_disabled()


ROOM_FOR_ONE = """
import { openGraphs as open } from "./engine-itself.js";
export { BINARIES } from "./engine-itself.js";
const room = () => new Promise((got, none) => {
    const hold = () => (got(), new Promise(() => {}));  // for as long as its worker lives
    navigator.locks.request("memory", { signal: AbortSignal.timeout(1000) }, hold).catch(none);
});
export async function openGraphs(...given) {
    await room().catch(() => { throw new RangeError("Array buffer allocation failed"); });
    return open(...given);
}
"""
ROOM_FOR_NONE = """
export { BINARIES } from "./engine-itself.js";
export const openGraphs = () => { throw new RangeError("Array buffer allocation failed"); };
"""


def give_memory(site: Path, engine: str) -> None:
    (site / "engine.js").rename(site / "engine-itself.js")
    (site / "engine.js").write_text(engine, encoding="utf-8")


def test_where_memory_is_short_the_other_models_give_theirs(copy_of_site: Path, look: Looking) -> None:
    give_memory(copy_of_site, ROOM_FOR_ONE)
    seen = look(copy_of_site)
    seen.wait("ready")
    for number, closed in ((1, MODEL), (0, "twin")):
        seen.page.locator("#models label").nth(number).click()
        seen.until(lambda closed=closed: f"so {closed} was closed" in seen.text("#message"))
        seen.wait("ready")
        seen.fill()


def test_where_no_memory_is_left_it_says_so_and_can_be_asked_again(copy_of_site: Path, look: Looking) -> None:
    give_memory(copy_of_site, ROOM_FOR_NONE)
    seen = look(copy_of_site, cores=4)
    for _ in range(2):
        seen.wait("error")
        assert f"not enough memory to run “{MODEL}”" in seen.text("#message")
        seen.page.evaluate("document.body.dataset.state = 'asked'")
        seen.page.click("#fill")


def test_opened_as_a_file_it_says_what_it_needs(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.page.goto((site / "index.html").as_uri())
    assert "needs a web server" in seen.text("#status")


SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


def test_webgpu_draws_what_webassembly_draws(
    site: Path, browser: Any, chromium: str, serve: Callable[..., str]
) -> None:
    """On a GPU of software, which is slow; a Chromium without one leaves this untested."""
    flags = [*SOFTWARE_GPU, "--use-vulkan=swiftshader", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    with_gpu = browser.browser_type.launch(executable_path=chromium, args=flags)
    try:
        seen = Look(with_gpu.new_page(), serve(site), None)
        seen.wait("ready")
        if not seen.page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no software GPU")
        seen.page.fill("#steps", "1")
        expected = seen.fill()
        seen.page.select_option("#engine", "webgpu")
        seen.until(lambda: f"{MODEL} runs on WebGPU." in seen.text("#runs"))
        seen.page.click("#fill")
        seen.wait("busy")
        seen.wait("done")
        assert f"{MODEL} runs on WebGPU." in seen.text("#runs"), "it went through, and did not fall back"
        assert np.abs(seen.pixels("#results canvas").astype(int) - expected).max() <= 2
        assert seen.complaints == []
    finally:
        with_gpu.close()
