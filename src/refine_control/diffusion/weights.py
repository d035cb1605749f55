"""What a stranger's folder asks for, by its config and the headers of its files, before anything is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from refine_control.errors import ModelError

MOST_JSON = 32_000_000  # bytes; a tokenizer's vocabulary is the largest, of a few million
TEXTS = (".json", ".txt", ".model", ".jinja")  # what libraries read as a whole
LAYERS = ("layers", "blocks")  # in the names of numbers that say how many
MOST_LAYERS = 2_000  # levels times layers of each; SDXL's networks come to 80
SLACK = 10_000_000  # numbers that are computed, not stored
OWN_ATTENTION = (None, "eager", "sdpa")
# Keys by which a config makes a library read other weights, or run code that the hub has; and what they may say.
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "transformers_weights": (None,),
    "quantization_config": (None,),
    "attn_implementation": OWN_ATTENTION,
    "_attn_implementation": OWN_ATTENTION,
    "attribute_map": (None,),  # other keys' values
}


def read_json(path: Path) -> dict[str, Any]:
    """A config. Raises ValueError and OSError where it is none, or longer than any."""
    _require_file(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def check_files(folder: Path) -> None:
    """Raises ModelError where what lies in a folder cannot be read to its end, or is longer than any model's text."""
    for path in folder.rglob("*"):
        if path.exists() and not path.is_dir():
            _require_file(path)


def _require_file(path: Path) -> None:
    size, where = path.stat().st_size, f"{path.parent.name}/{path.name}"
    if not path.is_file():  # to read a pipe is to wait for good
        raise ModelError(f"{where} is not a regular file")
    if path.suffix in TEXTS and size > MOST_JSON:
        raise ModelError(f"{where} has {size} bytes, more than any of a model")


def check_names(folder: Path, names: Collection[str], weights: Collection[str]) -> None:
    """Raises ModelError where a part's folder, by what lies in it, makes libraries read other files than its weights.

    names: of its files. weights: those of them that are safetensors weights.
    """
    if "adapter_config.json" in names:
        raise ModelError(f"{folder.name} holds an adapter; merge it into the weights, adapters are not read")
    for name in names:
        if ".safetensors.index." in name and (odd := {*read_json(folder / name)["weight_map"].values()} - {*weights}):
            raise ModelError(f"{folder.name}/{name} names {min(map(repr, odd))}, not one of the weights beside it")


def check_config(where: str, config: Any) -> None:
    """Raises ModelError where a config, at any depth, has a library look elsewhere."""
    for key, value in config.items() if isinstance(config, Mapping) else enumerate(config):
        if key in ELSEWHERE and value not in ELSEWHERE[key]:
            raise ModelError(f"{where}: {key} is {value!r:.80}; weights and code from elsewhere are not read")
        if isinstance(value, (dict, list)):
            check_config(where, value)


def asks_for_more_layers(config: Mapping[str, Any], most: int = MOST_LAYERS) -> bool:
    """Whether a config asks for more layers than there can be: to make them would take days."""
    return _longest(config.values()) * math.prod(_layers(config)) > most


def check_weights(kind: Any, folder: Path, config: Mapping[str, Any], files: list[Path]) -> None:
    """Raises ModelError where the files cannot be the weights of a `kind` with this config: where one tensor's shape
    is another, or the config asks for more numbers than the files have bytes, or more layers than they have tensors.
    """
    shapes = {name: shape for file in files for name, shape in _shapes(file)}
    if asks_for_more_layers(config, 8 * len(shapes)):
        raise ModelError(f"{folder.name}/config.json asks for more layers than its files have tensors ({len(shapes)})")
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
    if not 2 <= header <= MOST_JSON:
        raise ModelError(f"{file.parent.name}/{file.name} has a header of {header} bytes, and no model has that")
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            yield name, tuple(tensors.get_slice(name).get_shape())


def _longest(values: Iterable[Any]) -> int:
    """The length of the longest list, at any depth: lists describe the same levels."""
    inner = [each.values() if isinstance(each, dict) else each for each in values if isinstance(each, dict | list)]
    return max((max(len(each), _longest(each)) for each in inner), default=1)


def _layers(config: Mapping[str, Any]) -> Iterator[int]:
    """How often layers repeat, by every number of a config that says so."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _layers(value)
        elif any(word in key for word in LAYERS):
            yield max([1, *(n for n in _numbers(value) if not isinstance(n, bool))])


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)
