"""The forward process, in the papers' letters: x_t = alpha_t x_0 + sigma_t eps, and what a network predicts of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, get_args

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from refine_control.errors import ModelError, RecipeError
from refine_control.recipe import NoiseConfig, StageConfig

# Those whose forward process is x_t = alpha_t x_0 + sigma_t eps by betas: neither flow matching nor EDM's sigmas.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
MOST_TIMESTEPS = 100_000  # there is a table of them; models have 1,000
PREDICTIONS = get_args(NoiseConfig.model_fields["prediction_type"].annotation)


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t, sigma_t: float32 (T,), alpha^2 + sigma^2 = 1. prediction_type: 'epsilon' | 'sample' | 'v_prediction'.

    timesteps: int64 (n,), those that training draws, rising.
    """

    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    timesteps: Tensor

    @classmethod
    def from_config(cls, config: dict[str, Any], num_inference_steps: int | None = None) -> NoiseSchedule:
        """From a diffusers scheduler config: betas and their rescaling are diffusers' own arithmetic.

        num_inference_steps: training draws only the timesteps that a sampler of so many steps visits; None: all.

        Raises:
            ModelError: see `sampler`.
            RecipeError: the model has fewer timesteps than that.
        """
        scheduler = sampler(config) if num_inference_steps is None else sampler_at(config, num_inference_steps)
        abar = scheduler.alphas_cumprod.double().clamp(0, 1)
        visited = scheduler.timesteps.sort().values  # of one that was not set to a number: all
        return cls(abar.sqrt().float(), (1 - abar).sqrt().float(), scheduler.config.prediction_type, visited)

    @classmethod
    def of_stage(cls, config: dict[str, Any], stage: StageConfig) -> NoiseSchedule:
        """As a stage draws and weighs timesteps.

        Raises:
            ModelError, RecipeError: see `from_config`; or min-SNR weighs nothing of what the stage would learn.
        """
        schedule = cls.from_config(at_few_steps(config, stage.num_inference_steps), stage.num_inference_steps)
        if not schedule.row_weight(schedule.timesteps, stage.snr_gamma).any():
            raise RecipeError(
                f"snr_gamma {stage.snr_gamma} gives the timesteps of num_inference_steps {stage.num_inference_steps} "
                "no weight: they are pure noise; leave it out"
            )
        return schedule

    def __len__(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t, sigma_t shaped (B, 1, 1, ...) to stand beside `like`. t: int64 (B,) in [0, T)."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        index = t.to(self.alpha.device)
        return self.alpha[index].view(shape).to(like), self.sigma[index].view(shape).to(like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict: eps, x0, or v = alpha eps - sigma x0 (Salimans & Ho 2022, 2202.00512)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self.at(t, x0)
        return alpha * eps - sigma * x0

    def row_weight(self, t: Tensor, gamma: float | None) -> Tensor:
        """Min-SNR-gamma weight (2303.09556) of a squared error in the prediction's own space; 1 without gamma. (B,).

        min(SNR, gamma) weighs an x0 error; dividing by SNR (epsilon) or SNR + 1 (v) carries it to that space.
        """
        alpha, sigma = self.at(t, t.float())
        if gamma is None:
            return torch.ones_like(alpha)
        snr = (alpha / sigma.clamp_min(1e-6)) ** 2
        capped = snr.clamp_max(gamma)
        if self.prediction_type == "epsilon":
            return capped.clamp_min(1e-6) / snr.clamp_min(1e-6)
        if self.prediction_type == "sample":
            return capped
        return capped / (snr + 1)


def scheduler_config(config: NoiseConfig) -> dict[str, Any]:
    """The sampler saved with a model that we train: DDIM, latents never clipped, starting from pure noise.

    Zero terminal SNR needs 'trailing' timesteps, or sampling never visits the step of pure noise (2305.08891).
    """
    return dict(
        DDIMScheduler(
            **config.model_dump(),
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        ).config
    )


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with what it leaves out filled in, as its own class means it.

    diffusers itself would fill in the defaults of the class that reads: timesteps from another end, clipped latents.

    Raises:
        ModelError: flow matching, another class without betas, an unknown kind of prediction, or more timesteps than
            any model has; it is named.
    """
    kind = config.get("_class_name", "DDIMScheduler")
    if kind not in SCHEDULERS:
        raise ModelError(f"scheduler '{kind}' does not noise by betas; supported: {', '.join(SCHEDULERS)}")
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    filled = {**defaults, "clip_sample": False, **given}  # clipping is for data in [-1, 1]; latents are not
    if filled.get("use_flow_sigmas") or filled["prediction_type"] == "flow_prediction":
        raise ModelError(f"scheduler '{kind}' is set to flow matching; give a model with prediction_type {PREDICTIONS}")
    if filled["prediction_type"] not in PREDICTIONS:
        raise ModelError(f"scheduler's prediction_type '{filled['prediction_type']}' is none of {PREDICTIONS}")
    if not isinstance(steps := filled["num_train_timesteps"], int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise ModelError(f"scheduler's num_train_timesteps {steps!r:.80} is no number from 1 to {MOST_TIMESTEPS}")
    return filled


def sampler(config: dict[str, Any]) -> DDIMScheduler:
    """DDIM over the scheduler config of any class in SCHEDULERS; values that DDIM does not know stay in its config.

    Raises:
        ModelError: see `complete`; or no betas, one for each timestep, can be made of its values.
    """
    filled = complete(config)
    try:
        made = DDIMScheduler.from_config(filled)
        fits = made.alphas_cumprod.shape == (filled["num_train_timesteps"],) and made.alphas_cumprod.isfinite().all()
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps")
        named = ", ".join(f"{key} {filled.get(key)!r:.80}" for key in keys)
        raise ModelError(f"no betas can be made of {named}; mend scheduler_config.json")
    return made


def at_few_steps(config: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The scheduler config of a model that learns the timesteps of so many steps alone; None: of all, as it is.

    They end at pure noise ('trailing', 2305.08891), where a sampler starts: the one step of Stable Diffusion's own
    scheduler would be t = 1, of a picture that is all but there.
    """
    return config if steps is None else {**config, "timestep_spacing": "trailing"}


def sampler_at(config: dict[str, Any], steps: int, device: str | torch.device = "cpu") -> DDIMScheduler:
    """`sampler`, set to so many inference steps. An offset leads past no timestep that there is.

    Raises:
        ModelError: see `sampler`.
        RecipeError: the model has fewer timesteps.
    """
    scheduler = sampler(config)
    known = len(scheduler.alphas_cumprod)
    if steps > known:
        raise RecipeError(
            f"num_inference_steps is {steps} but the model knows {known} timesteps; give {known} or fewer"
        )
    scheduler.set_timesteps(steps, device=device)
    scheduler.timesteps = scheduler.timesteps.clamp(0, known - 1)
    return scheduler
