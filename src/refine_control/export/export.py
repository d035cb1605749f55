"""A model's folder -> a folder that runs without torch: graphs, tokenizer, the runner, and what was measured of it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from refine_control import runtime
from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import sampler
from refine_control.diffusion.store import load
from refine_control.errors import ModelError, UserError
from refine_control.export import onnx, openvino, parity, web
from refine_control.export.graph import Graph, graphs_of
from refine_control.export.onnx import Feed, write_fp32
from refine_control.files import write_whole
from refine_control.recipe import SampleConfig
from refine_control.student.plan import cost

Target = Literal["onnx", "openvino", "web"]
Precision = Literal["fp32", "fp16", "int8"]
QUANTIZED = ("denoiser", "vae_decoder")  # the others cost little and lose much; they stay in half precision
CALIBRATED_ON, SCORED_ON = 24, 192


def export_model(
    name: str,
    to: Target,
    precision: Precision,
    out: Path,
    data: str = "data/emoji",
    controlnets: Sequence[str] = (),
    title: str | None = None,
) -> dict[str, Any]:
    """Writes the exported model to `out`, or for the web to out/models/TITLE with the page around it.

    controlnets: saved on their own; they replace the pipeline's. title: the model's name there, its own without.
    data: pictures to calibrate int8 with (split train) and to see its effect on (split test); the page's examples.
    Returns the manifest, which holds the differences from torch ("parity") and of int8 the effect ("quality").

    Raises:
        ModelError: a part of the model cannot be exported; it is named. DataError: int8, and `data` cannot be read.
        UserError: `out` holds other files, or the title has other characters than letters, digits, '.', '_', '-'.
    """
    sample = SampleConfig()
    if title is None:
        title = name.rstrip("/").replace(":", "/").rsplit("/", 1)[-1].partition("@")[0]
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", title):
        raise UserError(f"'{title}' is no name for an exported model; give --name, of letters, digits, '.', '_', '-'")
    final = out / "models" / title if to == "web" else out
    _refuse_other_files(out, to)
    model = load(name, controlnets=controlnets).freeze()
    try:
        graphs = graphs_of(model)
        manifest = _describe(model, title, to, precision, sample)
        with tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "fp32"
            _write_fp32(graphs, model, whole, manifest)
            aside = Path(scratch) / "written"
            manifest = _write(graphs, model, whole, aside, manifest, data, sample)
            shutil.rmtree(final, ignore_errors=True)
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(aside, final)
    except ModelError as error:
        raise ModelError(f"cannot export '{name}': {error}") from None
    if to == "web":
        web.write_site(out, data)
    else:
        shutil.copyfile(runtime.__file__, final / "run.py")
    return manifest


def _write_fp32(graphs: dict[str, Graph], model: Model, folder: Path, manifest: dict[str, Any]) -> None:
    """The graphs as ONNX in single precision: what every other kind is made of and compared with."""
    folder.mkdir()
    for graph in tqdm(graphs.values(), desc="exporting", unit="graph"):
        write_fp32(graph, folder / f"{graph.name}.onnx")
    _finish(folder, model, manifest | {"precision": "fp32"}, ".onnx", graphs)


def _write(
    graphs: dict[str, Graph],
    model: Model,
    whole: Path,
    folder: Path,
    manifest: dict[str, Any],
    data: str,
    sample: SampleConfig,
) -> dict[str, Any]:
    folder.mkdir()
    precision, suffix = manifest["precision"], ".xml" if manifest["backend"] == "openvino" else ".onnx"
    exact = runtime.Student(whole)
    feeds: dict[str, list[Feed]] = {}
    if precision == "int8":
        feeds = parity.calibration_feeds(
            exact, parity.open_heldout(data, "train", CALIBRATED_ON, model.resolution), sample
        )
    for name in tqdm(graphs, desc=precision, unit="graph"):
        writer = _writer(suffix, precision if name in QUANTIZED or precision != "int8" else "fp16", feeds.get(name, []))
        writer(whole / f"{name}.onnx", folder / f"{name}{suffix}")
    manifest = _finish(folder, model, manifest, suffix, graphs)
    student = runtime.Student(folder)
    errors = {name: parity.graph_error(graph, student) for name, graph in graphs.items()}
    manifest["parity"] = {"what": "largest difference from torch / max(1, largest number)", **errors}
    if precision == "fp32" and max(errors.values()) > parity.FP32_BOUND:
        worst = max(errors, key=lambda name: errors[name])
        raise ModelError(f"its {worst} differs from torch by {errors[worst]:.1e}, more than {parity.FP32_BOUND:.0e}")
    if precision == "int8":
        heldout = parity.open_heldout(data, "test", SCORED_ON, model.resolution)
        reference = parity.reference_of(heldout)
        before, after = (reference.score(parity.draw(s, heldout, sample)) for s in (exact, student))
        manifest["quality"] = {
            "data": data,
            "provenance": after["provenance"],
            "fp32": before["metrics"],
            "int8": after["metrics"],
            "loss": parity.losses(before["metrics"], after["metrics"]),
        }
    write_whole(folder / runtime.MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def _writer(suffix: str, precision: str, feeds: list[Feed]) -> Callable[[Path, Path], object]:
    """A function of the fp32 ONNX file and of the file to be written."""
    kind = openvino if suffix == ".xml" else onnx
    if precision == "int8":
        return lambda source, path: kind.quantize(source, path, feeds)
    if suffix == ".xml":
        return lambda source, path: openvino.convert(source, path, half=precision == "fp16")
    return onnx.halve if precision == "fp16" else onnx.copy


def _describe(model: Model, title: str, to: Target, precision: Precision, sample: SampleConfig) -> dict[str, Any]:
    """The manifest, but for the files."""
    scheduler = sampler(model.scheduler)
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ModelError("its scheduler clips what it foresees (clip_sample, thresholding), which no runner here does")
    latent = model.denoiser.foundation.config.sample_size
    counted = cost(model.denoiser, model)
    tokenizers = [each for each in (model.tokenizer, model.tokenizer_2) if each is not None]
    return {
        "format": runtime.FORMAT,
        "name": title,
        "backend": to,
        "precision": precision,
        "resolution": model.resolution,
        "downscale": model.downscale,
        "latent_shape": [model.denoiser.foundation.config.in_channels, latent, latent],
        "params": counted.parameters,
        "macs": counted.macs,
        "scheduler": {
            "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
            "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
            **{key: scheduler.config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset")},
        },
        "text": {
            "tokenizers": ["tokenizer.json", "tokenizer_2.json"][: len(tokenizers)],
            "pad_ids": [each.pad_token_id for each in tokenizers],
            "max_length": model.tokenizer.model_max_length,
            "empty_is_zeros": model.empty_is_zeros,
        },
        "defaults": sample.model_dump(include={"num_inference_steps", "guidance_scale"}),
    }


def _finish(
    folder: Path, model: Model, manifest: dict[str, Any], suffix: str, graphs: dict[str, Graph]
) -> dict[str, Any]:
    """Adds the tokenizers, and a manifest of all files, so that the folder can be opened."""
    for name, tokenizer in zip(manifest["text"]["tokenizers"], (model.tokenizer, model.tokenizer_2), strict=False):
        tokenizer.backend_tokenizer.save(str(folder / name))
    manifest = manifest | {
        "graphs": {name: {"file": f"{name}{suffix}"} for name in graphs},
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    write_whole(folder / runtime.MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """What was written and measured, as lines to print."""
    errors, files = manifest["parity"], manifest["files"]
    lines = [f"{'graph':14}{'MB':>8}  largest difference from torch"]
    for name, graph in manifest["graphs"].items():
        size = sum(size for file, size in files.items() if file.partition(".")[0] == Path(graph["file"]).stem)
        lines.append(f"{name:14}{size / 1e6:8.2f}  {errors[name]:.1e}")
    lines.append(f"{'all files':14}{sum(files.values()) / 1e6:8.2f}")
    if quality := manifest.get("quality"):
        lines += ["", f"of {quality['provenance']['n']} pictures of {quality['data']}, in the hole:"]
        for metric, loss in quality["loss"].items():
            before, after = quality["fp32"][metric]["hole"], quality["int8"][metric]["hole"]
            verdict = f"MORE THAN {parity.MOST_LOSS:.0%} WORSE" if loss > parity.MOST_LOSS else ""
            lines.append(f"{metric:26} fp32 {before:10.4f}  int8 {after:10.4f}  loss {loss:+7.2%}  {verdict}".rstrip())
    return "\n".join(lines)


def _refuse_other_files(out: Path, to: Target) -> None:
    mark = "models.json" if to == "web" else runtime.MANIFEST
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; give --out a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file():
        raise UserError(f"'{out}' holds other files than an export --to {to}; choose another folder")
