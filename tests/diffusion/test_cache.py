"""What is kept on disk is what would be computed, and anything that decides it makes it anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from refine_control.data.loader import UNLABELLED, Pictures
from refine_control.data.source import open_dataset, open_usable
from refine_control.diffusion import cache as caching
from refine_control.diffusion.cache import EncoderCache, digest
from refine_control.diffusion.encode import Encoder
from refine_control.diffusion.model import Model
from refine_control.recipe import DataConfig
from tiny import DATA, WORDS, tiny_model, write_folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "labelled": write_folder(tmp_path / "labelled", 5),
        "plain": write_folder(tmp_path / "plain", 4, captioned=False),
        "cache": tmp_path / "cache",
    }


def cached(model: Model, folders: dict[str, Path], config: DataConfig = DATA, variants: int = 2) -> EncoderCache:
    sets = (Pictures(open_dataset(folders[name]), config, variants) for name in ("labelled", "plain"))
    return EncoderCache(model, *sets, folders["cache"])


@contextmanager
def counted(model: Model) -> Iterator[list[str]]:
    """Which networks run inside."""
    runs: list[str] = []
    networks: dict[str, nn.Module] = {"vae": model.vae.encoder, "text": model.text_encoder}
    hooks = [net.register_forward_hook(lambda *_, name=name: runs.append(name)) for name, net in networks.items()]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def test_latents_are_those_of_the_pictures_of_either_set(teacher: Model, folders: dict[str, Path]) -> None:
    cache = cached(teacher, folders)
    for name, offset in (("labelled", 0), ("plain", UNLABELLED)):
        pictures = Pictures(open_dataset(folders[name]), DATA, 2)
        images = torch.from_numpy(np.stack([pictures[n].image for n in (7, 0, 3)])).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            expected = teacher.encode(images / 127.5 - 1)
        torch.testing.assert_close(cache.latents([offset + n for n in (7, 0, 3)]), expected, rtol=0, atol=1e-5)


def test_text_is_that_of_the_captions(teacher: Model, folders: dict[str, Path]) -> None:
    cache = cached(teacher, folders)
    captions = [WORDS[2], "", WORDS[0]]
    kept = cache.text(captions)
    assert kept is not None
    with torch.no_grad():
        torch.testing.assert_close(kept[0], teacher.embed(captions).tokens, rtol=0, atol=1e-5)


def test_a_caption_that_is_not_kept_is_computed(teacher: Model, folders: dict[str, Path]) -> None:
    encoder = Encoder(teacher, 0.1, cached(teacher, folders))
    with torch.no_grad():
        expected = teacher.embed(["somebody else's words", WORDS[1]]).tokens
    torch.testing.assert_close(encoder.text(["somebody else's words", WORDS[1]]).tokens, expected, rtol=0, atol=1e-5)


def test_a_second_run_computes_nothing(teacher: Model, folders: dict[str, Path]) -> None:
    cached(teacher, folders)
    with counted(teacher) as runs:
        encoder = Encoder(teacher, 0.1, cached(teacher, folders))
        encoder.text([WORDS[0], ""])
    assert "vae" not in runs
    assert len(runs) == 1, "one caption is embedded to know the shape"


@pytest.mark.parametrize("change", ["vae", "picture", "resolution", "variants"])
def test_what_decides_the_latents_makes_them_anew(folders: dict[str, Path], change: str) -> None:
    model, config, variants = tiny_model().freeze(), DATA, 2
    cached(model, folders)
    if change == "vae":
        model.vae.quant_conv.bias.data += 1e-3
    elif change == "picture":
        Image.new("RGB", (16, 16)).save(folders["plain"] / "0.png")
    elif change == "resolution":
        config = DATA.model_copy(update={"resolution": 8})
    else:
        variants = 3
    with counted(model) as runs:
        cached(model, folders, config, variants)
    assert "vae" in runs


def test_folders_in_another_order_have_latents_in_another_order(teacher: Model, folders: dict[str, Path]) -> None:
    labelled = Pictures(open_dataset(folders["labelled"]), DATA, 1)
    paths = [str(folders["plain"]), str(folders["labelled"])]
    for order in (paths, paths[::-1]):
        plain = Pictures(open_usable(order, "train", skip_corrupt=False), DATA, 1)
        cache = EncoderCache(teacher, labelled, plain, folders["cache"])
        image = torch.from_numpy(plain[0].image)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(cache.latents([UNLABELLED]), teacher.encode(image), rtol=0, atol=1e-5)


def test_what_decides_the_text_makes_it_anew(folders: dict[str, Path]) -> None:
    model = tiny_model().freeze()
    cached(model, folders)
    before = digest(model.text_encoder)
    next(model.text_encoder.parameters()).data[0] += 1e-3
    assert digest(model.text_encoder) != before
    with counted(model) as runs:
        cached(model, folders)
    assert runs.count("text") > 1


def test_large_pictures_are_encoded_few_at_a_time(
    teacher: Model, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = cached(teacher, folders)
    monkeypatch.setattr(caching, "PIXELS", DATA.resolution**2)
    with counted(teacher) as runs:
        alone = cached(teacher, folders | {"cache": folders["cache"].with_name("other")})
    assert runs.count("vae") == 2 * (5 + 4)
    torch.testing.assert_close(alone.latents([0, 3]), together.latents([0, 3]), rtol=0, atol=1e-5)
