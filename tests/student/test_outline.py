"""A teacher is planned for by its configs alone."""

import shutil
from pathlib import Path

import pytest

import tiny_sd
from published import write_configs
from refine_control.diffusion import store
from refine_control.errors import ModelError
from refine_control.student.outline import plan_teacher
from refine_control.student.plan import cost, plan_cost


@pytest.mark.parametrize(("family", "nets"), [("sd", 0), ("sd", 1), ("sd2", 1), ("sdxl", 2)])
def test_the_outline_costs_what_the_teacher_costs(family: str, nets: int, tmp_path: Path) -> None:
    folder = tiny_sd.save_pipeline(tmp_path / "model", family, nets)
    teacher, outline = store.load(str(folder)), plan_teacher(str(folder))
    assert cost(outline.denoiser, outline) == cost(teacher.denoiser, teacher)
    assert plan_cost("bk-small", outline) == plan_cost("bk-small", teacher)
    assert all(tensor.device.type == "meta" for tensor in outline.denoiser.state_dict().values())


def test_no_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_sd.save_pipeline(tmp_path / "model")
    before = cost(plan_teacher(str(folder)).denoiser, plan_teacher(str(folder)))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    assert cost(plan_teacher(str(folder)).denoiser, plan_teacher(str(folder))) == before


def test_controlnets_saved_on_their_own_replace_the_pipelines(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "alone", "sd15", module=False)
    assert plan_teacher(str(folder)).denoiser.module is None
    other = write_configs(tmp_path / "pair", "sd15") / "controlnet"
    one, two = plan_teacher(str(folder), [str(other)]), plan_teacher(str(tmp_path / "pair"), [str(other)] * 2)
    assert sum(p.numel() for p in one.denoiser.module.parameters()) == 361_279_120
    assert len(two.denoiser.nets) == 2


@pytest.mark.parametrize(
    ("missing", "words"),
    [("unet", "unet/config.json"), ("vae", "vae/config.json"), ("controlnet", "controlnet/config.json")],
)
def test_a_missing_config_is_named(missing: str, words: str, tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "model", "sd15")
    shutil.rmtree(folder / missing)
    with pytest.raises(ModelError, match=words):
        plan_teacher(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "org/model", "zoo:none"])
def test_a_name_that_leads_nowhere(name: str) -> None:
    with pytest.raises(ModelError, match=name.rsplit(":")[-1]) as caught:
        plan_teacher(name)
    assert "\n" not in str(caught.value)


def test_a_config_that_makes_no_network(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "model", "sd15")
    (folder / "unet/config.json").write_text('{"block_out_channels": [320]}')
    with pytest.raises(ModelError, match="no network comes of the configs of"):
        plan_teacher(str(folder))
