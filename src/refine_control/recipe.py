"""The whole recipe, made of small configs: one for each room. Data only: nothing here can name code to run.

A recipe is a YAML file. `load` reads it, lays `--key value` overrides over it and validates it once; unknown keys are
errors. The resolved recipe is saved with the run. This module imports no torch, so `--help` stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from refine_control.errors import RecipeError
from refine_control.files import is_known, write_whole
from refine_control.plain import read_flag, read_yaml
from refine_control.plans import AutoencoderPlan, Config, DenoiserPlan, StudentPlan, TextPlan

FORMAT = 1  # of a recipe, those before it are read too; one that does not say, as those written by hand, is of 1
ControlKind = Literal["inpaint", "edges", "grey", "file"]  # see data/controls.py
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # those that torch takes


class DataConfig(Config):
    """Where the pictures are and how they are brought to one size."""

    labelled: str = "data/emoji"
    unlabelled: str | tuple[str, ...] | None = None  # one folder or several
    labelled_limit: PositiveInt | None = None  # captioned pictures to learn from, evenly spread over the data set
    resolution: PositiveInt = 32
    fit: Literal["crop", "pad"] = "crop"
    controls: tuple[ControlKind, ...] = ("inpaint",)  # what each ControlNet is shown, in the model's order
    variants: PositiveInt = 2  # versions of each picture: as it is, mirrored, then slightly zoomed and shifted
    cache_gb: PositiveFloat = 2.0  # captioned pictures, plain ones, latents: each kept in memory up to this size
    cache_dir: str | None = None  # keep latents and text embeddings there, for later runs
    teacher_cache_gb: float = Field(0, ge=0)  # and what the teacher made of each step: this much a stage and seed
    skip_corrupt: bool = False


class MaskConfig(Config):
    """Relative frequency of each kind of mask (LaMa's strokes and boxes, see data/masks.py)."""

    thin: float = Field(1, ge=0)
    medium: float = Field(1, ge=0)
    thick: float = Field(1, ge=0)
    box: float = Field(1, ge=0)


class NoiseConfig(Config):
    """The forward process. Names and values are those of diffusers' schedulers."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    num_train_timesteps: PositiveInt = 1000
    rescale_betas_zero_snr: bool = True

    @model_validator(mode="after")
    def _noise_can_be_undone(self) -> NoiseConfig:
        if self.prediction_type == "epsilon" and self.rescale_betas_zero_snr:
            raise ValueError("epsilon says nothing about the picture at pure noise; set rescale_betas_zero_snr false")
        return self


class LossWeights(Config):
    """w of docs/method.md: L = w_task L_task + w_out L_out + w_feat L_feat."""

    task: float = Field(1, ge=0)
    output: float = Field(0, ge=0)
    feature: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossWeights:
        if not (self.task or self.output or self.feature):
            raise ValueError("all weights are 0; give task, output or feature a weight")
        return self


class StageConfig(Config):
    """One training stage. Every stage, the teacher's included, runs through the same loop."""

    steps: int = Field(1000, ge=0)
    batch_size: PositiveInt = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: int = Field(50, ge=0)
    final_learning_rate: float = Field(0.0, ge=0, le=1)  # of learning_rate, at the end of the cosine
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: PositiveFloat = Field(1.0, allow_inf_nan=True)  # .inf: gradients are not clipped
    ema_decay: float = Field(0.999, ge=0, lt=1)
    weights: LossWeights = LossWeights()
    labelled_fraction: float = Field(1.0, ge=0, le=1)  # of the rows of a batch
    task_on_unlabelled: bool = True  # the noise is known without any label
    caption_dropout: float = Field(0.1, ge=0, le=1)
    word_dropout: float = Field(0.0, ge=0, le=1)  # of each word of the captions that are kept
    hole_weight: PositiveFloat = 1.0  # of a pixel to fill against a known one, in the task and output terms
    snr_gamma: PositiveFloat | None = None  # min-SNR weighting (2303.09556); with v it silences pure noise
    # Only the timesteps that a sampler of so many steps visits are learnt; by default all.
    num_inference_steps: PositiveInt | None = Field(None, exclude_if=lambda steps: steps is None)


class RunConfig(Config):
    """How to run, never what to learn: changing these changes no result beyond rounding, of floats or to 8 bits."""

    device: str = "auto"
    num_threads: PositiveInt | None = None  # default: the cores we may use
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    use_8bit_adam: bool = False  # the optimiser's moments in 8 bits, needs bitsandbytes
    shard: bool = False  # weights, gradients, moments and averages spread over the processes (FSDP)
    compile: bool = False  # torch.compile the layers that repeat: minutes at the start, then faster on a GPU
    teacher_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"  # of the teacher's weights: half the memory, less time
    gradient_checkpointing: bool = False  # the student's activations are computed twice instead of kept
    gradient_accumulation_steps: PositiveInt = 1  # passes that a process takes for its share of a batch
    workers: int | None = Field(None, ge=0)  # threads that make batches ahead; default: 2 with a GPU, 0 without
    checkpoint_every: PositiveInt = 200
    max_skipped_steps: int = Field(10, ge=0)  # whose loss or gradient was not finite, of a stage
    log_every: PositiveInt = 20
    grad_norm_every: PositiveInt = 200
    preview_every: PositiveInt = 500

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, value: Any) -> Any:
        return "no" if value is False else value

    @model_validator(mode="after")
    def _shards_are_plain(self) -> RunConfig:
        if self.shard and (self.use_8bit_adam or self.compile):
            raise ValueError("use_8bit_adam and compile do not work on sharded weights; set them, or shard, to false")
        return self


class SampleConfig(Config):
    num_inference_steps: PositiveInt = 10  # best a divisor of 1000: else DDIM stops short of the last step
    guidance_scale: float = Field(2.0, ge=1)
    seed: Seed = 0
    batch_size: PositiveInt = 64


class EvaluateConfig(Config):
    split: str = "test"
    images: PositiveInt = 192
    seed: Seed = 1234  # of the masks
    # Weights of the standard backbones, for the plain names lpips, fid and cmmd beside the offline ones.
    standard: dict[Literal["inception", "clip", "lpips-alex", "lpips-vgg"], str] = Field({})


class TeacherRecipe(Config):
    """`refine-control train-teacher`: autoencoder, then foundation + module + text encoder."""

    output_dir: str
    seed: Seed = 0
    data: DataConfig = DataConfig()
    masks: MaskConfig = MaskConfig()
    noise: NoiseConfig = NoiseConfig()
    autoencoder: AutoencoderPlan = AutoencoderPlan()
    text: TextPlan = TextPlan()
    denoiser: DenoiserPlan
    autoencoder_stage: StageConfig
    denoiser_stage: StageConfig
    init_from: str | None = None  # start from the weights of a saved model; autoencoder_stage.steps 0 keeps its latents
    sample: SampleConfig = SampleConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _stages_go_with_the_rest(self) -> TeacherRecipe:
        stages = {name: getattr(self, name) for name in ("autoencoder_stage", "denoiser_stage")}
        _refuse_what_does_not_go_together(self.sample, self.run, stages)
        return self

    @field_validator("denoiser_stage")
    @classmethod
    def _nobody_teaches_a_teacher(cls, value: StageConfig) -> StageConfig:
        if value.weights != LossWeights(task=value.weights.task):
            raise ValueError("a teacher learns by the task alone; set weights.output and weights.feature to 0")
        return value


class DistilRecipe(Config):
    """`refine-control distill`: the student's plan, stage 1 (labelled) and stage 2 (plain images mixed in)."""

    output_dir: str
    teacher: str = "zoo:emoji-teacher"  # a saved pipeline's folder, zoo:NAME, or org/repo@REVISION on the hub
    controlnets: tuple[str, ...] = ()  # ControlNets saved on their own, folders or hub ids, instead of the teacher's
    seed: Seed = 0
    data: DataConfig = DataConfig()
    masks: MaskConfig = MaskConfig()
    student: StudentPlan
    init: Literal["teacher", "random"] = "teacher"
    alignment: Literal["auto"] | dict[str, str] = "auto"
    feature_norm: Literal["channel", "l2", "none"] = "channel"
    stage1: StageConfig
    stage2: StageConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _stages_go_with_the_rest(self) -> DistilRecipe:
        _refuse_what_does_not_go_together(self.sample, self.run, self.stages)
        return self

    @property
    def stages(self) -> dict[str, StageConfig]:
        return {"stage1": self.stage1, "stage2": self.stage2}

    @property
    def only_steps(self) -> int | None:
        """The one number of sampler steps that the last stage learns; None: all timesteps."""
        return (self.stage2 if self.stage2.steps else self.stage1).num_inference_steps


def _refuse_what_does_not_go_together(sample: SampleConfig, run: RunConfig, stages: dict[str, StageConfig]) -> None:
    for name, stage in stages.items():
        if run.use_8bit_adam and stage.steps and stage.optimizer == "muon":
            raise ValueError(f"run.use_8bit_adam is of AdamW; set it to false, or {name}.optimizer to adamw, not muon")
        if (learnt := stage.num_inference_steps) not in (None, sample.num_inference_steps):
            raise ValueError(
                f"{name}.num_inference_steps {learnt}: only the timesteps of as many steps would be learnt, but "
                f"sample.num_inference_steps is {sample.num_inference_steps}; set both alike"
            )


R = TypeVar("R", bound=Config)
_OF = {"rows": "compare", "denoiser": "train-teacher", "student": "distill"}  # key -> the command whose recipes have it


def load(kind: type[R], path: str | Path, overrides: Mapping[str, Any] | None = None) -> R:
    """Reads a recipe and lays dotted overrides over it, e.g. {"stage1.steps": "100"}; text is read by `read_flag`.
    Raises RecipeError, which names the key and the value: no such file, not YAML, an unknown key, a wrong value."""
    return validate(kind, read_tree(kind, path, overrides or {}), f"recipe '{path}'")


def read_tree(kind: type[Config], path: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's file with overrides laid over it, not yet validated but of no other command. Raises RecipeError."""
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at '{path}'; the shipped ones are in the clone's folder recipes/") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read recipe '{path}': {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe '{path}' must hold 'key: value' lines at its top level")
    found = tree.pop("format", 1)
    if not is_known(found, FORMAT):
        raise RecipeError(
            f"recipe '{path}' is of format {found!r}, not {FORMAT} or before; install a later refine-control"
        )
    its = next((key for key in _OF if key in tree), None)
    if its and not tree.keys() & (_OF.keys() & kind.model_fields.keys()):
        raise RecipeError(f"recipe '{path}' is one of `refine-control {_OF[its]}`, by its key '{its}'; give another")
    for key, value in overrides.items():
        _override(tree, key, value)
    return tree


def validate(kind: type[R], tree: dict[str, Any], origin: str) -> R:
    """A config from plain data; every mistake becomes one line that names its key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [str(part) for part in first["loc"] if not _is_type(str(part))]
        key = ".".join(loc)
        if first["type"] == "extra_forbidden":
            reason = f"unknown key '{key}'; known here: {', '.join(_fields_beside(kind, loc))}"
        elif first["type"] == "missing":
            reason = f"'{key}' is missing"
        elif not key:  # values that do not go together
            reason = first["msg"].removeprefix("Value error, ")
        else:
            given = repr(first["input"])
            reason = f"'{key}' = {given if len(given) <= 80 else given[:76] + ' ...'}: {first['msg']}"
        raise RecipeError(f"{origin}: {reason}") from None


def save(config: Config, path: Path) -> None:
    write_whole(path, yaml.safe_dump({"format": FORMAT, **config.model_dump(mode="json")}, sort_keys=False))


def _override(tree: dict[str, Any], dotted: str, value: Any) -> None:
    try:
        value = read_flag(value) if isinstance(value, str) else deepcopy(value)
    except ValueError:
        raise RecipeError(f"--{dotted}: cannot read '{value}'; put text with ':' or brackets in quotes") from None
    *parents, leaf = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--{dotted}: '{name}' is a value, not a section")
    tree[leaf] = value


def _is_type(part: str) -> bool:
    """pydantic mixes the branches of a union, e.g. 'literal[...]' and 'constrained-int', into a mistake's place."""
    return "[" in part or part.startswith("constrained-")


def _fields_beside(kind: type[Config], loc: list[str]) -> list[str]:
    names = iter(loc[:-1])
    for name in names:
        annotation = kind.model_fields[name].annotation
        inner = _config_in(annotation)
        if inner is None:
            return []
        if get_origin(annotation) is dict:
            next(names, None)  # of the user's own choice
        kind = inner
    return list(kind.model_fields)


def _config_in(annotation: Any) -> type[Config] | None:
    """The Config that a field holds, be it one branch of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _config_in(arg))), None)
