"""A graph as OpenVINO's own format, from the same graph as ONNX. OpenVINO's types do not leak past this file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refine_control.export.onnx import Feed


def convert(source: Path, path: Path, half: bool) -> None:
    """path: ending in .xml; weights go beside it, in .bin, as halves where asked. It computes in single precision."""
    import openvino

    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=half)


def quantize(source: Path, path: Path, feeds: Sequence[Feed], kept: Sequence[str] = ()) -> None:
    """NNCF's post-training int8 of weights and activations, by the ranges that `feeds` reach.

    kept: names of nodes that stay as they are.
    """
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    options: dict[str, Any] = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(feeds)}
    if kept:
        options["ignored_scope"] = nncf.IgnoredScope(names=[*kept], validate=False)
    quantized = nncf.quantize(openvino.convert_model(source), nncf.Dataset([*feeds]), **options)
    openvino.save_model(quantized, path, compress_to_fp16=True)
