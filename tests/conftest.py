"""One thread and no network for every test: results do not depend on the machine's cores, nor on what it can reach.
Here, and only here, shapes in hints are checked at every call."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it stands before every other import

from jaxtyping import install_import_hook

CHECKED = ["data.batch", "data.controls", "distill.draw", "distill.losses"]
install_import_hook([f"refine_control.{name}" for name in CHECKED], "beartype.beartype")  # before they are imported

import pytest
import torch

from refine_control.diffusion.model import Model
from tiny import tiny_model

torch.set_num_threads(1)
TALLY = Path(__file__).parent.parent / "results" / "reliability.json"


@pytest.fixture(scope="session")
def teacher() -> Model:
    """A frozen tiny model that tests share; one that changes it builds its own."""
    return tiny_model().freeze()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Prints what a test of reliability counted. What a long one counted is kept in results/reliability.json."""
    began = time.monotonic()

    def keep(name: str, **counts: object) -> None:
        counts["seconds"] = round(time.monotonic() - began)
        print(json.dumps({name: counts}))
        if request.node.get_closest_marker("long"):
            kept = json.loads(TALLY.read_text(encoding="utf-8")) if TALLY.is_file() else {}
            TALLY.write_text(json.dumps(kept | {name: counts}, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    return keep
