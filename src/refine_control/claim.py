"""A folder holds one run: what was trained in it is of one recipe, one teacher and one data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from refine_control.errors import RecipeError
from refine_control.files import write_whole
from refine_control.plans import Config
from refine_control.recipe import RunConfig, load, save

R = TypeVar("R", bound=Config)


def learnt(config: Config) -> dict[str, Any]:
    """What decides the trained weights, as plain data: not where they go, how fast, or how they are looked at.

    Nor skip_corrupt, which a run that met a corrupt picture may need to go on.
    """
    data = {"cache_gb", "cache_dir", "teacher_cache_gb", "skip_corrupt"}
    aside: dict[str, Any] = {"output_dir": True, "run": True, "sample": True, "evaluate": True, "data": data}
    return config.model_dump(mode="json", exclude=aside)


def rounding(run: RunConfig) -> dict[str, Any]:
    """What of the way it runs moves the trained weights by rounding; {} where nothing is set."""
    plain = run.__class__()
    keys = ("mixed_precision", "teacher_dtype", "use_8bit_adam")
    return {key: getattr(run, key) for key in keys if getattr(run, key) != getattr(plain, key)}


def has_trained(folder: Path) -> bool:
    """Whether there is anything in a run's folder that took training."""
    return any(next(folder.glob(mark), None) for mark in ("*/checkpoints/step-*", "student", "model"))


def claim(
    config: R, folder: Path, contents: dict[str, str] | None = None, settings: dict[str, Any] | None = None
) -> None:
    """Writes folder/recipe.yaml. A folder holds one run; the same command, or one that runs it otherwise, goes on.

    contents: digests of what the recipe only names (a teacher's weights, data), kept in folder/contents.json.
    settings: what else decides how a teacher answers, kept in folder/settings.json.

    Earlier versions kept no settings, and some digests of theirs were of other things: these are not compared. Nor are
    settings that one side alone has, as other versions of a library do.

    Raises:
        RecipeError: what was trained in the folder is of another recipe; the first key that differs is named.
    """
    path, kept, told = (folder / name for name in ("recipe.yaml", "contents.json", "settings.json"))
    if has_trained(folder) and path.is_file():
        begun = load(type(config), path)
        theirs, ours = _leaves(learnt(begun)), _leaves(learnt(config))
        if kept.is_file():
            before, now = _contents(kept), contents or {}
            unknown = set() if told.is_file() else _hashed_otherwise(begun)
            theirs |= _leaves({key: before[key] for key in before.keys() - unknown}, "contents of ")
            ours |= _leaves({key: now[key] for key in now.keys() - unknown}, "contents of ")
        if told.is_file():
            before, now = _leaves(_contents(told), "teacher: "), _leaves(settings or {}, "teacher: ")
            theirs |= {key: before[key] for key in before.keys() & now.keys()}
            ours |= {key: now[key] for key in before.keys() & now.keys()}
        for key in [*ours, *theirs]:
            if ours.get(key) != theirs.get(key):
                raise RecipeError(
                    f"'{folder}' holds a run of another recipe ({key} {theirs.get(key)}, not {ours.get(key)}); "
                    "remove it or choose another output_dir (of a comparison: work_dir)"
                )
    elif path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith("format:"):
        raise RecipeError(f"'{path}' would be written over, and is not as a run writes it; choose another output_dir")
    save(config, path)
    if contents:
        write_whole(kept, json.dumps(contents, indent=1))
    write_whole(told, json.dumps(settings or {}, indent=1))


def known_commits(kind: type[R], folder: Path, names: Callable[[R], Iterable[str | None]]) -> dict[str, str]:
    """name -> name@COMMIT, of the hub's models that the run in a folder began with."""
    path = folder / "recipe.yaml"
    begun = names(load(kind, path)) if path.is_file() else ()
    return {name.partition("@")[0]: name for name in begun if name}


def _hashed_otherwise(begun: Any) -> set[str]:
    """By versions that kept no settings: the teacher after it was cast, captions of usable pictures only."""
    teacher = {"teacher"} if begun.run.teacher_dtype != "fp32" else set()
    return teacher | ({"data.labelled"} if begun.data.skip_corrupt else set())


def _contents(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"cannot read '{path}' ({error}); remove the run's folder or choose another") from None


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"stage1.steps": 100, ...}"""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
