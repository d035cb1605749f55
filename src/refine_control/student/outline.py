"""A teacher as its configs say, without its weights: all that planning needs, in a second, for any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine_control.diffusion import hub, store
from refine_control.diffusion.belonging import check_belonging
from refine_control.diffusion.build import build_outline, build_text_outline
from refine_control.diffusion.model import Model
from refine_control.diffusion.trial import try_outline
from refine_control.diffusion.weights import asks_for_more_layers, check_config, read_json
from refine_control.errors import ModelError, refusal
from refine_control.student.plan import probe


@dataclass(frozen=True)
class Words:
    """What a text encoder's config says of its tokenizer."""

    vocabulary: int
    model_max_length: int

    def __len__(self) -> int:
        return self.vocabulary


def plan_teacher(name: str, controlnets: Sequence[str] = ()) -> Model:
    """A teacher whose networks lie on the meta device; it plans, but it cannot run.

    Args:
        name: a saved pipeline's folder, zoo:NAME, or org/repo@REVISION on the hub, of which only configs are read.
        controlnets: ControlNets saved on their own, instead of the pipeline's; with none of either, no module.

    Raises:
        ModelError: a config is not there, makes no network, or does not belong to the others.
    """
    folder = str(store.resolve(name)) if name.startswith("zoo:") else name
    own = _own_controlnets(folder) if not controlnets else []
    configs = {part: _config(folder, part) for part in ("unet", "vae")}
    second = [_config(folder, "text_encoder_2")] if configs["unet"].get("addition_embed_type") else []
    texts = [_config(folder, "text_encoder"), *second]
    nets = [_config(net, "") for net in controlnets] or [_config(folder, part) for part in own]
    try:
        denoiser, vae = build_outline(configs["unet"], nets, configs["vae"])
        encoders = [build_text_outline(config) for config in texts]
        words: list[Any] = [Words(each.config.vocab_size, each.config.max_position_embeddings) for each in encoders]
        model = Model(denoiser, vae, encoders[0], words[0], {}, *encoders[1:], *words[1:])
        check_belonging(model, name, controlnets)
        try_outline(model, probe(model, "meta")[2])
    except Exception as error:  # diffusers and transformers raise nearly every type on a malformed config
        raise refusal(name, "no network comes of the configs of", error) from None
    return model


def _own_controlnets(folder: str) -> list[str]:
    """The folders of the pipeline's ControlNets; none where it is a foundation alone."""
    index = _json(folder, "model_index.json")
    try:
        has_own = bool((index.get("controlnet") or (None, None))[1])
    except (LookupError, TypeError) as error:
        raise ModelError(f"model_index.json of '{folder}': controlnet: {error}") from None
    return store.controlnet_folders(index, lambda part: _is_there(folder, part)) if has_own else []


def _is_there(folder: str, part: str) -> bool:
    try:
        return bool(_config(folder, part))
    except ModelError:
        return False


def _config(folder: str, part: str) -> dict[str, Any]:
    config, where = _json(folder, f"{part}/config.json".lstrip("/")), f"{part}/config.json of '{folder}'".lstrip("/")
    check_config(where, config)
    if asks_for_more_layers(config):
        raise ModelError(f"{where} asks for more layers than any network has")
    return config


def _json(folder: str, file: str) -> dict[str, Any]:
    """A small file of a folder here, or of `org/repo` or `org/repo@REVISION` on the hub."""
    try:
        if Path(folder).is_dir():
            path = Path(folder) / file
        elif hub.is_name(folder):
            path = hub.download_file(folder, file)
        else:
            raise ModelError(f"'{folder}' is no folder here; give one, zoo:NAME, or org/repo on the Hugging Face hub")
        return read_json(path)
    except ModelError as error:
        raise ModelError(str(error) if f"'{folder}'" in str(error) else f"'{folder}': {error}") from None
    except (*hub.UNREACHABLE, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot read {file} of '{folder}': {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
