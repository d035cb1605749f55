"""Two processes that share a batch learn what one process learns of the whole batch (gloo, as launched by torchrun)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_control import recipe as recipes
from refine_control.distill.distil import Distiller
from refine_control.recipe import DistilRecipe
from tiny import RUN, distil_recipe, stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, four steps each, eight rows a step; plain rows are mixed in and share out unevenly."""
    root = tmp_path_factory.mktemp("ranks")
    whole = distil_recipe(
        root,
        labelled=6,
        plain=5,
        stage1=stage(4, batch_size=8, ema_decay=0.5),
        stage2=stage(4, batch_size=8, ema_decay=0.5, labelled_fraction=0.4),
        run=RUN.model_copy(update={"checkpoint_every": 2}),
    )
    recipes.save(whole, root / "recipe.yaml")
    return root / "recipe.yaml"


def distil(recipe: Path, processes: int, *flags: str, differing: bool = False) -> subprocess.CompletedProcess[str]:
    """`differing`: each process gets a seed of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = ["-m", "refine_control", "distill", str(recipe), *flags]
    if differing:
        script = recipe.parent / "differing.sh"
        script.write_text(f"exec {sys.executable} {' '.join(command)} --seed $RANK\n")
        launch, command = [*launch, "--no-python", "sh"], [str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=240)


def weights(student: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("unet", "controlnet")
        for path in (student / part).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_two_processes_end_where_one_does(recipe: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = distil(recipe, processes, "--output_dir", str(tmp_path / str(processes)))
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / str(n) / "student") for n in (1, 2))
    loaded = recipes.load(DistilRecipe, recipe)
    student, _ = Distiller(loaded.teacher, loaded.data, loaded.run).fresh_student(loaded)
    start = {f"unet.{key}": value for key, value in student.foundation.state_dict().items()}
    start |= {f"controlnet.{key}": value for key, value in student.module.state_dict().items()}
    assert one.keys() == two.keys() == start.keys()
    for key, value in start.items():
        assert (two[key] - one[key]).norm() < 0.02 * (one[key] - value).norm(), key


def test_processes_with_different_recipes_stop(recipe: Path, tmp_path: Path) -> None:
    done = distil(recipe, 2, "--output_dir", str(tmp_path), differing=True)
    assert done.returncode != 0
    assert "processes 0 and 1 were given different recipes; start all with the same file and flags" in done.stderr
    assert not (tmp_path / "recipe.yaml").exists()
