"""Stable Diffusion 1.5 + ControlNet against its small students on this CPU: a forward, a whole picture, memory.

    python benchmarks/edge.py --out results/edge-full-size.json

Random weights of the published shapes at 512 px (time does not depend on training; quality is not claimed). Each
student is exported as `refine-control export` does, then measured in turns with its teacher's stock pipeline as
`refine-control bench` does. Goes on where it stopped: remove --out to measure anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

# Only light imports up here: each measured process reads this file, and what it imports counts as its memory.
EXPORTS = (("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "int8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default="micro,mobile,bk-tiny")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--teacher_steps", type=int, default=50, help="of the teacher as its user runs it, once")
    parser.add_argument("--work", type=Path, default=Path("runs/edge-full-size"), help="models, tens of GB")
    parser.add_argument("--out", type=Path, default=Path("results/edge-full-size.json"))
    args = parser.parse_args()
    from common import write
    from full_size import write_random_teacher
    from refine_control.evaluate.compare import machine
    from refine_control.export.bench import BenchConfig, bench, plot

    results: dict = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"students": {}}
    results["machine"] = machine()
    teacher = args.work / "sd15"
    if not (teacher / "model_index.json").is_file():
        write_random_teacher(teacher)
    config = BenchConfig(
        num_inference_steps=(args.num_inference_steps,), repeats=args.repeats, warm_up=1, data=None, guidance_scale=7.5
    )
    for name in args.students.split(","):
        if name in results["students"]:
            continue
        folders = write_student(name, teacher, args.work)
        bench([str(folder) for folder in (teacher, *folders)], config, args.work / "bench" / name)
        found = json.loads((args.work / "bench" / name / "bench.json").read_text(encoding="utf-8"))
        results["students"][name] = found["rows"]
        results["settings"] = found["settings"]
        write(results, args.out)
        for folder in folders[1:]:
            shutil.rmtree(folder)
    rows = [row for beside in results["students"].values() for row in beside[1:]]
    plot({"rows": [next(iter(results["students"].values()))[0], *rows]}, args.out.with_suffix(".png"))
    if "teacher" not in results and args.teacher_steps:
        once = config.model_copy(update={"num_inference_steps": (args.teacher_steps,), "repeats": 1, "warm_up": 0})
        bench([str(teacher)], once, args.work / "bench" / "teacher")
        found = json.loads((args.work / "bench" / "teacher" / "bench.json").read_text(encoding="utf-8"))
        results["teacher"] = found["rows"][0]
        write(results, args.out)


def write_student(name: str, teacher: Path, work: Path) -> list[Path]:
    """The student's pipeline, then each of its exports."""
    import dataclasses

    import torch

    from refine_control.diffusion.store import load, save
    from refine_control.export.export import export_model
    from refine_control.student.plan import build_student

    whole, folder = load(str(teacher)), work / f"sd15-{name}"
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(0)
        student = build_student(name, whole)  # type: ignore[arg-type]
        save(dataclasses.replace(whole, denoiser=student), folder, torch.float16)
    del whole
    folders = [folder]
    for backend, precision in EXPORTS:
        out = work / f"sd15-{name}-{backend}-{precision}"
        if not (out / "refine-control.json").is_file():
            export_model(str(folder), backend, precision, out, calibration_images=1, images=0)  # type: ignore[arg-type]
        folders.append(out)
    return folders


if __name__ == "__main__":
    main()
