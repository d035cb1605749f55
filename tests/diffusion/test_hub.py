"""A model on the hub is pinned to a commit, and only what we read of it is brought here. No network in these tests."""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from refine_control.diffusion import hub
from refine_control.diffusion.store import load, pin, resolve
from refine_control.errors import ModelError
from tiny_sd import save_pipeline, tiny_controlnet, tiny_unet

MAIN, TAGGED = "a" * 40, "b" * 40
REVISIONS = {None: MAIN, "main": MAIN, "v1": TAGGED, MAIN: MAIN, TAGGED: TAGGED}


class FakeHub:
    """In the place of HfApi and snapshot_download: repositories are folders, and so is the cache."""

    def __init__(self, root: Path) -> None:
        self.repos, self.cache = root / "repos", root / "cache"
        self.asked: list[tuple[str, str | None]] = []
        self.reachable = True

    def model_info(self, repo: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append((repo, revision))
        if not self.reachable:
            raise ConnectionError("name resolution failed,\n  and so on")
        answer = SimpleNamespace(headers={}, request=None)
        if not (self.repos / repo).is_dir():
            raise RepositoryNotFoundError("404", response=answer)
        if revision not in REVISIONS:
            raise RevisionNotFoundError("404", response=answer)
        folder = self.repos / repo
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return SimpleNamespace(sha=REVISIONS[revision], siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        snapshot = self.cache / repo / REVISIONS[revision]
        if local_files_only:
            if not snapshot.is_dir():
                raise LocalEntryNotFoundError("not cached")
            return str(snapshot)
        assert self.reachable
        for path in (self.repos / repo).rglob("*"):
            name = path.relative_to(self.repos / repo).as_posix()
            if path.is_file() and any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    def here(self, repo: str) -> set[str]:
        """Every file of the repository that was brought to the cache."""
        return {"/".join(path.parts[-2:]) for path in (self.cache / repo).rglob("*") if path.is_file()}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """org/model with a ControlNet, in the company of what such repositories hold besides; org/net, a ControlNet."""
    fake = FakeHub(tmp_path)
    model = save_pipeline(fake.repos / "org" / "model", "sd", 1)
    for junk in (
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/modeling_unet.py",
        "unet/deeper/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ):
        (model / junk).parent.mkdir(parents=True, exist_ok=True)
        (model / junk).write_bytes(b"junk")
    tiny_controlnet(tiny_unet(), seed=7).save_pretrained(fake.repos / "org" / "net", variant="fp16")
    (fake.repos / "org" / "net" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"junk")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def refused(name: str, controlnets: tuple[str, ...] = ()) -> str:
    with pytest.raises(ModelError) as caught:
        load(name, controlnets=controlnets)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_pinned_to_its_commit(fake: FakeHub) -> None:
    assert pin("org/model") == pin("org/model@main") == f"org/model@{MAIN}"
    assert pin("org/model@v1") == f"org/model@{TAGGED}"
    assert fake.asked == [("org/model", None), ("org/model", "main"), ("org/model", "v1")]
    assert pin(f"org/model@{TAGGED}") == f"org/model@{TAGGED}"
    assert len(fake.asked) == 3, "a commit needs no question"
    assert not fake.cache.exists(), "nothing is downloaded"


@pytest.mark.parametrize("name", ["zoo:emoji-teacher", "org/model", "/somewhere/else", "a/b/c", "../up"])
def test_folders_and_the_zoo_are_pinned_as_they_are(fake: FakeHub, tmp_path: Path, name: str) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert pin(name) == name
    assert fake.asked == []


def test_only_what_is_read_is_brought_here(fake: FakeHub) -> None:
    model = load("org/model@v1")
    assert fake.asked == [("org/model", "v1")]
    assert resolve(f"org/model@{TAGGED}") == fake.cache / "org" / "model" / TAGGED
    brought = fake.here("org/model")
    assert {name for name in brought if name.endswith("safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors",
        "controlnet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert {name.rpartition(".")[2] for name in brought} == {"json", "safetensors"}
    assert not [name for name in brought if name.startswith("safety_checker")]
    local = load(str(fake.repos / "org" / "model"))
    for ours, theirs in zip(model.denoiser.parameters(), local.denoiser.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_controlnets_of_their_own_spare_the_pipelines(fake: FakeHub) -> None:
    model = load("org/model", controlnets=("org/net", "org/net@v1"))
    given = tiny_controlnet(tiny_unet(), seed=7).state_dict()
    for net in model.denoiser.nets:
        assert all(torch.equal(value, given[name]) for name, value in net.state_dict().items())
    assert len(model.denoiser.nets) == 2
    assert not [name for name in fake.here("org/model") if name.startswith("controlnet")]
    assert {name.partition("/")[2] for name in fake.here("org/net")} == {
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    }


def test_a_folder_of_that_name_wins(fake: FakeHub, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "org" / "model", "sd", 0)
    assert load("org/model").denoiser.module is None
    assert fake.asked == []


def test_without_a_network_the_cache_answers(fake: FakeHub) -> None:
    first = load(pin("org/model"))
    fake.reachable = False
    assert pin("org/model") == f"org/model@{MAIN}"
    again = load(f"org/model@{MAIN}")
    assert all(torch.equal(a, b) for a, b in zip(first.vae.parameters(), again.vae.parameters(), strict=True))


def test_without_a_network_and_a_cache_the_mend_is_a_folder(fake: FakeHub) -> None:
    fake.reachable = False
    for ask in (pin, load):
        with pytest.raises(ModelError) as caught:
            ask("org/model")
        assert str(caught.value) == (
            "'org/model' is no folder here, and the Hugging Face hub cannot be reached (ConnectionError: name "
            "resolution failed, and so on); give a local folder, or try again with a network"
        )


def test_the_real_client_without_a_network() -> None:
    """The tests' own environment is offline: what huggingface_hub raises then is what we expect it to raise."""
    with pytest.raises(ModelError, match="is no folder here, and the Hugging Face hub cannot be reached"):
        pin("nobody/nothing-of-this-name")


def test_what_the_hub_does_not_have(fake: FakeHub) -> None:
    assert "'org/nobody' is neither a folder here nor a model on the Hugging Face hub" in refused("org/nobody")
    assert "'org/model' on the Hugging Face hub has no revision 'v9'" in refused("org/model@v9")
    assert "it has no model_index.json" in refused("org/net")
    assert "it has no config.json" in refused("org/model", ("org/model",))
    assert not fake.cache.exists() or not fake.here("org/net")


def test_a_model_behind_terms_is_listed_and_cannot_be_downloaded(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(repo: str, **_: object) -> str:
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match="accept the model's terms on its page and run `hf auth login`"):
        resolve("org/model")


def test_weights_in_pickles_alone_are_refused_before_anything_is_brought_here(fake: FakeHub) -> None:
    for path in (fake.repos / "org" / "model" / "unet").glob("*.safetensors"):
        path.unlink()
    message = refused("org/model")
    assert "'unet' has weights in diffusion_pytorch_model.bin but none in safetensors" in message
    assert not fake.cache.exists()


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], [0]),
        ([f"{STEM}.bf16.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.safetensors"], [1]),
        ([f"{STEM}.non_ema.safetensors", f"{STEM}.bf16.safetensors"], [1]),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], [0, 1]),
        (["model-00001-of-00002.safetensors", "model.fp16.safetensors", "lora.safetensors", "model.bin"], [0]),
        (["config.json", "merges.txt", "spiece.model", "script.py", "README.md"], [0, 1, 2]),
    ],
)
def test_plain_weights_before_variants_and_no_code(names: list[str], read: list[int]) -> None:
    files = [f"unet/{name}" for name in names]
    assert hub.choose(files, "unet|vae") == [files[place] for place in read]
    assert hub.choose(files, "vae") == []
    assert hub.choose(names, "") == [names[place] for place in read]
