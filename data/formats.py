"""Formats of datasets: HDF5, pickled paths and Minari in, validated trajectories out.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are float32 in raw units. A row is
one time step: the state, the action taken in it, the reward for it and, where the file has it, the state that followed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.trajectories import Trajectory
from utils import InputError, did_you_mean

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
OPTIONAL_KEYS = ("next_observations", "timeouts")
SIMULATOR_KEYS = {"infos/qpos": "qpos", "infos/qvel": "qvel"}  # by key: the field of Trajectory
FLAG_KEYS = ("terminals", "timeouts")
NUMBER_KEYS = ("rewards", *FLAG_KEYS)  # (N,); every other array is (N, features)

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


# ---- readers ---------------------------------------------------------------------------------------------------------


def read_hdf5(path: Path, simulator_states: bool, limit: int | None) -> tuple[list[Trajectory], str | None]:
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


def read_minari(name: str) -> tuple[list[Trajectory], str | None, str]:
    """Returns the trajectories of a Minari dataset on this machine, its environment's name and a digest of its arrays.

    Raises:
        InputError: If Minari is not installed or has no such dataset here, or the dataset cannot be used.
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
    return trajectories, source.env_spec.id if source.env_spec else None, digest.hexdigest()


class _PathsUnpickler(pickle.Unpickler):
    """Reads arrays and plain Python only, so that a file from a stranger cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, only NumPy arrays and plain Python are read")
        return super().find_class(module, name)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or its first byte."""
    with path.open("rb") as file:
        return path.suffix in (".pkl", ".pickle") or file.read(1) == pickle.PROTO


def read_pickle(path: Path, simulator_states: bool) -> tuple[list[Trajectory], dict[str, Any]]:
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


def to_path(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """Returns a trajectory as the dictionary that planners read, from which ``read_pickle`` makes the same again."""
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


def check_together(trajectories: list[Trajectory], where: str) -> None:
    """Checks what concerns all trajectories: their kind must be one, and they must hold a transition."""
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
