"""Models on the Hugging Face hub: a name -> a commit -> a folder that holds what we read of it, and nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from refine_control.errors import ModelError

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
UNREACHABLE = (HTTPError, OSError)  # of the client library's own HTTP library, whichever it is, and of the system


def is_name(name: str) -> bool:
    """Whether it reads as `org/repo` or `org/repo@REVISION`."""
    return NAME.fullmatch(name) is not None


def pin(name: str) -> str:
    """`org/repo` or `org/repo@REVISION` -> `org/repo@COMMIT`, which names the same weights for good.

    Raises:
        ModelError: no such model or revision, or the hub cannot be reached and its cache here does not know it.
    """
    repo, revision = _split(name)
    if revision and COMMIT.fullmatch(revision):
        return name
    commit, _ = _look_up(repo, revision)
    return f"{repo}@{commit}"


def download(name: str, index: str, folders: str) -> Path:
    """Brings what `choose` chooses here. Returns the folder in the hub's own cache, where it stays for the next time.

    Args:
        index: the file that makes the repository a model of the wanted kind.
        folders: see `choose`.

    Raises:
        ModelError: see `pin` and `choose`; or the repository lacks the index.
    """
    repo, revision = _split(name)
    commit, files = _look_up(repo, revision)
    if files is None:
        return _cached(repo, commit)
    if index not in files:
        raise ModelError(f"'{name}' on the Hugging Face hub is no model that we read: it has no {index}")
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=[index, *choose(files, folders)]))
    except RepositoryNotFoundError:  # one behind terms: it is listed to all
        raise _no_access(repo) from None
    except UNREACHABLE as error:
        raise ModelError(f"cannot download '{name}' ({_line(error)}); run the same command again") from None


def download_file(name: str, file: str) -> Path:
    """Brings one file here; raises what the client library raises, see UNREACHABLE."""
    repo, revision = _split(name)
    return Path(hf_hub_download(repo, file, revision=revision))


def choose(files: Iterable[str], folders: str) -> list[str]:
    """The files of a repository that we read: json, txt, model, and safetensors weights. Pickles can run code.

    Of weights the plain ones; a variant (fp16 first) only where a folder holds nothing else.

    Args:
        folders: a regular expression of the folders that are read, '' being the top.

    Raises:
        ModelError: a folder has its weights in pickles only.
    """
    inside = defaultdict(list)
    for file in files:
        folder, _, name = file.rpartition("/")
        if re.fullmatch(folders, folder):
            inside[folder].append(name)
    chosen = []
    for folder, names in inside.items():
        kind = variant(names)
        weights = [name for name in names if (match := WEIGHTS.fullmatch(name)) and match["variant"] == kind]
        pickles = [name for name in names if name.endswith(PICKLED)]
        if pickles and not weights:
            raise ModelError(
                f"'{folder or 'the top folder'}' has weights in {pickles[0]} but none in safetensors; "
                "pickles can run code and are never read: give a revision or a folder with safetensors"
            )
        texts = [name for name in names if name.endswith((".json", ".txt", ".model"))]
        chosen += [f"{folder}/{name}".lstrip("/") for name in (*texts, *weights)]
    return chosen


def variant(names: Iterable[str]) -> str | None:
    """Which variant of the weights to read, by the names of a folder's files. None is the plain one."""
    found = {match["variant"] or "" for name in names if (match := WEIGHTS.fullmatch(name))}
    if not found or "" in found:
        return None
    return "fp16" if "fp16" in found else min(found)


def is_weights(name: str, wanted: str | None) -> bool:
    """Whether a file's name is that of weights of this variant, whole or one of several."""
    match = WEIGHTS.fullmatch(name)
    return match is not None and name.endswith(".safetensors") and (match["variant"] or None) == wanted


def _split(name: str) -> tuple[str, str | None]:
    match = NAME.fullmatch(name)
    assert match, "is_name was asked before"
    return match["repo"], match["revision"]


def _look_up(repo: str, revision: str | None) -> tuple[str, list[str] | None]:
    """The commit that a revision stands for, and its files: None where only the cache could be asked."""
    try:
        info = HfApi().model_info(repo, revision=revision)
    except RevisionNotFoundError:
        raise ModelError(f"'{repo}' on the Hugging Face hub has no revision '{revision}'") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _no_access(repo) from None
    except UNREACHABLE as error:
        try:
            return _cached(repo, revision).name, None
        except UNREACHABLE:
            raise ModelError(
                f"'{repo}' is no folder here, and the Hugging Face hub cannot be reached ({_line(error)}); "
                "give a local folder, or try again with a network"
            ) from None
    assert info.sha, "the hub names the commit of every revision"
    return info.sha, [sibling.rfilename for sibling in info.siblings or ()]


def _no_access(repo: str) -> ModelError:
    return ModelError(
        f"'{repo}' is neither a folder here nor a model on the Hugging Face hub that we may read; "
        "check the name, or accept the model's terms on its page and run `hf auth login`"
    )


def _cached(repo: str, revision: str | None) -> Path:
    """The snapshot that an earlier download left, named by its commit; which of its files are there is not asked."""
    return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
