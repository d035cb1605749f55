"""Two processes that share a batch learn what one process learns of the whole batch (gloo, as launched by torchrun)."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
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
    """Both stages, four steps each, eight rows a step; plain rows are mixed in and share out unevenly.

    Gradients are not clipped, which would make those of a sum and of a mean alike.
    """
    root = tmp_path_factory.mktemp("ranks")
    alike = {"batch_size": 8, "ema_decay": 0.5, "max_grad_norm": math.inf}
    whole = distil_recipe(
        root,
        labelled=6,
        plain=5,
        stage1=stage(4, **alike),
        stage2=stage(4, **alike, labelled_fraction=0.4),
        run=RUN.model_copy(update={"checkpoint_every": 2}),
    )
    recipes.save(whole, root / "recipe.yaml")
    return root / "recipe.yaml"


def launch(processes: int, *command: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # Without the second, processes that are started again read the addresses of the dead ones (pytorch issue 135712).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(
        [*torchrun, f"--max-restarts={restarts}", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def distil(recipe: Path, processes: int, *flags: str) -> subprocess.CompletedProcess[str]:
    return launch(processes, "-m", "refine_control", "distill", str(recipe), *flags)


def read(paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    return {f"{path.parent.name}.{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read(path for part in ("unet", "controlnet") for path in (run / "student" / part).glob("*.safetensors"))


def gradients(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """Of each weight, by its place, the running mean at the end of the stage."""
    kept, average = (
        load_file(run / stage / "checkpoints" / "step-000004" / f"{name}.safetensors") for name in ("optimizer", "ema")
    )
    means = {key.partition(".")[0]: mean for key, mean in kept.items() if key.endswith((".exp_avg", ".momentum"))}
    assert means.keys() == average.keys(), "of every weight"
    return means


def norm_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


@pytest.fixture(scope="module")
def one(recipe: Path) -> Path:
    """A run of one process, which learns of the whole batch."""
    done = distil(recipe, 1, "--output_dir", str(recipe.parent / "one"))
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "one"


def assert_learnt_the_same(recipe: Path, one: Path, two: Path) -> None:
    """The gradients of each weight are the same, and all weights together are far closer than to where they began.

    Sums taken in another order differ in their last digits. Where a single weight's gradient is nearly zero, Adam makes
    a whole step of these; so no bound is set to the steps of one tensor, which may have eight weights.
    """
    for part in ("stage1", "stage2"):
        ours, theirs = gradients(two, part), gradients(one, part)
        assert ours.keys() == theirs.keys()
        whole = norm_of(theirs)
        for name, gradient in theirs.items():
            apart = (ours[name] - gradient).norm()
            assert apart < 0.05 * gradient.norm() + 1e-4 * whole, f"{part}: {name}: {apart / gradient.norm():.2g}"
    loaded = recipes.load(DistilRecipe, recipe)
    student, _ = Distiller(loaded.teacher, loaded.data, loaded.run).fresh_student(loaded)
    start = {f"unet.{key}": value for key, value in student.foundation.state_dict().items()}
    start |= {f"controlnet.{key}": value for key, value in student.module.state_dict().items()}
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() == start.keys()
    apart = norm_of({key: second[key] - first[key] for key in start})
    assert apart < 0.05 * norm_of({key: first[key] - start[key] for key in start})


@pytest.mark.parametrize(("shard", "passes"), [("false", "1"), ("true", "2")])
def test_two_processes_end_where_one_does(recipe: Path, one: Path, tmp_path: Path, shard: str, passes: str) -> None:
    flags = ("--run.shard", shard, "--run.gradient_accumulation_steps", passes)
    done = distil(recipe, 2, "--output_dir", str(tmp_path), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_learnt_the_same(recipe, one, tmp_path)


def test_sharded_matrices_step_as_whole_ones_do(recipe: Path, tmp_path: Path) -> None:
    """Under Muon a step needs the whole matrix, of which each process has a part."""
    muon = ("--stage1.optimizer", "muon", "--stage2.optimizer", "muon")
    ends = []
    for processes, shard in ((1, "false"), (2, "true")):
        run = tmp_path / f"{processes}"
        done = distil(recipe, processes, "--output_dir", str(run), "--run.shard", shard, *muon)
        assert done.returncode == 0, done.stderr[-3000:]
        ends.append(run)
    assert_learnt_the_same(recipe, *ends)


GOES_ON = "2/4 [00:00<?"  # the progress bar of a stage that begins with its third step
DIES_ONCE = """
import os, sys, threading, time
from pathlib import Path

def die_after_the_first_checkpoint():
    while not list(Path(sys.argv[-1]).glob("stage1/checkpoints/step-000002/state.json")):
        time.sleep(0.001)
    os._exit(9)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    threading.Thread(target=die_after_the_first_checkpoint, daemon=True).start()

from refine_control.cli import main
sys.exit(main())
"""


def test_a_process_that_dies_is_started_again_and_nothing_is_lost(recipe: Path, one: Path, tmp_path: Path) -> None:
    """torchrun's elasticity: it starts all processes anew, and they go on from the last checkpoint."""
    script, run = tmp_path / "dies_once.py", tmp_path / "run"
    script.write_text(DIES_ONCE)
    done = launch(2, str(script), "distill", str(recipe), "--output_dir", str(run), restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"exitcode *: *9", done.stderr), "the process did die"
    assert GOES_ON in done.stderr
    assert_learnt_the_same(recipe, one, run)


def test_what_two_sharded_processes_began_one_may_finish(recipe: Path, one: Path, tmp_path: Path) -> None:
    script, run = tmp_path / "dies_once.py", tmp_path / "run"
    script.write_text(DIES_ONCE)
    begun = launch(2, str(script), "distill", str(recipe), "--run.shard", "true", "--output_dir", str(run))
    assert begun.returncode != 0
    assert not (run / "student").exists()
    done = distil(recipe, 1, "--output_dir", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert GOES_ON in done.stderr
    assert_learnt_the_same(recipe, one, run)


HALVES = """
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from refine_control.distill.processes import sharded, whole
from tiny import STUDENT, tiny_denoiser

PartialState(cpu=True)
given = tiny_denoiser(STUDENT)
twin = sharded(given, torch.device("cpu"))
for ours, theirs in zip(twin.parameters(), given.parameters(), strict=True):
    assert torch.equal(whole(ours), theirs)
here = sum(p.to_local().numel() for p in twin.parameters())
share = here / sum(p.numel() for p in given.parameters())
Path(sys.argv[1], f"share-{PartialState().process_index}").write_text(str(share))
"""


def test_sharded_weights_lie_half_in_each_of_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "halves.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{HALVES}")
    done = launch(2, str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [float(path.read_text()) for path in tmp_path.glob("share-*")]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.6


def test_processes_with_different_recipes_stop(recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "differing.sh"
    script.write_text(
        f"exec {sys.executable} -m refine_control distill {recipe} --output_dir {tmp_path}/run --seed $RANK\n"
    )
    done = launch(2, "--no-python", "sh", str(script))
    assert done.returncode != 0
    assert "processes 0 and 1 were given different recipes; start all with the same file and flags" in done.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_hosts_that_do_not_share_their_disk_do_not_go_on(recipe: Path, tmp_path: Path) -> None:
    """As each process runs in a folder of its own, so does one on each host with output_dir on its own disk."""
    script = tmp_path / "elsewhere.sh"
    script.write_text(
        f"mkdir -p {tmp_path}/$RANK && cd {tmp_path}/$RANK && "
        f"exec {sys.executable} -m refine_control distill {recipe} --output_dir run\n"
    )
    assert launch(2, "--no-python", "sh", str(script)).returncode == 0
    for leftover in ("0/run/student", "0/run/stage2"):
        shutil.rmtree(tmp_path / leftover)
    again = launch(2, "--no-python", "sh", str(script))
    assert again.returncode != 0
    assert "not every process sees the checkpoints in 'run/stage1'" in again.stderr


ROOT = Path(__file__).parents[2]
CAN_MAKE_HOSTS = shutil.which("ip") and not subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode


@pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="network namespaces need Linux, iproute2 and root")
def test_two_hosts_end_where_one_process_does(recipe: Path, one: Path, tmp_path: Path) -> None:
    command = [str(ROOT / "scripts/two_hosts.sh"), str(recipe), "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_learnt_the_same(recipe, one, tmp_path)
