"""The graphs compute what the model computes, the condition embedding taken out."""

from pathlib import Path

import pytest
import torch

from refine_control.diffusion import store
from refine_control.diffusion.model import EmbeddedDenoiser
from refine_control.diffusion.text import Text
from refine_control.errors import ModelError
from refine_control.export import onnx
from refine_control.export.graph import Graph, graphs_of
from tiny import SIDE, tiny_model
from tiny_sd import save_pipeline


@torch.no_grad()
def test_the_condition_can_be_embedded_beforehand() -> None:
    model = tiny_model().freeze()
    control, x_t, t = torch.rand(2, 3, SIDE, SIDE), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    text = model.embed(["a red cat", ""])
    embedded = EmbeddedDenoiser(model.denoiser, model.downscale)
    torch.testing.assert_close(embedded(x_t, t, text, embedded.embed(control)), model.denoiser(x_t, t, text, control))


def test_the_networks_are_shared_and_left_as_they_are() -> None:
    model = tiny_model()
    before = [*model.denoiser.state_dict()]
    embedded = EmbeddedDenoiser(model.denoiser, model.downscale)
    assert [*model.denoiser.state_dict()] == before
    assert {id(p) for p in embedded.parameters()} == {id(p) for p in model.denoiser.parameters()}


@torch.no_grad()
def test_sdxl_reads_two_encoders_and_its_own_sizes(tmp_path: Path) -> None:
    model = store.load(str(save_pipeline(tmp_path / "xl", "sdxl"))).freeze()
    graphs = graphs_of(model)
    assert graphs["text_encoder"].outputs == ("tokens", "pooled")
    inputs, control = graphs["denoiser"].inputs, graphs["condition"].inputs["control"]
    expected = model.denoiser(inputs["x_t"], inputs["t"], Text(inputs["tokens"], inputs["pooled"]), control)
    torch.testing.assert_close(graphs["denoiser"].expected()[0], expected)


def test_several_control_pictures_are_refused() -> None:
    model = tiny_model()
    model.denoiser.module.register_to_config(conditioning_channels=6)
    with pytest.raises(ModelError, match="2 control pictures"):
        graphs_of(model)


def test_a_part_that_no_exporter_takes_is_named(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("cannot be traced")

    graph = Graph("denoiser", Odd(), {"x": torch.zeros(2, 3)}, ("y",))
    with pytest.raises(ModelError, match=r"its denoiser cannot be exported: .*"):
        onnx.write_fp32(graph, tmp_path / "odd.onnx")
