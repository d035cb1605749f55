"""A graph as OpenVINO's own format, from the same graph as ONNX. OpenVINO's types do not leak past this file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from refine_control.export.onnx import Feed

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it reports each use to its makers, unasked


def convert(source: Path, path: Path, half: bool) -> None:
    """path: ending in .xml; weights go beside it, in .bin, as halves where asked. It computes in single precision."""
    import openvino

    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=half)


def quantize(source: Path, path: Path, feeds: Sequence[Feed]) -> None:
    """NNCF's post-training int8 of weights and activations, by the ranges that `feeds` reach."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    dataset, preset = nncf.Dataset([*feeds]), nncf.QuantizationPreset.MIXED
    quantized = nncf.quantize(openvino.convert_model(source), dataset, preset=preset, subset_size=len(feeds))
    openvino.save_model(quantized, path, compress_to_fp16=True)
