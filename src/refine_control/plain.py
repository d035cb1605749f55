"""YAML as plain data. It may be a stranger's: it is read, or refused, in one line and little time."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import yaml

MOST_VALUES = 100_000  # of a document, those that an alias repeats counted each time
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
MERGE = "tag:yaml.org,2002:merge"  # of the key <<, which may stand beside another


def read_yaml(text: str) -> Any:
    """What `yaml.safe_load` returns.

    Raises:
        ValueError: no YAML, a key that stands twice, of which YAML would take the last, or aliases without end.
    """
    try:
        tree = yaml.load(text, _Loader)
    except Exception as error:  # a number, a date or a depth that there is not raises nearly every type
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    count, left = 0, [tree]
    while left:
        count, value = count + 1, left.pop()
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, aliases counted each time")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return tree


def read_flag(text: str) -> Any:
    """The value of a flag: read as YAML, but text as it is typed, be there a '#' in it, and no numbers of its own kind.

    In YAML 1.1 010 is 8, 12:30 is 750, and 2024-01-01 is no text: here these stay text, unless they stand in a list.

    Raises:
        ValueError: see `read_yaml`.
    """
    value, stripped = read_yaml(text), text.strip()
    if isinstance(value, str) and stripped[:1] not in ("'", '"'):
        return text
    if isinstance(value, date) or (value is None and stripped not in ("", "~", "null", "Null", "NULL")):
        return text
    if isinstance(value, int) and not isinstance(value, bool) and not WHOLE.fullmatch(stripped):
        return text
    return text if isinstance(value, float | bool) and (":" in text or "#" in text) else value


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    reason = f"the key {key.value!r} stands twice"
                    raise yaml.MarkedYAMLError(problem=reason, problem_mark=key.start_mark)
                seen.add(key.value)
        return node
