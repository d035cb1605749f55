"""One thread and no network for every test: results do not depend on the machine's cores, nor on what it can reach.
Here, and only here, shapes in hints are checked at every call."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it stands before every other import

from jaxtyping import install_import_hook

CHECKED = ["data.batch", "data.controls", "distill.draw", "distill.losses"]
install_import_hook([f"refine_control.{name}" for name in CHECKED], "beartype.beartype")  # before they are imported

import pytest
import torch

from refine_control.diffusion.model import Model
from tiny import tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher() -> Model:
    """A frozen tiny model that tests share; one that changes it builds its own."""
    return tiny_model().freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the counts of make test-long, not a sample of them")
