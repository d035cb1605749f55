"""A small comparison, trained once."""

from pathlib import Path

import pytest

import tiny
from comparison import plan_of
from refine_control import recipe as recipes
from refine_control.compare import compare as comparing
from refine_control.recipe import EvaluateConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    recipe = tiny.distil_recipe(
        root,
        labelled=5,
        plain=4,
        stage1=tiny.stage(3, ema_decay=0.5),
        stage2=tiny.stage(2, ema_decay=0.5, labelled_fraction=0.5, learning_rate=1e-4),
        evaluate=EvaluateConfig(images=4),
        run=tiny.RUN.model_copy(update={"checkpoint_every": 1}),
    )
    recipes.save(recipe, root / "recipe.yaml")
    return root / "recipe.yaml"


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    comparing.compare(plan_of(base, out), {})
    return out
