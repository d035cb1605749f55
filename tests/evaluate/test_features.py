"""Extractors: frozen, deterministic, honestly named; what cannot be run offline is run up to its error."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from skimage import data
from torch import nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from refine_control.errors import ModelError
from refine_control.evaluate import features
from refine_control.evaluate.features import Extractor, efficientnet_lite0, squash, standard
from refine_control.evaluate.metrics import lpips_distance


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return efficientnet_lite0()


def rgb(picture) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def test_lite0_gives_five_strides_and_one_vector(lite0):
    maps, pooled = lite0.extract(torch.rand(2, 3, 32, 32))
    assert [tuple(one.shape) for one in maps] == [
        (2, 16, 64, 64),
        (2, 24, 32, 32),
        (2, 40, 16, 16),
        (2, 112, 8, 8),
        (2, 320, 4, 4),
    ]
    assert pooled.shape == (2, 1280)


def test_lite0_is_frozen(lite0):
    assert not any(module.training for module in lite0.network.modules())
    assert not any(parameter.requires_grad for parameter in lite0.network.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    maps, pooled = lite0.extract(images)
    assert not pooled.requires_grad
    assert not any(one.requires_grad for one in maps)
    torch.testing.assert_close(lite0.extract(images)[1], pooled, rtol=0, atol=0)


def test_lite0_vector_goes_through_the_classifier_to_the_right_name(lite0):
    _, pooled = lite0.extract(rgb(data.chelsea()))
    assert lite0.network.body._fc(pooled).argmax().item() == 285  # ImageNet's Egyptian cat


def test_lite0_normalisation_fits_the_running_statistics(lite0):
    """Photographs through the first layer have about the mean the network saw in training."""
    photographs = torch.cat([squash(rgb(picture()), 128) for picture in (data.chelsea, data.coffee, data.astronaut)])
    norm = lite0.network.body._bn0
    alive = norm.running_var > 1e-3
    seen = []
    hook = norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].mean((0, 2, 3))))
    lite0.extract(photographs)
    hook.remove()
    assert ((seen[0] - norm.running_mean) / norm.running_var.sqrt())[alive].abs().mean() < 0.5


def test_lite0_is_named_in_its_scores_and_loading_draws_no_random_number():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    extractor = efficientnet_lite0()
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(extractor.scores.values()) == {f"{family}[efficientnet-lite0]" for family in ("lpips", "fid", "cmmd")}
    assert len(extractor.sha256) == 64


def test_a_wheel_file_with_other_bytes_is_not_loaded(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not the weights")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded before the digest was checked"))
    with pytest.raises(ModelError, match="install some-package"):
        features._load_from_wheel(path, "0" * 64, "some-package")


def test_squash_keeps_the_range_and_a_fitting_image():
    image = (torch.rand(1, 3, 20, 30) > 0.5).float()
    small = squash(image, 16)
    assert small.shape == (1, 3, 16, 16)
    assert 0 <= small.min() <= small.max() <= 1
    assert squash(small, 16) is small


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    folder = tmp_path / "tiny-clip"
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_a_clip_that_is_not_the_standard_one_carries_its_name(clip_folder):
    extractor = standard("clip", clip_folder)
    assert dict(extractor.scores) == {"cmmd": "cmmd[tiny-clip]"}
    assert extractor.size == 28
    maps, pooled = extractor.extract(torch.rand(2, 3, 40, 30))
    assert maps == []
    assert pooled.shape == (2, 8)


def test_clip_sees_the_published_normalisation(clip_folder):
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    image = torch.rand(2, 3, 28, 28)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(image - mean) / std).image_embeds
    torch.testing.assert_close(standard("clip", clip_folder).extract(image)[1], expected)


def test_clip_reads_safetensors_only_and_wants_all_weights(clip_folder):
    weights = clip_folder / "model.safetensors"
    save_file({"visual_projection.weight": torch.zeros(8, 16)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="no weights for"):
        standard("clip", clip_folder)
    weights.rename(clip_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        standard("clip", clip_folder)


def torchvision_stack(net: str) -> nn.Sequential:
    """torchvision's `features` as written there, with its indices, for torchmetrics to slice."""
    torch.manual_seed(0)
    if net == "alex":
        layers: list = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2)]
        layers += [nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.MaxPool2d(3, 2))
    layers, width = [], 3
    for entry in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU()] if entry else [nn.MaxPool2d(2, 2)]
        width = entry or width
    return nn.Sequential(*layers)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_standard_lpips_is_torchmetrics_lpips(net, tmp_path, monkeypatch):
    stack = torchvision_stack(net)
    path = tmp_path / f"{net}.safetensors"
    state = {f"features.{key}": value for key, value in stack.state_dict().items()}
    save_file(state | {"classifier.6.bias": torch.zeros(3)}, path)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: stack)
    theirs = torchmetrics_lpips._LPIPS(net=net)
    extractor = standard(f"lpips-{net}", path)
    assert dict(extractor.scores) == {"lpips": "lpips"}
    pred, true = torch.rand(2, 2, 3, 64, 64)
    ours = lpips_distance(
        extractor.extract(pred)[0], extractor.extract(true)[0], channel_weights=extractor.channel_weights
    )
    with torch.no_grad():
        expected = theirs(pred, true, normalize=True).flatten().double()
    assert (ours > 0).all()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_lpips_refuses_pickles_and_other_networks(tmp_path):
    (tmp_path / "vgg16.pth").touch()
    with pytest.raises(ModelError, match="pickled"):
        standard("lpips-vgg", tmp_path / "vgg16.pth")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="vgg features"):
        standard("lpips-vgg", tmp_path / "other.safetensors")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_to_install(tmp_path):
    with pytest.raises(ModelError, match="pip install torch-fidelity"):
        standard("inception", tmp_path)


def test_standard_names_the_missing_path_and_the_unknown_kind(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        standard("clip", tmp_path / "nowhere")
    with pytest.raises(ModelError, match="'resnet' is not one of"):
        standard("resnet", tmp_path)
