"""Every PIL mode to RGB over white, refusals in one line, and the geometry of both fits."""

import io
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control.data.images import encode_png, encode_webp, fit_square, fit_square_mask, read_image, read_mask
from refine_control.errors import DataError


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are missing: only a reader that decodes would notice."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + checksum + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_rgb_is_read_unchanged_from_path_and_bytes(tmp_path: Path, kind: str) -> None:
    image = noise(5, 7)
    data = saved(Image.fromarray(image), kind)
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a"):
        read = read_image(source)
        assert read.dtype == np.uint8
        assert np.array_equal(read, image)


def test_encoders_are_lossless() -> None:
    image = noise(9, 6)
    assert np.array_equal(read_image(encode_webp(image)), image)
    assert np.array_equal(read_image(encode_png(image)), image)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 90), (90, 90, 90)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 32896, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (255, 255, 255)),
    ],
)
def test_png_modes(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert np.array_equal(read_image(saved(image)), np.full((2, 2, 3), expected))


def test_palette_transparency_and_cmyk() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    assert np.array_equal(read_image(saved(palette))[0, 0], (10, 20, 30))
    assert np.array_equal(read_image(saved(palette, transparency=0))[0, 0], (255, 255, 255))
    halves = read_image(saved(palette, transparency=bytes([51, 255])))[0, 0].tolist()  # a fifth of it on white
    assert halves == [206, 208, 210]
    cmyk = read_image(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"))[4, 4].astype(int)
    assert np.abs(cmyk - (0, 255, 255)).max() < 6


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda image: image),
        (2, np.fliplr),
        (3, lambda image: np.rot90(image, 2)),
        (5, lambda image: image.transpose(1, 0, 2)),
        (6, lambda image: np.rot90(image, -1)),
        (8, np.rot90),
    ],
)
def test_exif_turns_the_picture(orientation: int, turned: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(4, 6)
    assert np.array_equal(read_image(saved(Image.fromarray(image), exif=exif)), turned(image))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert np.array_equal(read_image(data)[0, 0], (255, 0, 0))


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (101, 10)])
def test_size_is_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"big\.png: .*pixels.*remove it"):
        read_image(png_header(*size), max_pixels=1000, name="big.png")


def gif_of_one_large_frame(width: int, height: int) -> bytes:
    """A GIF that calls itself 1x1 and whose frame is larger: PIL looks at sizes twice."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes([255, 0, 0, 0, 255, 0]) + frame


@pytest.mark.parametrize(
    "data", [png_header(10_000, 10_524), gif_of_one_large_frame(10_000, 10_524)], ids=["png", "gif"]
)
def test_the_limit_is_ours_and_pil_does_not_warn_of_its_own(data: bytes) -> None:
    """105 million pixels: PIL warns from 89 million on."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match="10000x10524 is more than 64000000 pixels"):
            read_image(data)
    assert seen == []


def test_what_pil_would_warn_of_is_read_where_the_limit_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    data = saved(Image.new("RGB", (10, 10)))
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    assert read_image(data).shape == (10, 10, 3)


def test_huge_header_costs_neither_time_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_header(30_000, 30_000)
    for pil_limit in (Image.MAX_IMAGE_PIXELS, None):  # None: only our own limit stands before 2.7 GB
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_limit)
        monkeypatch.setattr(Image.core, "new", None)  # whoever makes room for the pixels fails
        start = time.process_time()
        tracemalloc.start()
        with pytest.raises(DataError, match=r"900000000 pixels|30000x30000 is more than 64000000 pixels"):
            read_image(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000
        assert time.process_time() - start < 1


def test_size_at_the_limit_is_read() -> None:
    assert read_image(saved(Image.new("RGB", (10, 10))), max_pixels=100).shape == (10, 10, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "not a PNG"),
        (saved(Image.fromarray(noise(40, 40)))[:-900], "cannot be decoded"),
        (saved(Image.fromarray(noise(40, 40)), "JPEG")[:-300], "cannot be decoded"),
        *((saved(Image.fromarray(noise(40, 40)), kind)[:1500], "cannot be decoded") for kind in ("GIF", "BMP", "TIFF")),
        (encode_webp(noise(40, 40))[:1500], "cannot be decoded"),
        (saved(Image.new("F", (2, 2), 0.5), "TIFF"), "floats"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_image(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / ("a" * 5000)):
        with pytest.raises(DataError, match="cannot be read"):
            read_image(path)


def test_other_formats_are_refused() -> None:
    with pytest.raises(DataError, match="not a PNG"):
        read_image(saved(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Image.new("1", (2, 2), 1), 1),
        (Image.new("RGB", (2, 2), (255, 255, 255)), 1),
        (Image.new("RGB", (2, 2), (0, 0, 255)), 0),  # blue is dark
        (Image.new("RGBA", (2, 2), (255, 255, 255, 255)), 1),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), 1),
    ],
)
def test_mask_of_any_mode(mask: Image.Image, expected: int) -> None:
    assert read_mask(saved(mask)).tolist() == [[expected] * 2] * 2


def test_a_mask_with_transparent_parts_is_refused() -> None:
    """Is the hole what is transparent, or what is white? Over white, as a picture, it would be inverted."""
    mask = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    mask.putpixel((0, 0), (0, 0, 0, 255))
    with pytest.raises(DataError, match="transparent in places; save it without transparency, white where to fill"):
        read_mask(saved(mask))


def test_mask_threshold_is_above_127() -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    mask = read_mask(encode_png(grey))
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 0, 1, 1]]


def test_mask_of_zeros_and_ones_is_refused_and_a_black_one_is_not() -> None:
    with pytest.raises(DataError, match="brightest value is 1"):
        read_mask(encode_png(np.eye(4, dtype=np.uint8)))
    assert read_mask(encode_png(np.zeros((4, 4), np.uint8))).sum() == 0


def test_crop_keeps_the_centre_and_pad_keeps_everything() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10, 0], image[:, 10:20, 1], image[:, 20:, 2] = 255, 255, 255
    assert np.array_equal(fit_square(image, 10, "crop"), image[:, 10:20])
    padded = fit_square(image, 30, "pad")
    assert np.array_equal(padded[10:20], image)
    assert (padded[:10] == 255).all()
    assert (padded[20:] == 255).all()


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (7, 5), (64, 64)])
def test_any_shape_fits(mode: str, shape: tuple[int, int]) -> None:
    fitted = fit_square(noise(*shape), 16, mode)
    assert fitted.shape == (16, 16, 3)
    assert fitted.dtype == np.uint8


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit_square(stripes, 16)[4:12, 4:12].astype(int) - 128).max() < 10


def test_square_of_the_right_size_is_unchanged() -> None:
    image = noise(16, 16)
    assert np.array_equal(fit_square(image, 16, "crop"), image)
    assert np.array_equal(fit_square(image, 16, "pad"), image)


def test_mask_follows_the_picture_and_its_padding_is_no_hole() -> None:
    mask = np.zeros((8, 16), np.uint8)
    mask[:, 4:12] = 1
    assert fit_square_mask(mask, 4, "crop").all()
    padded = fit_square_mask(mask, 16, "pad")
    assert np.array_equal(padded[4:12], mask)
    assert padded.sum() == mask.sum()


@pytest.mark.parametrize(("resolution", "mode"), [(0, "crop"), (8, "stretch")])
def test_wrong_fit_is_named(resolution: int, mode: str) -> None:
    with pytest.raises(DataError, match=mode if resolution else "resolution 0"):
        fit_square(noise(4, 4), resolution, mode)
