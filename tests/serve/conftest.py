"""An exported site, served, and a browser that looks at it."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refine_control.serve.server import make_server

MODEL = "emoji-student"
SIDE = 32
WAIT = 60_000  # ms; the machine may be busy with other tests
FLAGS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded student, and the same with another end of its schedule as "twin"; two pictures of noise."""
    from refine_control.export.export import export_model

    folder = tmp_path_factory.mktemp("site")
    export_model(f"zoo:{MODEL}", to="web", precision="fp16", out=folder)
    shutil.copytree(folder / "models" / MODEL, folder / "models" / "twin")
    path = folder / "models" / "twin" / "refine-control.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["scheduler"]["final_alpha_cumprod"] = 0.9
    path.unlink()
    path.write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "models.json").write_text(json.dumps([MODEL, "twin"]))
    (folder / "examples").mkdir(exist_ok=True)
    examples = []
    for number, prompt in enumerate(["flat cat face", "3d red apple"]):
        name = f"examples/noise-{number}.png"
        Image.fromarray(example(number)).save(folder / name)
        examples.append({"image": name, "prompt": prompt})
    (folder / "examples" / "examples.json").write_text(json.dumps(examples))
    return folder


def example(number: int) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3): no pixel is like its neighbour, so that whatever resamples or recolours is seen."""
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def copy_of_site(site: Path, tmp_path: Path) -> Path:
    """One that a test may break: a file has to be replaced, not written into."""
    return Path(shutil.copytree(site, tmp_path / "site", copy_function=os.link))


@pytest.fixture(scope="session")
def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
    )
    if not found and os.environ.get("NEED_BROWSER"):
        pytest.fail("no Chromium on the PATH, and NEED_BROWSER is set")
    return found or pytest.skip("no Chromium on the PATH; name one in CHROMIUM")


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = [*FLAGS, "--no-sandbox"] if os.getuid() == 0 else FLAGS
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """folder -> the address at which it is served; bare: by a server that knows nothing of our headers."""
    servers: list[ThreadingHTTPServer] = []

    def start(folder: Path, bare: bool = False) -> str:
        if bare:
            handler = functools.partial(Quiet, directory=str(folder))
            servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        else:
            servers.append(make_server(folder, port=0))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Look:
    """A page being looked at, and all that it asked for and complained of."""

    def __init__(self, page: Any, url: str, cores: int | None) -> None:
        if cores:
            page.add_init_script(f"Object.defineProperty(navigator, 'hardwareConcurrency', {{ get: () => {cores} }})")
        self.page, self.url = page, url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        page.goto(url)

    def wait(self, *states: str) -> str:
        """Waits for one of the states; returns what the page says then."""
        chosen = ", ".join(f"[data-state={state}]" for state in states)
        self.page.wait_for_selector(f"body:is({chosen})", timeout=WAIT)
        return self.text("#status")

    def fill(self) -> np.ndarray:
        """Presses Fill; returns the first result's pixels."""
        self.page.click("#fill")
        self.wait("busy", "done")
        self.wait("done")
        return self.pixels("#results canvas")

    def text(self, selector: str) -> str:
        return " ".join((self.page.text_content(selector) or "").split())

    def pixels(self, selector: str) -> np.ndarray:
        """uint8 (height, width, 3) of a canvas."""
        url = self.page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
        return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))

    def until(self, happens: Callable[[], bool]) -> None:
        for _ in range(WAIT // 50):
            if happens():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("it never happened")

    def hole(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (SIDE, SIDE), 1 where the canvas to paint on does not show the picture. The brush must be elsewhere."""
        shown = self.pixels("#hole")
        zoom = len(shown) // SIDE
        return (shown[zoom // 2 :: zoom, zoom // 2 :: zoom] != picture).any(axis=-1).astype(np.uint8)


@pytest.fixture
def look(browser: Any, serve: Callable[..., str]) -> Iterator[Callable[..., Look]]:
    """folder -> its page, in a browser of its own.

    bare: of `serve`. cores: that the page is to believe in. Further arguments are those of the browser's context.
    """
    contexts = []

    def start(folder: Path, bare: bool = False, cores: int | None = None, **how: Any) -> Look:
        contexts.append(browser.new_context(**how))
        return Look(contexts[-1].new_page(), serve(folder, bare), cores)

    yield start
    for context in contexts:
        context.close()
