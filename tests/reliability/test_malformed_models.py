"""Malformed model folders, by the thousand: one line that names the folder, or a model; never a traceback, a hang or a
large allocation."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from refine_control.diffusion import store
from refine_control.diffusion.sample import sample
from refine_control.errors import ModelError
from refine_control.plans import StudentName
from refine_control.recipe import SampleConfig
from refine_control.student.named import named_plan
from refine_control.student.outline import plan_teacher
from refine_control.student.plan import plan_table
from refine_control.student.search import as_yaml, search, search_table
from reliability.faults import MEMORY, verdict
from tiny import plan, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 10**6, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x", "x" * 5000, "../..", "__import__('os')",
    [], [0], [1] * 50, [[[[]]]], [10**9, 10**9], {}, {"_class_name": "Evil"}, "conv", "nan",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = tmp_path_factory.mktemp("models") / "whole"
    store.save(tiny_model(plan(4, 4, attention=(False, True), heads=(1, 1))), whole)
    return whole


NAMES = get_args(StudentName)


def use(folder: Path) -> None:
    """Reads a model and draws by it, as `generate` does."""
    model = store.load(str(folder)).freeze()
    control = torch.zeros(1, 3, model.resolution, model.resolution)
    model.encode(sample(model, control, ["a red cat"], SampleConfig(num_inference_steps=3), [0]))


def plan_by(folder: Path) -> None:
    """Prints what `student plan` does."""
    teacher = plan_teacher(str(folder))
    print(plan_table("bk-small", teacher), *(as_yaml(named_plan(name, teacher.denoiser)) for name in NAMES))
    print(search_table(search(teacher, parameters=10**6), teacher))


def spoil(folder: Path, draw: random.Random) -> str:
    """Changes one thing in one file; says what."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    name = path.relative_to(folder).as_posix()
    kinds: list[Callable[[Path, random.Random], str]] = [_flip, _cut, _remove]
    kinds += [_change] * 6 if path.suffix == ".json" else [_lie] * 4 if path.suffix == ".safetensors" else []
    return f"{name}: {draw.choice(kinds)(path, draw)}"


def _flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 8, 100])):
        place = draw.randrange(min(len(content), draw.choice([16, 2000, len(content)])))
        content[place] = draw.randrange(256)
    path.write_bytes(content)
    return "bytes flipped"


def _cut(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])
    return "cut"


def _remove(path: Path, draw: random.Random) -> str:
    path.unlink()
    return "removed"


def _change(path: Path, draw: random.Random) -> str:
    """Of a JSON file one value, key or list."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    at = tree
    while True:
        if not isinstance(at, (dict, list)) or not at:
            return "unchanged"
        key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not (isinstance(at[key], (dict, list)) and at[key]) or draw.random() < 0.4:
            break
        at = at[key]
    how = draw.choice(["value", "value", "value", "gone", "number"])
    if how == "gone":
        del at[key]
    elif how == "number" and isinstance(at[key], int):
        at[key] = at[key] * draw.choice([-1, 2, 1000, 10**9])
    else:
        at[key] = copy.deepcopy(draw.choice(VALUES))
    path.write_text(json.dumps(tree), encoding="utf-8")
    return f"{key} {how}"


def _lie(path: Path, draw: random.Random) -> str:
    """A safetensors header that says something else than is there."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    how = draw.choice(["shape", "offsets", "dtype", "length", "name"])
    if how == "shape":
        header[name]["shape"] = draw.choice([[2**62], [2**31, 2**31], [-1], [], ["x"], [0], header[name]["shape"] * 2])
    elif how == "offsets":
        header[name]["data_offsets"] = draw.choice([[0, 2**63], [8, 0], [-1, 4], [0], "x", [2**64, 2**65]])
    elif how == "dtype":
        header[name]["dtype"] = draw.choice(["F64", "I8", "BOOL", "F8_E4M3", "evil", None, 7])
    elif how == "name":
        header[draw.choice(["../x", "", "x" * 10_000, "__metadata__"])] = header.pop(name)
    written = json.dumps(header).encode()
    size = draw.choice([2**63, 2**40, 0, length * 2]) if how == "length" else len(written)
    path.write_bytes(size.to_bytes(8, "little") + written + content[8 + length :])
    return f"header {how}"


PARTS = [pytest.param(1000 + 500 * part, 500, marks=[pytest.mark.long, pytest.mark.timeout(1200)]) for part in range(4)]


@pytest.mark.parametrize(("first", "count"), [(0, 50), *PARTS])
def test_malformed_folders_are_refused_in_one_line(
    folder: Path, tmp_path: Path, first: int, count: int, tally: Callable[..., None]
) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    spoilt = tmp_path / "spoilt"
    for seed in range(first, first + count):
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(folder, spoilt)
        what = spoil(spoilt, random.Random(seed))
        said = verdict(lambda: use(spoilt), str(spoilt))
        counts[said if said in ("read", "refused") else "wrong"] += 1
        if said not in ("read", "refused"):
            wrong.append(f"{seed}: {what} -> {said}")
    tally(f"malformed model folders from {first}", folders=count, **counts)
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] > count / 4


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *(("vae/config.json", {"scaling_factor": value}) for value in ("x", None)),
        *(("unet/config.json", {key: "x"}) for key in ("freq_shift", "norm_eps", "mid_block_scale_factor")),
        *(("unet/config.json", {"sample_size": value}) for value in (10**6, 0, -1, None, [8, 8])),
        *(("controlnet/config.json", {key: "x"}) for key in ("freq_shift", "controlnet_conditioning_channel_order")),
        *(("scheduler/scheduler_config.json", {key: "x"}) for key in ("timestep_spacing", "num_train_timesteps")),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**8}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -3}),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}),
        ("text_encoder/config.json", {"eos_token_id": None}),
    ],
    ids=str,
)
def test_what_would_fail_in_use_is_refused_when_read(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    config = json.loads((spoilt / file).read_text(encoding="utf-8"))
    (spoilt / file).write_text(json.dumps(config | change), encoding="utf-8")
    assert verdict(lambda: store.load(str(spoilt)), str(spoilt)) == "refused"
    if file.startswith(("unet", "vae", "controlnet")):
        assert verdict(lambda: plan_teacher(str(spoilt)), str(spoilt)) == "refused"


def test_a_large_allocation_is_no_refusal() -> None:
    def take(bytes_: int) -> None:
        try:
            torch.empty(bytes_, dtype=torch.uint8)
        except RuntimeError as error:
            raise ModelError(str(error)) from None

    assert verdict(lambda: take(MEMORY // 4)) == "read"
    assert verdict(lambda: take(2 * MEMORY)).startswith("took ")
    assert verdict(lambda: take(8 * MEMORY), "").startswith("odd: ")


def test_a_header_longer_than_any_models_is_not_parsed(folder: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    path = spoilt / "unet/diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = content[8 : 8 + length].ljust(40_000_000)  # as whole as it was
    path.write_bytes(len(longer).to_bytes(8, "little") + longer + content[8 + length :])
    with pytest.raises(ModelError, match="has a header of 40000000 bytes, and no model has that"):
        store.load(str(spoilt))


@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(2400)])])
def test_malformed_configs_are_refused_in_one_line_when_planned_by(
    folder: Path, tmp_path: Path, count: int, tally: Callable[..., None]
) -> None:
    configs = [path.relative_to(folder) for path in folder.glob("*/config.json")] + [Path("model_index.json")]
    counts: Counter[str] = Counter()
    wrong = []
    for seed in range(count):
        spoilt = tmp_path / str(seed)
        for path in configs:
            (spoilt / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / path, spoilt / path)
        what = spoil(spoilt, random.Random(seed))
        said = verdict(lambda spoilt=spoilt: plan_by(spoilt), str(spoilt), "the teacher", "this teacher")
        counts[said if said in ("read", "refused") else "wrong"] += 1
        if said not in ("read", "refused"):
            wrong.append(f"{seed}: {what} -> {said}")
    tally("malformed configs to plan by", folders=count, **counts)
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] > count / 4


# What makes the libraries below read something else than the weights that were looked at


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("named", ["weights.bin", "../../elsewhere.safetensors"])
def test_an_index_that_names_other_files_is_refused(folder: Path, tmp_path: Path, part: str, named: str) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    (weights,) = (spoilt / part).glob("*.safetensors")
    tensors = load_file(weights)
    if named.endswith(".bin"):
        torch.save(tensors, spoilt / part / named)
    shutil.copy(weights, tmp_path / "elsewhere.safetensors")
    weights.rename(weights.with_name(f"{weights.stem}-00001-of-00001.safetensors"))  # to be looked at, not read
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, named)}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=f"{part}/.* names '{named}', not one of the weights beside it"):
        store.load(str(spoilt))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_encoder", {"transformers_weights": "others.safetensors"}),
        ("text_encoder", {"attn_implementation": "someone/kernel"}),
        ("text_encoder", {"_attn_implementation": {"": "someone/kernel"}}),
        ("text_encoder", {"text_config": {"attn_implementation": "flash_attention_2"}}),
        ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ],
    ids=str,
)
def test_a_config_that_leads_elsewhere_is_refused(
    folder: Path, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    config = json.loads((spoilt / part / "config.json").read_text(encoding="utf-8"))
    (spoilt / part / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    for read in (store.load, plan_teacher):
        with pytest.raises(ModelError, match="weights and code from elsewhere are not read"):
            read(str(spoilt))


def test_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    """With peft at hand it would be read, and the base that it names downloaded."""
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    (spoilt / "text_encoder/adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="text_encoder holds an adapter"):
        store.load(str(spoilt))


@pytest.mark.parametrize(
    "name",
    [
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors.index.json"),
        *("tokenizer/added_tokens.json", "scheduler/scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "endless", "sparse"])
def test_what_has_no_end_is_not_read(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    path = spoilt / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    assert verdict(lambda: store.load(str(spoilt)), str(spoilt)) == "refused"


CODE = (
    "from pathlib import Path\nPath({0!r}).touch()\nclass Evil:\n    from_pretrained = from_config = __init__ = None\n"
)
AUTO = {"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "custom_pipeline": "evil"}
PLACES: list[tuple[str, dict[str, Any]]] = [
    ("model_index.json", {"_class_name": ["evil", "Evil"]}),
    ("model_index.json", {"unet": ["evil", "Evil"]}),
    ("model_index.json", {"vae": ["os", "system"]}),
    ("model_index.json", AUTO),
    *((f"{part}/config.json", AUTO) for part in ("unet", "vae", "text_encoder", "controlnet")),
    ("tokenizer/tokenizer_config.json", AUTO | {"tokenizer_class": "Evil"}),
    ("scheduler/scheduler_config.json", {"_class_name": "Evil"} | AUTO),
]


@pytest.mark.parametrize(("place", "change"), PLACES, ids=[f"{place}-{i}" for i, (place, _) in enumerate(PLACES)])
def test_code_beside_a_config_is_not_run(folder: Path, tmp_path: Path, place: str, change: dict[str, Any]) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    for beside in {spoilt, (spoilt / place).parent, *(path for path in spoilt.iterdir() if path.is_dir())}:
        (beside / "evil.py").write_text(CODE.format(str(tmp_path / "it ran")), encoding="utf-8")
        (beside / "pipeline.py").write_text(CODE.format(str(tmp_path / "it ran")), encoding="utf-8")
    config = json.loads((spoilt / place).read_text(encoding="utf-8"))
    (spoilt / place).write_text(json.dumps(config | change), encoding="utf-8")
    assert verdict(lambda: store.load(str(spoilt)), str(spoilt)) in ("read", "refused")
    assert not (tmp_path / "it ran").exists()
