"""The runner that exports carry: pictures and masks are read as in training, mistakes are told in one line."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from refine_control import runtime
from refine_control.data.images import fit_square, fit_square_mask, read_image, read_mask
from refine_control.export.export import RUNNER
from refine_control.runtime import ExportError

SIDE = 32


@pytest.fixture(scope="module")
def run() -> ModuleType:
    sys.modules.setdefault("runtime", runtime)  # as it lies beside run.py in an export
    spec = importlib.util.spec_from_file_location("run", RUNNER[0])
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def write(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def white(path: Path, size: tuple[int, int]) -> Path:
    return write(path, np.full(size, 255, np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (41, 97), (300, 20), (8, 8)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
def test_pictures_are_read_as_in_training(run: ModuleType, size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)
    if mode == "P":
        pixels = pixels[..., :3]
    path = write(tmp_path / "picture.png", pixels, mode)
    picture, hole = run.read_pair(path, white(tmp_path / "mask.png", size), SIDE)
    np.testing.assert_array_equal(picture, fit_square(read_image(path), SIDE))
    assert hole.all()


def test_sixteen_bits_are_scaled_as_in_training(run: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "deep.png", np.random.default_rng(0).integers(0, 65536, (40, 40), dtype=np.uint16))
    picture, _ = run.read_pair(path, white(tmp_path / "mask.png", (40, 40)), SIDE)
    np.testing.assert_array_equal(picture, fit_square(read_image(path), SIDE))


@pytest.mark.parametrize("size", [(32, 32), (41, 97), (300, 20)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_are_read_as_in_training(run: ModuleType, size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = np.clip(rng.integers(0, 256, (*size, 1)) + rng.integers(-30, 31, (*size, 3)), 0, 255).astype(np.uint8)
    path = write(tmp_path / "mask.png", pixels if mode == "RGB" else pixels[..., 0])
    _, hole = run.read_pair(white(tmp_path / "picture.png", size), path, SIDE)
    np.testing.assert_array_equal(hole, fit_square_mask(read_mask(path), SIDE))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((40, 40), 1, np.uint8), "no white"),
        (np.zeros((40, 40), np.uint8), "no white"),
        (np.full((40, 41), 255, np.uint8), "41x40 but"),
        (np.full((40, 40, 4), 200, np.uint8), "transparent in places"),
        (np.full((40, 40), 0.5, np.float32), "floats"),
        (np.full((40, 40, 3), (255, 255, 0), np.uint8), "in colour"),
    ],
    ids=["of-ones", "empty", "of-another-size", "transparent", "floats", "a-picture"],
)
def test_a_mask_that_would_be_another_hole_is_refused(
    run: ModuleType, pixels: np.ndarray, reason: str, tmp_path: Path
) -> None:
    picture, mask = white(tmp_path / "picture.png", (40, 40)), write(tmp_path / "mask.tif", pixels)
    with pytest.raises(ExportError, match=reason):
        run.read_pair(picture, mask, SIDE)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_is_refused_by_name(run: ModuleType, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(ExportError, match=r"cat\.png"):
        run.read_pair(tmp_path / "cat.png", white(tmp_path / "mask.png", (8, 8)), SIDE)


def test_a_picture_of_too_many_pixels_is_refused(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MAX_PIXELS", 99)
    big = white(tmp_path / "big.png", (10, 10))
    with pytest.raises(ExportError, match=r"10x10 is more than 99 pixels"):
        run.read_pair(big, big, SIDE)


@pytest.mark.parametrize(
    ("out", "reason"), [("filled", "no ending"), ("filled.xyz", "no ending"), ("no/a.png", "no folder")]
)
def test_a_place_that_cannot_be_written_is_refused_first(
    run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, reason: str
) -> None:
    given = {"--image": "none.png", "--mask": "none.png", "--model": "none", "--out": str(tmp_path / out)}
    assert run.main([word for pair in given.items() for word in pair]) == 2
    assert reason in capsys.readouterr().err


def test_what_is_not_said_is_as_the_model_asks(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Student:
        side = SIDE
        manifest: ClassVar = {"defaults": {"num_inference_steps": 3, "guidance_scale": 1.5}, "graphs": {}}

        def __init__(self, folder: Path) -> None: ...

        def fill(self, picture: np.ndarray, hole: np.ndarray, prompt: str, *how: float) -> np.ndarray:
            asked.append(how)
            return picture

    monkeypatch.setattr(run, "Student", Student)
    picture, out = str(white(tmp_path / "white.png", (SIDE, SIDE))), str(tmp_path / "filled.png")
    argv = ["--image", picture, "--mask", picture, "--out", out]
    assert run.main(argv) == run.main([*argv, "--num_inference_steps", "7", "--guidance_scale", "1"]) == 0
    assert asked == [(3, 1.5, 0), (7, 1, 0)]
    assert "has no ControlNet" in capsys.readouterr().err


def test_where_filled_pictures_go_by_themselves_can_be_written(run: ModuleType, tmp_path: Path) -> None:
    run.check_writable(Path("filled.png"))
    run.check_writable(tmp_path / "FILLED.JPG")
