"""What the benchmarks share: overrides of a recipe, the spread of ratios, the file that keeps a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def overrides_of(words: Sequence[str]) -> dict[str, str]:
    """['--a.b', 'c', ...] -> {'a.b': 'c', ...}"""
    return {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}


def quartiles(ratios: np.ndarray) -> dict[str, float]:
    return {q: float(np.percentile(ratios, p)) for q, p in (("low", 25), ("median", 50), ("high", 75))}


def write(result: dict[str, Any], path: Path) -> None:
    """Writes the result as JSON, and prints it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))
