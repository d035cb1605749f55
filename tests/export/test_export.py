"""What export writes draws what torch draws, from the same noise, and says how far it is from it."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx as onnx_format
import onnxruntime
import pytest
from PIL import Image

from refine_control.diffusion import store
from refine_control.diffusion.sample import fill
from refine_control.errors import DataError, ModelError, RecipeError, UserError
from refine_control.export import onnx, parity
from refine_control.export.export import _describe, export_model, summary, title_of
from refine_control.recipe import SampleConfig
from refine_control.runtime import MANIFEST, ExportError, Student
from tiny import SIDE, plan, tiny_denoiser, tiny_model, write_folder
from tiny_sd import tiny_pipeline

Exported = Callable[[str, str], Path]
KINDS = [("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "fp16"), ("web", "fp16")]


def student_in(folder: Path) -> Student:
    return Student(folder / "models" / "tiny" if (folder / "models").is_dir() else folder)


@pytest.mark.parametrize(("to", "precision"), KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_seed_draws_what_torch_draws(
    exported: Exported, tiny_folder: Path, pictures: Path, to: str, precision: str, guidance: float
) -> None:
    student = student_in(exported(to, precision))
    heldout = parity.open_heldout(str(pictures), "test", 4, SIDE)
    config = SampleConfig(num_inference_steps=5, guidance_scale=guidance)
    ours, theirs = parity.draw(student, heldout, config), heldout.draw(store.load(str(tiny_folder)).freeze(), config)
    np.testing.assert_allclose(ours, theirs, atol=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize(("to", "precision"), KINDS)
def test_every_graph_is_near_torch_and_the_manifest_says_how_near(exported: Exported, to: str, precision: str) -> None:
    manifest = student_in(exported(to, precision)).manifest
    assert manifest["defaults"] == {"num_inference_steps": 5, "guidance_scale": 2}
    assert manifest["only_steps"] is None
    errors = {k: v for k, v in manifest["parity"].items() if k != "what"}
    assert set(errors) == {"text_encoder", "condition", "denoiser", "vae_encoder", "vae_decoder"}
    assert 0 < max(errors.values()) < (1e-4 if precision == "fp32" else 2e-2)


def test_a_graph_that_differs_stops_the_export(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "out").mkdir()
    for bound, error in ((0.0, None), (1e-4, math.nan)):
        with monkeypatch.context() as patch:
            patch.setitem(parity.BOUNDS, "fp32", bound)
            if error is not None:
                patch.setattr(parity, "graph_error", lambda graph, student: math.nan)
            for to, folder in (("onnx", out), ("web", tmp_path / "site")):
                with pytest.raises(ModelError, match="differs from torch"):
                    export_model(str(tiny_folder), to, "fp32", folder)  # type: ignore[arg-type]
    assert not any(out.iterdir())
    export_model(str(tiny_folder), "web", "fp32", tmp_path / "site")  # what failed there is not in the way


def test_an_export_that_fails_leaves_the_older_one(
    exported: Exported, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(exported("onnx", "fp16"), tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def fail_the_second_time(path: Path, target: Path) -> Path:
        if path.name == "written":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_the_second_time)
    with pytest.raises(OSError, match="no"):
        export_model(str(tiny_folder), "onnx", "fp32", out)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export_model(str(tiny_folder), "onnx", "fp32", out)
    assert Student(out).manifest["precision"] == "fp32"
    (out / "filled.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"filled\.png"):
        export_model(str(tiny_folder), "onnx", "fp16", out)


@pytest.mark.parametrize(("data", "images", "reason"), [("nowhere", 8, "nowhere"), (None, 1, "--images 1")])
def test_int8_opens_its_data_first(
    tiny_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    images: int,
    reason: str,
) -> None:
    monkeypatch.setattr("refine_control.export.export.graphs_of", None)
    with pytest.raises(UserError, match=reason):
        export_model(str(tiny_folder), "onnx", "int8", tmp_path / "out", data or str(pictures), images=images)


def test_int8_without_pictures_asks_for_them(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give --data"):
        export_model(str(tiny_folder), "onnx", "int8", tmp_path / "out")


def test_what_int8_leaves_in_half_precision_is_held_to_its_bound(
    tiny_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "graph_error", lambda graph, student: 0.1)
    with pytest.raises(ModelError, match="text_encoder in fp16 differs"):
        export_model(str(tiny_folder), "onnx", "int8", tmp_path / "out", str(pictures), calibration_images=1, images=0)


def test_a_conversion_that_fails_names_graph_and_precision(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, path: Path) -> None:
        raise RuntimeError("no such\n operator")

    monkeypatch.setattr("refine_control.export.onnx.halve", fail)
    with pytest.raises(ModelError, match=r"tiny'.*text_encoder cannot be written as fp16\.onnx: no such operator"):
        export_model(str(tiny_folder), "onnx", "fp16", tmp_path / "out")


def test_the_page_takes_no_weights_beyond_a_file(
    exported: Exported, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gigabytes, of which a test makes ten kilobytes; the other exports keep such weights beside the graph."""
    exported("onnx", "fp32")  # traced with weights inside
    monkeypatch.setattr("refine_control.export.onnx.BIG", 10_000)
    with pytest.raises(ModelError, match=r"its \w+ has more than 2 GB"):
        export_model(str(tiny_folder), "web", "fp16", tmp_path / "site")
    export_model(str(tiny_folder), "onnx", "fp16", tmp_path / "out")
    assert (tmp_path / "out" / "denoiser.onnx.data").is_file()


def test_weights_beside_a_graph_are_quantised_too(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("onnx", "fp32") / "denoiser.onnx"
    apart = tmp_path / "denoiser.onnx"
    onnx_format.save(
        onnx_format.load(source), apart, save_as_external_data=True, location=f"{apart.name}.data", size_threshold=0
    )
    session = onnxruntime.InferenceSession(source)
    rng = np.random.default_rng(0)
    feeds = {
        given.name: rng.normal(size=[n if isinstance(n, int) else 1 for n in given.shape]).astype(np.float32)
        for given in session.get_inputs()
    }
    feeds["t"] = np.array([500], np.float32)
    monkeypatch.setattr("refine_control.export.onnx.BIG", 10_000)
    onnx.quantize(apart, tmp_path / "int8.onnx", [feeds])
    (exact,), (rounded,) = (
        session.run(None, feeds),
        onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, feeds),
    )
    assert 0 < np.abs(exact - rounded).max() < 0.5 * np.abs(exact).max()


@pytest.mark.slow
def test_sdxl_runs_from_its_graphs_as_in_torch(tmp_path: Path) -> None:
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ModelError, match="two encoders"):
        export_model(str(tmp_path / "sdxl"), "web", "fp16", tmp_path / "site")
    export_model(str(tmp_path / "sdxl"), "onnx", "fp32", tmp_path / "out")
    student = Student(tmp_path / "out")
    prompts = ["", "a red cat", "word " * 200]
    said, theirs = student.embed(prompts), store.load(str(tmp_path / "sdxl")).freeze().embed(prompts)
    np.testing.assert_allclose(said["tokens"], theirs.tokens.numpy(), atol=1e-4)
    np.testing.assert_allclose(said["pooled"], theirs.pooled.numpy(), atol=1e-4)


def test_a_loss_is_a_part_of_what_was_there() -> None:
    def scores(value: float) -> dict:
        return {"psnr": {"hole": value}, "fid[x]": {"hole": value}}

    assert parity.losses(scores(10.0), scores(9.0)) == pytest.approx({"psnr": 0.1, "fid[x]": -0.1})
    assert parity.losses(scores(0.0), scores(1.0)) == {"psnr": -math.inf, "fid[x]": math.inf}
    assert parity.losses(scores(0.0), scores(0.0)) == {"psnr": 0.0, "fid[x]": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_is_smaller_and_says_what_it_costs(exported: Exported, to: str) -> None:
    exact, student = Student(exported("onnx", "fp32")), Student(exported(to, "int8"))
    weights = {"onnx": "denoiser.onnx", "openvino": "denoiser.bin"}[to]
    assert student.manifest["files"][weights] < exact.manifest["files"]["denoiser.onnx"]
    quality = student.manifest["quality"]
    assert quality["int8"] != quality["fp32"]
    assert {name.partition("[")[0] for name in quality["loss"]} == {"psnr", "ssim", "lpips", "fid", "cmmd"}
    assert "loss" in summary(student.manifest)


@pytest.mark.slow
def test_of_openvinos_int8_the_ends_keep_their_precision(exported: Exported) -> None:
    import openvino

    graph = openvino.Core().read_model(exported("openvino", "int8") / "denoiser.xml")
    convolutions = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Convolution"]
    weights = [node.input_value(1).get_node() for node in convolutions]
    rounded = [each.get_type_name() == "Multiply" for each in weights]  # a scale times what is stored in int8
    assert not rounded[-1]
    assert rounded.count(False) == 3  # and the first of the foundation and of the module
    assert {each.shape[1] for each, is_int8 in zip(weights[:-1], rounded, strict=False) if not is_int8} == {4}


def test_without_a_number_calibration_has_as_many_pictures_as_make_its_calls(
    tiny_folder: Path, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class StopError(Exception): ...

    def opened(folder: str, split: str, images: int, *_: object) -> None:
        asked.append((split, images))
        raise StopError

    monkeypatch.setattr(parity, "open_heldout", opened)
    steps = store.load(str(tiny_folder)).usual.num_inference_steps
    for given in (None, 7):
        with pytest.raises(StopError):
            export_model(
                str(tiny_folder), "onnx", "int8", tmp_path / "out", str(pictures), calibration_images=given, images=0
            )
    assert asked == [("train", math.ceil(240 / steps)), ("train", 7)]


def test_the_summary_says_where_int8_costs_too_much() -> None:
    metrics = {"psnr": {"hole": 10.0}, "lpips[x]": {"hole": 0.5}}
    worse = {"psnr": {"hole": 9.9}, "lpips[x]": {"hole": 0.52}}
    quality = {
        "provenance": {"n": 3},
        "data": "d",
        "fp32": metrics,
        "int8": worse,
        "loss": parity.losses(metrics, worse),
    }
    lines = summary({"precision": "int8", "parity": {}, "files": {}, "graphs": {}, "quality": quality}).splitlines()
    assert quality["loss"] == pytest.approx({"psnr": 0.01, "lpips[x]": 0.04})
    assert [line.startswith("lpips") for line in lines if "MORE THAN 2% WORSE" in line] == [True]


def test_the_folder_runs_by_itself_without_torch(exported: Exported, tmp_path: Path) -> None:
    folder = exported("onnx", "fp16")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "cat.png")
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 15:35] = 255
    Image.fromarray(mask).save(tmp_path / "hole.png")
    out = tmp_path / "filled.png"
    code = (
        f"import sys, runpy; sys.modules['torch'] = sys.modules['refine_control'] = None; "
        f"sys.argv = ['run.py', '--image', {str(tmp_path / 'cat.png')!r}, '--mask', {str(tmp_path / 'hole.png')!r}, "
        f"'--out', {str(out)!r}, '--seed', '3']; sys.path[0] = {str(folder)!r}; "
        f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as filled:
        assert filled.size == (SIDE, SIDE)


@pytest.mark.parametrize("flags", [["--image", "none.png", "--mask", "none.png"]])
def test_the_runner_names_a_mistake_in_one_line(exported: Exported, flags: list[str]) -> None:
    run = [sys.executable, str(exported("onnx", "fp16") / "run.py"), *flags]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("run.py: 'none.png'")


def test_known_pixels_stay_and_the_hole_does_not(exported: Exported) -> None:
    student = Student(exported("onnx", "fp32"))
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    hole = np.zeros((SIDE, SIDE), np.uint8)
    hole[4:10, 4:12] = 1
    filled = student.fill(picture, hole, "a red cat", 4, 2.0, 7)
    np.testing.assert_array_equal(filled[hole == 0], picture[hole == 0])
    assert (filled[hole == 1] != picture[hole == 1]).any()


def test_a_student_of_few_steps_draws_with_no_other_number(exported: Exported) -> None:
    assert _describe(replace(tiny_model(), only_steps=2), "of two steps", "onnx", "fp32")["only_steps"] == 2
    student = Student(exported("onnx", "fp32"))
    student.manifest["only_steps"] = 2
    picture, hole = np.zeros((SIDE, SIDE, 3), np.uint8), np.ones((SIDE, SIDE), np.uint8)
    student.fill(picture, hole, "", 2, 1.0, 0)
    with pytest.raises(ExportError, match="3 steps: the model has learnt the timesteps of 2 alone"):
        student.fill(picture, hole, "", 3, 1.0, 0)


@pytest.mark.parametrize("guidance", [0.5, -3.0, math.inf, math.nan])
def test_a_guidance_that_guides_nowhere_is_refused(exported: Exported, guidance: float) -> None:
    with pytest.raises(ExportError, match=f"guidance {guidance}"):
        Student(exported("onnx", "fp32")).fill(
            np.zeros((SIDE, SIDE, 3), np.uint8), np.ones((SIDE, SIDE), np.uint8), "", 1, guidance, 0
        )


def test_sampling_agrees_with_torchs_own_fill(exported: Exported, tiny_folder: Path, pictures: Path) -> None:
    """From the picture, not from tensors: control, noise of the seed, pasting and rounding are all the runtime's."""
    heldout = parity.open_heldout(str(pictures), "test", 1, SIDE).batch
    student = Student(exported("onnx", "fp32"))
    config = SampleConfig(num_inference_steps=4)
    theirs = fill(store.load(str(tiny_folder)).freeze(), heldout, config, [11])[1]
    picture = ((heldout.image[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    ours = student.fill(picture, heldout.mask[0, 0].byte().numpy(), heldout.captions[0], 4, config.guidance_scale, 11)
    expected = ((theirs[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    assert np.abs(ours.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["denoiser.onnx", "tokenizer.json"])
def test_a_file_that_is_cut_off_is_named(exported: Exported, tmp_path: Path, name: str) -> None:
    for path in exported("onnx", "fp16").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -9 if path.name == name else None])
    with pytest.raises(ExportError, match=name):
        Student(tmp_path)


def test_another_format_is_refused(exported: Exported, tmp_path: Path) -> None:
    manifest = json.loads((exported("onnx", "fp16") / MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": 99}), encoding="utf-8")
    with pytest.raises(ExportError, match="another format"):
        Student(tmp_path)


def test_other_files_are_never_overwritten(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    for to in ("onnx", "web"):
        with pytest.raises(UserError, match="other files"):
            export_model(str(tiny_folder), to, "fp32", tmp_path)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    (tmp_path / "precious.txt").rename(tmp_path / ".git")
    with pytest.raises(UserError, match=r"other files than an export --to onnx, '\.git'"):
        export_model(str(tiny_folder), "onnx", "fp32", tmp_path)
    (tmp_path / "models.json").write_text("[]")
    with pytest.raises(UserError, match=r"other files than an export --to web, 'models\.json'"):
        export_model(str(tiny_folder), "web", "fp32", tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "another format"])
def test_a_damaged_export_is_replaced(exported: Exported, tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    out = Path(shutil.copytree(exported("onnx", "fp16"), tmp_path / "out"))
    if damage == "cut off":
        (out / "vae_decoder.onnx").write_bytes(b"short")
    else:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        (out / MANIFEST).write_text(json.dumps(manifest | {"format": 99}), encoding="utf-8")
    export_model(str(tiny_folder), "onnx", "fp32", out)
    assert Student(out).manifest["precision"] == "fp32"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("zoo:emoji-student", "emoji-student"),
        ("org/some-model@abc123", "some-model"),
        ("runs/mine/student/", "mine"),
        ("runs/demo/refine-control/seed-0/student", "refine-control"),
        ("student", "student"),
        ("./student", "student"),
        ("/home/u@corp/models/mine", "mine"),
        ("zoo:model", "model"),
    ],
)
def test_a_model_is_called_as_its_user_called_it(name: str, title: str) -> None:
    assert title_of(name) == title


def test_a_mistake_in_the_examples_costs_none_that_are_there(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        export_model(str(tiny_folder), "web", "fp16", tmp_path / "site", str(tmp_path / "nowhere"))
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("title", ["../out", "a b", "", ".hidden", "x/y"])
def test_a_name_that_is_no_plain_word_is_refused(tiny_folder: Path, tmp_path: Path, title: str) -> None:
    with pytest.raises(UserError, match="--name"):
        export_model(str(tiny_folder), "web", "fp16", tmp_path / "out", title=title)


def test_a_model_that_cannot_be_expressed_is_refused_by_its_part(tmp_path: Path) -> None:
    model = tiny_model()
    model.scheduler |= {"thresholding": True}
    store.save(model, tmp_path / "thresholds")
    with pytest.raises(ModelError, match=r"thresholds'.*its scheduler thresholds"):
        export_model(str(tmp_path / "thresholds"), "onnx", "fp32", tmp_path / "out")


@pytest.mark.slow
def test_a_foundation_alone_has_no_condition(tmp_path: Path) -> None:
    model = tiny_model()
    model.denoiser = tiny_denoiser(plan(8, 16))
    model.denoiser.module = None
    store.save(model, tmp_path / "alone")
    export_model(str(tmp_path / "alone"), "onnx", "fp32", tmp_path / "out")
    student = Student(tmp_path / "out")
    assert "condition" not in student.manifest["graphs"]
    hole = np.ones((SIDE, SIDE), np.uint8)
    assert student.fill(np.zeros((SIDE, SIDE, 3), np.uint8), hole, "", 2, 2.0, 0).any()


def test_a_site_holds_several_models_smallest_first(exported: Exported, tiny_folder: Path, pictures: Path) -> None:
    site = exported("web", "fp16")
    export_model(str(tiny_folder), "web", "fp32", site, str(pictures), title="larger")
    assert json.loads((site / "models.json").read_text(encoding="utf-8")) == ["tiny", "larger"]
    examples = json.loads((site / "examples" / "examples.json").read_text(encoding="utf-8"))
    assert len(examples) == 8
    with Image.open(site / examples[0]["image"]) as example:
        assert example.size == (SIDE, SIDE)
    assert (site / "lib" / "ort" / "ort-wasm-simd-threaded.wasm").read_bytes()[:4] == b"\0asm"


def test_nothing_of_this_machine_stands_in_the_graphs(exported: Exported) -> None:
    content = (exported("onnx", "fp32") / "denoiser.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


@pytest.mark.slow
def test_quantising_reports_to_nobody(exported: Exported) -> None:
    exported("openvino", "int8")
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]


def test_a_corrupt_picture_is_left_out_of_those_to_calibrate_on(pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    first = sorted(folder.rglob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:60])
    whole, lacking = (parity.open_heldout(str(each), "train", 99, SIDE).batch for each in (pictures, folder))
    assert len(lacking) == len(whole) - 1


def test_one_picture_is_too_few_to_score_on(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "one", 1))
    with pytest.raises(DataError, match="has one picture that can be used"):
        parity.open_heldout(folder, "test", 4, SIDE)


def test_pictures_are_shown_as_the_models_controlnets_are_used_to(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = parity.open_heldout(str(pictures), "test", 4, SIDE, ["edges"]).batch
    assert edges.control.min() == 0, "no hole"
    assert edges.mask.all()
    assert "were trained on" in capsys.readouterr().err, "the folder is not split"
    with pytest.raises(RecipeError, match=r"'controls\.0' = 'holes'"):
        parity.open_heldout(str(pictures), "test", 4, SIDE, ["holes"])
