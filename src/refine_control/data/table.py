"""What was computed once, kept on disk: keyed by everything that decides it, and whole or not read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from refine_control.errors import DataError
from refine_control.files import remove_leftovers, written_aside

CHUNK_BYTES = 64_000_000
FORMAT = 1  # of a table's files; another number is another table


class Table:
    """N rows of one shape and dtype, in chunks of equally many rows, each a memory-mapped .npy file.

    A chunk is written aside and renamed, so a run that was stopped goes on with the chunks that are missing and a
    half-written one is never read. `complete.json` comes last; a table without it is not read either. The folder's name
    is a hash of `key`: where anything that decides the rows changes, another table is made, and the old one stays until
    its user removes it.
    """

    def __init__(
        self, root: Path, what: str, key: Mapping[str, Any], rows: int, shape: Sequence[int], dtype: str
    ) -> None:
        self.rows, self.shape, self.dtype = rows, tuple(shape), np.dtype(dtype)
        whole = {**key, "rows": rows, "shape": list(shape), "dtype": self.dtype.name, "format": FORMAT}
        self.key = json.dumps(whole, sort_keys=True, indent=1)
        self.folder = Path(root) / f"{what}-{hashlib.sha256(self.key.encode()).hexdigest()[:16]}"
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        self.chunk_rows = max(1, CHUNK_BYTES // max(1, row_bytes))
        self._open: dict[int, np.ndarray] = {}

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    def is_complete(self) -> bool:
        return (self.folder / "complete.json").is_file()

    def fill(self, compute: Callable[[range], np.ndarray], batch: int, part: int = 0, parts: int = 1) -> None:
        """Computes the chunks that are missing: every `parts`-th from chunk `part` on, `batch` rows a call.

        compute: range of rows -> (len, *shape). Call `finish` when all parts are filled.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        missing = [i for i in range(part, self.chunks, parts) if not self._path(i).is_file()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            for chunk in tqdm(missing, desc=f"caching {self.folder.name}", unit="chunk", disable=not missing):
                rows = range(chunk * self.chunk_rows, min(self.rows, (chunk + 1) * self.chunk_rows))
                values = np.empty((len(rows), *self.shape), self.dtype)
                for first in range(rows.start, rows.stop, batch):
                    some = range(first, min(first + batch, rows.stop))
                    values[first - rows.start : some.stop - rows.start] = compute(some)
                _write(self._path(chunk), partial(np.save, arr=values))
        except OSError as error:
            raise DataError(
                f"cannot write cache '{self.folder}': {error.strerror or error}; make room, or set data.cache_dir null"
            ) from None

    def finish(self) -> None:
        """Marks the table complete, after looking at every chunk."""
        for chunk in range(self.chunks):
            self._chunk(chunk)
        _write(self.folder / "complete.json", lambda file: file.write(self.key.encode()))

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        """(len(rows), *shape), a copy.

        Raises:
            DataError: the table is not complete, or a chunk was damaged since.
        """
        if not self.is_complete():
            raise DataError(f"cache '{self.folder}' is not complete; run the same command to fill it, or remove it")
        return np.stack([self._chunk(row // self.chunk_rows)[row % self.chunk_rows] for row in rows])

    def _path(self, chunk: int) -> Path:
        return self.folder / f"rows-{chunk:06d}.npy"

    def _chunk(self, chunk: int) -> np.ndarray:
        if chunk not in self._open:
            path = self._path(chunk)
            expected = (min(self.rows - chunk * self.chunk_rows, self.chunk_rows), *self.shape)
            try:
                values = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, EOFError, ValueError) as error:
                raise DataError(f"cache '{path}' cannot be read ({error}); remove '{self.folder}'") from None
            if values.shape != expected or values.dtype != self.dtype:
                raise DataError(
                    f"cache '{path}' holds {values.dtype} {values.shape}, not {expected}; remove its folder"
                )
            self._open[chunk] = values
        return self._open[chunk]


class Steps:
    """What was computed at a training step, for runs that meet the same step again: one file a step, up to a size.

    `root` as for a Table. A file is whole or absent; one that cannot be read is computed again. It holds what every
    run that met the step asked for, so that a run which needs less reads less, and one which needs more adds to it.
    """

    def __init__(self, root: Path, what: str, key: Mapping[str, Any], limit_gb: float, parts: int = 1) -> None:
        """parts: how many processes keep steps there, each its part of what the limit leaves."""
        self.key = json.dumps({**key, "format": FORMAT}, sort_keys=True, indent=1)
        self.folder = Path(root) / f"{what}-{hashlib.sha256(self.key.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        self.left = (limit_gb * 2**30 - there) / parts

    def get(self, step: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """These arrays of a step; None unless all are there."""
        found = self._read(step, names)
        return found if all(name in found for name in names) else None

    def put(self, step: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keeps what fits; the rest is computed again. Returns the arrays, those kept before as they were kept."""
        before = self._read(step)
        arrays = {name: before.get(name, array) for name, array in arrays.items()}
        size = sum(array.nbytes for name, array in arrays.items() if name not in before)
        if size and size <= min(self.left, shutil.disk_usage(self.folder).free // 2):
            self.left -= size
            data = save({name: np.ascontiguousarray(array) for name, array in (before | arrays).items()})
            with suppress(OSError):
                _write(self.folder / f"{step}.safetensors", lambda file: file.write(data))
        return arrays

    def _read(self, step: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Those of these arrays, or of all, that are kept."""
        path = self.folder / f"{step}.safetensors"
        try:
            if not path.is_file():
                return {}
            with safe_open(path, "np") as file:
                kept = set(file.keys())
                return {name: file.get_tensor(name) for name in (kept if names is None else kept.intersection(names))}
        except (OSError, SafetensorError):
            path.unlink(missing_ok=True)
            return {}


def fingerprint(paths: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed, written anew, or comes in another place, as then the rows do:
    names, sizes and times, no contents."""
    digest = hashlib.sha256()
    for path in paths:
        state = path.stat()
        digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    with written_aside(path) as aside, open(aside, "wb") as file:
        write(file)
