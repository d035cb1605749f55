"""Exported models and pipelines side by side: time, memory, size, MACs, and what their pictures score."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from refine_control import runtime
from refine_control.data.source import open_usable
from refine_control.diffusion.store import load, resolve
from refine_control.errors import DataError, ModelError, UserError
from refine_control.evaluate.heldout import HeldOut
from refine_control.evaluate.score import Reference
from refine_control.export import parity
from refine_control.export.timing import Entry, Worker, cores
from refine_control.files import write_whole
from refine_control.provenance import machine
from refine_control.recipe import Config, ControlKind, SampleConfig
from refine_control.student.plan import cost

SETTLE = 0.25  # seconds: threads of the model before spin for a while after their work


class BenchConfig(Config):
    """repeats: turns that are counted, after `warm_up` that are not. keep_loaded: all models stay in memory; else each
    is loaded anew in each turn, for models that do not fit beside each other. data: pictures to score on, or None."""

    num_inference_steps: tuple[PositiveInt, ...] = (10,)
    guidance_scale: float = Field(2.0, ge=1)
    repeats: PositiveInt = 10
    warm_up: NonNegativeInt = 2
    keep_loaded: bool = True
    num_threads: PositiveInt | None = None
    data: str | None = "data/emoji"
    images: int = Field(192, ge=2)
    controls: tuple[ControlKind, ...] = ("inpaint",)


def bench(names: Sequence[str], config: BenchConfig, out: Path) -> str:
    """Measures every model, in turns so that a busy moment hits all of them. Returns the table, to be printed.

    names: folders that export wrote (of the page's folder each model), saved pipelines' folders, zoo:NAME, hub ids.
    Writes bench.json, bench.md and bench.png into `out`.

    Raises:
        UserError: a name is neither. ModelError: a model cannot be loaded or run.
    """
    try:
        return _bench(names, config, out)
    except runtime.ExportError as error:
        raise ModelError(str(error)) from None


def _bench(names: Sequence[str], config: BenchConfig, out: Path) -> str:
    entries = _told_apart([entry for name in names for entry in _entries(name)])
    if config.data is not None:
        try:
            if len(open_usable(config.data, "test", True)) < 2:  # a mistake there should not cost the measurement
                raise DataError(f"'{config.data}' has one picture to score on; give 2 or more")
        except DataError as error:
            raise DataError(f"{error}; or --data none, which scores nothing") from None
    sizes = [_size(entry, config) for entry in entries]
    rows = [row | size for row, size in zip(_measure(entries, config), sizes, strict=True)]
    settings = config.model_dump() | {"num_threads": config.num_threads or cores()}
    result = {"command": _command(names, config), "settings": settings, "machine": machine(), "rows": rows}
    write_whole(out / "bench.json", json.dumps(result, indent=1))
    if config.data is not None:
        _score(rows, entries, config)
        write_whole(out / "bench.json", json.dumps(result, indent=1))
    write_whole(out / "bench.md", table(result, " | "))
    plot(result, out / "bench.png")
    return table(result)


def _command(names: Sequence[str], config: BenchConfig) -> str:
    """What was typed, with every setting that is not the default."""
    usual, words = BenchConfig(), ["refine-control bench", *names]
    for key, value in config:
        if value != getattr(usual, key):
            words.append(f"--{key} {','.join(map(str, value)) if isinstance(value, tuple) else value or 'none'}")
    return " ".join(words)


def _entries(name: str) -> list[Entry]:
    folder = Path(name)
    if (folder / "models.json").is_file():
        models = json.loads((folder / "models.json").read_text(encoding="utf-8"))
        return [entry for model in models for entry in _entries(str(folder / "models" / model))]
    if (folder / runtime.MANIFEST).is_file():
        manifest = runtime.read_manifest(folder)
        backend, precision = manifest["backend"], manifest["precision"]
        by = "web graphs in onnxruntime" if backend == "web" else backend  # no browser is measured here
        return [Entry(f"{manifest['name']}, {by} {precision}", name, backend, precision)]
    if not (name.startswith("zoo:") or "/" in name or folder.is_dir()):
        raise UserError(f"'{name}' is neither an exported folder nor a saved pipeline")
    resolve(name)
    called = folder.resolve().name if folder.is_dir() else name.removeprefix("zoo:")
    return [Entry(f"{called}, diffusers fp32", name, "torch", "fp32")]


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """With the folder in the label of those that have one label."""
    labels = [entry.label for entry in entries]
    return [e._replace(label=f"{e.label}, {e.source}") if labels.count(e.label) > 1 else e for e in entries]


def _measure(entries: Sequence[Entry], config: BenchConfig) -> list[dict[str, Any]]:
    workers: dict[int, Worker] = {}
    peaks = [0.0] * len(entries)
    orders = [("forward",), *(("picture", steps) for steps in config.num_inference_steps)]
    taken: dict[tuple[int, tuple], list[float]] = {}
    for turn in tqdm(range(config.warm_up + config.repeats), desc="measuring", unit="turn"):
        for number, entry in enumerate(entries):
            if number not in workers:
                workers[number] = Worker(entry, config.guidance_scale, config.num_threads or cores())
                workers[number].seconds("forward")  # the first is slower
            for order in orders:
                time.sleep(SETTLE)
                seconds = workers[number].seconds(*order)  # type: ignore[arg-type]
                if turn >= config.warm_up:
                    taken.setdefault((number, order), []).append(seconds)
            if not config.keep_loaded or turn == config.warm_up + config.repeats - 1:
                peaks[number] = max(peaks[number], workers.pop(number).close())
    return [
        {
            "label": entry.label,
            **entry._asdict(),
            "forward_ms": _spread(np.array(taken[number, ("forward",)]) * 1e3),
            "picture_ms": {
                str(n): _spread(np.array(taken[number, ("picture", n)]) * 1e3) for n in config.num_inference_steps
            },
            "peak_memory_mb": peaks[number] / 1e6,
        }
        for number, entry in enumerate(entries)
    ]


def _spread(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in (("low", 25), ("median", 50), ("high", 75))}


def _size(entry: Entry, config: BenchConfig) -> dict[str, Any]:
    """Bytes on the disk; parameters and MACs of foundation + module.

    Raises:
        DataError: it is to be scored, and has not as many ControlNets as there are controls.
    """
    if entry.backend == "torch":
        model, folder = load(entry.source), resolve(entry.source)
        _check_controls(entry, len(model.denoiser.nets), config)
        counted = cost(model.denoiser, model)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {"size_mb": size / 1e6, "params": counted.parameters, "macs": counted.macs}
    _check_controls(entry, 1, config)
    manifest = runtime.read_manifest(Path(entry.source))
    return {"size_mb": sum(manifest["files"].values()) / 1e6, "params": manifest["params"], "macs": manifest["macs"]}


def _check_controls(entry: Entry, nets: int, config: BenchConfig) -> None:
    if config.data is not None and nets and nets != len(config.controls):
        raise DataError(
            f"--controls names {len(config.controls)} ({', '.join(config.controls)}) but '{entry.source}' has {nets} "
            "ControlNet(s); name one for each, in their order, or --data none, which scores nothing"
        )


def _score(rows: list[dict[str, Any]], entries: Sequence[Entry], config: BenchConfig) -> None:
    """Adds each row's scores, by steps: of the same pictures, masks, captions and noise."""
    assert config.data is not None
    opened: dict[int, tuple[HeldOut, Reference]] = {}
    for row, entry in zip(rows, tqdm(entries, desc="scoring", unit="model"), strict=True):
        exported = entry.backend != "torch"
        model: Any = (
            runtime.Student(Path(entry.source), config.num_threads) if exported else load(entry.source).freeze()
        )
        side = model.side if exported else model.resolution
        if side not in opened:
            heldout = parity.open_heldout(config.data, "test", config.images, side, config.controls)
            opened[side] = heldout, parity.reference_of(heldout)
        heldout, reference = opened[side]
        row["quality"] = {}
        for steps in config.num_inference_steps:
            sample = SampleConfig(num_inference_steps=steps, guidance_scale=config.guidance_scale)
            drawn = parity.draw(model, heldout, sample) if exported else heldout.draw(model, sample)
            row["quality"][str(steps)] = reference.score(drawn)["metrics"]
        row["provenance"] = reference.provenance()


def table(result: dict[str, Any], between: str = "  ") -> str:
    """One line for each model and number of steps; times are medians with their quartiles."""
    metrics = list(next(iter(result["rows"][0].get("quality", {"": {}}).values())))
    head = [
        "model",
        "steps",
        "a picture (ms)",
        "a forward (ms)",
        "faster",
        "memory MB",
        "size MB",
        "parameters",
        "MACs",
    ]
    lines = [head + [name.partition("[")[0] + ", hole" for name in metrics]]
    slowest = max(one["median"] for row in result["rows"] for one in row["picture_ms"].values())
    for row in result["rows"]:
        for steps, taken in row["picture_ms"].items():
            forward, scores = row["forward_ms"], row.get("quality", {}).get(steps, {})
            lines.append(
                [
                    row["label"],
                    steps,
                    f"{taken['median']:.1f} ({taken['low']:.1f}-{taken['high']:.1f})",
                    f"{forward['median']:.2f} ({forward['low']:.2f}-{forward['high']:.2f})",
                    f"{slowest / taken['median']:.1f}x",
                    f"{row['peak_memory_mb']:.0f}",
                    f"{row['size_mb']:.1f}",
                    f"{row['params'] / 1e6:.2f}M",
                    f"{row['macs'] / 1e6:.1f}M",
                    *(f"{scores[name]['hole']:.4g}" for name in metrics),
                ]
            )
    if "|" in between:
        lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
        return "\n".join("| " + between.join(line) + " |" for line in lines) + "\n"
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(between.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time of a picture, log scale, one bar for each model and number of steps."""
    from matplotlib.figure import Figure

    bars = [
        (f"{row['label']}, {steps} steps", taken)
        for row in result["rows"]
        for steps, taken in sorted(row["picture_ms"].items(), key=lambda item: -int(item[0]))
    ]
    bars.sort(key=lambda bar: bar[1]["median"])
    figure = Figure(figsize=(8, 0.6 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    medians = [taken["median"] for _, taken in bars]
    errors = [[t["median"] - t["low"] for _, t in bars], [t["high"] - t["median"] for _, t in bars]]
    bars_drawn = axes.barh(range(len(bars)), medians, xerr=errors, color="#4f6d8f", ecolor="#1d2733")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.bar_label(bars_drawn, labels=[f"{m:,.0f}" for m in medians], padding=4, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=max(medians) * 2.5)
    figure.supxlabel("one picture from prompt and mask to pixels, ms (median and quartiles)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
