"""The page as somebody uses it: by mouse, by touch, by keyboard, with files that are no pictures, where things fail."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control import runtime
from refine_control.data.images import fit_square, read_image
from serve.conftest import MODEL, SIDE, Look, example

pytestmark = pytest.mark.slow
Looking = Callable[..., Look]


def python_fills(site: Path, look: Look, picture: np.ndarray, hole: np.ndarray, model: str = MODEL) -> np.ndarray:
    value = look.page.input_value
    student = runtime.Student(site / "models" / model, threads=1)
    steps, guidance, seed = int(value("#steps")), float(value("#guidance")), int(value("#seed"))
    return student.fill(picture, hole, value("#prompt"), steps, guidance, seed)


def agrees(
    site: Path, look: Look, filled: np.ndarray, picture: np.ndarray, hole: np.ndarray, model: str = MODEL
) -> None:
    """Outside the hole nothing changed, and inside it is what Python draws."""
    assert hole.any()
    assert not hole.all()
    assert (filled[hole == 0] == picture[hole == 0]).all()
    assert (filled[hole == 1] != picture[hole == 1]).any()
    expected = python_fills(site, look, picture, hole, model)
    assert np.abs(filled.astype(int) - expected).max() <= 2


def middle(look: Look, selector: str) -> tuple[float, float, float]:
    """x and y of its middle, and its width."""
    look.page.locator(selector).scroll_into_view_if_needed()
    box = look.page.locator(selector).bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"]


def test_a_stroke_is_filled_as_python_fills_it_and_nobody_is_asked(site: Path, look: Looking) -> None:
    seen = look(site)
    assert f"{MODEL} is ready" in seen.wait("ready")
    seen.page.locator("#examples button").nth(1).click()
    seen.until(lambda: seen.page.input_value("#prompt") == "3d red apple")
    before = seen.hole(example(1))
    x, y, width = middle(seen, "#hole")
    seen.page.mouse.move(x - 0.4 * width, y - 0.4 * width)
    seen.page.mouse.down()
    seen.page.mouse.move(x, y - 0.3 * width, steps=5)
    seen.page.mouse.up()
    seen.page.mouse.move(0, 0)
    hole = seen.hole(example(1))
    assert hole.sum() > before.sum() + 20
    seen.page.fill("#seed", "7")
    asked = len(seen.requests)
    agrees(site, seen, seen.fill(), example(1), hole)
    assert seen.requests[asked:] == [], "filling asks nobody"
    assert all(url.startswith((seen.url, f"blob:{seen.url}")) for url in seen.requests)
    assert seen.complaints == []
    assert "ms" in seen.text("#results figcaption")
    assert "a step" in seen.text("#models label >> nth=0")


def test_a_phone_paints_by_touch_and_scrolls_only_down(site: Path, look: Looking) -> None:
    seen = look(site, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    seen.wait("ready")
    seen.page.click("#clear")
    assert "Paint over" in seen.text("#status")
    x, y, width = middle(seen, "#hole")
    finger = seen.page.context.new_cdp_session(seen.page)
    for kind, shift in [("touchStart", -0.2), ("touchMove", 0.0), ("touchMove", 0.2), ("touchEnd", None)]:
        points = [] if shift is None else [{"x": x + shift * width, "y": y}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    hole = seen.hole(example(0))
    assert hole[SIDE // 2, 12:20].all(), "the finger painted, and did not scroll"
    seen.page.click("#undo")
    assert not seen.hole(example(0)).any()
    seen.page.click("#examples button >> nth=0")  # on a busy machine a tap becomes a long press
    seen.until(lambda: bool(seen.hole(example(0)).any()))
    filled = seen.fill()
    box = seen.page.locator("#results canvas").bounding_box()
    assert 0 <= box["y"] <= 844 - box["height"], "what is drawn is seen"
    agrees(site, seen, filled, example(0), seen.hole(example(0)))
    for wide in (390, 360, 320):
        seen.page.set_viewport_size({"width": wide, "height": 844})
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= wide


def test_a_keyboard_is_enough(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    keys = seen.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            keys.press("Tab")
            if seen.page.evaluate("document.activeElement.id") == name:
                outline = seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"{name}: focus is seen"
                return
        raise AssertionError(f"Tab does not reach {name}")

    tab_to("clear")
    keys.press("Enter")
    seen.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    seen.page.mouse.click(2, 2)
    tab_to("hole")
    keys.down("Space")
    for _ in range(6):
        keys.press("ArrowRight")
    keys.up("Space")
    keys.press("ArrowDown")
    tab_to("brush")
    hole = seen.hole(example(0))
    assert hole[SIDE // 2, SIDE // 2 : SIDE // 2 + 6].all()
    tab_to("prompt")
    keys.type("!")
    keys.press("Enter")
    seen.wait("busy", "done")
    seen.wait("done")
    assert seen.page.input_value("#prompt").endswith("!")
    agrees(site, seen, seen.pixels("#results canvas"), example(0), hole)
    keys.press("Shift+Tab")
    assert seen.page.get_attribute("#status", "aria-live") == "polite"


def test_everything_has_a_name(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    unnamed = """() => [...document.querySelectorAll("input, select, button, canvas[tabindex]")]
        .filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"""
    assert seen.page.evaluate(unnamed) == []


def test_models_are_compared_on_the_same_hole(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    seen.page.check("#compare")
    first = seen.fill()
    assert seen.page.locator("#results canvas").count() == 2
    second = seen.pixels("figure:nth-child(2) canvas")
    for filled, model in ((first, MODEL), (second, "twin")):
        agrees(site, seen, filled, example(0), seen.hole(example(0)), model)
    assert (first != second).any()


def test_each_model_is_asked_as_it_is_used_but_for_what_was_typed(copy_of_site: Path, look: Looking) -> None:
    path = copy_of_site / "models" / "twin" / "refine-control.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    manifest |= {"defaults": {"num_inference_steps": 3, "guidance_scale": 1.0}, "only_steps": 3}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    seen = look(copy_of_site)
    seen.wait("ready")

    def fields() -> list[str]:
        return [seen.page.input_value(f"#{name}") for name in ("steps", "guidance")]

    assert fields() == ["2", "2"]
    seen.page.check("#compare")
    seen.fill()
    hole = seen.hole(example(0))
    twin = runtime.Student(copy_of_site / "models" / "twin", threads=1)
    expected = twin.fill(
        example(0), hole, seen.page.input_value("#prompt"), 3, 1.0, int(seen.page.input_value("#seed"))
    )
    drawn = seen.pixels("figure:nth-child(2) canvas")
    assert np.abs(drawn.astype(int) - expected).max() <= 2
    seen.page.check("input[value=twin]")
    seen.until(lambda: fields() == ["3", "1"])
    seen.page.fill("#steps", "4")
    seen.page.check(f"input[value={MODEL}]")
    seen.until(lambda: fields() == ["4", "2"])
    seen.page.check("input[value=twin]")
    seen.until(lambda: fields() == ["3", "1"])  # all that it has learnt
    seen.page.check(f"input[value={MODEL}]")
    seen.until(lambda: fields() == ["4", "2"])


def test_the_embedded_student_is_small(site: Path) -> None:
    """The 15 MB that issue and README promise, without the runtime that is the same for every model."""
    others = (site / "lib", site / "models" / "twin")
    files = (path for path in site.rglob("*") if path.is_file() and not any(map(path.is_relative_to, others)))
    assert sum(path.stat().st_size for path in files) < 15e6


def test_what_is_broken_is_named_and_the_rest_works(copy_of_site: Path, look: Looking) -> None:
    """One model of two and one example of two."""
    (copy_of_site / "models" / "twin" / "refine-control.json").unlink()
    (picture := copy_of_site / "examples" / "noise-0.png").unlink()
    picture.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    seen = look(copy_of_site)
    seen.wait("ready")
    assert seen.page.locator("#examples button").count() == seen.page.locator("#models input").count() == 1
    told = seen.page.inner_text("#message")
    assert "twin" in told
    assert "noise-0.png" in told
    agrees(copy_of_site, seen, seen.fill(), example(1), seen.hole(example(1)))


def test_it_stops_when_told_and_goes_on_after(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    seen.page.fill("#steps", "100")
    seen.page.click("#fill")
    seen.wait("busy")
    seen.page.click("#stop")
    assert seen.wait("ready", "done") == "Stopped."
    seen.page.fill("#steps", "2")
    agrees(site, seen, seen.fill(), example(0), seen.hole(example(0)))


def test_the_result_is_downloaded_as_it_is(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    filled = seen.fill()
    with seen.page.expect_download() as download:
        seen.page.click(".download")
    assert download.value.suggested_filename == f"filled-by-{MODEL}.png"
    assert (np.array(Image.open(download.value.path()).convert("RGB")) == filled).all()


def test_with_isolation_it_runs_on_half_the_cores(site: Path, look: Looking) -> None:
    seen = look(site, cores=4)
    seen.wait("ready")
    assert seen.text("#runs") == f"{MODEL} runs on WebAssembly, 2 threads."
    asked = len(seen.requests)
    agrees(site, seen, seen.fill(), example(0), seen.hole(example(0)))
    assert seen.requests[asked:] == [], "filling asks nobody"


def test_without_isolation_it_runs_on_one_thread_and_says_so(site: Path, look: Looking) -> None:
    seen = look(site, bare=True)
    seen.wait("ready")
    assert "one thread" in seen.text("#runs")
    assert "does not isolate" in seen.text("#runs")
    agrees(site, seen, seen.fill(), example(0), seen.hole(example(0)))


def test_any_picture_is_brought_to_the_models_size(site: Path, look: Looking, tmp_path: Path) -> None:
    """Like the Python runner: the middle square, smoothly, transparency over white. Not by the same filter."""
    seen = look(site)
    seen.wait("ready")
    x, y = np.meshgrid(np.linspace(0, 1, 700), np.linspace(0, 1, 400))
    waves = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x), np.clip(2 * y, 0, 1)], axis=-1)
    Image.fromarray((255 * waves).astype(np.uint8)).save(tmp_path / "waves.png")
    before = seen.pixels("#hole")
    seen.page.set_input_files("#file", tmp_path / "waves.png")
    seen.until(lambda: bool((seen.pixels("#hole") != before).any()))
    seen.page.click("#clear")
    shown = seen.pixels("#hole")
    zoom = len(shown) // SIDE
    expected = fit_square(read_image(tmp_path / "waves.png"), SIDE)
    assert np.abs(shown[::zoom, ::zoom].astype(int) - expected).max() <= 4


def test_a_picture_can_be_dropped_or_pasted(site: Path, look: Looking) -> None:
    seen = look(site)
    seen.wait("ready")
    give = """async ([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(bytes)], "given.png"));
        const how = { bubbles: true, cancelable: true };
        const given = kind === "drop" ? new DragEvent(kind, { ...how, dataTransfer: data })
            : new ClipboardEvent(kind, { ...how, clipboardData: data });
        document.querySelector("main").dispatchEvent(given);
    }"""
    for number, kind in enumerate(["drop", "paste"], start=5):
        file = io.BytesIO()
        Image.fromarray(example(number)).save(file, "PNG")
        seen.page.evaluate(give, [kind, list(file.getvalue())])
        picture = example(number)
        seen.until(lambda picture=picture: seen.hole(picture).mean() < 0.5)
    agrees(site, seen, seen.fill(), example(6), seen.hole(example(6)))
