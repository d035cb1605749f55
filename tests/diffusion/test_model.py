"""A model survives its own folder, stock diffusers runs that folder, and a wrong folder is named in one line."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionControlNetInpaintPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refine_control.diffusion.build import build_autoencoder, build_text_encoder, build_tokenizer
from refine_control.diffusion.model import Model
from refine_control.diffusion.store import ONLY_KEY, USUAL_KEY, load, resolve, save
from refine_control.diffusion.text import Text
from refine_control.errors import ModelError
from refine_control.recipe import SampleConfig
from tiny import AUTOENCODER, TEXT, WORDS, batch, plan, tiny_denoiser, tiny_model

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "controlnet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
PLANS = {"with mid block": plan(16, 32), "without": plan(8, 16, mid_block="none")}


def networks(model: Model) -> tuple[nn.Module, ...]:
    return model.denoiser, model.vae, model.text_encoder


def outputs(model: Model) -> list[Tensor]:
    b = batch(3)
    with torch.no_grad():
        text, latents = model.embed(list(b.captions)), model.encode(b.image)
        return [
            text.tokens,
            latents,
            model.decode(latents),
            model.denoiser(latents, torch.tensor([0, 500, 999]), text, (b.image + 1) / 2),
        ]


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


@pytest.fixture
def folder(teacher: Model, tmp_path: Path) -> Path:
    """A saved model that a test may break."""
    save(teacher, tmp_path / "model")
    return tmp_path / "model"


def test_saved_then_loaded_is_equal(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path)
    loaded = load(str(tmp_path))
    for before, after in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(before, after)
    assert noise_of(loaded) == noise_of(model)
    assert (loaded.denoiser.foundation.mid_block is None) == (model.denoiser.foundation.mid_block is None)
    assert loaded.resolution == model.resolution == 16
    assert loaded.downscale == 2


def test_half_precision_loads_as_float32(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path, torch.float16)
    kept = load_file(tmp_path / "unet" / WEIGHTS["unet"])
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    loaded = load(str(tmp_path))
    assert {p.dtype for network in networks(loaded) for p in network.parameters()} == {torch.float32}
    for before, after in zip(outputs(model), outputs(loaded), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0.05)


def test_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    before = outputs(model)
    save(model, tmp_path, torch.float16)
    for old, new in zip(before, outputs(model), strict=True):
        assert torch.equal(old, new)


def test_a_model_that_was_used_is_saved_as_one_that_was_not(model: Model, tmp_path: Path) -> None:
    """A tokenizer remembers how it was last asked to cut; what was scored before would be taken for another model's."""
    save(model, tmp_path / "before")
    model.embed(["a red cat"])
    save(model, tmp_path / "after")
    for path in (tmp_path / "before").rglob("*.*"):
        assert (tmp_path / "after" / path.relative_to(tmp_path / "before")).read_bytes() == path.read_bytes(), path


def test_what_else_lies_in_a_models_folder_stays(model: Model, tmp_path: Path) -> None:
    """A card, a repository; of an earlier model nothing."""
    save(model, tmp_path / "model")
    (tmp_path / "model/README.md").write_text("my card")
    (tmp_path / "model/.git/objects").mkdir(parents=True)
    (tmp_path / "model/.git/HEAD").write_text("ref: refs/heads/main")
    (tmp_path / "model/controlnet_7").mkdir()
    save(model, tmp_path / "model")
    assert (tmp_path / "model/README.md").read_text() == "my card"
    assert (tmp_path / "model/.git/HEAD").read_text() == "ref: refs/heads/main"
    assert (tmp_path / "model/.git/objects").is_dir()
    assert not (tmp_path / "model/controlnet_7").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_save_leaves_the_older_model(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    save(model, folder)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.vae), "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            save(tiny_model(seed=1), folder)
    for before, after in zip(outputs(model), outputs(load(str(folder))), strict=True):
        assert torch.equal(before, after)


def test_a_model_says_how_it_is_drawn(model: Model, folder: Path, tmp_path: Path) -> None:
    save(replace(model, usual=SampleConfig(num_inference_steps=3, guidance_scale=1.5, seed=7)), tmp_path / "three")
    assert load(str(tmp_path / "three")).usual == SampleConfig(num_inference_steps=3, guidance_scale=1.5)
    save(replace(model, only_steps=3), tmp_path / "three-alone")
    assert [load(str(tmp_path / name)).only_steps for name in ("three", "three-alone")] == [None, 3]
    for wrong in ({USUAL_KEY: {"num_inference_steps": 0}}, {ONLY_KEY: 0}):
        index = json.loads((tmp_path / "three/model_index.json").read_text()) | wrong
        (folder / "model_index.json").write_text(json.dumps(index))
        assert "num_inference_steps' = 0" in refused(folder)


def noise_of(model: Model) -> dict:
    return {k: v for k, v in model.scheduler.items() if not k.startswith("_")}


def test_stock_pipelines_run_the_folder(model: Model, tmp_path: Path) -> None:
    save(model, tmp_path)
    picture, hole = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    known = -torch.ones(1, 3, 16, 16)
    for kind, pictures in (
        (StableDiffusionControlNetPipeline, {"image": known}),
        (StableDiffusionControlNetInpaintPipeline, {"image": picture, "mask_image": hole, "control_image": known}),
    ):
        pipeline = kind.from_pretrained(tmp_path, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline("a red cat", **pictures, num_inference_steps=2, height=16, width=16, output_type="pt").images
        assert drawn.shape == (1, 3, 16, 16)
        assert drawn.isfinite().all()
        assert drawn.std() > 0.01


def test_the_module_steers_the_foundation(teacher: Model) -> None:
    """Known pixels and holes reach the prediction: the two networks are joined."""
    x, t, text = torch.zeros(1, 4, 8, 8), torch.tensor([500]), Text(torch.zeros(1, 8, 16))
    with torch.no_grad():
        hole, white = (teacher.denoiser(x, t, text, torch.full((1, 3, 16, 16), v)) for v in (-1.0, 1.0))
    assert (hole - white).abs().max() > 1e-3


def test_frozen_means_no_gradient_and_eval_for_good() -> None:
    model = tiny_model()
    for network in networks(model):
        network.train()
    assert model.freeze() is model
    owner = nn.Module()
    owner.teacher, owner.student = model, nn.Dropout()
    owner.train()
    assert owner.student.training
    for network in networks(model):
        assert not any(p.requires_grad for p in network.parameters())
        assert not any(module.training for module in network.modules())


# What cannot be loaded


def refused(name: Path | str) -> str:
    """The message, which is one line that names the model."""
    with pytest.raises(ModelError) as caught:
        load(str(name))
    assert "\n" not in str(caught.value)
    assert str(name) in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    assert "model_index.json" in refused(tmp_path / "nowhere")
    assert "model_index.json" in refused(tmp_path)


def test_a_runs_folder_names_the_student_in_it(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model_index.json").touch()
    with pytest.raises(ModelError, match=re.escape(f"no model_index.json; give '{tmp_path / 'student'}'")):
        resolve(str(tmp_path))


def test_an_unknown_zoo_name_lists_the_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refine_control.diffusion.store.ZOO", tmp_path)
    assert "there are: none yet" in refused("zoo:nobody")
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "model_index.json").write_text("{}")
    assert "there are: zoo:somebody" in refused("zoo:nobody")
    assert resolve("zoo:somebody") == tmp_path / "somebody"


@pytest.mark.parametrize("part", [*WEIGHTS, "tokenizer", "scheduler"])
def test_a_missing_part(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    refused(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_in_a_pickle_are_not_read(folder: Path, part: str) -> None:
    weights = folder / part / WEIGHTS[part]
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    refused(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_torn_weights(folder: Path, part: str) -> None:
    weights = folder / part / WEIGHTS[part]
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_lack_a_tensor(folder: Path, part: str) -> None:
    """Stock loading would fill the gap with random numbers and only warn."""
    weights = folder / part / WEIGHTS[part]
    kept = load_file(weights)
    name = sorted(kept)[0]
    del kept[name]
    save_file(kept, weights, metadata={"format": "pt"})
    assert name.rpartition(".")[2] in refused(folder)


def other_text_width(model: Model) -> Model:
    tokenizer = build_tokenizer(TEXT, list(WORDS))
    text_encoder = build_text_encoder(TEXT.model_copy(update={"hidden_size": 24}), tokenizer)
    return replace(model, text_encoder=text_encoder, tokenizer=tokenizer)


def other_latents(model: Model) -> Model:
    return replace(model, vae=build_autoencoder(AUTOENCODER.model_copy(update={"latent_channels": 6})))


def other_cross_attention(model: Model) -> Model:
    wide = tiny_denoiser(text_width=24)
    denoiser = tiny_denoiser()
    denoiser.module = wide.module
    return replace(model, denoiser=denoiser)


def other_widths(model: Model) -> Model:
    denoiser = tiny_denoiser()
    denoiser.module = tiny_denoiser(plan(8, 16)).module
    return replace(model, denoiser=denoiser)


@pytest.mark.parametrize(
    ("mismatch", "numbers"),
    [
        (other_text_width, "16 and 24"),
        (other_latents, "4 and 6"),
        (other_cross_attention, "16 and 24"),
        (other_widths, "(16, 32) and (8, 16)"),
    ],
)
def test_parts_that_do_not_belong_together(
    teacher: Model, tmp_path: Path, mismatch: Callable[[Model], Model], numbers: str
) -> None:
    save(mismatch(teacher), tmp_path)
    assert refused(tmp_path).endswith(f"differ, {numbers}")


def test_the_layers_that_repeat_are_compiled() -> None:
    """Compiled when they first run, which this test leaves out."""
    denoiser = tiny_denoiser()
    denoiser.compile_blocks()
    compiled = {type(module).__name__ for module in denoiser.modules() if module._compiled_call_impl is not None}
    assert compiled == {"ResnetBlock2D", "BasicTransformerBlock"}
