"""The rooms stand in one line; imports run along it, never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import refine_control

SOURCE = Path(refine_control.__file__).parent
ROOMS = [
    "errors",
    "files",
    "provenance",
    "plain",
    "runtime",
    "command",
    "plans",
    "recipe",
    "claim",
    "data",
    "diffusion",
    "student",
    "distill",
    "evaluate",
    "compare",
    "export",
    "serve",
    "zoo",
]
DOORS = ["cli", "__main__"]  # these may know every room, and no room knows them
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
MOST_LINES = 320


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def rooms_imported(code: str) -> set[str]:
    """Rooms that a file imports, at its top or inside a function. `from refine_control import __version__` is none."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "refine_control" else {str(node.module)}
    parts = [name.split(".") for name in found]
    return {part[1] for part in parts if part[0] == "refine_control" and len(part) > 1} & {*ROOMS, *DOORS}


@pytest.mark.parametrize(
    ("code", "rooms"),
    [
        ("import refine_control.data.batch", {"data"}),
        ("from refine_control.diffusion.store import load", {"diffusion"}),
        ("from refine_control import recipe, __version__", {"recipe"}),
        ("def f():\n    from refine_control.cli import main", {"cli"}),
        ("import torch\nfrom pathlib import Path", set()),
    ],
)
def test_the_reader_of_imports_sees_them(code: str, rooms: set[str]) -> None:
    assert rooms_imported(code) == rooms


def test_every_file_stands_in_a_room() -> None:
    assert {room_of(path) for path in FILES} <= {*ROOMS, *DOORS}, "give a new room its place in ROOMS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    allowed = {*ROOMS, *DOORS} if room in DOORS else set(ROOMS[: ROOMS.index(room) + 1])
    assert rooms_imported(path.read_text(encoding="utf-8")) <= allowed


def test_the_package_itself_imports_nothing() -> None:
    assert rooms_imported((SOURCE / "__init__.py").read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_can_be_read_at_once(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize("module", ["refine_control.cli", "refine_control.recipe"])
def test_help_and_recipes_wait_for_no_heavy_import(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "numpy", "PIL", "cv2", "matplotlib")
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == []
