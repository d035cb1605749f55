"""What a stranger's folder asks for, by its config and the headers of its files, before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from refine_control.errors import ModelError

MOST_JSON = 32_000_000  # bytes; a tokenizer's vocabulary is the largest, of a few million
LAYERS = ("layers", "blocks")  # in the names of numbers that say how many
SLACK = 10_000_000  # numbers that are computed, not stored


def check_weights(kind: Any, folder: Path, config: Mapping[str, Any], files: list[Path]) -> None:
    """Raises ModelError where the files cannot be the weights of a `kind` with this config: where one tensor's shape
    is another, or the config asks for more numbers than the files have bytes, or more layers than they have tensors.
    """
    shapes = {name: shape for file in files for name, shape in _shapes(file)}
    count = math.prod(max(1, number) for number in _layers(config))
    if count > 8 * len(shapes):
        raise ModelError(f"{folder.name}/config.json asks for {count} layers, and its files have {len(shapes)} tensors")
    with torch.device("meta"):
        plain = {key: value for key, value in config.items() if not key.startswith("_")}
        transformer = issubclass(kind, PreTrainedModel)
        network = kind(kind.config_class(**plain)) if transformer else kind.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in wanted.keys() & shapes.keys():
        if wanted[name] != shapes[name]:
            raise ModelError(f"{folder.name}: {name} is {shapes[name]} in its file, {wanted[name]} by its config.json")
    asked, there = sum(map(math.prod, wanted.values())), sum(file.stat().st_size for file in files)
    if asked > there + SLACK:
        raise ModelError(f"{folder.name}/config.json asks for {asked} numbers, and its files have {there} bytes")


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of each tensor in a file; safetensors itself refuses headers that say more than is there."""
    with file.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if header > MOST_JSON:
        raise ModelError(f"{file.parent.name}/{file.name} has a header of {header} bytes, more than any model")
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            yield name, tuple(tensors.get_slice(name).get_shape())


def _layers(config: Mapping[str, Any]) -> Iterator[int]:
    """How often layers repeat, by every number of a config that says so."""
    for key, value in config.items():
        if isinstance(value, list):
            yield len(value)
        if any(word in key for word in LAYERS):
            yield max((n for n in _numbers(value) if not isinstance(n, bool)), default=1)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)
