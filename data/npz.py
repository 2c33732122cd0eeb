"""NumPy's ``.npz`` files: arrays by key, one row per step, as OGBench publishes them and as people log their own.

OGBench's files have no rewards, and a state more per episode than transitions: its ``terminals`` mark that last row.
Arrays of Python objects could run code when they are read, so they are not.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.columns import Recording, Stretch, Wanted, read_columns
from data.limits import Budget
from utils import InputError

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SUFFIX = ".npy"
# What NumPy and zipfile raise: a SystemError for a text of no characters.
FAILURES = (
    OSError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    SystemError,
)


def is_npz(path: Path) -> bool:
    """Whether a file is a zip archive, which is what ``.npz`` files are."""
    return zipfile.is_zipfile(path)


def read_npz(path: Path, wanted: Wanted) -> Recording:
    """Reads a ``.npz`` file under D4RL's keys.

    Raises:
        InputError: If it cannot be read or learned from.
    """
    try:
        budget = Budget(path)
        with zipfile.ZipFile(path) as archive:
            stretch = Stretch(str(path), _Arrays(archive, budget))
            columns, findings = read_columns([stretch], str(path), wanted, budget, stretches_are_episodes=False)
            env_name = stretch.entries.get("env_name")
            is_text = isinstance(env_name, _Array) and env_name.dtype.kind == "U" and env_name.shape == ()
            env_name = str(env_name[...]) if is_text else None
    except InputError:
        raise
    except FAILURES as error:
        raise InputError(
            f"{path} cannot be read as .npz ({' '.join(str(error).split())[:200]}); expected what np.savez writes: "
            "compare its size or checksum with the source's, and fetch it again under another name"
        ) from None
    return Recording(columns, tuple(findings), env_name)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a ``.npz`` file by name.

    Raises:
        ValueError: If it cannot be read, or is larger than memory or out of proportion.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _Arrays(archive, Budget(path))
            return {name: array[...] for name, array in arrays.items() if isinstance(array, _Array)}
    except FAILURES as error:
        raise ValueError(str(error)) from None


class _Array:
    """An array in an archive: its shape and type are known, its values are read by ``array[...]``."""

    def __init__(self, archive: zipfile.ZipFile, name: str, budget: Budget) -> None:
        self._archive, self._name, self._budget = archive, name, budget
        try:
            with archive.open(name) as file:
                self.shape, _, self.dtype = HEADERS[np.lib.format.read_magic(file)](file)
        except Exception as error:  # the header is Python text, and a damaged one raises anything at all
            raise ValueError(f"{name} has no header that can be read: {error}") from None
        if archive.getinfo(name).file_size < math.prod(self.shape) * self.dtype.itemsize and not self.dtype.hasobject:
            raise ValueError(f"{name} is shorter than its shape {self.shape}")

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.dtype.hasobject:
            raise ValueError(f"{self._name} holds Python objects, which are not read")
        self._budget.take(math.prod(self.shape) * self.dtype.itemsize, f"an array of shape {self.shape}")
        with self._archive.open(self._name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)[index]

    def astype(self, dtype: type) -> np.ndarray:
        """Returns all values as another type."""
        return self[...].astype(dtype)


class _Arrays(Mapping[str, Any]):
    """The arrays of an archive by name; names with ``/`` are nested mappings."""

    def __init__(self, archive: zipfile.ZipFile, budget: Budget, prefix: str = "") -> None:
        self._archive, self._budget, self._prefix = archive, budget, prefix
        names = (name for name in archive.namelist() if name.startswith(prefix) and name.endswith(SUFFIX))
        inner = (name[len(prefix) :].removesuffix(SUFFIX).split("/", 1) for name in names)
        self._keys = {key: bool(rest) for key, *rest in inner if key}

    def __getitem__(self, key: str) -> _Array | _Arrays:
        if key not in self._keys:
            raise KeyError(key)
        if self._keys[key]:
            return _Arrays(self._archive, self._budget, f"{self._prefix}{key}/")
        return _Array(self._archive, f"{self._prefix}{key}{SUFFIX}", self._budget)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
