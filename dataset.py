"""Datasets: a name or a file in, validated trajectories out; splits by whole trajectory; transitions to train on.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are float32 in raw units. A row is
one time step: the state, the action taken in it, the reward for it and, where the file has it, the state that followed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from errors import InputError, did_you_mean

DATA_FOLDER = Path(__file__).resolve().parent / "data"

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
OPTIONAL_KEYS = ("next_observations", "timeouts")
SIMULATOR_KEYS = ("infos/qpos", "infos/qvel")
FLAG_KEYS = ("terminals", "timeouts")
RANKS = {"rewards": 1, "terminals": 1, "timeouts": 1}  # every other array is (N, features)


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
        sha256: Digest of the source file's bytes.
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
        name: A bundled name or the path of a D4RL-format HDF5 file.
        dataset_path: Not used yet.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If there is no such dataset, or it cannot be used.
    """
    path = _find(name)
    paths, env_name = _read_hdf5(path, simulator_states)
    trajectories = [trajectory for columns in paths for trajectory in _episodes(columns, None, str(path))]
    _check_trajectories(trajectories, name)
    return Dataset(name, env_name, _sha256(path), trajectories)


def _find(name: str) -> Path:
    """Returns the file that a name stands for."""
    bundled = DATA_FOLDER / f"{name}.hdf5"
    path = bundled if name in bundled_names() else Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"dataset {name!r} is a folder, expected a file; give the path of an .hdf5 file in it")
    if not path.exists():
        raise InputError(
            f"dataset {name!r} is neither a known name nor a file{did_you_mean(name, bundled_names())}; "
            f"give a path or one of the bundled names: {', '.join(bundled_names()) or 'none'}"
        )
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- reading and validating ------------------------------------------------------------------------------------------


def _read_hdf5(path: Path, simulator_states: bool) -> tuple[list[dict[str, np.ndarray]], str | None]:
    """Returns the file's columns, as one path that may hold many episodes, and its environment's name."""
    keys = (*REQUIRED_KEYS, *OPTIONAL_KEYS, *(SIMULATOR_KEYS if simulator_states else ()))
    try:
        with h5py.File(path, "r") as file:
            columns = {key: file[key] for key in keys if isinstance(file.get(key), h5py.Dataset)}
            found = [key for key in file if key not in columns]
            env_name = file.attrs.get("env_name")
            return [_validate(columns, found, str(path))], None if env_name is None else str(env_name)
    except OSError as error:
        raise InputError(_unreadable_hdf5(path, error)) from None


def _unreadable_hdf5(path: Path, error: OSError) -> str:
    """Says why HDF5 could not read a file: the user's remedy for half a file is not that for another kind of file."""
    if "truncated" in str(error) or path.stat().st_size == 0:
        return f"{path} is truncated: a download or a copy was cut off; delete the file and fetch it again"
    if not h5py.is_hdf5(path):
        return f"{path} is not an HDF5 file; expected a D4RL-format .hdf5 file"
    return f"{path} cannot be read as HDF5 ({error}); it may be damaged: fetch it again"


def _validate(
    columns: Mapping[str, h5py.Dataset | np.ndarray], other_keys: Sequence[str], where: str
) -> dict[str, np.ndarray]:
    """Checks the columns of one path and reads them as float32, the flags as bool.

    Args:
        columns: Arrays or HDF5 datasets of ``(N, features)`` or ``(N,)`` by key.
        other_keys: What else the source holds, for the message about a missing key.
        where: What to call the source in messages.
    """
    for key in REQUIRED_KEYS:
        if key not in columns:
            found = ", ".join([*columns, *other_keys]) or "nothing"
            raise InputError(f"{where} has no array {key!r}{did_you_mean(key, other_keys)}; it has: {found}")
    rows = columns["observations"].shape[:1]
    for key, column in columns.items():
        _check_kind(key, column, where)
        if column.shape[:1] != rows:
            raise InputError(f"{where}: {key} has {column.shape[0]} rows, but observations has {rows[0]}")
    if rows == (0,):
        raise InputError(f"{where} is empty: its arrays have 0 rows; collect or fetch the dataset again")
    values = {key: _read_column(key, column, where) for key, column in columns.items()}
    states, following = values["observations"], values.get("next_observations")
    if following is not None and following.shape != states.shape:
        raise InputError(f"{where}: next_observations has shape {following.shape}, but observations {states.shape}")
    return values


def _check_kind(key: str, column: h5py.Dataset | np.ndarray, where: str) -> None:
    """Refuses what is not a column of float vectors, or of numbers or flags for the 1-D keys, before reading it."""
    shape, dtype = column.shape, column.dtype
    if key == "observations" and (len(shape) > 2 or dtype == np.uint8):
        raise InputError(f"{where} has image observations (shape {shape}, {dtype}); only float vectors can be learned")
    if key == "actions" and dtype.kind in "iu":
        raise InputError(f"{where} has discrete actions ({dtype}); only continuous (float) actions can be learned")
    if RANKS.get(key, 2) == 1:
        if dtype.kind not in "fiub":
            raise InputError(f"{where}: {key} holds {dtype} values; expected numbers")
        if shape[1:] not in ((), (1,)) or not shape:
            raise InputError(f"{where}: {key} has shape {shape}; expected one number per row, (rows,)")
    elif dtype.kind != "f":
        raise InputError(f"{where}: {key} holds {dtype} values; expected floating-point numbers")
    elif len(shape) != 2 or shape[1] == 0:
        raise InputError(f"{where}: {key} has shape {shape}; expected one vector per row, (rows, features)")


def _read_column(key: str, column: h5py.Dataset | np.ndarray, where: str) -> np.ndarray:
    """Returns a checked column in memory, float32 or bool, every value finite and every flag 0 or 1."""
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and is reported below
        values = np.ascontiguousarray(column.astype(np.float32)[...])
    if RANKS.get(key, 2) == 1:
        values = values.reshape(-1)  # (N, 1) -> (N,)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values.reshape(len(values), -1)).all(axis=1)))
        raise InputError(
            f"{where}: {key} is NaN, infinite or too large for float32 in row {row}; remove or repair that row"
        )
    if key not in FLAG_KEYS:
        return values
    flags = values.astype(bool)
    if not np.array_equal(flags, values):
        row = int(np.argmax(flags != values))
        raise InputError(f"{where}: {key} is {values[row]:g} in row {row}; expected 0 or 1 (False or True)")
    return flags


def _episodes(columns: Mapping[str, np.ndarray], limit: int | None, where: str) -> list[Trajectory]:
    """Cuts validated columns where an episode ended; trajectories are views, nothing is copied."""
    ends = _episode_ends(columns["terminals"], columns.get("timeouts"), limit)
    starts = np.concatenate(([0], ends[:-1]))
    names = {"infos/qpos": "qpos", "infos/qvel": "qvel"}
    arrays = {names.get(key, key): column for key, column in columns.items() if key not in FLAG_KEYS}
    arrays.setdefault("next_observations", None)
    return [
        Trajectory(
            **{key: None if array is None else array[start:end] for key, array in arrays.items()},
            terminated=bool(columns["terminals"][end - 1]),
        )
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


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


def _check_trajectories(trajectories: list[Trajectory], name: str) -> None:
    if not any(trajectory.num_transitions for trajectory in trajectories):
        raise InputError(
            f"dataset {name!r} has no transition: all its trajectories have length 1 and there are no "
            "next_observations; give trajectories of 2 rows or more"
        )


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
    """Returns how many leading trajectories come nearest to a share of all transitions, and neither to none nor to all."""
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
