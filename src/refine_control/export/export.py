"""A model's folder -> a folder that runs without torch: graphs, tokenizer, the runner, and what was measured of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from refine_control import runtime
from refine_control.data.source import NoSplitError, open_usable
from refine_control.diffusion.model import Model
from refine_control.diffusion.noise import sampler
from refine_control.diffusion.store import USUAL, load
from refine_control.errors import ModelError, UserError
from refine_control.evaluate.heldout import HeldOut
from refine_control.export import onnx, openvino, parity, web
from refine_control.export.graph import Graph, graphs_of
from refine_control.export.onnx import Feed, write_fp32
from refine_control.files import put_in_place, write_whole
from refine_control.student.plan import cost

Target = Literal["onnx", "openvino", "web"]
Precision = Literal["fp32", "fp16", "int8"]
DATA = "data/emoji"
RUNNER = (Path(__file__).with_name("run.py"), Path(runtime.__file__))
CALIBRATION_CALLS, CALIBRATION_IMAGES = 240, 24  # at least: of the denoiser, and of the VAE decoder
QUANTIZED = ("denoiser", "vae_decoder")  # the others cost little and lose much; they stay in half precision


class Int8(NamedTuple):
    """Pictures to choose int8's ranges by, and to see its effect on."""

    data: str
    calibration: HeldOut
    scored: HeldOut | None

    @classmethod
    def open(cls, data: str, calibration_images: int, images: int, resolution: int, controls: Sequence[str]) -> Int8:
        if images == 1:
            raise UserError("--images 1 is too few to score on; give 0 or at least 2")
        if data == DATA and not Path(data).is_dir():
            raise UserError(
                f"int8 is calibrated with pictures, and '{DATA}' is not here; give --data, a folder of yours"
            )
        scored = parity.open_heldout(data, "test", images, resolution, controls) if images else None
        return cls(data, parity.open_heldout(data, "train", calibration_images, resolution, controls), scored)


def export_model(
    name: str,
    to: Target,
    precision: Precision,
    out: Path,
    data: str | None = None,
    controlnets: Sequence[str] = (),
    title: str | None = None,
    calibration_images: int | None = None,
    images: int = 192,
    controls: Sequence[str] = ("inpaint",),
) -> dict[str, Any]:
    """Writes the exported model to `out`, or for the web to out/models/TITLE with the page around it.

    controlnets: saved on their own; they replace the pipeline's. title: the model's name there, its own without.
    data: pictures to calibrate int8 with (`calibration_images` of the split train; without, as many as make
    CALIBRATION_CALLS at the model's usual steps) and to see its effect on (`images` of the split test; 0 leaves it
    unmeasured), with `controls`, one for each ControlNet; the page's examples. Without, DATA, or the examples that
    the page has.
    What `out` held before is replaced when all is written, not earlier.
    Returns the manifest, which holds the differences from torch ("parity") and of int8 the effect ("quality").

    Raises:
        ModelError: a part of the model cannot be exported; it is named.
        DataError: `data` is given, or int8, and cannot be read.
        UserError: `out` holds other files, or the title has other characters than letters, digits, '.', '_', '-'.
    """
    title = title_of(name) if title is None else title
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", title):
        raise UserError(f"'{title}' is no name for an exported model; give --name, of letters, digits, '.', '_', '-'")
    out = out.resolve()
    final = out / "models" / title if to == "web" else out
    _refuse_other_files(out, to)
    _refuse_other_files(final, "onnx")
    if to == "web" and data is not None:
        with suppress(NoSplitError):  # the page is without examples then
            open_usable(data, "test", skip_corrupt=True)  # now: a mistake should not cost the examples that are there
    model = load(name, controlnets=controlnets).freeze()
    if calibration_images is None:
        calibration_images = max(CALIBRATION_IMAGES, math.ceil(CALIBRATION_CALLS / model.usual.num_inference_steps))
    try:
        if len(controls) > 1:
            raise UserError(f"--controls names {len(controls)}; a model with one ControlNet is exported, name its one")
        side = model.resolution
        int8 = Int8.open(data or DATA, calibration_images, images, side, controls) if precision == "int8" else None
        graphs = graphs_of(model)
        manifest = _describe(model, title, to, precision)
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as scratch:
            whole = Path(scratch) / "fp32"
            _write_fp32(graphs, model, whole, manifest)
            aside = Path(scratch) / "written"
            manifest = _write(graphs, model, whole, aside, manifest, int8)
            if to != "web":
                for script in RUNNER:
                    shutil.copyfile(script, aside / script.name)
            put_in_place(aside, final)
    except ModelError as error:
        raise ModelError(f"cannot export '{name}': {error}") from None
    if to == "web":
        web.write_site(out, data, DATA)
    return manifest


def title_of(name: str) -> str:
    """A name for the model: the last part of its own that is not of our own giving, as are the last three of
    runs/mine/refine-control/seed-0/student."""
    parts = [part for part in re.split("[/:]", name) if part not in ("", ".", "..")]
    told = [part for part in parts if not re.fullmatch(r"student|model|seed-\d+", part)]
    chosen = parts if name.startswith("zoo:") else told or parts
    return (chosen or [""])[-1].partition("@")[0]


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
    int8: Int8 | None,
) -> dict[str, Any]:
    folder.mkdir()
    precision, suffix = manifest["precision"], ".xml" if manifest["backend"] == "openvino" else ".onnx"
    exact = runtime.Student(whole)
    feeds: dict[str, list[Feed]] = parity.calibration_feeds(exact, int8.calibration, model.usual) if int8 else {}
    kept = {name: precision if name in QUANTIZED or precision != "int8" else "fp16" for name in graphs}
    for name in tqdm(graphs, desc=precision, unit="graph"):
        try:
            _writer(suffix, kept[name], feeds.get(name, []))(whole / f"{name}.onnx", folder / f"{name}{suffix}")
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:  # of the converters' insides
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"its {name} cannot be written as {kept[name]}{suffix}: {reason}") from None
    manifest = _finish(folder, model, manifest, suffix, graphs)
    student = runtime.Student(folder)
    errors = {name: parity.graph_error(graph, student) for name, graph in graphs.items()}
    manifest["parity"] = {"what": "largest difference from torch / max(1, largest number)", **errors}
    for name, off in errors.items():
        if not off <= (bound := parity.BOUNDS[kept[name]]):  # of nan too
            raise ModelError(f"its {name} in {kept[name]} differs from torch by {off:.1e}, more than {bound:.0e}")
    if int8 and int8.scored:
        reference = parity.reference_of(int8.scored)
        before, after = (reference.score(parity.draw(s, int8.scored, model.usual)) for s in (exact, student))
        manifest["quality"] = {
            "data": int8.data,
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


def _describe(model: Model, title: str, to: Target, precision: Precision) -> dict[str, Any]:
    """The manifest, but for the files."""
    scheduler = sampler(model.scheduler)
    if scheduler.config.thresholding:
        raise ModelError("its scheduler thresholds what it foresees (thresholding), which no runner here does")
    latent = model.denoiser.foundation.config.sample_size
    counted = cost(model.denoiser, model)
    tokenizers = [each for each in (model.tokenizer, model.tokenizer_2) if each is not None]
    if to == "web" and len(tokenizers) > 1:
        raise ModelError("its text goes through two encoders (SDXL), and the page runs models with one")
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
            "clip_sample_range": scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
            **{key: scheduler.config[key] for key in ("prediction_type", "timestep_spacing", "steps_offset")},
        },
        "text": {
            "tokenizers": ["tokenizer.json", "tokenizer_2.json"][: len(tokenizers)],
            "pad_ids": [each.pad_token_id for each in tokenizers],
            "max_length": model.tokenizer.model_max_length,
            "empty_is_zeros": model.empty_is_zeros,
        },
        "defaults": model.usual.model_dump(include={*USUAL}),
        "only_steps": model.only_steps,
    }


def _finish(
    folder: Path, model: Model, manifest: dict[str, Any], suffix: str, graphs: dict[str, Graph]
) -> dict[str, Any]:
    """Adds the tokenizers, and a manifest of all files, so that the folder can be opened."""
    for name, tokenizer in zip(manifest["text"]["tokenizers"], (model.tokenizer, model.tokenizer_2), strict=False):
        tokenizer.backend_tokenizer.save(str(folder / name))
    manifest = manifest | {
        "graphs": {name: {"file": f"{name}{suffix}"} for name in graphs},
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != runtime.MANIFEST},
    }
    for name in manifest["files"]:
        if manifest["backend"] == "web" and name.endswith(".data"):
            graph = name.partition(".")[0]
            raise ModelError(f"its {graph} has more than 2 GB, and the page takes less; export a smaller student")
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
    if manifest["precision"] == "int8" and "quality" not in manifest:
        lines += ["", "what int8 does to the pictures was NOT measured (no --images)"]
    if quality := manifest.get("quality"):
        lines += ["", f"of {quality['provenance']['n']} pictures of {quality['data']}, in the hole:"]
        for metric, loss in quality["loss"].items():
            before, after = quality["fp32"][metric]["hole"], quality["int8"][metric]["hole"]
            verdict = "" if loss <= parity.MOST_LOSS else f"MORE THAN {parity.MOST_LOSS:.0%} WORSE"
            lines.append(f"{metric:26} fp32 {before:10.4f}  int8 {after:10.4f}  loss {loss:+7.2%}  {verdict}".rstrip())
    return "\n".join(lines)


def _refuse_other_files(out: Path, to: Target) -> None:
    """Nothing but an export is ever replaced, one with damaged graphs too. A site may lie in a repository."""
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; give --out a folder")
    if not out.is_dir():
        return
    found = {path.name for path in out.iterdir()} - {".DS_Store"}
    if to == "web":
        is_ours = (out / web.MARK).is_file()
        strangers = set() if is_ours else {name for name in found if name[0] != "."} - {"models"}
    else:
        try:
            known = dict(json.loads((out / runtime.MANIFEST).read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            known = {}
        strangers = found - {runtime.MANIFEST, "__pycache__", *known, *(script.name for script in RUNNER)}
    if strangers:
        raise UserError(
            f"'{out}' holds other files than an export --to {to}, '{min(strangers)}'; choose another folder"
        )
