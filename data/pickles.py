"""Pickles of paths, as planners and published scripts write them; and how this project writes them.

What is read: a list of paths, such a list with metadata as the pair ``(paths, metadata)``, or one dictionary of D4RL's
arrays. A path is a dictionary of arrays of one episode (MOReL, mjrl, Decision Transformer, DAPG). How a file from a
stranger is unpickled is told in ``unpickling.py``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data.columns import Recording, Stretch, Wanted, read_columns
from data.limits import Budget
from data.nested import listed
from data.trajectories import Dataset, Finding, Part, Trajectory, shown
from data.unpickling import ArraysUnpickler
from utils import InputError

MAX_AXES, BYTES_PER_NUMBER, NUMBERS_PER_LIST = 4, 8, 8  # of arrays that are written as lists; the last is their size
NUMERIC = (bool, int, float, np.number, np.bool_, np.ndarray, list, tuple)  # what such lists may hold
SIMULATOR_FIELDS = {"infos/qpos": "qpos", "infos/qvel": "qvel"}  # by key: the field of Trajectory


@dataclass(frozen=True)
class PickledPaths:
    """What a pickle holds.

    Attributes:
        file: The pickle.
        paths: A dictionary of arrays under D4RL's keys for each; one for a dictionary of D4RL's arrays.
        paths_are_episodes: Whether an episode ends with each of them.
        dataset: The dataset's name, if the metadata give one.
        env_name: The environment's name, if the metadata give one.
        sha256: In a cache, the digest of what the paths were read from; not checked.
        findings: In a cache, what was found when they were.
        parts: In a cache of several datasets, what it was joined from.
        budget: How much may still be made of the file.
    """

    file: Path
    paths: list[dict[str, Any]]
    paths_are_episodes: bool
    budget: Budget = field(repr=False, compare=False)
    dataset: object = None
    env_name: str | None = None
    sha256: str | None = None
    findings: tuple[Finding, ...] = ()
    parts: tuple[Part, ...] = ()

    def read(self, wanted: Wanted) -> Recording:
        """Returns the validated rows.

        Raises:
            InputError: If they cannot be learned from.
        """
        place = "{}, path {}" if self.paths_are_episodes else "{}"
        entries = [_Entries(path, self.file, self.budget) for path in self.paths]
        stretches = [Stretch(place.format(self.file, index), path) for index, path in enumerate(entries)]
        columns, findings = read_columns(
            stretches, str(self.file), wanted, self.budget, stretches_are_episodes=self.paths_are_episodes
        )
        return Recording(columns, tuple(dict.fromkeys((*self.findings, *findings))), self.env_name)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or its first byte."""
    with path.open("rb") as file:
        return path.suffix in (".pkl", ".pickle") or file.read(1) == pickle.PROTO


def read_pickle(path: Path, wanted: Wanted) -> Recording:
    """Reads a pickle of paths.

    Raises:
        InputError: If it cannot be read or learned from.
    """
    return open_pickle(path).read(wanted)


def open_pickle(path: Path) -> PickledPaths:
    """Unpickles a file without looking into the paths yet.

    Raises:
        InputError: If the file holds something else, or names what is not read from a stranger's file.
    """
    budget = Budget(path)
    try:
        with path.open("rb") as file:
            content = ArraysUnpickler(file, budget).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything at all
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} cannot be read as a pickle of paths: {reason}") from None
    if isinstance(content, np.ndarray) and content.dtype == object and content.ndim == 1:
        content = content.tolist()
    match content:
        case (list() | tuple() as paths, dict(metadata)) if all(isinstance(entry, dict) for entry in paths):
            return _with_metadata(path, list(paths), metadata, budget)
        case list() | tuple() if all(isinstance(entry, dict) for entry in content):
            return PickledPaths(path, list(content), paths_are_episodes=True, budget=budget)
        case dict() if "observations" in content:
            return PickledPaths(path, [content], paths_are_episodes=False, budget=budget)
    raise InputError(
        f"{path} holds {_described(content)}; expected a list of paths (dictionaries with 'observations', 'actions', "
        "...), a pair (that list, metadata), or one such dictionary"
    )


def _described(content: object) -> str:
    if isinstance(content, dict):
        return f"a dictionary of {listed(content)}"
    if isinstance(content, list | tuple):
        return f"a {type(content).__name__} of {listed({type(entry).__name__ for entry in content})}"
    return f"one {type(content).__name__}"


def _with_metadata(path: Path, paths: list[dict[str, Any]], metadata: dict[str, Any], budget: Budget) -> PickledPaths:
    mask = _Entries(metadata, path, budget).get("obs_mask")
    if mask is not None and not (isinstance(mask, np.ndarray) and mask.dtype.kind in "fiub" and (mask == 1).all()):
        raise InputError(
            f"{path} hides parts of the state (its obs_mask is not all ones); only whole states are learned"
        )
    env_name = metadata.get("env_name")
    if env_name is not None and not isinstance(env_name, str):
        raise InputError(f"{path} has the env_name {shown(env_name)}; expected a string")
    return PickledPaths(
        path,
        paths,
        paths_are_episodes=True,
        budget=budget,
        dataset=metadata.get("dataset"),
        env_name=_plain(env_name),
        sha256=_plain(metadata.get("sha256")),
        findings=_restored(Finding, metadata.get("findings")),
        parts=_restored(Part, metadata.get("parts")),
    )


def _plain(value: object) -> str | None:
    """Returns a plain string, also for NumPy's own kind of string: model.pkl, where it ends up, holds plain Python."""
    return None if value is None else str(value) if isinstance(value, str) else shown(value)


def _restored(kind: type, entries: object) -> tuple[Any, ...]:
    """Returns findings or parts as a cache keeps them; what another program stored under their name is not read."""
    wanted = {each.name: each.type for each in fields(kind)}  # types by name, as annotations are not evaluated
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return ()
    if any({key: type(value).__name__ for key, value in entry.items()} != wanted for entry in entries):
        return ()
    return tuple(kind(**entry) for entry in entries)


class _Entries(Mapping[str, Any]):
    """A dictionary of a pickle: further dictionaries, and all else as arrays."""

    def __init__(self, content: Mapping[str, Any], where: object, budget: Budget) -> None:
        self._content, self._where, self._budget = content, where, budget

    def __getitem__(self, key: str) -> _Entries | np.ndarray | None:
        entry = self._content[key]
        if isinstance(entry, Mapping):
            return _Entries(entry, self._where, self._budget)
        if entry is None or isinstance(entry, np.ndarray):
            return entry
        try:
            if not isinstance(entry, list | tuple):
                return np.asarray(entry)
            numbers, is_numeric = _count(entry, self._budget)
            self._budget.take(numbers * BYTES_PER_NUMBER, f"the list under {key!r:.80}")
            return np.asarray(entry, None if is_numeric else object)
        except InputError:
            raise
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise InputError(
                f"{self._where} has lists of different lengths under {key!r:.80}, expected an array"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


def _count(entry: list[Any] | tuple[Any, ...], budget: Budget, axes: int = 1) -> tuple[int, bool]:
    """Returns how many numbers and lists are in lists in lists, and whether they hold numbers only.

    A list can stand in a list many times, and in itself: InputError if these are more than fit.
    """
    if axes > MAX_AXES:
        raise ValueError
    kinds = set(map(type, entry))
    if kinds <= {float, int, bool}:
        return len(entry), True
    total, is_numeric = 0, all(issubclass(kind, NUMERIC) for kind in kinds)
    for part in entry:
        more, numeric = 1, True
        if isinstance(part, list | tuple):
            more, numeric = _count(part, budget, axes + 1)
            more += NUMBERS_PER_LIST
        elif isinstance(part, np.ndarray):
            more, numeric = part.size + NUMBERS_PER_LIST, part.dtype.kind in "fiub"
        total, is_numeric = total + more, is_numeric and numeric
        if total * BYTES_PER_NUMBER > budget.left:
            budget.take(total * BYTES_PER_NUMBER, "a list of lists")
    return total, is_numeric


# --- Writing ---


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
    for key, entries in (("findings", dataset.findings), ("parts", dataset.parts)):
        if entries:
            metadata[key] = [asdict(entry) for entry in entries]
    return [_to_path(trajectory) for trajectory in dataset.trajectories], metadata


def _to_path(trajectory: Trajectory) -> dict[str, np.ndarray]:
    fields = {key: key for key in ("observations", "actions", "rewards", "next_observations")} | SIMULATOR_FIELDS
    path = {key: getattr(trajectory, field) for key, field in fields.items()}
    is_last = np.arange(len(trajectory)) == len(trajectory) - 1
    path |= {"terminals": is_last & trajectory.terminated, "timeouts": is_last & (not trajectory.terminated)}
    return {key: array for key, array in path.items() if array is not None}
