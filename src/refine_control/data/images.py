"""Bytes on the disk -> uint8 RGB arrays, and back to one square size. Untrusted files are expected here."""

import io
import math
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from refine_control.errors import DataError
from refine_control.runtime import NO_MASK, is_coloured

MAX_PIXELS = 64_000_000
LARGEST_SIDE = math.isqrt(MAX_PIXELS)  # of a square that can be read back
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # PIL knows more, and some of those start other programs
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".ppm", ".dng")  # pictures all the same
OPENING = threading.Lock()  # what is done with warnings, is done for all threads
FitMode = Literal["crop", "pad"]


def read_image(source: Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """Decode a file or its bytes to uint8 (H, W, 3) RGB.

    EXIF orientation is applied, alpha is composited over white, an animation gives its first frame, 16-bit grey is
    scaled to 8 bits. `name` stands for the source in messages (a path names itself).

    Raises DataError, in one line: missing, empty, truncated or corrupt file; more than `max_pixels` (read from the
    header, before anything is decoded); float pixels.
    """
    return _decode(source, max_pixels, name, _to_rgb)


def _decode(source: Path | bytes, max_pixels: int, name: str | None, to_array: Callable) -> np.ndarray:
    label = name or (f"{len(source)} bytes in memory" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _read_bytes(Path(source), label, most_bytes(max_pixels))
    if not data:
        raise DataError(f"{label}: the image is empty (0 bytes); replace or remove it")
    try:
        with _open(data) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{label}: {width}x{height} is more than {max_pixels} pixels; make the image smaller or remove it"
                )
            return to_array(image)
    except DataError as error:
        raise error if str(error).startswith(label) else DataError(f"{label}: {error}") from None
    except Image.DecompressionBombError as error:
        reason = _one_line(error)
        raise DataError(f"{label}: {reason}; make the image at most {max_pixels} pixels or remove it") from None
    except Exception as error:  # PIL's decoders raise nearly every type on a broken file
        raise DataError(f"{label}: cannot be decoded ({_one_line(error)}); replace or remove it") from None


def read_mask(
    source: Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None, coloured: bool = True
) -> np.ndarray:
    """Decode a mask to uint8 (H, W) of {0, 1}: brighter than 127 is 1, the hole to fill (as in diffusers).

    Raises DataError as `read_image` does, and for what would silently be another hole than was meant: a mask stored as
    0 and 1 instead of 0 and 255, one with transparent parts, and where not `coloured` one in colour.
    """
    opaque = _decode(source, max_pixels, name, _to_opaque)
    grey = np.asarray(Image.fromarray(opaque).convert("L"))
    label = name or (str(source) if not isinstance(source, bytes) else "mask")
    if grey.max() == 1:
        raise DataError(f"{label}: the mask's brightest value is 1 of 255; store holes as 255 (white)")
    if not coloured and is_coloured(opaque):
        raise DataError(f"'{label}' {NO_MASK}")
    return (grey > 127).astype(np.uint8)


def fit_square(image: np.ndarray, resolution: int, mode: FitMode = "crop") -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (resolution, resolution, 3), antialiased (Lanczos).

    "crop" keeps the centre square, so that the shorter side fills `resolution`; "pad" keeps everything and fills a
    square with white. Raises DataError for an unknown mode, and see `require_side`.
    """
    return _fit(Image.fromarray(image), resolution, mode, Image.Resampling.LANCZOS, (255, 255, 255))


def fit_square_mask(mask: np.ndarray, resolution: int, mode: FitMode = "crop") -> np.ndarray:
    """uint8 (H, W) of {0, 1} -> uint8 (resolution, resolution) of {0, 1}, with `fit_square`'s geometry.

    A pixel is a hole where at least half of its area was; padding is never a hole. Raises as `fit_square`.
    """
    fitted = _fit(Image.fromarray(mask * np.uint8(255)), resolution, mode, Image.Resampling.BOX, 0)
    return (fitted > 127).astype(np.uint8)


def encode_webp(image: np.ndarray, quality: int | None = None) -> bytes:
    """uint8 (H, W, 3) -> WebP bytes: lossless where `quality` is None, else lossy at that quality (0..100)."""
    out = io.BytesIO()
    # Lossless: more effort than this costs twenty times the time for one percent of the size.
    how = {"lossless": True, "quality": 80} if quality is None else {"quality": quality}
    Image.fromarray(image).save(out, "WEBP", method=4, **how)
    return out.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) -> PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def require_side(resolution: int) -> None:
    """Raises DataError unless squares of that side can be made, kept and read back."""
    if not 1 <= resolution <= LARGEST_SIDE:
        raise DataError(f"resolution {resolution} is not between 1 and {LARGEST_SIDE}; give a square's side in pixels")


def most_bytes(max_pixels: int) -> int:
    """No file of so many pixels is larger: four channels of 16 bits, and as much beside them as any picture has."""
    return 8 * max_pixels + 10_000_000


def _read_bytes(path: Path, label: str, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise DataError(f"{label}: {size} bytes are more than a picture may have ({most}); remove it")
            return file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{label}: cannot be read ({reason}); check the path and its permissions") from None


def _open(data: bytes) -> Image.Image:
    """Read the header only. PIL warns of large pictures, its own limit in mind; `max_pixels` is ours."""
    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _to_opaque(image: Image.Image) -> np.ndarray:
    """Any PIL mode without transparency -> uint8 (H, W, 3)."""
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise DataError("the mask is transparent in places; save it without transparency, white where to fill")
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL mode -> uint8 (H, W, 3) over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError("the pixels are floats of unknown range; save the image with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise DataError("the pixels have more than 16 bits; save the image with 8 or 16 bits a channel")
        return np.repeat(((wide + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert("RGB"))


def _fit(
    image: Image.Image, resolution: int, mode: str, resample: Image.Resampling, fill: int | tuple[int, int, int]
) -> np.ndarray:
    require_side(resolution)
    width, height = image.size
    if mode == "crop":  # cropped before it is resized: the same picture, and a very long one costs no memory
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return np.array(image.resize((resolution, resolution), resample, box=box))
    if mode == "pad":
        scale = resolution / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        canvas = Image.new(image.mode, (resolution, resolution), fill)
        canvas.paste(image.resize(size, resample), ((resolution - size[0]) // 2, (resolution - size[1]) // 2))
        return np.array(canvas)
    raise DataError(f"fit mode {mode!r} is unknown; use 'crop' or 'pad'")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "not a PNG, JPEG, WebP, BMP, GIF or TIFF image" if "cannot identify image file" in text else text[:160]
