"""Formats of datasets: HDF5, pickled paths and Minari in, validated trajectories out; and pickled paths out again.

A reader reads everything into memory once and returns trajectories that can be learned from: finite, all of the same
state and action dimensions, with at least one transition. Else it raises an ``InputError`` that names the place.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are float32 in raw units. A row is
one time step: the state, the action taken in it, the reward for it and, where the file has it, the state that followed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.episodes import cut_episodes
from data.trajectories import Dataset, Trajectory
from utils import InputError, did_you_mean

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
OPTIONAL_KEYS = ("next_observations", "timeouts")
SIMULATOR_KEYS = {"infos/qpos": "qpos", "infos/qvel": "qvel"}  # by key: the field of Trajectory
FLAG_KEYS = ("terminals", "timeouts")
NUMBER_KEYS = ("rewards", *FLAG_KEYS)  # (N,); every other array is (N, features)

# The only names a pickle of (paths, metadata) may refer to: what NumPy 1 and 2 need to rebuild arrays, and plain
# containers. None of them can be made to run code from the file.
PICKLED_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),  # bytes, in the oldest pickle protocols
    *(("builtins", name) for name in ("set", "frozenset", "complex", "bytearray")),
    ("collections", "OrderedDict"),
}


# ---- readers ---------------------------------------------------------------------------------------------------------


def read_hdf5(path: Path, simulator_states: bool, limit: int | None = None) -> tuple[list[Trajectory], str | None]:
    """Reads a D4RL-format HDF5 file.

    Args:
        path: The file.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too, where the file has them.
        limit: Steps after which the environment ends an episode, used where the file records no timeouts.

    Returns:
        The trajectories, and the environment's name where the file's attributes give one.

    Raises:
        InputError: If the file cannot be read or learned from.
    """
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
    trajectories, _ = cut_episodes(_by_field(values), limit)
    _check_together(trajectories, str(path))
    return trajectories, None if env_name is None else str(env_name)


def _keys(simulator_states: bool) -> tuple[str, ...]:
    return (*REQUIRED_KEYS, *OPTIONAL_KEYS, *(SIMULATOR_KEYS if simulator_states else ()))


def _unreadable_hdf5(path: Path, error: Exception) -> str:
    """Says why HDF5 could not read a file and what to do: fetch half a file again, give another file than a zip."""
    if "truncated" in str(error) or path.stat().st_size == 0:
        return f"{path} is truncated (incomplete): a download or copy of it was cut off; delete it and fetch it again"
    if not h5py.is_hdf5(path):
        return f"{path} is not an HDF5 file; expected a D4RL-format .hdf5 file or a .pkl of (paths, metadata)"
    return f"{path} is damaged, HDF5 cannot read it ({error}); delete it and fetch it again"


def read_minari(name: str) -> tuple[list[Trajectory], str | None, str]:
    """Reads a Minari dataset that is on this machine.

    Returns:
        The trajectories, the environment's name where Minari knows it, and a SHA-256 digest of the arrays.

    Raises:
        InputError: If Minari is not installed or has no such dataset here, or it cannot be learned from.
    """
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
            "observations": episode.observations[:-1],  # the last one is what followed the last action
            "actions": np.asarray(episode.actions),
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            "next_observations": episode.observations[1:],
            "timeouts": episode.truncations,
        }
        values = _validate(columns, f"{name}, episode {index}", found=[])
        for column in values.values():
            digest.update(column)
        trajectories += cut_episodes(_by_field(values))[0]
    _check_together(trajectories, name)
    return trajectories, source.env_spec.id if source.env_spec else None, digest.hexdigest()


# ---- pickled paths ---------------------------------------------------------------------------------------------------


class _PathsUnpickler(pickle.Unpickler):
    """Reads arrays and plain Python only, so that a file from a stranger cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, only NumPy arrays and plain Python are read")
        return super().find_class(module, name)


@dataclass(frozen=True)
class PickledPaths:
    """What a pickle of ``(list of paths, metadata)`` holds, as planners write and read it.

    Attributes:
        file: The pickle.
        paths: A dictionary of arrays under D4RL's keys for each.
        dataset: The dataset's name, if the metadata give one.
        env_name: The environment's name, if the metadata give one.
        sha256: In a cache, the digest of the file that the paths were read from; not checked.
    """

    file: Path
    paths: list[dict[str, Any]]
    dataset: object
    env_name: str | None
    sha256: str | None

    def trajectories(self, simulator_states: bool) -> list[Trajectory]:
        """Returns the validated trajectories.

        A path is one episode, or several where its ``terminals`` and ``timeouts`` say so. Instead of ``terminals`` it
        may have ``terminated``, a flag for its last row. With neither, it was cut off.

        Raises:
            InputError: If they cannot be learned from.
        """
        trajectories = []
        for index, path in enumerate(self.paths):
            where = f"{self.file}, path {index}"
            columns = _path_columns(path, simulator_states, where)
            values = _validate(columns, where, found=list(map(str, path)))
            trajectories += cut_episodes(_by_field(values))[0]
        _check_together(trajectories, str(self.file))
        return trajectories


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or its first byte."""
    with path.open("rb") as file:
        return path.suffix in (".pkl", ".pickle") or file.read(1) == pickle.PROTO


def read_pickle(path: Path, simulator_states: bool) -> tuple[list[Trajectory], str | None]:
    """Reads a pickle of ``(list of paths, metadata)``.

    Args:
        path: The file.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too, where the paths have them.

    Returns:
        The trajectories, and the environment's name where the metadata give one.

    Raises:
        InputError: If the file cannot be read or learned from.
    """
    pickled = open_pickle(path)
    return pickled.trajectories(simulator_states), pickled.env_name


def open_pickle(path: Path) -> PickledPaths:
    """Unpickles ``(list of paths, metadata)`` without looking into the paths yet.

    Raises:
        InputError: If the file holds something else, or names what is not read from a stranger's file.
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
    env_name = metadata.get("env_name")
    if env_name is not None and not isinstance(env_name, str):
        raise InputError(f"{path} has the env_name {env_name!r}; expected a string")
    return PickledPaths(path, paths, metadata.get("dataset"), _plain(env_name), _plain(metadata.get("sha256")))


def _plain(value: object) -> str | None:
    """Returns a plain string, also for NumPy's own kind of string: model.pkl, where it ends up, holds plain Python."""
    return None if value is None else str(value)


def _path_columns(path: dict[str, Any], simulator_states: bool, where: str) -> dict[str, np.ndarray]:
    """Returns a path's arrays by key, with one flag per row under ``terminals``."""
    keys = [key for key in (*_keys(simulator_states), "terminated") if path.get(key) is not None]
    try:
        columns = {key: np.asarray(path[key]) for key in keys}
    except ValueError:
        raise InputError(f"{where} has lists of different lengths where an array is expected") from None
    terminated = columns.pop("terminated", np.asarray(False))
    if "terminals" not in columns and "observations" in columns:
        columns["terminals"] = terminated
        if terminated.ndim == 0:
            columns["terminals"] = np.zeros(columns["observations"].shape[:1], bool)
            columns["terminals"][-1:] = terminated
    return columns


def to_paths(dataset: Dataset) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Returns a dataset as ``(list of paths, metadata)``, the pair that planners unpickle and ``open_pickle`` reads."""
    metadata = {
        "dataset": dataset.name,
        "env_name": dataset.env_name,
        "obs_mask": np.ones(dataset.state_dim, np.float32),
        "sha256": dataset.sha256,
        "rows": dataset.num_rows,
        "trajectories": len(dataset.trajectories),
    }
    return [_to_path(trajectory) for trajectory in dataset.trajectories], metadata


def _to_path(trajectory: Trajectory) -> dict[str, np.ndarray]:
    fields = {key: key for key in ("observations", "actions", "rewards", "next_observations")} | SIMULATOR_KEYS
    path = {key: getattr(trajectory, field) for key, field in fields.items()}
    is_last = np.arange(len(trajectory)) == len(trajectory) - 1
    path |= {"terminals": is_last & trajectory.terminated, "timeouts": is_last & (not trajectory.terminated)}
    return {key: array for key, array in path.items() if array is not None}


# ---- validation ------------------------------------------------------------------------------------------------------


def _validate(
    columns: Mapping[str, h5py.Dataset | np.ndarray], where: str, *, found: list[str]
) -> dict[str, np.ndarray]:
    """Checks columns and reads them into memory.

    Args:
        columns: Arrays or HDF5 datasets by key, ``(N, features)`` or ``(N,)``, all of the same N.
        where: Where they are from, for messages.
        found: All keys there, for the message about a missing one.

    Returns:
        The same columns in float32, all finite; ``terminals`` and ``timeouts`` as bool ``(N,)``.
    """
    for key in REQUIRED_KEYS:
        if key not in columns:
            raise InputError(
                f"{where} has no array {key!r}{did_you_mean(key, found)}; it has: {', '.join(found) or 'none'}"
            )
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
    """Refuses a column of another type or shape than its key stands for, before it is read."""
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
    """Reads a column into memory, and checks that every value is finite and every flag 0 or 1."""
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


def _by_field(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names columns like the fields of ``Trajectory``."""
    return {SIMULATOR_KEYS.get(key, key): column for key, column in values.items()}


def _check_together(trajectories: list[Trajectory], where: str) -> None:
    """Checks what concerns all trajectories: they have the same dimensions, and there is a transition."""
    shapes = {(t.observations.shape[1], t.actions.shape[1], t.next_observations is not None) for t in trajectories}
    if len(shapes) > 1:
        raise InputError(
            f"{where} mixes trajectories of different kinds, (state_dim, action_dim, has next_observations): "
            f"{', '.join(map(str, sorted(shapes)))}; give one kind"
        )
    if not trajectories:
        raise InputError(f"{where} is empty (no trajectories); collect or fetch the dataset again")
    if not any(trajectory.num_transitions for trajectory in trajectories):
        raise InputError(
            f"{where} has no transition: all its trajectories have length 1 and there are no next_observations; "
            "give trajectories of 2 rows or more"
        )
