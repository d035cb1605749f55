"""Fills a hole in one picture with the exported model that this file lies beside. No torch.

    python my-export/run.py --image cat.png --mask hole.png --prompt "flat cat face" --out filled.png

`refine-control export` copies it there with runtime.py. Needs numpy, pillow, tokenizers and onnxruntime or openvino.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from runtime import NO_MASK, ExportError, Student, is_coloured, one_line  # type: ignore[import-not-found]

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # PIL knows more, and some of those start other programs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill the white part of a mask in one picture, without torch.")
    parser.add_argument("--image", type=Path, required=True, help="the square in its middle is taken")
    parser.add_argument("--mask", type=Path, required=True, help="white where to fill")
    parser.add_argument("--prompt", default="", help="what to fill in")
    parser.add_argument("--out", type=Path, default=Path("filled.png"))
    parser.add_argument("--num_inference_steps", type=int, help="of the sampler; without, as the model asks")
    parser.add_argument("--guidance_scale", type=float, help="likewise; 1 asks the model once a step, more twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the exported folder")
    args = parser.parse_args(argv)
    try:
        check_writable(args.out)
        student = Student(args.model)
        picture, hole = read_pair(args.image, args.mask, student.side)
        prompt = args.prompt.encode(errors="replace").decode()
        usual = student.manifest["defaults"]
        given = {key: getattr(args, key) for key in ("num_inference_steps", "guidance_scale")}
        steps, guidance = (usual[key] if value is None else value for key, value in given.items())
        if "condition" not in student.manifest["graphs"]:
            print("run.py: the model has no ControlNet: it does not see the picture around the hole", file=sys.stderr)
        filled = student.fill(picture, hole, prompt, steps, guidance, args.seed)
        Image.fromarray(filled).save(args.out)
    except (ExportError, OSError, ValueError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}, {student.side}x{student.side}")
    return 0


def check_writable(out: Path) -> None:
    """Before minutes are spent on drawing.

    Raises:
        ExportError: no picture can be written there.
    """
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ExportError(f"'{out}' has no ending of a kind of picture; give --out one, as in filled.png")
    if not out.parent.is_dir():
        raise ExportError(f"'{out.parent}' is no folder to write to; make it first, or give another --out")


def read_pair(image: Path, mask: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle squares of a picture and its mask: uint8 (side, side, 3), transparency over white, and (side, side),
    1 where the mask is white. Reads and refuses what refine-control's own training does.

    Raises:
        ExportError: one cannot be decoded or has more than MAX_PIXELS, they differ in size, the mask is transparent
            in places or in colour, or has nothing white.
    """
    picture, white = _read(image), _read(mask)
    if picture.size != white.size:
        (w, h), (mw, mh) = picture.size, white.size
        raise ExportError(f"'{mask}' is {mw}x{mh} but '{image}' is {w}x{h}; give a mask of the picture's size")
    if np.asarray(white)[..., 3].min() < 255:
        raise ExportError(f"'{mask}' is transparent in places; save it without transparency, white where to fill")
    if is_coloured(np.asarray(white)[..., :3]):
        raise ExportError(f"'{mask}' {NO_MASK}")
    least = min(picture.size)
    left, top = (picture.width - least) / 2, (picture.height - least) / 2
    box = (left, top, left + least, top + least)
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    hole = white.convert("RGB").convert("L").point(lambda grey: 255 * (grey > 127))
    fitted = np.array(hole.resize((side, side), Image.Resampling.BOX, box=box)) > 127
    if not fitted.any():
        raise ExportError(f"'{mask}' has no white (255) at {side}x{side}, the model's size; nothing is to be filled")
    return np.array(picture.resize((side, side), Image.Resampling.LANCZOS, box=box)), fitted.astype(np.uint8)


def _read(path: Path) -> Image.Image:
    """RGBA."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} is more than {MAX_PIXELS} pixels; make it smaller")
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("its pixels are floats of unknown range; save 8 or 16 bits a channel")
            if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip instead of scaling
                wide = np.asarray(image).astype(np.int64)
                if wide.min() < 0 or wide.max() > 65535:
                    raise ValueError("its pixels have more than 16 bits; save 8 or 16 bits a channel")
                image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
            return image.convert("RGBA")
    except Exception as error:  # PIL's decoders raise nearly every type on a broken file
        raise ExportError(f"'{path}' cannot be read: {one_line(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
