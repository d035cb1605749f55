"""The runtime without torch agrees with torch and diffusers, number for number."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import refine_control.runtime as runtime
from refine_control.runtime import ExportError, Scheduler, fit_tokens, noise
from tiny import least

ODD = least(runtime.MUST_HAVE["scheduler"])


def described(scheduler: DDIMScheduler) -> dict:
    names = ("prediction_type", "timestep_spacing", "steps_offset")
    return {
        "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
        "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
        "clip_sample_range": scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
        **{name: scheduler.config[name] for name in names},
    }


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("prediction", "zero_snr", "to_one", "offset", "clip"),
    [
        ("epsilon", False, False, 1, False),
        ("epsilon", False, True, 0, True),
        ("v_prediction", True, True, 0, False),
        ("sample", False, True, 0, True),
    ],
)
def test_the_scheduler_is_diffusers_ddim(
    steps: int, spacing: str, prediction: str, zero_snr: bool, to_one: bool, offset: int, clip: bool
) -> None:
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=clip,
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"files": []}, "files"),
        ({"graphs": {"denoiser": {"file": "../denoiser.onnx"}}}, r"\.\./denoiser\.onnx"),
        ({"files": {"../secret": 6}}, "secret"),
        ({"text": {"tokenizers": ["/etc/hostname"]}}, "text.pad_ids"),
        ({"scheduler": None}, "scheduler"),
        ({"resolution": "32"}, "resolution"),
        ({"latent_shape": [4, "8", 8]}, "latent_shape"),
        ({"graphs": {"denoiser": {"file": {}}}}, r"uses '\{\}' but does not list it"),
        ({"graphs": {"denoiser": []}}, r"uses '\[\]' but does not list it"),
        ({"scheduler": ODD | {"prediction_type": "flow"}}, "scheduler.prediction_type"),
        ({"scheduler": ODD | {"timestep_spacing": "even"}}, "scheduler.timestep_spacing"),
        ({"text": least(runtime.MUST_HAVE["text"]) | {"tokenizers": [["x"]]}}, "text.tokenizers"),
        ({"text": least(runtime.MUST_HAVE["text"]) | {"pad_ids": [0]}}, "1 pad_ids for 0 tokenizers"),
        ({"scheduler": ODD | {"alphas_cumprod": ["x"]}}, "scheduler.alphas_cumprod"),
        *(
            ({"scheduler": {k: v for k, v in ODD.items() if k != key}}, key)
            for key in ("timestep_spacing", "clip_sample_range")
        ),
    ],
    ids=str,
)
def test_a_manifest_that_says_odd_things_is_refused(change: dict, named: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "export"
    folder.mkdir()
    whole = least(runtime.MUST_HAVE) | {"format": runtime.FORMAT}
    (folder / runtime.MANIFEST).write_text(json.dumps(whole), encoding="utf-8")
    assert runtime.read_manifest(folder) == whole
    (folder / runtime.MANIFEST).write_text(json.dumps(whole | change), encoding="utf-8")
    with pytest.raises(ExportError, match=named):
        runtime.Student(folder)


def test_a_graph_that_drawing_needs_is_missed_by_its_name(tmp_path: Path) -> None:
    whole = least(runtime.MUST_HAVE) | {"format": runtime.FORMAT}
    (tmp_path / runtime.MANIFEST).write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ExportError, match="names no graph 'denoiser'; export the model again"):
        runtime.Student(tmp_path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"format": 1}', "null", '{"format": 2}'], ids=lambda t: t[:9])
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / runtime.MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match=re.escape(str(tmp_path))):
        runtime.read_manifest(tmp_path)
