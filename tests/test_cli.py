"""The commands as a user types them, on tiny models and folders; mistakes end in one line and exit code 2."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tiny
from published import write_configs
from refine_control.cli import main
from refine_control.cli.distilling import _as_it_is
from refine_control.command import parser
from refine_control.diffusion import store
from refine_control.plain import read_flag
from refine_control.recipe import SampleConfig

TINY_STAGE = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "weights": {"task": 1, "output": 1, "feature": 0.5}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny teacher, captioned and plain pictures, and a recipe that uses them."""
    root = tmp_path_factory.mktemp("work")
    store.save(tiny.tiny_model(), root / "teacher")
    tiny.write_folder(root / "captioned", 6)
    tiny.write_folder(root / "plain", 5, captioned=False)
    recipe = {
        "output_dir": str(root / "out"),
        "teacher": str(root / "teacher"),
        "data": {
            "labelled": str(root / "captioned"),
            "unlabelled": str(root / "plain"),
            "resolution": tiny.SIDE,
            "cache_gb": 0.1,
        },
        "student": tiny.STUDENT.model_dump(mode="json"),
        "stage1": TINY_STAGE,
        "stage2": TINY_STAGE | {"labelled_fraction": 0.5},
        "sample": {"num_inference_steps": 2},
        "evaluate": {"images": 4},
        "run": {"device": "cpu", "num_threads": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    tiny.write_comparison(root / "recipe.yaml")
    return root


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must end with exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refine-control:")]
    lines = [line for line in lines if "these scores are of pictures that were trained on" not in line]  # a warning
    assert len(lines) == 1
    return lines[0]


def test_distilled_student_loads_in_stock_diffusers(workplace: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionControlNetPipeline

    assert main(["distill", str(workplace / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "run/student", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.block_out_channels == list(tiny.STUDENT.block_out_channels)
    assert not any("bridge" in name for name, _ in pipeline.unet.named_parameters())
    picture = pipeline(
        "a red cat", image=torch.zeros(1, 3, tiny.SIDE, tiny.SIDE), num_inference_steps=2, output_type="np"
    ).images
    assert picture.shape == (1, tiny.SIDE, tiny.SIDE, 3)


@pytest.mark.slow
def test_compare_scores_every_row_and_runs_again_from_what_is_there(workplace: Path, tmp_path: Path) -> None:
    argv = ["compare", str(workplace / "compare.yaml"), "--rows", "scratch,refine-control", "--seeds", "0,1"]
    argv += ["--output_dir", str(tmp_path)]
    assert main(argv) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows = scores["rows"]
    for row in ("teacher", "scratch", "refine-control"):
        metrics = {name.split("[")[0] for name in rows[row]["mean"]["labelled"]}
        assert {"psnr", "ssim", "lpips", "fid", "cmmd"} == metrics
        assert set(rows[row]["mean"]["labelled"]["psnr"]) == {"whole", "hole"}
        assert rows[row]["latency_ms"] > 0
    assert rows["scratch"]["params"] < rows["teacher"]["params"]
    assert scores["extractors"][0]["n"] == 4
    assert rows["scratch"]["spread"]["labelled"]["psnr"]["hole"] > 0
    assert rows["scratch"]["wall_seconds"] > 0
    assert "<html" in (tmp_path / "report.html").read_text()
    weights = tmp_path / "refine-control/seed-1/student/unet/diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(argv) == 0
    assert json.loads((tmp_path / "scores.json").read_text()) == scores, "measured once"
    assert weights.stat().st_mtime_ns == before


def test_evaluate_ranks_models_and_baselines_alike(workplace: Path, tmp_path: Path) -> None:
    argv = ["evaluate", str(workplace / "teacher"), "--recipe", str(workplace / "recipe.yaml"), "--baselines"]
    assert main([*argv, "--output_dir", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"mean_fill", "telea", "navier_stokes", "biharmonic"} <= set(scores)
    assert main([*argv, "--output_dir", str(tmp_path), "--evaluate.seed", "7"]) == 0
    other = json.loads((tmp_path / "scores.json").read_text())
    name = str(workplace / "teacher")
    assert other[name]["domains"] != scores[name]["domains"], "other masks, so the kept scores do not apply"
    assert set(scores[str(workplace / "teacher")]["caption_losses"]) == {"right", "empty", "shuffled"}


def test_generate_fills_the_hole_and_keeps_the_rest(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.full((tiny.SIDE, tiny.SIDE, 3), 200, np.uint8)
    mask = np.zeros((tiny.SIDE, tiny.SIDE), np.uint8)
    mask[4:10, 4:10] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["generate", "--model", str(workplace / "teacher"), "--image", str(tmp_path / "picture.png")]
    argv += ["--mask", str(tmp_path / "mask.png"), "--num_inference_steps", "2", "--out", str(tmp_path / "filled.png")]
    assert main(argv) == 0
    filled = np.asarray(Image.open(tmp_path / "filled.png"))
    assert (filled[mask == 0] == 200).all()
    assert (filled[mask > 0] != 200).any()
    argv[argv.index("--num_inference_steps") : argv.index("--out")] = []
    store.save(replace(tiny.tiny_model(), usual=SampleConfig(num_inference_steps=2)), tmp_path / "of-two-steps")
    argv[2] = str(tmp_path / "of-two-steps")
    assert main(argv) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "filled.png")), filled)
    assert "psd' has no ending of a kind of picture" in refused(capsys, *argv[:-1], str(tmp_path / "filled.psd"))
    alone = tiny.tiny_model()
    alone.denoiser.module = None
    store.save(alone, tmp_path / "alone")
    argv[2] = str(tmp_path / "alone")
    assert main([*argv, "--num_inference_steps", "1"]) == 0
    assert "has no ControlNet, so it does not see the picture" in capsys.readouterr().err


def test_generate_asks_at_no_timesteps_that_were_not_learnt(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 16), "white").save(tmp_path / "picture.png")
    few = replace(tiny.tiny_model(), usual=SampleConfig(num_inference_steps=2), only_steps=2)
    store.save(few, tmp_path / "of-two-steps")
    argv = ["generate", "--model", str(tmp_path / "of-two-steps"), "--out", str(tmp_path / "filled.png")]
    argv += ["--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "picture.png")]
    assert main(argv) == 0
    assert main([*argv, "--num_inference_steps", "3"]) == 2
    assert "the model has learnt the timesteps of 2 step(s) alone" in capsys.readouterr().err


def test_data_prepare_then_check(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert main(["data", "prepare", str(workplace / "captioned"), "--out", str(out), "--resolution", "16"]) == 0
    assert main(["data", "check", str(out)]) == 0
    assert "6 pictures, 6 with captions, 0 cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("side", [0, -1, 8001, 17000, 200_000, 10**30])
def test_shards_of_an_impossible_size_are_refused_before_anything_is_written(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], side: int
) -> None:
    argv = ("data", "prepare", str(workplace / "captioned"), "--out", str(tmp_path / "out"), "--resolution", str(side))
    assert f"resolution {side} is not between 1 and 8000" in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["my data #2", "2024-01-01", "010", "it's \U0001f600", "null", "a: b", "yes"])
def test_a_folder_may_have_any_name(name: str) -> None:
    assert read_flag(_as_it_is(name)) == name
    assert read_flag(_as_it_is("[a, 'b #2']")) == ["a", "b #2"]


def test_corrupt_pictures_are_listed_and_skipped_only_on_request(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_folder(tmp_path / "pictures", 6)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    assert "1 of 6 pictures cannot be used" in refused(capsys, "data", "check", str(folder))
    argv = ("distill", str(workplace / "recipe.yaml"), "--labelled", str(folder), "--stage1.steps", "4")
    assert "3.png" in refused(capsys, *argv, "--output_dir", str(tmp_path / "strict"))
    assert main([*argv, "--output_dir", str(tmp_path / "lenient"), "--data.skip_corrupt", "true"]) == 0
    assert "skipped:" in capsys.readouterr().err
    prepare = ("data", "prepare", str(folder), "--out", str(tmp_path / "shards"), "--resolution", "16")
    assert "3.png" in refused(capsys, *prepare)
    assert main([*prepare, "--skip_corrupt"]) == 0
    assert main(["data", "check", str(tmp_path / "shards")]) == 0
    assert "train: 5 pictures, 5 with captions, 0 cannot be used" in capsys.readouterr().out


def test_a_check_takes_all_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 3), ("test", 2)):
        tiny.write_folder(tmp_path / split, count)
    assert main(["data", "check", str(tmp_path)]) == 0
    assert [line.split(" pictures")[0] for line in capsys.readouterr().out.splitlines()] == ["train: 3", "test: 2"]


def test_a_check_tells_of_pictures_beside_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_folder(tmp_path / "train", 3)
    (tmp_path / "more").mkdir()
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / "folder.png").mkdir()
    for stray in (tmp_path / "a.png", tmp_path / "more/B.PNG", tmp_path / ".hidden.png", tmp_path / ".thumbs/a.png"):
        shutil.copy(tmp_path / "train/0.png", stray)
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "2 pictures lie beside train, not read" in capsys.readouterr().out


def test_plan_names_the_cost_before_training(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["student", "plan", str(workplace / "recipe.yaml")]) == 0
    assert "fewer parameters" in capsys.readouterr().out
    assert main(["student", "plan", str(workplace / "recipe.yaml"), "--student", "bk-base"]) == 0
    assert "fewer parameters" in capsys.readouterr().out


@pytest.mark.parametrize("wish", [("--target", "mobile"), ("--macs", "60G", "--params", "100M")])
def test_plan_without_a_recipe_prints_one_that_a_recipe_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wish: tuple[str, ...]
) -> None:
    from refine_control.plans import DenoiserPlan
    from refine_control.recipe import validate

    folder = str(write_configs(tmp_path / "alone", "sd15", module=False))
    net = str(write_configs(tmp_path / "pair", "sd15") / "controlnet")
    assert main(["student", "plan", "--teacher", folder, "--controlnet", net, *wish]) == 0
    table, _, plan = capsys.readouterr().out.partition("student:\n")
    assert "859,520,964    361,279,120" in table
    assert len(validate(DenoiserPlan, yaml.safe_load(plan), "printed").block_out_channels) >= 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ("give a recipe, or --teacher",)),
        (("--teacher", "TEACHER"), ("--target, --macs, --params",)),
        (("--teacher", "TEACHER", "--target", "tiny"), ("'tiny'", "bk-base, bk-small, bk-tiny, mobile, micro")),
        (("--teacher", "TEACHER", "--target", "micro", "--macs", "1G"), ("give either",)),
        (("--teacher", "TEACHER", "--macs", "much"), ("--macs 'much'", "60G")),
        (("--teacher", "TEACHER", "--params", "10"), ("no student", "--params")),
        (("--teacher", "nowhere", "--macs", "1G"), ("'nowhere'",)),
        (("--teacher", "TEACHER", "--macs", "1G", "--student.heads", "3"), ("--student.heads", "recipe")),
        (("RECIPE", "--target", "micro"), ("--target", "recipe")),
        (("RECIPE", "--student", "nano"), ("'nano'", "micro")),
    ],
)
def test_a_plan_that_cannot_be_made(
    workplace: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    places = {"TEACHER": str(workplace / "teacher"), "RECIPE": str(workplace / "recipe.yaml")}
    line = refused(capsys, "student", "plan", *(places.get(word, word) for word in argv))
    for word in words:
        assert word in line


def test_a_student_may_be_named_in_the_recipe(workplace: Path, tmp_path: Path) -> None:
    argv = ["compare", str(workplace / "compare.yaml"), "--student", "bk-small", "--rows", "scratch", "--seeds", "0"]
    assert main([*argv, "--output_dir", str(tmp_path)]) == 0
    assert store.load(str(tmp_path / "scratch/seed-0/student")).denoiser.foundation.mid_block is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("distill", "RECIPE", "--stage1.stepz", "3"), ("stage1.stepz", "steps")),
        (("distill", "RECIPE", "--stage1.steps", "many"), ("stage1.steps", "many")),
        (("distill", "nowhere.yaml"), ("nowhere.yaml",)),
        (("distill", "RECIPE", "--teacher", "zoo:none"), ("zoo:none",)),
        (("distill", "RECIPE", "--controlnet", "/no/such #net"), ("/no/such #net",)),
        (("distill", "RECIPE", "--data.labelled", "/no/such/folder"), ("/no/such/folder",)),
        (("distill", "RECIPE", "--data.resolution", "64"), ("64", "16")),
        (("distill", "RECIPE", "--data.unlabelled", "null"), ("data.unlabelled",)),
        (("distill", "RECIPE", "--alignment", "{foundation.nowhere: foundation.mid_block}"), ("foundation.nowhere",)),
        (("compare", "COMPARE", "--rows", "magic"), ("magic", "scratch")),
        (("compare", "COMPARE", "--seed", "5"), ("--seeds 5",)),
        (("distill", "RECIPE", "--stage1.steps"), ("--stage1.steps", "no value")),
        (("distill", "RECIPE", "--labelled", "PLAIN"), ("plain", "caption", "metadata.jsonl")),
        *(
            (("compare", "COMPARE", "--seeds", seeds), (f"'{seeds[:80]}'", "no whole number from 0"))
            for seeds in ("one", "²", "9" * 5000)
        ),
        (("compare", "COMPARE", "--seeds", "0,99999999999999999999"), ("99999999999999999999", "from 0")),
        *((("distill", "RECIPE", "--seed", seed), ("'seed'", seed)) for seed in (str(10**30), str(-(10**30)))),
        (("distill", "RECIPE", "--sample.num_inference_steps", "2000"), ("is 2000", "give 1000 or fewer")),
        (("distill", "RECIPE", "--run.device", "abacus"), ("abacus", "cpu")),
    ],
)
def test_mistakes_end_in_one_line_that_names_value_and_mend(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    out = ("--output_dir", str(tmp_path / "out"))
    places = {
        "PLAIN": str(workplace / "plain"),
        "RECIPE": str(workplace / "recipe.yaml"),
        "COMPARE": str(workplace / "compare.yaml"),
    }
    line = refused(capsys, *(places.get(word, word) for word in argv), *out)
    for word in words:
        assert word in line
    assert not list((tmp_path / "out").glob("st*")), "nothing was trained"


def test_overrides_may_stand_anywhere(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = str(workplace / "recipe.yaml"), str(tmp_path / "out")
    assert main(["distill", "--stage1.steps", "0", recipe, "--stage2.steps=1", "--output_dir", out]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("stage*")) == ["stage2"]


def test_scores_of_pictures_that_were_trained_on_are_called_so(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(workplace / "teacher"), "--recipe", str(workplace / "recipe.yaml")]
    assert main([*argv, "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("pictures that were trained on") == 2
    assert "trained on: the scores of labelled and unlabelled" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_kept_scores_that_are_damaged_are_made_anew(workplace: Path, tmp_path: Path) -> None:
    argv = ["evaluate", str(workplace / "teacher"), "--recipe", str(workplace / "recipe.yaml")]
    assert main([*argv, "--output_dir", str(tmp_path)]) == 0
    (kept,) = tmp_path.rglob("evaluation.json")
    whole = kept.read_text(encoding="utf-8")
    for damage in (whole[:100], "[]", "\udcff"):
        kept.write_text(damage, encoding="utf-8", errors="surrogateescape")
        assert main([*argv, "--output_dir", str(tmp_path)]) == 0
        assert kept.read_text(encoding="utf-8") == whole


def test_another_scheduler_is_another_model(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "teacher", tmp_path / "model")
    argv = ["evaluate", str(tmp_path / "model"), "--recipe", str(workplace / "recipe.yaml")]
    argv += ["--output_dir", str(tmp_path / "out"), "--sample.num_inference_steps", "2"]

    def scores() -> dict[str, Any]:
        assert main(argv) == 0
        (kept,) = tmp_path.rglob("evaluation.json")
        return json.loads(kept.read_text())["domains"]

    before = scores()
    config = tmp_path / "model/scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "leading"}))
    assert scores() != before


def test_one_picture_is_too_few_to_be_scored_on(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(workplace / "teacher"), "--recipe", str(workplace / "recipe.yaml")]
    argv += ["--output_dir", str(tmp_path / "out")]
    assert "'evaluate.images' = 1" in refused(capsys, *argv, "--evaluate.images", "1")
    one = tiny.write_folder(tmp_path / "one", 1)
    assert "give 2 or more" in refused(capsys, *argv, "--data.labelled", str(one))


def refused_filling(capsys: pytest.CaptureFixture[str], model: Path, folder: Path, size: tuple[int, int]) -> str:
    """A picture of a size, an empty mask of 16x16; nothing is written."""
    Image.new("RGB", size).save(folder / "picture.png")
    Image.new("L", (16, 16)).save(folder / "mask.png")
    files = ("--image", str(folder / "picture.png"), "--mask", str(folder / "mask.png"))
    line = refused(capsys, "generate", "--model", str(model), *files, "--out", str(folder / "o.png"))
    assert not (folder / "o.png").exists()
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_inference_steps", "2000"), ("is 2000", "give 1000 or fewer")),
        (("--num_inference_steps", str(10**30)), (str(10**30), "give 1000 or fewer")),
        (("--seed", str(10**30)), ("'seed'", str(10**30))),
        (("--seed", str(-(10**30))), ("'seed'", str(-(10**30)))),
        (("--guidance_scale", ".inf"), ("'guidance_scale'", "inf")),
        (("--prompt", "caf\udce9"), ("--prompt 'caf\\udce9' is not UTF-8",)),
        (("--mask", "examples/monkey.png"), ("'examples/monkey.png' is in colour", "white where to fill")),
    ],
)
def test_odd_wishes_of_a_picture_are_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], words: tuple[str, ...]
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    files = ("--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png"))
    line = refused(
        capsys, "generate", "--model", str(workplace / "teacher"), *files, "--out", str(tmp_path / "o.png"), *flags
    )
    for word in words:
        assert word in line
    assert not (tmp_path / "o.png").exists()


def test_more_steps_than_timesteps_are_refused_before_a_teacher_is_trained(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = teacher_recipe(workplace, tmp_path) | {"noise": {"num_train_timesteps": 20}}
    recipe["sample"] = {"num_inference_steps": 21}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert "give 20 or fewer" in refused(capsys, "train-teacher", str(tmp_path / "teacher.yaml"))
    assert not (tmp_path / "run/autoencoder").exists()


def test_more_steps_than_timesteps_are_refused_to_an_evaluation(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("evaluate", str(workplace / "teacher"), "--recipe", str(workplace / "recipe.yaml"))
    line = refused(capsys, *argv, "--output_dir", str(tmp_path), "--sample.num_inference_steps", "2000")
    assert "is 2000 but the model knows 1000 timesteps; give 1000 or fewer" in line


def test_a_page_is_this_machines_alone_unless_told_otherwise() -> None:
    assert parser().parse_args(["serve", "site"]).host == "127.0.0.1"


def test_a_mask_without_a_hole_is_refused(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no white at 16x16" in refused_filling(capsys, workplace / "teacher", tmp_path, (16, 16))


def test_mask_of_another_size_is_refused(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused_filling(capsys, workplace / "teacher", tmp_path, (20, 16))
    assert "16x16" in line
    assert "20x16" in line


def test_a_full_disk_ends_in_one_line(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "checkpoint")

    monkeypatch.setattr("refine_control.distill.checkpoint.save_file", full)
    line = refused(capsys, "distill", str(workplace / "recipe.yaml"), "--output_dir", str(tmp_path))
    assert "No space left" in line
    assert not list(tmp_path.glob("*/checkpoints/*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_of_training_ends_with_its_code_too(workplace: Path, number: int, code: int) -> None:
    """In a process of its own: a worker of the tests may not be the one that is ended."""
    program = f"""
import signal, sys
from refine_control.cli import main
from refine_control.data import source
source.check = lambda _: signal.raise_signal({int(number)})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.exit(main(["data", "check", {str(workplace / "plain")!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == code
    assert "the same command goes on where this one was" in ended.stderr


def test_a_run_of_another_recipe_is_not_overwritten(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (
        "compare",
        str(workplace / "compare.yaml"),
        "--rows",
        "scratch",
        "--seeds",
        "0",
        "--output_dir",
        str(tmp_path),
    )
    assert main(argv) == 0
    assert "another recipe" in refused(capsys, *argv, "--stage1.learning_rate", "0.5")


def teacher_recipe(workplace: Path, tmp_path: Path) -> dict[str, Any]:
    stage = {"steps": 2, "batch_size": 4, "weights": {"task": 1}}
    return {
        "output_dir": str(tmp_path / "run"),
        "data": yaml.safe_load((workplace / "recipe.yaml").read_text())["data"],
        "autoencoder": tiny.AUTOENCODER.model_dump(mode="json"),
        "text": tiny.TEXT.model_dump(mode="json"),
        "denoiser": tiny.TEACHER.model_dump(mode="json"),
        "autoencoder_stage": stage | {"labelled_fraction": 0.5},
        "denoiser_stage": stage | {"labelled_fraction": 0.5},
        "run": {"device": "cpu", "num_threads": 1},
    }


def test_teacher_is_trained_by_the_same_loop(workplace: Path, tmp_path: Path) -> None:
    recipe = teacher_recipe(workplace, tmp_path)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train-teacher", str(tmp_path / "teacher.yaml")]) == 0
    model = store.load(str(tmp_path / "run/model"))
    assert model.resolution == tiny.SIDE
    assert model.vae.config.scaling_factor != pytest.approx(0.18215)
