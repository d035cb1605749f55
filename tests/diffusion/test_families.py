"""Stock SD 1, SD 2 and SDXL pipelines, with no, one or several ControlNets: read, run and saved as diffusers does."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, MultiControlNetModel
from torch import Tensor, nn

from refine_control.diffusion.model import Denoiser, Model
from refine_control.diffusion.sample import sample
from refine_control.diffusion.store import PIPELINES, load, save
from refine_control.diffusion.taps import block_points, feature_shapes
from refine_control.diffusion.text import Text
from refine_control.errors import ModelError
from refine_control.recipe import SampleConfig
from tiny_sd import NAMES, save_pipeline, tiny_controlnet, tiny_pipeline, tiny_unet

SEEDS = [11, 12]
CAPTIONS = ["a red cat", "two yellow suns"]
FAMILIES = [*NAMES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """(family, number of ControlNets) -> a saved stock pipeline."""
    root = tmp_path_factory.mktemp("stock")
    return {(f, n): save_pipeline(root / f"{f}-{n}", f, n) for f in FAMILIES for n in (0, 1, 2)}


def stock_of(folder: Path) -> DiffusionPipeline:
    """The saved pipeline, sampling by DDIM as we do; like us it does not clip latents where its config is silent."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    config = {"clip_sample": False, **pipeline.scheduler.config}
    pipeline.scheduler = DDIMScheduler.from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def control_of(nets: int) -> Tensor | None:
    """Another picture for each net, stacked in channels."""
    return torch.rand(2, 3 * nets, 16, 16, generator=torch.Generator().manual_seed(7)) if nets else None


def stock_pictures(pipeline: DiffusionPipeline, control: Tensor | None, config: SampleConfig) -> Tensor:
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    pictures = {}
    if control is not None:
        parts = list(control.chunk(control.shape[1] // 3, dim=1))
        pictures["image"] = parts if len(parts) > 1 else parts[0]
    drawn = pipeline(
        prompt=CAPTIONS,
        latents=noise,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        output_type="pt",
        **pictures,
    )
    return drawn.images * 2 - 1


@pytest.mark.parametrize("nets", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_the_stock_pipeline(folders: dict, family: str, nets: int) -> None:
    model = load(str(folders[family, nets])).freeze()
    stock, control = stock_of(folders[family, nets]), control_of(nets)
    for guidance_scale in (1, 3):
        config = SampleConfig(num_inference_steps=3, guidance_scale=guidance_scale)
        ours = sample(model, control, CAPTIONS, config, SEEDS)
        torch.testing.assert_close(ours, stock_pictures(stock, control, config), rtol=0, atol=1e-4)
        assert ours.std() > 0.05, "pictures that are all one grey would agree too"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_what_the_stock_pipeline_encodes(folders: dict, family: str) -> None:
    model, stock = load(str(folders[family, 0])).freeze(), stock_of(folders[family, 0])
    tokens, empty, *pooled = stock.encode_prompt(
        CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    ours, ours_empty = model.embed(CAPTIONS), model.embed(["", ""])
    torch.testing.assert_close((ours.tokens, ours_empty.tokens), (tokens, empty), rtol=0, atol=1e-5)
    assert tokens.std() > 0.1
    if family == "sdxl":
        torch.testing.assert_close((ours.pooled, ours_empty.pooled), tuple(pooled), rtol=0, atol=1e-5)
        assert not ours_empty.tokens.any()
        assert not ours_empty.pooled.any()
    else:
        assert ours.pooled is None
        assert ours_empty.tokens.any()


def test_an_empty_caption_is_empty_beside_others_too(folders: dict) -> None:
    model = load(str(folders["sdxl", 0])).freeze()
    mixed, alone = model.embed(["a red cat", ""]), model.embed(["a red cat"])
    torch.testing.assert_close(mixed.tokens[:1], alone.tokens)
    torch.testing.assert_close(mixed.pooled[:1], alone.pooled)
    assert not mixed.tokens[1].any()
    assert not mixed.pooled[1].any()


def test_sdxl_that_does_not_force_zeros_encodes_the_empty_caption(tmp_path: Path) -> None:
    model = load(str(save_pipeline(tmp_path / "given", "sdxl", 0, force_zeros_for_empty_prompt=False))).freeze()
    save(model, tmp_path / "saved")
    for folder in (tmp_path / "given", tmp_path / "saved"):
        _, empty, _, pooled = stock_of(folder).encode_prompt(CAPTIONS[0], device="cpu")
        ours = load(str(folder)).freeze().embed([""])
        torch.testing.assert_close((ours.tokens, ours.pooled), (empty, pooled), rtol=0, atol=1e-5)
        assert empty.std() > 0.1


def test_an_encoder_that_asks_for_it_gets_the_attention_mask(folders: dict, tmp_path: Path) -> None:
    shutil.copytree(folders["sd", 0], tmp_path / "masked")
    config = tmp_path / "masked" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_attention_mask": True}))
    masked, plain = (load(str(folder)).freeze().embed(["red"]) for folder in (tmp_path / "masked", folders["sd", 0]))
    tokens, _ = stock_of(tmp_path / "masked").encode_prompt(["red"], "cpu", 1, False)
    torch.testing.assert_close(masked.tokens, tokens, rtol=0, atol=1e-5)
    assert not torch.allclose(masked.tokens, plain.tokens, atol=1e-3), "padding is seen where nothing masks it"


# Sizes, which SDXL is told


def told_sizes(denoiser: Denoiser, x_t: Tensor, control: Tensor | None) -> list[list[float]]:
    seen: list[Tensor] = []
    handle = denoiser.foundation.add_time_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        text = Text(torch.zeros(len(x_t), 8, 40), torch.zeros(len(x_t), 20))
        denoiser(x_t, torch.full((len(x_t),), 500), text, control)
    handle.remove()
    return seen[0].view(len(x_t), -1).tolist()


def test_sdxl_is_told_the_size_in_pixels() -> None:
    unet = tiny_unet("sdxl")
    x_t = torch.zeros(2, 4, 8, 16)
    with_net = Denoiser(unet, tiny_controlnet(unet), downscale=2)
    assert told_sizes(with_net, x_t, torch.zeros(2, 3, 16, 32)) == [[16, 32, 0, 0, 16, 32]] * 2
    assert told_sizes(Denoiser(unet, downscale=2), x_t, None) == [[16, 32, 0, 0, 16, 32]] * 2
    assert told_sizes(Denoiser(unet), x_t, None) == [[64, 128, 0, 0, 64, 128]] * 2


# Which classes


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_supported_class_is_read(kind: str, tmp_path: Path) -> None:
    family, nets = "sdxl" if "XL" in kind else "sd", int("ControlNet" in kind)
    model = load(str(save_pipeline(tmp_path, family, nets, kind=kind)))
    assert (model.text_encoder_2 is not None) == (family == "sdxl")
    assert len(model.denoiser.nets) == nets
    assert type(model.pipeline()).__name__ == kind.replace("Inpaint", "").replace("Img2Img", "")


@pytest.mark.parametrize(
    "kind", ["StableDiffusion3Pipeline", "StableDiffusionInpaintPipeline", ["my_pipeline", "X"], None]
)
def test_another_class_is_named_beside_the_supported(folders: dict, tmp_path: Path, kind: object) -> None:
    broken = changed_index(folders["sd", 1], tmp_path, _class_name=kind)
    assert f"is a {kind}; supported: StableDiffusionPipeline" in refused(broken)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("unet", ["diffusers", "UNetMotionModel"]),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"]),
        ("tokenizer", [None, None]),
    ],
)
def test_a_part_of_another_class_is_named(folders: dict, tmp_path: Path, part: str, kind: list) -> None:
    broken = changed_index(folders["sd", 1], tmp_path, **{part: kind})
    assert f"its {part} is a {kind[1]}; supported: " in refused(broken)


def test_a_controlnet_of_another_class_is_named(folders: dict, tmp_path: Path) -> None:
    shutil.copytree(folders["sd", 1], tmp_path / "union")
    config = tmp_path / "union" / "controlnet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "ControlNetUnionModel"}))
    assert "'controlnet' is a ControlNetUnionModel; supported: ControlNetModel" in refused(tmp_path / "union")


def changed_index(folder: Path, root: Path, **changes: object) -> Path:
    shutil.copytree(folder, root / "broken")
    index = root / "broken" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return root / "broken"


def refused(name: Path, controlnets: tuple[str, ...] = ()) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(name), controlnets=controlnets)
    assert "\n" not in str(caught.value)
    assert str(name) in str(caught.value)
    return str(caught.value)


# ControlNets


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_several_controlnets_keep_their_order(folders: dict) -> None:
    model = load(str(folders["sd", 2]))
    assert isinstance(model.denoiser.module, MultiControlNetModel)
    assert [
        seed for net in model.denoiser.nets for seed in (0, 1) if same(net, tiny_controlnet(tiny_unet(), seed))
    ] == [0, 1]
    assert model.denoiser.control_channels == 6


def test_controlnets_of_their_own_take_the_pipelines_place(folders: dict, tmp_path: Path) -> None:
    nets = [tiny_controlnet(tiny_unet(), seed) for seed in (5, 6)]
    names = [str(tmp_path / f"net-{place}") for place in range(2)]
    for net, name in zip(nets, names, strict=True):
        net.save_pretrained(name)
    for own in (0, 2):
        one, two = (load(str(folders["sd", own]), controlnets=names[:count]) for count in (1, 2))
        assert same(one.denoiser.module, nets[0])
        assert [same(net, given) for net, given in zip(two.denoiser.nets, nets, strict=True)] == [True, True]
    assert "no saved ControlNet: it has no config.json" in refused(folders["sd", 0], (str(tmp_path / "nowhere"),))
    assert "'unet' is a UNet2DConditionModel" in refused(folders["sd", 0], (str(folders["sd", 0] / "unet"),))


@pytest.mark.parametrize(("nets", "channels"), [(1, 6), (2, 3), (2, None)])
def test_a_control_of_other_channels_is_refused(folders: dict, nets: int, channels: int | None) -> None:
    model = load(str(folders["sd", nets]))
    control = None if channels is None else torch.zeros(1, channels, 16, 16)
    with pytest.raises(ModelError, match=f"has {channels or 0} channels but the model's {nets} .* take {3 * nets}"):
        sample(model, control, [""], SampleConfig(num_inference_steps=1), [0])


def test_the_blocks_of_every_net_can_be_tapped(folders: dict) -> None:
    none, two = (load(str(folders["sd", nets])) for nets in (0, 2))
    assert {point.partition(".")[0] for point in block_points(none.denoiser)} == {"foundation"}
    latents, text = torch.zeros(1, 4, 8, 8), Text(torch.zeros(1, 8, 16))
    shapes = feature_shapes(two.denoiser, (latents, torch.tensor([5]), text, torch.zeros(1, 6, 16, 16)))
    assert shapes["module.nets.0.down_blocks.0"] == shapes["module.nets.1.down_blocks.0"] == (8, 4, 4)
    assert shapes["foundation.down_blocks.0"] == (8, 4, 4)


def test_gradients_reach_every_part_of_every_net(folders: dict) -> None:
    denoiser = load(str(folders["sdxl", 2])).denoiser
    text = Text(torch.randn(2, 8, 40), torch.randn(2, 20))
    out = denoiser(torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), text, torch.rand(2, 6, 16, 16))
    out.square().mean().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


# Saved again


@pytest.mark.parametrize("nets", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_is_the_stock_class_with_the_teachers_values(
    folders: dict, tmp_path: Path, family: str, nets: int
) -> None:
    given = folders[family, nets]
    save(load(str(given)), tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(again).__name__ == f"{NAMES[family]}{'ControlNet' if nets else ''}Pipeline"
    for ours, theirs in zip(networks_of(again), networks_of(stock_of(given)), strict=True):
        assert same(ours, theirs)
    before, after = (scheduler_values(folder) for folder in (given, tmp_path))
    assert before.items() <= after.items()
    kind = getattr(diffusers, json.loads((given / "model_index.json").read_text())["scheduler"][1])
    back = kind.from_pretrained(tmp_path, subfolder="scheduler")
    assert {key: back.config[key] for key in before} == before, "the teacher's own scheduler still reads its values"


def networks_of(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [part for _, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)]


def scheduler_values(folder: Path) -> dict:
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def test_an_sdxl_model_survives_its_folder(folders: dict, tmp_path: Path) -> None:
    before = load(str(folders["sdxl", 2]))
    save(before, tmp_path)
    after: Model = load(str(tmp_path))
    config = SampleConfig(num_inference_steps=2)
    drawn = [sample(model, control_of(2), CAPTIONS, config, SEEDS) for model in (before, after)]
    assert torch.equal(*drawn)
    assert (after.resolution, after.downscale, after.empty_is_zeros) == (16, 2, True)


def test_freezing_and_moving_reach_both_text_encoders(folders: dict) -> None:
    model = load(str(folders["sdxl", 1])).freeze().to("meta")
    for network in (model.text_encoder, model.text_encoder_2, model.vae, *model.denoiser.nets):
        assert not any(p.requires_grad or p.device.type != "meta" for p in network.parameters())


def test_a_folder_with_a_variant_only(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd", 1)
    pipeline.save_pretrained(tmp_path / "only", variant="fp16")
    assert same(load(str(tmp_path / "only")).denoiser.module, pipeline.controlnet)
    other = tiny_pipeline("sd", 1, controlnet=tiny_controlnet(tiny_unet(), seed=9))
    other.save_pretrained(tmp_path / "only")
    assert same(load(str(tmp_path / "only")).denoiser.module, other.controlnet), "plain weights win"
