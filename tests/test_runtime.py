"""The runtime without torch agrees with torch and diffusers, number for number."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import refine_control.runtime as runtime
from refine_control.data.images import fit_square, fit_square_mask, read_image, read_mask
from refine_control.runtime import ExportError, Scheduler, fit_tokens, noise, read_square


def described(scheduler: DDIMScheduler) -> dict:
    names = ("prediction_type", "timestep_spacing", "steps_offset")
    return {
        "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
        "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
        **{name: scheduler.config[name] for name in names},
    }


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("prediction", "zero_snr", "to_one", "offset"),
    [("epsilon", False, False, 1), ("v_prediction", True, True, 0), ("sample", False, True, 0)],
)
def test_the_scheduler_is_diffusers_ddim(
    steps: int, spacing: str, prediction: str, zero_snr: bool, to_one: bool, offset: int
) -> None:
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=offset if spacing == "leading" else 0,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing=spacing,
    )
    ours = Scheduler(described(theirs))
    theirs.set_timesteps(steps)
    assert ours.timesteps(steps).tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    for t in theirs.timesteps:
        said = torch.randn(1, 4, 8, 8, generator=generator)
        step = theirs.step(said, t, latents)
        x0, eps = ours.to_x0_eps(said.numpy(), int(t), latents.numpy())
        np.testing.assert_allclose(x0, step.pred_original_sample.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.step(x0, eps, int(t), steps), step.prev_sample.numpy(), rtol=1e-4, atol=2e-5)
        latents = step.prev_sample / step.prev_sample.std()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_there_cannot_be_are_refused(steps: int) -> None:
    with pytest.raises(ExportError, match=str(steps)):
        Scheduler(described(DDIMScheduler())).timesteps(steps)


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**31, 2**32 + 7, 2**62])
@pytest.mark.parametrize("shape", [(16,), (17,), (1, 8, 8, 8), (3, 7), (2, 4, 33, 31)])
def test_a_seed_draws_the_noise_that_torch_draws(seed: int, shape: tuple[int, ...]) -> None:
    theirs = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(noise(seed, shape), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "fitted"),
    [([0, 5, 1], [0, 5, 1, 9, 9]), ([0, 5, 6, 7, 1], [0, 5, 6, 7, 1]), ([0, 5, 6, 7, 8, 1], [0, 5, 6, 7, 1])],
)
def test_tokens_are_padded_or_cut_before_their_end_mark(ids: list[int], fitted: list[int]) -> None:
    assert fit_tokens(ids, 5, 9) == fitted


@pytest.mark.parametrize("size", [(32, 32), (41, 97), (300, 20), (8, 8)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pictures_are_read_as_in_training(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).convert("RGB" if mode == "P" else mode).convert(mode).save(path)
    np.testing.assert_array_equal(read_square(path, 32), fit_square(read_image(path), 32))


@pytest.mark.parametrize("size", [(32, 32), (41, 97), (300, 20)])
def test_masks_are_read_as_in_training(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)).save(path)
    np.testing.assert_array_equal(read_square(path, 32, mask=True), fit_square_mask(read_mask(path), 32))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(ExportError, match=r"cat\.png"):
        read_square(tmp_path / "cat.png", 32)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "big.png")
    with pytest.raises(ExportError, match=r"10x10 is more than 99 pixels"):
        read_square(tmp_path / "big.png", 32)


def test_a_folder_that_was_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"refine-control\.json"):
        runtime.Student(tmp_path)


@pytest.mark.parametrize("module", ["refine_control.runtime", "refine_control.serve.server"])
def test_what_runs_on_the_edge_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_runtime_knows_none_of_our_other_files() -> None:
    assert "import refine_control" not in (code := Path(runtime.__file__).read_text(encoding="utf-8"))
    assert "from refine_control" not in code
