"""Commands for the edge: export, bench, serve."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from refine_control.command import CONTROLNET, command, flag, plain, whole_number
from refine_control.errors import UserError


@command(
    "export",
    "Write a model as graphs that run without torch, with their runner or with a page for the browser.",
    [
        "zoo:emoji-student --to onnx --precision fp32 --out student-onnx",
        "runs/mine/student --to openvino --precision int8 --data my/captioned --out student-openvino",
        "zoo:emoji-student --to web --out site",
    ],
    [
        flag("model", metavar="MODEL", help="a saved pipeline's folder, or zoo:NAME"),
        flag(
            "--to", choices=["onnx", "openvino", "web"], required=True, help="web: a static folder for any web server"
        ),
        flag(
            "--precision", choices=["fp32", "fp16", "int8"], default="fp16", help="of the weights; int8 computes in it"
        ),
        flag("--out", type=Path, required=True, help="a folder; exported to the web, one holds several models"),
        CONTROLNET,
        flag(
            "--name",
            help="what the model is called there; by default as MODEL, of runs/mine/student 'mine'",
        ),
        flag("--data", help="for int8 to calibrate with and be scored on; the page's examples; data/emoji, without"),
        flag(
            "--calibration_images",
            help="of the split train, for int8; without, enough for 240 steps of the sampler",
        ),
        flag("--images", default="192", help="of the split test, to see int8's effect on; 0 leaves it unmeasured"),
        flag(
            "--controls", default="inpaint", help="for int8, what its ControlNet is shown: inpaint, edges, grey, file"
        ),
    ],
)
def _export(args: argparse.Namespace) -> None:
    _need_engines()
    from refine_control.export.export import export_model, summary

    given = args.calibration_images
    calibration = None if given is None else whole_number(given, "--calibration_images", 1)
    images = whole_number(args.images, "--images")
    manifest = export_model(
        args.model, args.to, args.precision, args.out, args.data, args.controlnet, args.name, calibration, images,
        args.controls.split(","),
    )  # fmt: skip
    print(summary(manifest))
    if args.to == "web":
        print(f"refine-control serve {args.out}  opens the page")
    else:
        print(f"python {args.out}/run.py --image cat.png --mask hole.png --prompt 'flat cat face'  runs it")


@command(
    "bench",
    "Measure exported models and pipelines side by side: time, memory, size, MACs, and what they draw.",
    ["zoo:emoji-teacher zoo:emoji-student student-onnx student-openvino --num_inference_steps 2,10"],
    [
        flag("models", nargs="+", metavar="MODEL", help="a folder that export wrote, a saved pipeline's, or zoo:NAME"),
        flag("--num_inference_steps", default="10", help="of the sampler; several with commas between"),
        flag("--guidance_scale", default="2.0", help="1 asks the model once a step, more asks it twice"),
        flag("--repeats", default="10", help="turns; each turn runs every model once"),
        flag("--num_threads", help="of each model; the cores there are, without"),
        flag("--data", default="data/emoji", help="pictures to score on (split test); 'none' scores nothing"),
        flag("--images", default="192", help="how many of them"),
        flag(
            "--controls", default="inpaint", help="for the scores, one for each ControlNet: inpaint, edges, grey, file"
        ),
        flag("--output_dir", type=Path, default=Path("runs/bench"), help="gets bench.json, bench.md and bench.png"),
    ],
)
def _bench(args: argparse.Namespace) -> None:
    _need_engines()
    from refine_control import recipe
    from refine_control.export.bench import BenchConfig, bench

    given = {name: plain(getattr(args, name)) for name in ("guidance_scale", "repeats", "images")}
    given["num_inference_steps"] = [plain(steps) for steps in args.num_inference_steps.split(",")]
    given["num_threads"] = None if args.num_threads is None else plain(args.num_threads)
    given["controls"] = args.controls.split(",")
    given["data"] = None if args.data == "none" else args.data
    config = recipe.validate(BenchConfig, given, "command line")
    print(f"\n{bench(args.models, config, args.output_dir)}\n\nfigures: {args.output_dir}/bench.json")


@command(
    "serve",
    "Open the page of a folder that 'export --to web' wrote, on this machine alone.",
    ["site", "site --port 8123 --no_browser"],
    [
        flag("folder", type=Path, metavar="DIR", help="what 'export --to web' wrote"),
        flag("--host", default="127.0.0.1", help="another address lets other machines in"),
        flag("--port", default="8000", help="0 takes a free one"),
        flag("--no_browser", action="store_true", help="only print the address"),
    ],
)
def _serve(args: argparse.Namespace) -> None:
    from refine_control.serve.server import serve

    serve(args.folder, args.host, whole_number(args.port, "--port", most=65535), not args.no_browser)


def _need_engines() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed; pip install -e '.[edge]' in the clone")
