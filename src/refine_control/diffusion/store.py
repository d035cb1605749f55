"""A model's folder on disk: a stock diffusers pipeline, safetensors only, whole or not there."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from refine_control.diffusion import hub
from refine_control.diffusion.belonging import check_belonging
from refine_control.diffusion.build import module_of
from refine_control.diffusion.model import Denoiser, Model, halvings
from refine_control.diffusion.noise import complete
from refine_control.diffusion.trial import try_out
from refine_control.diffusion.weights import check_config, check_files, check_names, check_weights, read_json
from refine_control.errors import ModelError, refusal
from refine_control.files import is_known, put_in_place, sync
from refine_control.recipe import SampleConfig, StageConfig, validate

disable_progress_bar()  # one bar for each file of a model says nothing

ZOO = Path(__file__).parent.parent / "zoo"
PIPELINES = tuple(
    f"StableDiffusion{xl}{control}Pipeline"
    for xl in ("", "XL")
    for control in ("", "ControlNet", "ControlNetInpaint", "ControlNetImg2Img")
)
PARTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
}
XL_PARTS: dict[str, Any] = {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}
FORMAT, FORMAT_KEY = 1, "_refine_control_format"  # in model_index.json; stock pipelines, and our first ones, have none
USUAL_KEY, USUAL = "_refine_control_sample", ("num_inference_steps", "guidance_scale")  # there too: Model.usual
ONLY_KEY = "_refine_control_only_steps"  # there too: Model.only_steps, where it is not None
FOLDERS = "|".join([*PARTS, *XL_PARTS, "scheduler"])


def save(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a folder that the stock pipeline's from_pretrained loads (safetensors): StableDiffusion(XL)(ControlNet).

    Written aside, then renamed: a half-written model is never seen. What else the folder of an earlier one holds, such
    as a card or a repository's .git, stays.

    Raises:
        ModelError: `folder` holds something else than a model, or the disk is full.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ModelError(f"'{folder}' holds other files than a model; choose another folder")
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    whole = model if dtype == torch.float32 else copy.deepcopy(model)
    for network in whole.networks:
        network.to(dtype)
    try:
        for tokenizer in filter(None, (whole.tokenizer, whole.tokenizer_2)):  # else it keeps what it was last asked for
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        whole.pipeline().save_pretrained(aside, safe_serialization=True)
        ours = {FORMAT_KEY: FORMAT, USUAL_KEY: model.usual.model_dump(include={*USUAL})}
        ours |= {ONLY_KEY: model.only_steps} if model.only_steps else {}
        index = read_json(aside / "model_index.json") | ours
        (aside / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        for path in aside.rglob("*"):
            sync(path)
        _keep_others(folder, aside)
        put_in_place(aside, folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise ModelError(f"cannot write '{folder}': {error}; make room, then run the same command") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _keep_others(folder: Path, aside: Path) -> None:
    """Copies what is no part of a model from where one is about to be replaced."""
    ours = re.compile(rf"{FOLDERS}|controlnet(_\d+)?|model_index\.json|safety_checker|feature_extractor|image_encoder")
    for path in folder.iterdir() if folder.is_dir() else ():
        if not ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.copytree(path, aside / path.name, symlinks=True)
        elif not ours.fullmatch(path.name):
            shutil.copy2(path, aside / path.name, follow_symlinks=False)


def resolve(name: str, own_controlnets: bool = True) -> Path:
    """A model's folder, from a path, `zoo:NAME`, or `org/repo` or `org/repo@REVISION` on the Hugging Face hub.

    own_controlnets: whether the pipeline's ControlNets are wanted too.

    Raises:
        ModelError: no such folder or repository, or it holds no saved pipeline.
    """
    if name.startswith("zoo:"):
        folder = ZOO / name.removeprefix("zoo:")
        known = ", ".join(f"zoo:{path.parent.name}" for path in sorted(ZOO.glob("*/model_index.json"))) or "none yet"
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"no model '{name}' is embedded; there are: {known}")
        return folder
    folder = Path(name)
    if _on_hub(name):
        folder = hub.download(name, "model_index.json", FOLDERS + (r"|controlnet(_\d+)?" if own_controlnets else ""))
    if not (folder / "model_index.json").is_file():
        mend = "give a folder, zoo:NAME or org/repo on the hub"
        for inner in (folder / "student", folder / "model"):  # of a run
            mend = f"give '{inner}'" if (inner / "model_index.json").is_file() else mend
        raise ModelError(f"'{name}' is no saved pipeline: it has no model_index.json; {mend}")
    return folder


def pin(name: str) -> str:
    """The name that means the same weights for good: `org/repo@COMMIT` on the hub; a folder or zoo:NAME as it is.

    Raises:
        ModelError: see `hub.pin`.
    """
    return hub.pin(name) if _on_hub(name) else name


def load(name: str, device: str | torch.device = "cpu", controlnets: Sequence[str] = ()) -> Model:
    """Reads a saved Stable Diffusion pipeline, safetensors only, as float32.

    Args:
        name: see `resolve`. A pipeline without a ControlNet is a foundation alone.
        controlnets: folders or hub ids of ControlNets that were saved on their own; they replace the pipeline's.

    Raises:
        ModelError: a part is missing or malformed, of a class that is not supported, or does not belong to the others;
            or together they draw no picture.
    """
    folder = resolve(name, own_controlnets=not controlnets)
    try:
        nets = [_read_controlnet(resolve_controlnet(net)) for net in controlnets]
        model = _read_model(folder, nets)
        check_belonging(model, name, controlnets)
        try_out(model)
    except Exception as error:  # diffusers and transformers raise nearly every type on a malformed config
        raise refusal(name, "cannot load", error) from None
    return model.to(device)


def _read_model(folder: Path, nets: list[ControlNetModel]) -> Model:
    """nets: instead of the pipeline's own."""
    check_files(folder)
    index = read_json(folder / "model_index.json")
    if not is_known(found := index.get(FORMAT_KEY, 1), FORMAT):
        raise ModelError(f"it is of format {found!r}, not {FORMAT} or before; install a later refine-control")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ModelError(f"its pipeline is a {kind}; supported: {', '.join(PIPELINES)}")
    is_xl, has_own = "XL" in kind, "ControlNet" in kind
    parts = {part: _read(wanted, folder, part, index) for part, wanted in (PARTS | (XL_PARTS if is_xl else {})).items()}
    if has_own and not nets:
        own = controlnet_folders(index, lambda part: (folder / part).is_dir())
        nets = [_read_controlnet(folder / part) for part in own]
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    foundation, vae = parts.pop("unet"), parts["vae"]
    return Model(
        denoiser=Denoiser(foundation, module_of(nets), downscale=halvings(vae.config.block_out_channels)),
        scheduler=complete(scheduler),
        empty_is_zeros=is_xl and index.get("force_zeros_for_empty_prompt", True),
        usual=validate(SampleConfig, index.get(USUAL_KEY, {}), USUAL_KEY),
        only_steps=validate(StageConfig, {"num_inference_steps": index.get(ONLY_KEY)}, ONLY_KEY).num_inference_steps,
        **parts,
    )


def _read(wanted: Any, folder: Path, part: str, index: dict[str, Any]) -> Any:
    """A tokenizer, or a network as float32."""
    _, kind = index.get(part) or (None, None)
    if kind not in (wanted.__name__, f"{wanted.__name__}Fast"):
        raise ModelError(f"its {part} is a {kind}; supported: {wanted.__name__}")
    if wanted is CLIPTokenizer:
        check_files(folder / part)  # which may be a link
        return CLIPTokenizer.from_pretrained(folder, subfolder=part, local_files_only=True)
    return _read_network(wanted, folder, part)


def controlnet_folders(index: dict[str, Any], is_there: Callable[[str], bool]) -> list[str]:
    """A pipeline's own: stock saves several as controlnet, controlnet_1, ... and counts the folders when it loads."""
    if (index.get("controlnet") or (None, None))[1] != "MultiControlNetModel":
        return ["controlnet"]
    more = (f"controlnet_{place}" for place in itertools.count(1))
    return ["controlnet", *itertools.takewhile(is_there, more)]


def resolve_controlnet(name: str) -> Path:
    """The folder of a ControlNet that was saved on its own, from a path or the hub.

    Raises:
        ModelError: no such folder or repository, or it holds no saved network.
    """
    folder = hub.download(name, "config.json", "") if _on_hub(name) else Path(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{name}' is no saved ControlNet: it has no config.json; give a folder or hub id org/repo")
    return folder


def _read_controlnet(folder: Path) -> ControlNetModel:
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != "ControlNetModel":
        raise ModelError(f"'{folder.name}' is a {kind}; supported: ControlNetModel")
    return _read_network(ControlNetModel, folder.parent, folder.name)


def _read_network(kind: Any, folder: Path, part: str) -> Any:
    """One network as float32. diffusers and transformers fill a missing tensor with noise and only warn; we refuse."""
    options: dict[str, Any] = {} if issubclass(kind, PreTrainedModel) else {"low_cpu_mem_usage": False}
    check_files(folder / part)
    names = [path.name for path in (folder / part).iterdir()]
    check_names(folder / part, names, list(filter(hub.WEIGHTS.fullmatch, names)))
    variant = hub.variant(names)
    files = [folder / part / name for name in names if hub.is_weights(name, variant)]
    config = read_json(folder / part / "config.json")
    check_config(f"{part}/config.json", config)
    check_weights(kind, folder / part, config, files)
    network, loading = kind.from_pretrained(
        folder,
        subfolder=part,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if loading["missing_keys"]:
        raise ValueError(
            f"{part} lacks {len(loading['missing_keys'])} tensors, e.g. {sorted(loading['missing_keys'])[0]}"
        )
    return network.float()


def _on_hub(name: str) -> bool:
    """A folder of that name wins."""
    return hub.is_name(name) and not Path(name).is_dir()
