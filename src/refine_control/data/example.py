"""One picture with what belongs to it, as it comes from the disk."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refine_control.errors import DataError


@dataclass(frozen=True, eq=False)
class Example:
    """One sample at its own size; nothing is resized or normalised yet.

    key      unique within its dataset
    image    uint8 (H, W, 3), RGB, 0..255
    text     the caption, or None where the source has none
    mask     uint8 (H, W) of {0, 1}, 1 = hole to fill, or None
    control  uint8 (H, W, 3), a ready conditioning image, or None
    extra    every other key of the metadata line
    """

    key: str
    image: np.ndarray
    text: str | None = None
    mask: np.ndarray | None = None
    control: np.ndarray | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def require_caption(text: Any, where: str) -> str | None:
    """`text` itself where it is a caption or None, else DataError. `where` begins the message."""
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: text is {text!r}; write the caption as a string, or leave it out")
    if text is not None and not is_unicode(text):
        raise DataError(f"{where}: text {text!r} has half of a surrogate pair; write the caption in whole characters")
    return text


def read_json(data: bytes) -> Any:
    """JSON in UTF-8; ValueError for a key that stands twice, of which json would silently take the last."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} stands twice")
        found[key] = value
    return found


def is_unicode(text: str) -> bool:
    """False with half of a surrogate pair, which JSON can spell (\\ud800) but neither tokenizers nor UTF-8 take."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def require_no_faults(faults: list[str], lenient: bool) -> None:
    """Raise DataError with the first of a data set's faults, unless lenient."""
    if faults and not lenient:
        others = f" (and {len(faults) - 1} more: data check lists them)" if faults[1:] else ""
        raise DataError(faults[0] + others)


def require_same_size(key: str, image: np.ndarray, other: np.ndarray | None, what: str) -> None:
    """Raise DataError unless `other` (H, W[, C]) is as large as `image` (H, W, 3). `what` names it in the message."""
    if other is not None and other.shape[:2] != image.shape[:2]:
        raise DataError(
            f"{key}: the {what} is {other.shape[1]}x{other.shape[0]} but the image is "
            f"{image.shape[1]}x{image.shape[0]}; resize the {what} to the image's size"
        )
