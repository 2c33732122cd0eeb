"""Datasets: a name or a file in, validated trajectories out; splits by whole trajectory; transitions to train on.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are float32 in raw units. A row is
one time step: the state, the action taken in it, the reward for it and, where the file has it, the state that followed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import d4rl_registry
from errors import InputError, did_you_mean
from utils import atomic_write

DATA_FOLDER = Path(__file__).resolve().parent / "data"

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
OPTIONAL_KEYS = ("next_observations", "timeouts")
SIMULATOR_KEYS = {"infos/qpos": "qpos", "infos/qvel": "qvel"}  # by key: the field of Trajectory
FLAG_KEYS = ("terminals", "timeouts")
NUMBER_KEYS = ("rewards", *FLAG_KEYS)  # (N,); every other array is (N, features)

MINARI_ID = re.compile(r"[\w.-]+(/[\w.-]+)+-v\d+")

# All that the pickle of (paths, metadata) needs, under the names of NumPy 1 and 2. Nothing here runs code of the file.
PICKLED_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),  # bytes, in the oldest pickle protocols
    *(("builtins", name) for name in ("set", "frozenset", "complex", "bytearray")),
    ("collections", "OrderedDict"),
}


@dataclass(frozen=True)
class Trajectory:
    """One episode, or the part of it that was recorded: rows in time order.

    Attributes:
        observations: States, ``(T, state_dim)``.
        actions: Actions taken in them, ``(T, action_dim)``.
        rewards: Rewards of those steps, ``(T,)``.
        next_observations: States that followed, ``(T, state_dim)``; None where the file has none.
        terminated: Whether the last row ended in a terminal state, not at a time limit or the file's end.
        qpos: Simulator positions, ``(T, positions)``; None unless asked for and in the file.
        qvel: Simulator velocities, ``(T, velocities)``; None unless asked for and in the file.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray | None
    terminated: bool
    qpos: np.ndarray | None = None
    qvel: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def num_transitions(self) -> int:
        """Every row with next observations; else the pairs of neighbouring rows, one fewer."""
        return len(self) if self.next_observations is not None else len(self) - 1


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


def _load_source(name: str, simulator_states: bool, quiet: bool) -> Dataset:
    path, is_d4rl = _locate(name)
    if is_d4rl:
        path = _fetch(name, quiet)
    elif not path.exists() and MINARI_ID.fullmatch(name):
        return _load_minari(name)
    if not path.is_file():
        raise InputError(_no_such_file(name, path))
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions")
    if _is_pickle(path):
        trajectories, metadata = _read_pickle(path, simulator_states)
        env_name = metadata.get("env_name")
    else:
        limit = d4rl_registry.episode_limit(name) if is_d4rl else None
        trajectories, env_name = _read_hdf5(path, simulator_states, limit)
    _check_together(trajectories, str(path))
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


# ---- formats: HDF5, Minari, pickle -----------------------------------------------------------------------------------


def _read_hdf5(path: Path, simulator_states: bool, limit: int | None) -> tuple[list[Trajectory], str | None]:
    """Returns the trajectories of a D4RL-format file and the environment's name, where its attributes give one."""
    try:
        with h5py.File(path, "r") as file:
            columns = {key: file[key] for key in _keys(simulator_states) if isinstance(file.get(key), h5py.Dataset)}
            values = _validate(columns, str(path), found=list(file))
            env_name = file.attrs.get("env_name")
    except (OSError, RuntimeError) as error:
        raise InputError(_unreadable_hdf5(path, error)) from None
    if not {"timeouts", "next_observations"} & set(values) and limit is None:
        print(
            f"note: {path} has neither timeouts nor next_observations, so episodes are taken to end at terminals only; "
            "if time limits cut some, add a boolean array 'timeouts'",
            file=sys.stderr,
        )
    return _episodes(values, limit), None if env_name is None else str(env_name)


def _keys(simulator_states: bool) -> tuple[str, ...]:
    return (*REQUIRED_KEYS, *OPTIONAL_KEYS, *(SIMULATOR_KEYS if simulator_states else ()))


def _unreadable_hdf5(path: Path, error: Exception) -> str:
    """Says why HDF5 could not read a file: the remedy for half a file is not that for another kind of file."""
    if "truncated" in str(error) or path.stat().st_size == 0:
        return f"{path} is truncated (incomplete): a download or copy of it was cut off; delete it and fetch it again"
    if not h5py.is_hdf5(path):
        return f"{path} is not an HDF5 file; expected a D4RL-format .hdf5 file or a .pkl of (paths, metadata)"
    return f"{path} is damaged, HDF5 cannot read it ({error}); delete it and fetch it again"


def _load_minari(name: str) -> Dataset:
    """Loads a Minari dataset from this machine; ``minari download`` is how one gets there."""
    if importlib.util.find_spec("minari") is None:
        raise InputError(f"{name!r} is no file; to load it as a Minari id, first: pip install 'minari[hdf5]'")
    import minari

    try:
        source = minari.load_dataset(name)
    except FileNotFoundError:
        raise InputError(f"Minari has no dataset {name!r} on this machine; first: minari download {name}") from None
    trajectories, digest = [], hashlib.sha256()
    for index, episode in enumerate(source.iterate_episodes()):
        if not isinstance(episode.observations, np.ndarray):
            raise InputError(f"{name} has observations that are no vectors; only float vectors can be learned")
        columns = {
            "observations": episode.observations[:-1],  # Minari records the state behind the last action, too
            "actions": np.asarray(episode.actions),
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            "next_observations": episode.observations[1:],
            "timeouts": episode.truncations,
        }
        values = _validate(columns, f"{name}, episode {index}", found=[])
        for column in values.values():
            digest.update(column)
        trajectories += _episodes(values, None)
    _check_together(trajectories, name)
    return Dataset(name, source.env_spec.id if source.env_spec else None, digest.hexdigest(), trajectories)


class _PathsUnpickler(pickle.Unpickler):
    """Reads arrays and plain Python only, so that a file from a stranger cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, only NumPy arrays and plain Python are read")
        return super().find_class(module, name)


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix in (".pkl", ".pickle") or file.read(1) == pickle.PROTO


def _read_pickle(path: Path, simulator_states: bool) -> tuple[list[Trajectory], dict[str, Any]]:
    """Returns the trajectories and metadata of a pickled ``(list of paths, metadata)``.

    A path is a dictionary of arrays under D4RL's keys and ends an episode, or several where its flags say so. Instead
    of ``terminals`` it may have ``terminated`` (one flag, for its end), or neither: then it was cut off.
    """
    try:
        with path.open("rb") as file:
            content = _PathsUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything at all
        raise InputError(f"{path} cannot be read as a pickle of (paths, metadata): {error or type(error)}") from None
    match content:
        case (list(paths), dict(metadata)) if all(isinstance(entry, dict) for entry in paths):
            pass
        case _:
            raise InputError(f"{path} holds no pair (list of paths, metadata), each path a dictionary of arrays")
    if not np.all(np.asarray(metadata.get("obs_mask", 1)) == 1):
        raise InputError(
            f"{path} hides parts of the state (its obs_mask is not all ones); only whole states are learned"
        )
    trajectories = []
    for index, entry in enumerate(paths):
        where = f"{path}, path {index}"
        columns = _path_columns(entry, simulator_states, where)
        trajectories += _episodes(_validate(columns, where, found=list(map(str, entry))), None)
    return trajectories, metadata


def _path_columns(entry: dict[str, Any], simulator_states: bool, where: str) -> dict[str, np.ndarray]:
    """Returns a path's arrays by key, with a flag per row under ``terminals``."""
    keys = [key for key in (*_keys(simulator_states), "terminated") if entry.get(key) is not None]
    try:
        columns = {key: np.asarray(entry[key]) for key in keys}
    except ValueError:
        raise InputError(f"{where} has lists of different lengths where an array is expected") from None
    terminated = columns.pop("terminated", np.asarray(False))
    if "terminals" not in columns and "observations" in columns:
        columns["terminals"] = terminated
        if terminated.ndim == 0:
            columns["terminals"] = np.zeros(columns["observations"].shape[:1], bool)
            columns["terminals"][-1:] = terminated
    return columns


def _load_cache(name: str, dataset_path: Path, simulator_states: bool) -> Dataset:
    """Loads a cache written before, if it was made of what ``name`` stands for."""
    remedy = "give another --dataset_path, or delete that file to have it made again"
    if not dataset_path.is_file():
        raise InputError(f"--dataset_path {dataset_path} is a folder or a device, expected a file; {remedy}")
    trajectories, metadata = _read_pickle(dataset_path, simulator_states)
    if metadata.get("dataset") != name:
        raise InputError(f"{dataset_path} holds dataset {metadata.get('dataset')!r}, asked for was {name!r}; {remedy}")
    cached_sha256, (source, _) = metadata.get("sha256"), _locate(name)
    if cached_sha256 is not None and source.is_file() and cached_sha256 != (found := _sha256(source)):
        raise InputError(
            f"{dataset_path} was made of another {name!r} (sha256 {cached_sha256:.12}) than {source} is now "
            f"({found:.12}); {remedy}"
        )
    _check_together(trajectories, str(dataset_path))
    return Dataset(name, metadata.get("env_name"), cached_sha256 or _sha256(dataset_path), trajectories)


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
            pickle.dump(([_path(trajectory) for trajectory in dataset.trajectories], metadata), file, protocol=4)
    except OSError as error:
        raise InputError(f"--dataset_path {dataset_path} cannot be written: {error.strerror}; give another") from None


def _path(trajectory: Trajectory) -> dict[str, np.ndarray]:
    fields = {key: key for key in ("observations", "actions", "rewards", "next_observations")} | SIMULATOR_KEYS
    path = {key: getattr(trajectory, field) for key, field in fields.items()}
    is_last = np.arange(len(trajectory)) == len(trajectory) - 1
    path |= {"terminals": is_last & trajectory.terminated, "timeouts": is_last & (not trajectory.terminated)}
    return {key: array for key, array in path.items() if array is not None}


# ---- validation ------------------------------------------------------------------------------------------------------


def _validate(
    columns: Mapping[str, h5py.Dataset | np.ndarray], where: str, *, found: list[str]
) -> dict[str, np.ndarray]:
    """Checks columns of equal length and reads them into memory.

    Args:
        columns: Arrays or HDF5 datasets by key, ``(N, features)`` or ``(N,)``.
        where: What to call their source in messages.
        found: All keys of the source, for the message about a missing one.

    Returns:
        The same keys: float32, finite; ``terminals`` and ``timeouts`` bool, ``(N,)``.
    """
    for key in REQUIRED_KEYS:
        if key not in columns:
            raise InputError(f"{where} has no array {key!r}{did_you_mean(key, found)}; it has: {_listed(found)}")
    rows = columns["observations"].shape[:1]
    for key, column in columns.items():
        _check_kind(key, column, where)
        if column.shape[:1] != rows:
            raise InputError(
                f"{where}: {key} has {column.shape[0]} rows, but observations has {rows[0]}; expected one per step"
            )
    if rows == (0,):
        raise InputError(f"{where} is empty (0 rows); collect or fetch the dataset again")
    values = {key: _read_column(key, column, where) for key, column in columns.items()}
    states, following = values["observations"], values.get("next_observations")
    if following is not None and following.shape != states.shape:
        raise InputError(
            f"{where}: next_observations has shape {following.shape}, expected that of observations, {states.shape}"
        )
    return values


def _check_kind(key: str, column: h5py.Dataset | np.ndarray, where: str) -> None:
    """Refuses what holds no float vectors, or no numbers under the keys of one number per row, before reading it."""
    shape, dtype = column.shape, column.dtype
    if key == "observations" and (len(shape) > 2 or dtype == np.uint8):
        raise InputError(f"{where} has image observations (shape {shape}, {dtype}); only float vectors can be learned")
    if key == "actions" and dtype.kind in "iub":
        raise InputError(f"{where} has discrete actions ({dtype}); only continuous (float) actions can be learned")
    if dtype.kind not in ("fiub" if key in NUMBER_KEYS else "f"):
        raise InputError(f"{where}: {key} holds {dtype} values, expected floating-point numbers")
    if key in NUMBER_KEYS and not (shape and shape[1:] in ((), (1,))):
        raise InputError(f"{where}: {key} has shape {shape}, expected one number per row: (rows,)")
    if key not in NUMBER_KEYS and not (len(shape) == 2 and shape[1] > 0):
        raise InputError(f"{where}: {key} has shape {shape}, expected one vector per row: (rows, features)")


def _read_column(key: str, column: h5py.Dataset | np.ndarray, where: str) -> np.ndarray:
    """Returns a column of the right kind in memory, every value finite and every flag 0 or 1."""
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and is reported below
        values = np.ascontiguousarray(column.astype(np.float32)[...])
    if key in NUMBER_KEYS:
        values = values.reshape(-1)  # (N, 1) -> (N,)
    is_usable = np.isfinite(values) if key not in FLAG_KEYS else (values == 0) | (values == 1)
    if not is_usable.all():
        row, *feature = np.argwhere(~is_usable)[0].tolist()
        value = np.ravel(column[row])[feature or [0]].item()
        expected = "0 or 1" if key in FLAG_KEYS else "a finite number within float32"
        raise InputError(f"{where}: {key} is {value} in row {row}, expected {expected}; remove or repair that row")
    return values.astype(bool) if key in FLAG_KEYS else values


def _check_together(trajectories: list[Trajectory], where: str) -> None:
    """Checks what concerns all trajectories: their kind must be one, and they must hold a transition."""
    shapes = {(t.observations.shape[1], t.actions.shape[1], t.next_observations is not None) for t in trajectories}
    if len(shapes) > 1:
        raise InputError(
            f"{where} mixes trajectories of different kinds, (state_dim, action_dim, has next_observations): "
            f"{_listed(map(str, sorted(shapes)))}; give one kind"
        )
    if not trajectories:
        raise InputError(f"{where} is empty (no trajectories); collect or fetch the dataset again")
    if not any(trajectory.num_transitions for trajectory in trajectories):
        raise InputError(
            f"{where} has no transition: all its trajectories have length 1 and there are no next_observations; "
            "give trajectories of 2 rows or more"
        )


def _episodes(columns: Mapping[str, np.ndarray], limit: int | None) -> list[Trajectory]:
    """Cuts validated columns where an episode ended; trajectories are views, nothing is copied."""
    ends = _episode_ends(columns["terminals"], columns.get("timeouts"), limit)
    starts = np.concatenate(([0], ends[:-1]))
    fields = {SIMULATOR_KEYS.get(key, key): column for key, column in columns.items() if key not in FLAG_KEYS}
    episodes = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        rows = {"next_observations": None, **{field: column[start:end] for field, column in fields.items()}}
        episodes.append(Trajectory(**rows, terminated=bool(columns["terminals"][end - 1])))
    return episodes


def _episode_ends(terminals: np.ndarray, timeouts: np.ndarray | None, limit: int | None) -> np.ndarray:
    """Returns, for every episode, the index behind its last row.

    An episode ends at a terminal, at a timeout and with the data. D4RL's oldest files have no timeouts: as in its
    ``qlearning_dataset``, an episode then also ends after as many steps as the environment allows, from its start.
    """
    last = terminals.copy() if timeouts is None else terminals | timeouts  # (N,)
    last[-1] = True
    ends = np.flatnonzero(last) + 1
    if timeouts is None and limit is not None:
        starts = np.concatenate(([0], ends[:-1]))
        pieces = [np.append(np.arange(start + limit, end, limit), end) for start, end in zip(starts, ends, strict=True)]
        ends = np.concatenate(pieces)
    return ends


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
    for flag, ratio in (("holdout_ratio", holdout_ratio), ("test_ratio", test_ratio)):
        if not 0 <= ratio < 1:
            raise InputError(f"{flag} is {ratio}; expected a share of the data, 0 <= {flag} < 1")
    if holdout_ratio and holdout_samples is not None:
        raise InputError("holdout_ratio and holdout_samples are both given; give one of them")
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
