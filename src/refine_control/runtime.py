"""An exported model, run without torch. This one file, with numpy, pillow, tokenizers and either onnxruntime or
openvino, is all that a device needs; `refine-control export` copies it into the folder that it writes, as run.py.

    python my-export/run.py --image cat.png --mask hole.png --prompt "flat cat face" --out filled.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMAT = 1
MANIFEST = "refine-control.json"
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # PIL knows more, and some of those start other programs
Arrays = dict[str, np.ndarray]


class ExportError(ValueError):
    """A folder or a file that cannot be used; the message names it and the mend."""


class Scheduler:
    """DDIM without noise of its own (2010.02502), number for number as diffusers' DDIMScheduler with eta 0."""

    def __init__(self, config: dict[str, Any]) -> None:
        """config: alphas_cumprod (T,), final_alpha_cumprod, prediction_type, timestep_spacing, steps_offset."""
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
        self.side, self.downscale = self.manifest["resolution"], self.manifest["downscale"]
        self.scheduler = Scheduler(self.manifest["scheduler"])
        self._tokenizers = [_tokenizer(self.folder / name) for name in self.manifest["text"]["tokenizers"]]
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
    except (OSError, ValueError) as error:
        raise ExportError(f"'{folder}' is no exported model: {MANIFEST}: {error}; give what export wrote") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"'{folder}' is of another format than {FORMAT}; export the model again")
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ExportError(f"'{path}' is missing or cut off (not {size} bytes); copy or export it again")
    return manifest


def fit_tokens(ids: Sequence[int], length: int, pad: int) -> list[int]:
    """A caption's ids, its end mark last, cut or padded to `length`."""
    return [*ids[: length - 1], ids[-1]] if len(ids) > length else [*ids, *[pad] * (length - len(ids))]


def read_square(path: Path, side: int, mask: bool = False) -> np.ndarray:
    """A file's middle square: uint8 (side, side, 3), transparency over white; of a mask (side, side), 1 = to fill.

    Raises:
        ExportError: it cannot be decoded, or has more than MAX_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            if width * height > MAX_PIXELS:
                raise ExportError(f"'{path}': {width}x{height} is more than {MAX_PIXELS} pixels; make it smaller")
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except ExportError:
        raise
    except Exception as error:  # PIL's decoders raise nearly every type on a broken file
        raise ExportError(f"'{path}' cannot be decoded: {' '.join(str(error).split())[:160]}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    least = min(image.size)
    left, top = (image.width - least) / 2, (image.height - least) / 2
    box = (left, top, left + least, top + least)
    if not mask:
        return np.array(image.resize((side, side), Image.Resampling.LANCZOS, box=box))
    hole = image.convert("L").point(lambda grey: 255 * (grey > 127)).resize((side, side), Image.Resampling.BOX, box=box)
    return (np.array(hole) > 127).astype(np.uint8)


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _open(path: Path, threads: int) -> Callable[[Arrays], list[np.ndarray]]:
    """A graph's file -> a function of its named inputs."""
    try:
        return _open_openvino(path, threads) if path.suffix == ".xml" else _open_onnx(path, threads)
    except ImportError as error:
        raise ExportError(f"'{path.name}' needs {error.name}; pip install {error.name}") from None
    except RuntimeError as error:
        raise ExportError(f"'{path}' cannot be loaded: {' '.join(str(error).split())[:200]}") from None


def _open_onnx(path: Path, threads: int) -> Callable[[Arrays], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill the white part of a mask in one picture, without torch.")
    parser.add_argument("--image", type=Path, required=True, help="the square in its middle is taken")
    parser.add_argument("--mask", type=Path, required=True, help="white where to fill")
    parser.add_argument("--prompt", default="", help="what to fill in")
    parser.add_argument("--out", type=Path, default=Path("filled.png"))
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="1 asks the model once a step, more twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the exported folder")
    args = parser.parse_args(argv)
    try:
        student = Student(args.model)
        picture, hole = (read_square(path, student.side, path is args.mask) for path in (args.image, args.mask))
        filled = student.fill(picture, hole, args.prompt, args.num_inference_steps, args.guidance_scale, args.seed)
    except ExportError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    Image.fromarray(filled).save(args.out)
    print(f"wrote {args.out}, {student.side}x{student.side}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
