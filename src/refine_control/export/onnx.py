"""A graph as ONNX, in the precision asked for. ONNX's own types do not leak past this file."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static, shape_inference

from refine_control.errors import ModelError
from refine_control.export.graph import Graph

Feed = dict[str, np.ndarray]
BIG = 1.5e9  # bytes; a file of protobuf ends at 2 GiB, and torch puts weights beside the graph from 1.5 GiB on
WORTH_HALVING = 256  # numbers; smaller tensors stay as they are
QUANTIZED = ["Conv", "MatMul", "Gemm"]


def write_fp32(graph: Graph, path: Path) -> None:
    """Writes the graph with its batch dimension left open; weights beyond 2 GB stand beside it, in path + '.data'.

    Raises:
        ModelError: no exporter can express it; the graph and the reason are named.
    """
    reasons = []
    for dynamo in (True, False):  # the second is older and takes some modules that the first does not
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _export(graph, path, dynamo)
                _forget_origins(path)
            return
        except Exception as error:  # whatever torch makes of a module that it cannot express
            reasons.append(" ".join(str(error).split())[:200])
    raise ModelError(f"its {graph.name} cannot be exported: {reasons[0]}")


def _export(graph: Graph, path: Path, dynamo: bool) -> None:
    names = [*graph.inputs]
    if dynamo:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # says at each export that torchvision is not there
        batch = torch.export.Dim("batch", min=1, max=1024)
        how: dict = {"dynamic_shapes": (tuple({0: batch} for _ in names),)}
    else:
        how = {"dynamic_axes": {name: {0: "batch"} for name in (*names, *graph.outputs)}, "opset_version": 18}
    torch.onnx.export(
        graph.module,
        tuple(graph.inputs.values()),
        path,
        dynamo=dynamo,
        input_names=names,
        output_names=[*graph.outputs],
        external_data=sum(p.nbytes for p in graph.module.parameters()) > BIG,
        verbose=False,
        **how,
    )


def _forget_origins(path: Path) -> None:
    """Drops the line of Python that each node came from: a tenth of a small graph's bytes, and this machine's paths."""
    model = onnx.load(path, load_external_data=False)
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    path.write_bytes(model.SerializeToString())


def halve(source: Path, path: Path) -> None:
    """The same graph with its weights kept in half precision. It computes in single precision, as every CPU can."""
    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < WORTH_HALVING or np.abs(values).max() > 65504:
            continue
        whole = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{whole}.half"))
        casts.append(helper.make_node("Cast", [f"{whole}.half"], [whole], name=f"{whole}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _save(model, path)


def copy(source: Path, path: Path) -> None:
    """The graph as it is, with the file of its weights where it has one."""
    _save(onnx.load(source), path)


def quantize(source: Path, path: Path, feeds: Sequence[Feed]) -> None:
    """Weights and activations as int8 (one scale a channel and one a tensor), by the ranges that `feeds` reach.

    The convolutions at both ends stay as they are: small, and what they round every later layer sees.
    """
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepared.onnx"
        # Shapes and a tidied graph would be written to a folder that the weights beside the graph are not in.
        big = _bytes_beside(source) > 0
        how = {
            "skip_symbolic_shape": True,
            "skip_onnx_shape": big,
            "skip_optimization": big,
            "save_as_external_data": big,
        }
        shape_inference.quant_pre_process(source, prepared, **how)
        quantize_static(
            prepared,
            path,
            _Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_ends(prepared),
            use_external_data_format=big,
        )


class _Feeds(CalibrationDataReader):
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._left: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._left, None)


def _ends(path: Path) -> list[str]:
    """The names of the convolutions that read an input of the graph, and of the first and the last of all."""
    graph = onnx.load(path, load_external_data=False).graph
    inputs = {each.name for each in graph.input}
    found = [node for node in graph.node if node.op_type == "Conv"]
    return [node.name for node in found if node in (found[0], found[-1]) or node.input[0] in inputs]


def _bytes_beside(path: Path) -> int:
    beside = path.with_name(f"{path.name}.data")
    return beside.stat().st_size if beside.is_file() else 0


def _save(model: onnx.ModelProto, path: Path) -> None:
    big = model.ByteSize() > BIG
    onnx.save(model, path, save_as_external_data=big, location=f"{path.name}.data")
