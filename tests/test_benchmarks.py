"""The benchmarks run: a figure in a document rests on each."""

import importlib.util
from pathlib import Path
from types import ModuleType

from tiny import RUN, distil_recipe, stage


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_against_its_floor(tmp_path: Path) -> None:
    recipe = distil_recipe(tmp_path, labelled=5, plain=1, stage1=stage(6), stage2=stage(0), run=RUN)
    result = benchmark("step").measure(recipe, 6)
    assert result["steps"] == 3, "of the second and third pass, whose end alone is not seen"
    assert result["step_over_floor"]["low"] <= result["step_over_floor"]["median"] <= result["step_over_floor"]["high"]
    assert 0 <= result["share_waiting_for_data"] < 1
    assert result["peak_memory_gb"] > 0


def test_checkpoints_against_steps(tmp_path: Path) -> None:
    recipe = distil_recipe(
        tmp_path,
        labelled=5,
        plain=1,
        stage1=stage(6),
        stage2=stage(0),
        run=RUN.model_copy(update={"checkpoint_every": 2}),
    )
    result = benchmark("checkpoint").measure(recipe)
    assert result["saves"] == 3
    assert result["added"] > 0
    assert result["checkpoint_bytes"] > 100_000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp")] == []


def test_pictures_checked_a_second() -> None:
    assert benchmark("check").rate(64, "png", 8) > 0
