"""From the name of a dataset to its trajectories. ``SOURCES`` lists where datasets come from.

A new source takes a reader in ``formats.py`` and a row in that table.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from data import d4rl_registry
from data.formats import is_pickle, open_pickle, read_hdf5, read_minari, read_pickle, to_paths
from data.trajectories import Dataset
from utils import InputError, atomic_write, did_you_mean

BUNDLED = Path(__file__).resolve().parent / "bundled"
MINARI_ID = re.compile(r"[\w.-]+(/[\w.-]+)+-v\d+")


def bundled_names() -> list[str]:
    """Returns the names of the datasets that come with the repository."""
    return sorted(path.stem for path in BUNDLED.glob("*.hdf5"))


def load_dataset(
    name: str, dataset_path: Path | None = None, *, simulator_states: bool = False, quiet: bool = False
) -> Dataset:
    """Finds a dataset, reads it into memory once and validates it.

    Args:
        name: A bundled name, a D4RL id (downloaded if need be), the path of a D4RL-format HDF5 file or of a pickle of
            ``(list of paths, metadata)``, or the id of a Minari dataset on this machine; looked up in this order.
        dataset_path: A cache, which is such a pickle: read if it is there (and holds what ``name`` stands for), else
            written.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If there is no such dataset, or it cannot be used.
    """
    if dataset_path is None:
        return _load(name, simulator_states, quiet)
    if dataset_path.exists():
        return _load_cache(name, dataset_path, simulator_states)
    dataset = _load(name, True, quiet)  # whoever reads the cache may want the simulator states
    _write_cache(dataset, dataset_path)
    return dataset


def source_attributes(name: str) -> dict[str, Any]:
    """Returns what the HDF5 file behind a name says of how it was made; nothing for other formats and silent files."""
    file = _existing_file(name)
    if file is None or not h5py.is_hdf5(file):
        return {}
    with h5py.File(file, "r") as content:
        return dict(content.attrs)


# --- Where datasets come from ---


@dataclass(frozen=True)
class Source:
    """A row of ``SOURCES``.

    Attributes:
        has: Whether a name is one of this source's, unless an earlier source has it.
        file: Returns the file that a name stands for, whether or not it is there; None for what is no single file.
        load: Reads the dataset of a name. Called as ``load(name, file, simulator_states=..., quiet=...)``; the flags
            are those of ``load_dataset``.
    """

    has: Callable[[str], bool]
    file: Callable[[str], Path | None]
    load: Callable[..., Dataset]


def _load_file(name: str, file: Path, *, simulator_states: bool, quiet: bool) -> Dataset:
    _check_readable(name, file)
    read = read_pickle if is_pickle(file) else read_hdf5
    trajectories, env_name = read(file, simulator_states)
    return Dataset(name, env_name, _sha256(file), trajectories)


def _load_d4rl(name: str, file: Path, *, simulator_states: bool, quiet: bool) -> Dataset:
    try:
        d4rl_registry.fetch(name, quiet=quiet)
    except InputError as error:
        raise InputError(f"{error}; bundled datasets need no download: {_listed(bundled_names())}") from None
    _check_readable(name, file)
    trajectories, _ = read_hdf5(file, simulator_states, limit=d4rl_registry.episode_limit(name))
    return Dataset(name, name, _sha256(file), trajectories)


def _load_minari(name: str, file: None, *, simulator_states: bool, quiet: bool) -> Dataset:
    trajectories, env_name, digest = read_minari(name)
    return Dataset(name, env_name, digest, trajectories)


# Asked in this order: the first source that has a name loads it.
SOURCES = (
    Source(lambda name: name in bundled_names(), lambda name: BUNDLED / f"{name}.hdf5", _load_file),
    Source(lambda name: name in d4rl_registry.bundled_table(), d4rl_registry.local_path, _load_d4rl),
    Source(lambda name: Path(name).exists(), Path, _load_file),
    Source(lambda name: MINARI_ID.fullmatch(name) is not None, lambda name: None, _load_minari),
)


def _find_source(name: str) -> Source | None:
    return next((source for source in SOURCES if source.has(name)), None)


def _load(name: str, simulator_states: bool, quiet: bool) -> Dataset:
    source = _find_source(name)
    if source is None:
        raise InputError(_unknown(name))
    return source.load(name, source.file(name), simulator_states=simulator_states, quiet=quiet)


def _existing_file(name: str) -> Path | None:
    """Returns the file that a name stands for, where it is on this machine."""
    source = _find_source(name)
    file = source.file(name) if source else None
    return file if file and file.is_file() else None


def _unknown(name: str) -> str:
    known = [*bundled_names(), *d4rl_registry.usable_ids()]
    return (
        f"dataset {name!r} is neither a known name nor a file{did_you_mean(name, known)}; give a path, a D4RL id with "
        "float vectors (CARLA's and Atari's images and minigrid's discrete actions cannot be learned), or a bundled "
        f"name: {_listed(bundled_names())}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _check_readable(name: str, file: Path) -> None:
    if not file.is_file():
        raise InputError(f"dataset {name!r} is a folder or a device, expected a file; give the path of a data file")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} may not be read; change its permissions")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- The cache ---


def _load_cache(name: str, dataset_path: Path, simulator_states: bool) -> Dataset:
    """Loads a cache, if it was made of what ``name`` stands for.

    A source that is gone, or has no file, cannot be compared with: then the name decides alone.
    """
    remedy = "give another --dataset_path, or delete that file to have it made again"
    if not dataset_path.is_file():
        raise InputError(f"--dataset_path {dataset_path} is a folder or a device, expected a file; {remedy}")
    cache = open_pickle(dataset_path)
    if cache.dataset != name:
        raise InputError(f"{dataset_path} holds dataset {cache.dataset!r}, asked for was {name!r}; {remedy}")
    if cache.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", cache.sha256):
        raise InputError(f"{dataset_path} has the sha256 {cache.sha256!r}; expected 64 hexadecimal digits; {remedy}")
    source = _existing_file(name)
    if cache.sha256 is not None and source and cache.sha256 != (found := _sha256(source)):
        raise InputError(
            f"{dataset_path} was made of another {name!r} (sha256 {cache.sha256:.12}) than {source} is now "
            f"({found:.12}); {remedy}"
        )
    trajectories = cache.trajectories(simulator_states)
    return Dataset(name, cache.env_name, cache.sha256 or _sha256(dataset_path), trajectories)


def _write_cache(dataset: Dataset, dataset_path: Path) -> None:
    try:
        with atomic_write(dataset_path) as file:
            pickle.dump(to_paths(dataset), file, protocol=4)
    except OSError as error:
        raise InputError(f"--dataset_path {dataset_path} cannot be written: {error.strerror}; give another") from None
