"""An exported model, run without torch. This one file, with numpy, tokenizers and either onnxruntime or openvino, is
all that a device needs; `refine-control export` copies it into the folder that it writes.

    filled = Student("my-export").fill(picture, hole, "flat cat face", steps=10, guidance=2.0, seed=0)
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
MANIFEST = "refine-control.json"
MUST_HAVE: dict[str, Any] = {  # a type, such a dict, in a list what each value of a list is, in a tuple all there are
    "name": str,
    "backend": str,
    "precision": str,
    "resolution": int,
    "latent_shape": [int],
    "params": int,
    "macs": int,
    "files": dict,
    "graphs": dict,
    "scheduler": {
        "alphas_cumprod": [float],
        "final_alpha_cumprod": float,
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "steps_offset": int,
        "clip_sample_range": float | int | None,
    },
    "defaults": {"num_inference_steps": int, "guidance_scale": float},
    "text": {"tokenizers": [str], "pad_ids": [int], "max_length": int, "empty_is_zeros": bool},
}
NEEDED = {"text_encoder", "denoiser", "vae_decoder"}  # of the graphs
NO_MASK = "is in colour, a picture and no mask; give one that is white where to fill, else black"
Arrays = dict[str, np.ndarray]


class ExportError(ValueError):
    """A folder or a file that cannot be used; the message names it and the mend."""


class Scheduler:
    """DDIM without noise of its own (2010.02502), number for number as diffusers' DDIMScheduler with eta 0."""

    def __init__(self, config: dict[str, Any]) -> None:
        """config: alphas_cumprod (T,), final_alpha_cumprod, prediction_type, timestep_spacing, steps_offset;
        clip_sample_range, the bound of what is foreseen, or None."""
        self.abar, self.config = np.array(config["alphas_cumprod"]), config

    def timesteps(self, steps: int) -> np.ndarray:
        """int64 (steps,), falling."""
        total, spacing = len(self.abar), self.config["timestep_spacing"]
        if not 1 <= steps <= total:
            raise ExportError(f"{steps} inference steps are not between 1 and {total}")
        if spacing == "trailing":
            return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1  # arange may add a -1
        if spacing == "linspace":
            return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
        return np.minimum(np.arange(steps)[::-1] * (total // steps) + self.config["steps_offset"], total - 1)

    def to_x0_eps(self, prediction: np.ndarray, t: int, x_t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The clean latents and the noise that a prediction stands for; x_t = alpha x_0 + sigma eps."""
        x0, eps = self._to_x0_eps(prediction, t, x_t)
        bound = self.config["clip_sample_range"]
        return x0 if bound is None else x0.clip(-bound, bound), eps

    def _to_x0_eps(self, prediction: np.ndarray, t: int, x_t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alpha, sigma = math.sqrt(self.abar[t]), math.sqrt(1 - self.abar[t])
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            return (x_t - sigma * prediction) / alpha, prediction
        if kind == "sample":
            return prediction, (x_t - alpha * prediction) / sigma
        return alpha * x_t - sigma * prediction, alpha * prediction + sigma * x_t

    def step(self, x0: np.ndarray, eps: np.ndarray, t: int, steps: int) -> np.ndarray:
        """The latents one step further on."""
        previous = t - len(self.abar) // steps
        abar = self.abar[previous] if previous >= 0 else self.config["final_alpha_cumprod"]
        return (math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps).astype(np.float32)


def noise(seed: int, shape: Sequence[int]) -> np.ndarray:
    """torch.randn(shape, generator=torch.Generator().manual_seed(seed)), float32, for 16 numbers or more.

    Mersenne Twister, 24 bits a number, Box-Muller over eights: so a seed draws here what it draws in diffusers.
    """
    count = math.prod(shape)
    bits = np.random.RandomState(seed & 0xFFFFFFFF)

    def uniform(n: int) -> np.ndarray:
        return ((bits.randint(0, 2**32, n, dtype=np.uint32) & 0xFFFFFF) / 2**24).astype(np.float32)

    def normal(u: np.ndarray) -> np.ndarray:
        one, two = np.moveaxis(u.reshape(-1, 2, 8), 1, 0)
        radius, angle = np.sqrt(-2 * np.log(1 - one)), np.float32(2 * np.pi) * two
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

    drawn = uniform(count)
    whole = count // 16 * 16
    drawn[:whole] = normal(drawn[:whole])
    if whole < count:
        drawn[-16:] = normal(uniform(16))
    return drawn.reshape(shape)


class Student:
    """The graphs of an exported folder and what binds them: prompt and masked picture -> picture."""

    def __init__(self, folder: Path | str, threads: int | None = None) -> None:
        """threads: of a graph; the cores there are, without.

        Raises:
            ExportError: no exported folder, of another format, with a file missing or cut off, or its engine is not
                installed.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if missing := NEEDED - self.manifest["graphs"].keys():
            raise ExportError(f"'{folder}': {MANIFEST} names no graph '{min(missing)}'; export the model again")
        self.side = self.manifest["resolution"]
        self.scheduler = Scheduler(self.manifest["scheduler"])
        self._tokenizers = [_open(self.folder / name, 1) for name in self.manifest["text"]["tokenizers"]]
        self._graphs = {
            name: _open(self.folder / graph["file"], threads or os.cpu_count() or 1)
            for name, graph in self.manifest["graphs"].items()
        }

    def run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        """A graph's outputs. text_encoder, condition, denoiser, vae_encoder, vae_decoder; see docs/export.md."""
        return self._graphs[graph](inputs)

    def embed(self, prompts: Sequence[str]) -> Arrays:
        """What the denoiser reads of the prompts: tokens (B, L, D), and pooled (B, P) where there are two encoders."""
        text = self.manifest["text"]
        ids = {}
        for number, (tokenizer, pad) in enumerate(zip(self._tokenizers, text["pad_ids"], strict=True), start=1):
            rows = [fit_tokens(tokenizer.encode(prompt).ids, text["max_length"], pad) for prompt in prompts]
            ids["input_ids" if number == 1 else f"input_ids_{number}"] = np.array(rows, dtype=np.int32)
        embedded = dict(zip(("tokens", "pooled"), self.run("text_encoder", **ids), strict=False))
        if text["empty_is_zeros"]:
            for part in embedded.values():
                part[[prompt == "" for prompt in prompts]] = 0
        return embedded

    def sample(
        self,
        control: np.ndarray | None,
        prompt: str,
        steps: int,
        guidance: float,
        latents: np.ndarray,
        on_step: Callable[[int, np.ndarray], None] = lambda step, x0: None,
    ) -> np.ndarray:
        """Denoises latents (1, c, h, w) of pure noise and decodes them: (1, 3, S, S) in [-1, 1].

        control: (1, 3, S, S), known pixels in [0, 1], pixels to fill -1; None for a model without a module.
        on_step: is told each step's number and the clean latents that it foresees.
        """
        if (only := self.manifest.get("only_steps")) not in (None, steps):
            raise ExportError(f"{steps} steps: the model has learnt the timesteps of {only} alone; ask for as many")
        if not 1 <= guidance < math.inf:
            raise ExportError(f"guidance {guidance} is no number from 1 up; 1 is without")
        guided = guidance > 1
        inputs = self.embed(["", prompt] if guided else [prompt])
        rows = len(inputs["tokens"])
        if control is not None:
            condition = self.run("condition", control=control)[0]
            inputs["condition"] = np.repeat(condition, rows, axis=0)
        for number, t in enumerate(self.scheduler.timesteps(steps)):
            x_t = np.repeat(latents, rows, axis=0)
            prediction = self.run("denoiser", x_t=x_t, t=np.full(rows, t, dtype=np.float32), **inputs)[0]
            if guided:
                prediction = prediction[:1] + guidance * (prediction[1:] - prediction[:1])
            x0, eps = self.scheduler.to_x0_eps(prediction, int(t), latents)
            latents = self.scheduler.step(x0, eps, int(t), steps)
            on_step(number, x0)
        return self.run("vae_decoder", latents=latents)[0]

    def fill(
        self, picture: np.ndarray, hole: np.ndarray, prompt: str, steps: int, guidance: float, seed: int
    ) -> np.ndarray:
        """picture: uint8 (S, S, 3). hole: uint8 (S, S), 1 where to fill. Returns uint8 (S, S, 3), the rest kept."""
        drawn = self.sample(
            self.control(picture, hole), prompt, steps, guidance, noise(seed, (1, *self.manifest["latent_shape"]))
        )
        pixels = np.clip(np.round((drawn[0].transpose(1, 2, 0) + 1) * 127.5), 0, 255).astype(np.uint8)
        return np.where(hole[..., None] == 1, pixels, picture)

    def control(self, picture: np.ndarray, hole: np.ndarray) -> np.ndarray | None:
        """(1, 3, S, S): known pixels in [0, 1], pixels to fill -1, as diffusers' inpainting ControlNets take it."""
        if "condition" not in self.manifest["graphs"]:
            return None
        known = picture.astype(np.float32).transpose(2, 0, 1)[None] / 255
        return np.where(hole == 1, np.float32(-1), known)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The exported folder's own description; every file that it names is there and of the size it names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"'{folder}' is no exported model: {MANIFEST}: {error}; give what export wrote") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"'{folder}' is of another format than {FORMAT}; export the model again")
    if missing := _missing(manifest, MUST_HAVE):
        raise ExportError(f"'{folder}': {MANIFEST} has no usable '{missing}'; export the model again")
    files, text = manifest["files"], manifest["text"]
    if (pads := len(text["pad_ids"])) != (tokenizers := len(text["tokenizers"])):
        raise ExportError(f"'{folder}': {MANIFEST} has {pads} pad_ids for {tokenizers} tokenizers; export it again")
    for name, size in files.items():
        path = folder / name
        if "/" in name or "\\" in name or not path.is_file() or path.stat().st_size != size:
            raise ExportError(f"'{path}' is missing or cut off (not {size} bytes); copy or export it again")
    graphs = [graph.get("file") if isinstance(graph, dict) else graph for graph in manifest["graphs"].values()]
    for name in (*graphs, *text["tokenizers"]):
        if not isinstance(name, str) or name not in files:
            raise ExportError(f"'{folder}': {MANIFEST} uses '{name}' but does not list it; export the model again")
    return manifest


def _missing(given: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first key of `wanted`, see MUST_HAVE, that `given` lacks or holds otherwise."""
    for key, kind in wanted.items():
        value = given.get(key)
        if isinstance(kind, list):
            fits = isinstance(value, list) and all(isinstance(each, kind[0]) for each in value)
        elif isinstance(kind, tuple):
            fits = value in kind
        else:
            fits = isinstance(value, dict if isinstance(kind, dict) else kind)
        if key not in given or not fits:
            return key
        if isinstance(kind, dict) and (missing := _missing(given[key], kind)):
            return f"{key}.{missing}"
    return None


def fit_tokens(ids: Sequence[int], length: int, pad: int) -> list[int]:
    """A caption's ids, its end mark last, cut or padded to `length`."""
    return [*ids[: length - 1], ids[-1]] if len(ids) > length else [*ids, *[pad] * (length - len(ids))]


def _open(path: Path, threads: int) -> Any:
    """A graph's file -> a function of its named inputs; a tokenizer's -> the tokenizer."""
    open_it = {".xml": _open_openvino, ".onnx": _open_onnx}.get(path.suffix, _open_tokenizer)
    try:
        return open_it(path, threads)
    except ImportError as error:
        raise ExportError(f"'{path.name}' needs {error.name}; pip install {error.name}") from None
    except Exception as error:  # each engine raises types of its own on a file that is not what it should be
        raise ExportError(f"'{path}' cannot be loaded: {one_line(error)}") from None


def is_coloured(pixels: np.ndarray) -> bool:
    """Whether a twentieth of uint8 (H, W, 3) has more colour than compression lends to grey."""
    return bool((np.ptp(pixels, axis=-1) > 63).mean() > 0.05)


def one_line(error: Exception) -> str:
    """Its message, short, or its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open_tokenizer(path: Path, threads: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _open_onnx(path: Path, threads: int) -> Callable[[Arrays], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A graph's threads wait at work for the next call, and are in the way of the next graph's: twice the time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _open_openvino(path: Path, threads: int) -> Callable[[Arrays], list[np.ndarray]]:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # nobody is told what runs here
    import openvino

    # Left alone it computes in bfloat16 where the CPU can, and results are a hundredth off.
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().read_model(path)
    requests: dict[tuple, Any] = {}

    def run(inputs: Arrays) -> list[np.ndarray]:
        shapes = {name: list(array.shape) for name, array in inputs.items()}
        key = tuple(map(tuple, shapes.values()))
        if key not in requests:  # fixed shapes run faster; there are two of them, with and without guidance
            model.reshape(shapes)
            requests[key] = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        return [np.array(output) for output in requests[key].infer(inputs).values()]

    return run
