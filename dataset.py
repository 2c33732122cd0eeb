"""Datasets: a name or a file in, validated trajectories out; splits by whole trajectory; transitions to train on.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are float32 in raw units.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import d4rl_registry
from dataset_formats import Trajectory, check_together, is_pickle, read_hdf5, read_minari, read_pickle, to_path
from errors import InputError, did_you_mean
from utils import atomic_write

DATA_FOLDER = Path(__file__).resolve().parent / "data"
MINARI_ID = re.compile(r"[\w.-]+(/[\w.-]+)+-v\d+")


@dataclass(frozen=True)
class Dataset:
    """Validated trajectories and where they came from.

    Attributes:
        name: The name as the user gave it.
        env_name: The environment, as far as the name or the file says.
        sha256: Digest of the source file's bytes; for a Minari dataset, of its arrays.
        trajectories: In the file's order, at least one of them with a transition.
    """

    name: str
    env_name: str | None
    sha256: str
    trajectories: list[Trajectory]

    @property
    def state_dim(self) -> int:
        """Length of a state vector."""
        return self.trajectories[0].observations.shape[1]

    @property
    def action_dim(self) -> int:
        """Length of an action vector."""
        return self.trajectories[0].actions.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows of all trajectories together."""
        return sum(len(trajectory) for trajectory in self.trajectories)

    @property
    def num_transitions(self) -> int:
        """Transitions of all trajectories together."""
        return sum(trajectory.num_transitions for trajectory in self.trajectories)


@dataclass(frozen=True)
class Transitions:
    """What models train on.

    Attributes:
        states: ``(N, state_dim)``.
        actions: ``(N, action_dim)``.
        next_states: ``(N, state_dim)``.
        rewards: ``(N,)``.
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    rewards: np.ndarray

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Split:
    """Indices into ``Dataset.trajectories``: sorted 1-D int64 arrays, disjoint and together complete."""

    train: np.ndarray
    holdout: np.ndarray
    test: np.ndarray


# ---- from a name to trajectories -------------------------------------------------------------------------------------


def bundled_names() -> list[str]:
    """Returns the names of the datasets that come with the repository."""
    return sorted(path.stem for path in DATA_FOLDER.glob("*.hdf5"))


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
        return DATA_FOLDER / f"{name}.hdf5", False
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


# ---- splitting and gathering -----------------------------------------------------------------------------------------


def split_trajectories(
    dataset: Dataset,
    split_seed: int,
    *,
    holdout_ratio: float = 0.0,
    holdout_samples: int | None = None,
    test_ratio: float = 0.0,
) -> Split:
    """Divides whole trajectories at random into training, holdout and test.

    The trajectories are put in the order ``np.random.default_rng(split_seed).permutation(len(trajectories))``. The test
    set is taken from the front of it and the holdout from the back, so that neither depends on the size of the other.

    Args:
        dataset: What to divide.
        split_seed: Seed of the order.
        holdout_ratio: Share of all transitions to hold out, 0 <= ratio < 1; as near to it as whole trajectories come.
        holdout_samples: Hold out whole trajectories until there are this many transitions; instead of the ratio.
        test_ratio: Share of all transitions to keep for testing, counted like ``holdout_ratio``.

    Raises:
        InputError: If a ratio is out of range, both holdout sizes are given, or a side would get no transition.
    """
    check_shares(holdout_ratio, holdout_samples, test_ratio)
    order = np.random.default_rng(split_seed).permutation(len(dataset.trajectories))
    sizes = np.array([dataset.trajectories[index].num_transitions for index in order])
    num_test = _count_for_ratio(sizes, test_ratio)
    if holdout_samples is None:
        num_holdout = _count_for_ratio(sizes[::-1], holdout_ratio)
    else:
        num_holdout = _count_for_samples(sizes[::-1], holdout_samples)
    train = slice(num_test, max(num_test, len(order) - num_holdout))
    if sizes[train].sum() == 0:
        raise InputError(
            f"holding out {num_holdout} and testing on {num_test} of {len(order)} trajectories leaves none to train on"
            "; hold out less or give a dataset of more trajectories"
        )
    parts = (order[train], order[train.stop :], order[: train.start])
    return Split(*(np.sort(part).astype(np.int64) for part in parts))


def check_shares(holdout_ratio: float, holdout_samples: int | None, test_ratio: float) -> None:
    """Checks what can be checked of a split before the dataset is there.

    Raises:
        InputError: If a ratio is out of range, or both holdout sizes are given.
    """
    for flag, ratio in (("holdout_ratio", holdout_ratio), ("test_ratio", test_ratio)):
        if not 0 <= ratio < 1:
            raise InputError(f"{flag} is {ratio}; expected a share of the data, 0 <= {flag} < 1")
    if holdout_ratio and holdout_samples is not None:
        raise InputError("holdout_ratio and holdout_samples are both given; give one of them")


def _count_for_ratio(sizes: np.ndarray, ratio: float) -> int:
    """Returns how many leading trajectories come nearest to a share of all transitions, none and all excluded."""
    if ratio == 0:
        return 0
    share = np.cumsum(sizes) / sizes.sum()
    return int(np.argmin(np.where((share > 0) & (share < 1), np.abs(share - ratio), np.inf))) + 1


def _count_for_samples(sizes: np.ndarray, samples: int) -> int:
    """Returns how many leading trajectories it takes to have that many transitions."""
    if not 1 <= samples < sizes.sum():
        raise InputError(
            f"holdout_samples is {samples}; expected at least 1 and fewer than the dataset's {sizes.sum()} transitions"
        )
    return int(np.searchsorted(np.cumsum(sizes), samples)) + 1


def gather_transitions(dataset: Dataset, indices: np.ndarray) -> Transitions:
    """Returns the transitions of some trajectories, one behind the other in the order of the indices.

    With next observations every row is a transition, terminal ones included; without, neighbouring rows are paired.
    """
    chosen = [dataset.trajectories[index] for index in indices]
    paired = dataset.trajectories[0].next_observations is None
    if paired:
        following = [trajectory.observations[1:] for trajectory in chosen]
    else:
        following = [trajectory.next_observations for trajectory in chosen]
    return Transitions(
        states=_concatenate([t.observations[: t.num_transitions] for t in chosen], (dataset.state_dim,)),
        actions=_concatenate([t.actions[: t.num_transitions] for t in chosen], (dataset.action_dim,)),
        next_states=_concatenate(following, (dataset.state_dim,)),
        rewards=_concatenate([t.rewards[: t.num_transitions] for t in chosen], ()),
    )


def _concatenate(arrays: list[np.ndarray], row_shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty((0, *row_shape), np.float32)


def holdout_rows(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """Returns the rows of some trajectories in the concatenation of ``observations[:-1]`` over all trajectories.

    This is the indexing of published planners (``model.holdout_idx``), whether or not the file has next observations.
    """
    ends = np.cumsum([len(trajectory) - 1 for trajectory in dataset.trajectories])
    starts = np.concatenate(([0], ends[:-1]))
    rows = [np.arange(starts[index], ends[index]) for index in indices]
    return np.concatenate(rows) if rows else np.empty(0, np.int64)
