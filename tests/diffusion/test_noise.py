"""The forward process: its invariants, its agreement with diffusers, and the way back through the sampler."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from refine_control.data.controls import inpaint_control
from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import SCHEDULERS, NoiseSchedule, complete, sampler, sampler_at, scheduler_config
from refine_control.diffusion.sample import _denoise, sample
from refine_control.errors import ModelError, RecipeError
from refine_control.recipe import NoiseConfig, SampleConfig
from tiny import batch

TYPES = get_args(NoiseConfig.model_fields["prediction_type"].annotation)
BETAS = get_args(NoiseConfig.model_fields["beta_schedule"].annotation)


def noise_config(prediction_type: str, **changes: object) -> NoiseConfig:
    """Noise that never quite drowns the picture where eps is predicted: pure noise says nothing of x0 then."""
    zero_snr = prediction_type != "epsilon"
    return NoiseConfig(prediction_type=prediction_type, **{"rescale_betas_zero_snr": zero_snr, **changes})


def schedule(prediction_type: str = "v_prediction") -> NoiseSchedule:
    return NoiseSchedule.from_config(scheduler_config(noise_config(prediction_type)))


def by_snr(prediction_type: str, *snr: float) -> NoiseSchedule:
    """A schedule whose step i has the i-th signal-to-noise ratio."""
    ratio = torch.tensor(snr)
    alpha, sigma = (ratio / (1 + ratio)).sqrt(), (1 / (1 + ratio)).sqrt()
    return NoiseSchedule(alpha, sigma, prediction_type, torch.arange(len(ratio)))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("zero_snr", [True, False])
def test_variance_is_preserved_and_noise_only_grows(betas: str, zero_snr: bool) -> None:
    config = NoiseConfig(beta_schedule=betas, rescale_betas_zero_snr=zero_snr, num_train_timesteps=100)
    s = NoiseSchedule.from_config(scheduler_config(config))
    assert len(s) == 100
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones(100))
    assert (s.sigma.diff() > 0).all()
    assert (s.alpha.diff() < 0).all()


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    ends, does_not = (
        NoiseSchedule.from_config(scheduler_config(NoiseConfig(rescale_betas_zero_snr=z))) for z in (True, False)
    )
    assert ends.alpha[-1] == 0
    assert ends.sigma[-1] == 1
    assert does_not.alpha[-1] > 0.01


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_right_prediction_stands_for_x0(prediction_type: str) -> None:
    """As diffusers reads it."""
    config = scheduler_config(noise_config(prediction_type))
    s, steps = NoiseSchedule.from_config(config), sampler_at(config, 50)
    for t in steps.timesteps[:, None]:
        x0, eps = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x_t = s.add_noise(x0, eps, t)
        said = steps.step(s.target(x0, eps, t), int(t), x_t)
        torch.testing.assert_close(said.pred_original_sample, x0, rtol=0, atol=1e-4)


def test_noise_and_v_are_those_of_diffusers() -> None:
    config = scheduler_config(NoiseConfig())
    ours, theirs = NoiseSchedule.from_config(config), DDIMScheduler.from_config(config)
    t = torch.tensor([0, 1, 500, 998, 999])
    x0, eps = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t))
    torch.testing.assert_close(ours.target(x0, eps, t), theirs.get_velocity(x0, eps, t))


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", [1, 5 / 9]), ("sample", [4, 5]), ("v_prediction", [4 / 5, 5 / 10])],
)
def test_min_snr_weights(prediction_type: str, expected: list[float]) -> None:
    """Signal to noise 4 and 9, gamma 5."""
    weight = by_snr(prediction_type, 4, 9).row_weight(torch.tensor([0, 1]), gamma=5)
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-5, atol=0, check_dtype=False)


def test_min_snr_weights_at_the_ends() -> None:
    t = torch.tensor([999, 0, 999])
    assert torch.equal(schedule().row_weight(t, None), torch.ones(3))
    weight = schedule().row_weight(t, 5)
    assert weight[0] == weight[2] == 0
    assert 0 < weight[1] < 0.01


class Oracle:
    """Stands in for a trained denoiser: knows x0, and remembers which noise each x_t it sees must hold."""

    def __init__(self, schedule: NoiseSchedule, x0: Tensor) -> None:
        self.schedule, self.x0 = schedule, x0
        self.foundation = SimpleNamespace(config=SimpleNamespace(in_channels=x0.shape[1]))
        self.noise: list[Tensor] = []
        self.times: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, text: Tensor, control: Tensor) -> Tensor:
        x0 = self.x0.repeat(len(x_t) // len(self.x0), 1, 1, 1)
        alpha, sigma = self.schedule.at(t, x_t)
        eps = (x_t - alpha * x0) / sigma
        self.noise.append(eps[: len(self.x0)])
        self.times.append(int(t[0]))
        return self.schedule.target(x0, eps, t)


@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 1), (4, 2), (10, 1), (10, 2)])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_brings_the_latents_back(
    teacher: Model, prediction_type: str, steps: int, guidance_scale: float
) -> None:
    """Encode, noise, predict perfectly, sample: the latents of the start; on the way one and the same noise.

    For step counts that divide 1000. With others, diffusers' DDIM steps to floor(t - 1000 / steps), which is not quite
    the next timestep it visits, and the last step ends at t = 0 instead of at the clean latents.
    """
    b = batch(3)
    x0 = teacher.encode(b.image).detach()
    oracle = Oracle(schedule(prediction_type), x0)
    model = replace(teacher, denoiser=oracle, scheduler=scheduler_config(noise_config(prediction_type)))
    config = SampleConfig(num_inference_steps=steps, guidance_scale=guidance_scale, batch_size=3)
    control = inpaint_control(b.image, b.mask)

    with torch.no_grad():
        latents = _denoise(model, control, b.captions, config, [0, 1, 2])
    torch.testing.assert_close(latents, x0, rtol=0, atol=2e-5)
    assert len(oracle.times) == steps
    assert oracle.times[0] == 999, "pure noise is where sampling begins"
    for eps in oracle.noise[1:]:
        torch.testing.assert_close(eps, oracle.noise[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(
        sample(model, control, b.captions, config, [0, 1, 2]), teacher.decode(x0).detach(), rtol=0, atol=2e-4
    )


# Scheduler configs as models have them

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = (
    *("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "LCMScheduler", "UniPCMultistepScheduler"),
)


def config_of(kind: str, **values: object) -> dict:
    """What the scheduler itself writes, with a key of a later version."""
    return json.loads(getattr(diffusers, kind)(**SD, **values).to_json_string()) | {"key_of_a_later_version": 1}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_supported_scheduler_has_its_own_noise(kind: str) -> None:
    s = NoiseSchedule.from_config(config_of(kind, prediction_type="v_prediction"))
    theirs = getattr(diffusers, kind)(**SD).alphas_cumprod
    torch.testing.assert_close(s.alpha**2, theirs, rtol=0, atol=1e-6)
    assert s.prediction_type == "v_prediction"


def test_the_required_schedulers_are_supported() -> None:
    assert set(KINDS) <= set(SCHEDULERS)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler"])
def test_beta_schedules_of_any_scheduler(kind: str) -> None:
    cosine = NoiseSchedule.from_config(config_of(kind) | {"beta_schedule": "squaredcos_cap_v2"})
    assert 0 < cosine.alpha[-1] < 1e-3
    rescaled = NoiseSchedule.from_config(config_of(kind) | {"rescale_betas_zero_snr": True})
    assert rescaled.alpha[-1] == 0
    trained = NoiseSchedule.from_config(config_of(kind) | {"trained_betas": [0.5, 0.5, 0.75], "num_train_timesteps": 3})
    torch.testing.assert_close(trained.alpha**2, torch.tensor([0.5, 0.25, 0.0625]))


def test_what_a_config_leaves_out_is_what_its_own_class_means() -> None:
    """Old and hand-written configs are short. DDIM's own defaults would be other timesteps and clipped latents."""
    assert complete({"_class_name": "EulerDiscreteScheduler"})["timestep_spacing"] == "linspace"
    assert complete({"_class_name": "PNDMScheduler"})["timestep_spacing"] == "leading"
    assert complete({"_class_name": "LCMScheduler"})["beta_end"] == 0.012
    assert complete({"_class_name": "DDIMScheduler", **SD})["beta_end"] == 0.012
    for kind in KINDS:
        assert sampler({"_class_name": kind}).config.clip_sample is False
    assert sampler({"_class_name": "DDIMScheduler", "clip_sample": True}).config.clip_sample


def test_inference_steps_stay_within_the_timesteps() -> None:
    offset = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": 10**9}
    assert sampler_at(offset, 3).timesteps.tolist() == [999] * 3
    assert sampler_at(offset | {"steps_offset": 1}, 2).timesteps.tolist() == [501, 1]
    with pytest.raises(RecipeError, match="num_inference_steps is 11 but the model knows 10 timesteps"):
        sampler_at(offset | {"num_train_timesteps": 10}, 11)


def test_completing_twice_changes_nothing() -> None:
    once = complete(config_of("EulerDiscreteScheduler"))
    assert complete(once) | once == complete(once)
    assert complete(scheduler_config(NoiseConfig())).items() >= scheduler_config_values().items()


def scheduler_config_values() -> dict:
    return {key: value for key, value in scheduler_config(NoiseConfig()).items() if not key.startswith("_")}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "'FlowMatchEulerDiscreteScheduler' does not noise by betas",
        ),
        ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' does not noise by betas"),
        ({"_class_name": "os.system"}, "'os.system' does not noise by betas"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "'UniPC.*' is set to flow matching"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            "is set to flow matching",
        ),
        ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "prediction_type 'score' is none of"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "no betas can be made of .*sigmoid"),
        ({"_class_name": "DDIMScheduler", "beta_start": "small"}, "no betas can be made of .*small"),
        ({"_class_name": "DDIMScheduler", "beta_start": float("nan")}, "no betas can be made of .*nan"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, r"no betas can be made of .*\[0.1\]"),
        *(
            (
                {"_class_name": "DDIMScheduler", "num_train_timesteps": steps},
                f"num_train_timesteps {steps!r} is no number",
            )
            for steps in (0, -1, None, "x", 10**8)
        ),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_named(config: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        NoiseSchedule.from_config(config)
    assert "\n" not in str(caught.value)
