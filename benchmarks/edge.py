"""Stable Diffusion 1.5 + ControlNet against its small students on this CPU: a forward, a whole picture, memory.

    python benchmarks/edge.py --out results/edge-full-size

Random weights of the published shapes at 512 px (time does not depend on training; quality is not claimed). Each
student is exported as `refine-control export` does, then all take turns with the teacher's stock pipeline, one in
memory at a time. Writes OUT/bench.json and bench.png. Exports that are in --work already are measured as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

# Only light imports up here: each measured process reads this file, and what it imports counts as its memory.
KINDS = ("onnx-fp32", "onnx-int8", "openvino-fp32", "openvino-int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default="micro,mobile,bk-tiny")
    parser.add_argument("--num_inference_steps", default="10")
    parser.add_argument("--repeats", default="3")
    parser.add_argument("--work", type=Path, default=Path("runs/edge-full-size"), help="models, tens of GB")
    parser.add_argument("--only_export", action="store_true", help="measure later")
    parser.add_argument("--only_measure", action="store_true", help="what is exported already")
    parser.add_argument("--out", type=Path, default=Path("results/edge-full-size"))
    args = parser.parse_args()
    args.work = args.work.resolve()
    students, teacher = args.students.split(","), args.work / "sd15"
    subprocess.run([sys.executable, "-c", WRITE, str(args.work), *students], check=True, cwd=Path(__file__).parent)
    pipelines = [args.work / f"sd15-{name}" for name in students]
    wanted = {Path(f"{pipeline}-{kind}"): (pipeline, kind) for pipeline in pipelines for kind in KINDS}
    for out, (pipeline, kind) in wanted.items():
        if not args.only_measure and not is_exported(out):
            export(pipeline, out, *kind.split("-"))
    if args.only_export:
        return
    from refine_control.export.bench import BenchConfig, bench
    from refine_control.files import write_whole

    config = BenchConfig(
        num_inference_steps=[int(n) for n in args.num_inference_steps.split(",")], guidance_scale=7.5, data=None,
        repeats=int(args.repeats), warm_up=0, keep_loaded=False,
    )  # fmt: skip
    exported = [out for out in wanted if is_exported(out)]
    # From here on, so that the results name no folder of this machine.
    names = [os.path.relpath(path) for path in (teacher, *pipelines, *exported)]
    print(bench(names, config, args.out))
    result = json.loads((args.out / "bench.json").read_text(encoding="utf-8"))
    result["not_exported"] = [out.name for out in wanted if out not in exported]
    write_whole(args.out / "bench.json", json.dumps(result, indent=1))


def export(pipeline: Path, out: Path, backend: str, precision: str) -> None:
    """In a process of its own, whose memory is given back; it may fail, for want of memory say."""
    command = ["export", str(pipeline), "--to", backend, "--precision", precision, "--out", str(out)]
    few = ["--calibration_images", "1", "--images", "0"]
    subprocess.run([sys.executable, "-m", "refine_control", *command, *few], check=False)


def is_exported(out: Path) -> bool:
    return (out / "refine-control.json").is_file()


# The teacher's pipeline and each student's, random, in half precision; in a process of its own too.
WRITE = """
import dataclasses, sys
from pathlib import Path
import torch
from full_size import write_random_teacher
from refine_control.diffusion.store import load, save
from refine_control.student.plan import build_student
work, names = Path(sys.argv[1]), sys.argv[2:]
if not (work / "sd15" / "model_index.json").is_file():
    write_random_teacher(work / "sd15")
for name in names:
    if not (work / f"sd15-{name}" / "model_index.json").is_file():
        teacher = load(str(work / "sd15"))
        torch.manual_seed(0)
        save(dataclasses.replace(teacher, denoiser=build_student(name, teacher)), work / f"sd15-{name}", torch.float16)
"""


if __name__ == "__main__":
    main()
