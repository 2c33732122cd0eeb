"""From the name of a dataset to its trajectories: bundled, D4RL, Minari, a file, or a cache made before."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data import d4rl_registry
from data.formats import check_together, is_pickle, read_hdf5, read_minari, read_pickle, to_path
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
        dataset_path: A cache: such a pickle, read if it is there (and holds what ``name`` stands for), else written.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If there is no such dataset, or it cannot be used.
    """
    if dataset_path is None:
        return _load_source(name, simulator_states, quiet)
    dataset_path = Path(dataset_path)
    if dataset_path.exists():
        return _load_cache(name, dataset_path, simulator_states)
    dataset = _load_source(name, True, quiet)  # whoever asks next may want the simulator states
    _write_cache(dataset, dataset_path)
    return dataset


def source_attributes(name: str) -> dict[str, Any]:
    """Returns what the HDF5 file behind a name says of how it was made; nothing for other formats and silent files."""
    path, _ = _locate(name)
    if not path.is_file() or not h5py.is_hdf5(path):
        return {}
    with h5py.File(path, "r") as file:
        return dict(file.attrs)


def _load_source(name: str, simulator_states: bool, quiet: bool) -> Dataset:
    path, is_d4rl = _locate(name)
    if is_d4rl:
        path = _fetch(name, quiet)
    elif not path.exists() and MINARI_ID.fullmatch(name):
        trajectories, env_name, digest = read_minari(name)
        check_together(trajectories, name)
        return Dataset(name, env_name, digest, trajectories)
    if not path.is_file():
        raise InputError(_no_such_file(name, path))
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions")
    if is_pickle(path):
        trajectories, metadata = read_pickle(path, simulator_states)
        env_name = _plain_name(metadata.get("env_name"), path)
    else:
        limit = d4rl_registry.episode_limit(name) if is_d4rl else None
        trajectories, env_name = read_hdf5(path, simulator_states, limit)
    check_together(trajectories, str(path))
    return Dataset(name, name if is_d4rl else env_name, _sha256(path), trajectories)


def _locate(name: str) -> tuple[Path, bool]:
    """Returns the file that a name stands for, whether or not it is there, and whether the name is a D4RL id."""
    if name in bundled_names():
        return BUNDLED / f"{name}.hdf5", False
    if name in d4rl_registry.bundled_table():
        return d4rl_registry.local_path(name), True
    return Path(name), False


def _fetch(name: str, quiet: bool) -> Path:
    try:
        return d4rl_registry.fetch(name, quiet=quiet)
    except InputError as error:
        raise InputError(f"{error}; bundled datasets need no download: {_listed(bundled_names())}") from None


def _no_such_file(name: str, path: Path) -> str:
    if path.exists():
        return f"dataset {name!r} is a folder or a device, expected a file; give the path of a data file"
    known = [*bundled_names(), *d4rl_registry.usable_ids()]
    return (
        f"dataset {name!r} is neither a known name nor a file{did_you_mean(name, known)}; give a path, a D4RL id with "
        "float vectors (CARLA's and Atari's images and minigrid's discrete actions cannot be learned), or a bundled "
        f"name: {_listed(bundled_names())}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _load_cache(name: str, dataset_path: Path, simulator_states: bool) -> Dataset:
    """Loads a cache written before, if it was made of what ``name`` stands for."""
    remedy = "give another --dataset_path, or delete that file to have it made again"
    if not dataset_path.is_file():
        raise InputError(f"--dataset_path {dataset_path} is a folder or a device, expected a file; {remedy}")
    trajectories, metadata = read_pickle(dataset_path, simulator_states)
    if metadata.get("dataset") != name:
        raise InputError(f"{dataset_path} holds dataset {metadata.get('dataset')!r}, asked for was {name!r}; {remedy}")
    cached_sha256, (source, _) = metadata.get("sha256"), _locate(name)
    if cached_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", str(cached_sha256)):
        raise InputError(f"{dataset_path} has the sha256 {cached_sha256!r}; expected 64 hexadecimal digits; {remedy}")
    if cached_sha256 is not None and source.is_file() and cached_sha256 != (found := _sha256(source)):
        raise InputError(
            f"{dataset_path} was made of another {name!r} (sha256 {cached_sha256:.12}) than {source} is now "
            f"({found:.12}); {remedy}"
        )
    check_together(trajectories, str(dataset_path))
    env_name = _plain_name(metadata.get("env_name"), dataset_path)
    return Dataset(name, env_name, cached_sha256 or _sha256(dataset_path), trajectories)


def _plain_name(env_name: object, path: Path) -> str | None:
    """Returns an environment's name from a pickle as a plain string: it becomes part of ``model.pkl``."""
    if env_name is not None and not isinstance(env_name, str):
        raise InputError(f"{path} has the env_name {env_name!r}; expected a string")
    return None if env_name is None else str(env_name)


def _write_cache(dataset: Dataset, dataset_path: Path) -> None:
    """Writes ``(paths, metadata)`` as planners read it, from which the same dataset can be loaded."""
    metadata = {
        "dataset": dataset.name,
        "env_name": dataset.env_name,
        "obs_mask": np.ones(dataset.state_dim, np.float32),
        "sha256": dataset.sha256,
        "rows": dataset.num_rows,
        "trajectories": len(dataset.trajectories),
    }
    try:
        with atomic_write(dataset_path) as file:
            pickle.dump(([to_path(trajectory) for trajectory in dataset.trajectories], metadata), file, protocol=4)
    except OSError as error:
        raise InputError(f"--dataset_path {dataset_path} cannot be written: {error.strerror}; give another") from None
