"""What the method is measured against, one small file each. A recipe's line `rival: hole-only` names hole_only.py.

A file defines one of

    losses(seen, weights)   another loss for the same student, see `Seen` in distill/stages.py: distillation rivals; its
                            terms are named task, output or feature, and take the recipe's weights of these
    fill(images, masks)     inpainting without training: (N, 3, H, W) in [0, 1], (N, 1, H, W), 1 = hole -> (N, 3, H, W)
    Network()               a network of its own, see feedforward.py; trained on the same batches by the same loop

`--rival my_rival.py` adds one that lies elsewhere: a command line may name code, a recipe may not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from refine_control.distill.stages import LossFunction
from refine_control.errors import RecipeError, UserError
from refine_control.evaluate import baselines

KINDS = ("losses", "fill", "Network")


@dataclass(frozen=True)
class Rival:
    """Exactly one of losses, fill and network is there. digest: of the file, so that results follow its code."""

    name: str
    digest: str
    losses: LossFunction | None
    fill: Callable[[Tensor, Tensor], Tensor] | None
    network: Callable[[], nn.Module] | None


def known(more: Sequence[Path] = ()) -> dict[str, Path]:
    """Name -> file, of those that come with the package and of `more`.

    Raises:
        UserError: two are of one name.
    """
    ours = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    files: dict[str, Path] = {}
    for path in (*ours, *more):
        name = path.stem.replace("_", "-")
        if files.setdefault(name, path) != path:
            raise UserError(f"rival '{path}': there is a '{name}' already, '{files[name]}'; rename the file")
    return files


def find(name: str, more: Sequence[Path] = ()) -> Rival:
    """Reads a rival's file.

    Raises:
        RecipeError: there is none of that name. UserError: its file cannot be read, or does not define one of `KINDS`.
    """
    files = known(more)
    if name not in files:
        raise RecipeError(f"no rival '{name}'; there are: {', '.join(files)}; --rival FILE adds one of your own")
    path = files[name]
    module = _imported(path)
    found = {kind: getattr(module, kind) for kind in KINDS if hasattr(module, kind)}
    if len(found) != 1:
        raise UserError(
            f"rival '{path}' defines {', '.join(found) or 'nothing'}; it must define one of: {', '.join(KINDS)}"
        )
    shared = Path(baselines.__file__).read_bytes() if "fill" in found else b""  # most fills are a line that calls it
    for kind in getattr(found.get("Network"), "__mro__", ()):
        module_file = Path(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")
        if module_file.parent == Path(__file__).parent and module_file != path:  # of a rival that this one is built on
            shared += module_file.read_bytes()
    digest = hashlib.sha256(path.read_bytes() + shared).hexdigest()
    return Rival(name, digest, found.get("losses"), found.get("fill"), found.get("Network"))


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"cannot read rival '{path}'; give a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"rival '{path}' cannot be run: {type(error).__name__}: {error}") from None
    return module
