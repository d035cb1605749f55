"""A graph as OpenVINO's own format, from the same graph as ONNX. OpenVINO's types do not leak past this file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refine_control.export.onnx import Feed

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it reports each use to its makers, unasked


def convert(source: Path, path: Path, half: bool) -> None:
    """path: ending in .xml; weights go beside it, in .bin, as halves where asked. It computes in single precision."""
    import openvino

    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=half)


def quantize(source: Path, path: Path, feeds: Sequence[Feed]) -> None:
    """NNCF's post-training int8 of weights and activations, by the ranges that `feeds` reach.

    The convolutions at both ends stay as they are, so do sums and norms (NNCF's way with transformers); ranges are the
    widest seen and no average; activations and weights share each channel's range (Xiao et al. 2023, SmoothQuant,
    equation 4), of convolutions with a strength of 0.5, of matrix products with NNCF's own.
    """
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.convert_model(source)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([*feeds]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=_ends(model)),
        subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=0.5),
        ),
    )
    openvino.save_model(quantized, path, compress_to_fp16=True)


def _ends(model: Any) -> list[str]:
    """As onnx._ends: the convolutions that read an input of the graph, and the first and the last of all."""
    kinds = ("Convolution", "GroupConvolution")
    found = [node for node in model.get_ordered_ops() if node.get_type_name() in kinds]
    reading = [node for node in found if node.input_value(0).get_node().get_type_name() == "Parameter"]
    return sorted({node.get_friendly_name() for node in [*found[:1], *reading, *found[-1:]]})
