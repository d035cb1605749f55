"""The page of an export in a real browser: time of a picture and of a step, for each model of the site.

    refine-control export zoo:emoji-student --to web --out runs/edge/site
    refine-control export zoo:emoji-teacher --to web --out runs/edge/site
    python benchmarks/page.py runs/edge/site --out results/benchmark-page.json

Needs playwright and a Chromium on the PATH. The models take turns; the first turn warms up.
"""

from __future__ import annotations

import argparse
import re
import shutil
import threading
from pathlib import Path

import numpy as np

from common import quartiles, write
from refine_control.provenance import machine
from refine_control.serve.server import make_server

TAKEN = re.compile(r"([\d.,]+) (ms|s), ([\d.,]+) (ms|s) a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark-page.json"))
    args = parser.parse_args()
    server = make_server(args.site, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        result = measure(f"http://127.0.0.1:{server.server_address[1]}/", args.turns)
    finally:
        server.shutdown()
    write(result | {"turns": args.turns - 1, "machine": machine()}, args.out)


def measure(address: str, turns: int) -> dict:
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]", timeout=60_000)
        names = page.evaluate("fetch('models.json').then((answer) => answer.json())")
        page.locator("#examples button").first.click()
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        runs_on = {}
        for turn in range(turns):
            for number, name in enumerate(names):
                page.locator("#models label").nth(number).click()
                page.wait_for_timeout(300)  # the model may have to be loaded first; and threads come to rest
                page.wait_for_selector("body[data-state=ready], body[data-state=done]", timeout=60_000)
                page.click("#fill")
                page.wait_for_selector("body[data-state=busy]", timeout=10_000)
                page.wait_for_selector("body[data-state=done]", timeout=300_000)
                found = TAKEN.search(page.inner_text("#results figcaption"))
                assert found, page.inner_text("#results figcaption")
                if turn:
                    taken[name].append((milliseconds(*found.groups()[:2]), milliseconds(*found.groups()[2:])))
                runs_on[name] = page.inner_text("#runs")
        version, steps = browser.version, int(page.input_value("#steps"))
        browser.close()
    return {
        "browser": f"Chromium {version}",
        "steps": steps,
        "models": {
            name: {
                "picture_ms": quartiles(np.array([total for total, _ in times])),
                "step_ms": quartiles(np.array([step for _, step in times])),
                "runs_on": runs_on[name],
            }
            for name, times in taken.items()
        },
    }


def milliseconds(number: str, unit: str) -> float:
    return float(number.replace(",", "")) * (1000 if unit == "s" else 1)


if __name__ == "__main__":
    main()
