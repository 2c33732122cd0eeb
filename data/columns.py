"""From what a file holds to validated columns: what all formats share.

A reader finds the stretches of rows in its file and hands each on as a mapping: arrays under the names that the file
gives them, nested where the file nests them. ``read_columns`` picks what can be learned from, checks it, and joins all
stretches to one set of columns.

Letters in shapes: ``N`` rows. A row is one time step, as in ``trajectories.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.flags import join_flags, read_flags
from data.limits import Budget
from data.nested import Leaf, join_names, listed, nested_findings, pick_leaves
from data.precision import SAMPLED_ROWS, precision_finding, unresolved_dimensions
from data.trajectories import Finding, printable
from utils import InputError, did_you_mean

REQUIRED_FIELDS = ("observations", "actions")
STATE_FIELDS = ("observations", "next_observations")  # (N, features), the only ones that may be nested
SIMULATOR_NAMES = {
    "qpos": ("infos/qpos", "qpos"),
    "qvel": ("infos/qvel", "qvel"),
}  # by field; OGBench has the short ones
SIMULATOR_LIKE = ("qpos", "qvel")
FLOAT32_MAX = float(np.finfo(np.float32).max)
BLOCK_ROWS = 65536
LONGEST_NAME = 200  # characters, of an environment


@dataclass(frozen=True)
class Wanted:
    """What to read of a file beyond what is always read.

    Attributes:
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too, where the file has them.
        observation_keys: Which entries of nested observations make the state, in this order; none: all of them.
    """

    simulator_states: bool = False
    observation_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """Rows of a file that stand together.

    Attributes:
        where: Where they are, for messages, such as ``a.pkl, path 3``.
        entries: Arrays by the file's names, or further mappings of them.
    """

    where: str
    entries: Mapping[str, Any]


@dataclass(frozen=True)
class Recording:
    """What a reader returns.

    Attributes:
        columns: Arrays ``(N, ...)`` by field of ``Trajectory``; ``terminals`` and, if the file tells of other ends,
            ``timeouts``, both bool ``(N,)``. Numbers are finite and float32, but states float64 where float32 would
            lose something.
        findings: What was found while reading.
        env_name: The environment, where the file names it.
        sha256: Digest of the arrays, for a dataset that is not one file.
    """

    columns: dict[str, np.ndarray]
    findings: tuple[Finding, ...]
    env_name: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        """Makes the environment's name, which anybody can have written, one that can be printed."""
        if self.env_name is not None:
            object.__setattr__(self, "env_name", printable(self.env_name)[:LONGEST_NAME])


def read_columns(
    stretches: Sequence[Stretch], where: str, wanted: Wanted, budget: Budget, *, stretches_are_episodes: bool
) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Picks, checks and joins columns.

    Args:
        stretches: Rows of the file, in order.
        where: The file, for messages.
        wanted: What else to read.
        budget: How much may be made of the file.
        stretches_are_episodes: Whether an episode ends with every stretch.

    Returns:
        ``columns`` and ``findings`` of a ``Recording``.

    Raises:
        InputError: If they cannot be learned from; it names the place.
    """
    if not stretches:
        raise InputError(f"{where} is empty (no trajectories); collect or fetch the dataset again")
    picked = [_pick(stretch, wanted) for stretch in stretches]
    _check_alike(picked)
    if not any(part.rows for part in picked):
        raise InputError(f"{where} is empty (0 rows); collect or fetch the dataset again")
    budget.take(sum(part.size for part in picked), f"its {sum(part.rows for part in picked):,} rows")
    flags, findings = join_flags(
        [read_flags(part.entries, part.rows, part.where, is_episode=stretches_are_episodes) for part in picked],
        stretches_are_episodes=stretches_are_episodes,
    )
    if not flags and "next_observations" not in picked[0].leaves:
        raise InputError(
            f"{where} does not say where episodes end: it has neither 'terminals' nor 'timeouts'; add one, true in the "
            f"last row of each; it has: {listed(stretches[0].entries)}"
        )
    states, kept = _join_states(picked)
    others = {field: _join(picked, field) for field in picked[0].leaves if field not in STATE_FIELDS}
    flags = flags or {"terminals": np.zeros(len(states["observations"]), bool)}
    nested = nested_findings(picked[0].leaves["observations"], picked[0].left_out)
    return {**states, **others, **flags}, [*findings, *kept, *nested, *_unread_findings(stretches[0])]


def find_entry(entries: Mapping[str, Any], name: str) -> Any:
    """Returns an entry, whether it stands under ``a/b`` or under ``b`` inside ``a``; None where there is none."""
    if (found := entries.get(name)) is not None:
        return found
    outer, _, inner = name.partition("/")
    nested = entries.get(outer) if inner else None
    return find_entry(nested, inner) if isinstance(nested, Mapping) else None


# --- Picking ---


@dataclass(frozen=True)
class _Picked:
    """What is read of a stretch: by field, the arrays that make it."""

    where: str
    entries: Mapping[str, Any]
    rows: int
    leaves: dict[str, list[Leaf]]
    left_out: list[str]

    @property
    def size(self) -> int:
        """How many bytes its rows take as they are read, at least those of float32."""
        leaves = [leaf for parts in self.leaves.values() for leaf in parts]
        return self.rows * sum(leaf.width * max(4, leaf.column.dtype.itemsize) for leaf in leaves)


def _pick(stretch: Stretch, wanted: Wanted) -> _Picked:
    entries, where = stretch.entries, stretch.where
    leaves: dict[str, list[Leaf]] = {}
    left_out: list[str] = []
    for field in ("observations", "actions", "rewards", "next_observations", "qpos", "qvel"):
        if field in SIMULATOR_NAMES and not wanted.simulator_states:
            continue
        names = SIMULATOR_NAMES.get(field, (field,))
        entry = next((found for name in names if (found := find_entry(entries, name)) is not None), None)
        if entry is None:
            if field in REQUIRED_FIELDS:
                hint = did_you_mean(field, map(str, entries))
                raise InputError(f"{where} has no array {field!r}{hint}; it has: {listed(entries)}")
            continue
        if field in STATE_FIELDS:
            leaves[field], left_out = pick_leaves(entry, wanted.observation_keys, f"{where}: {field}")
        else:
            leaves[field] = [Leaf("", entry)]
        for leaf in leaves[field]:
            _check_kind(leaf, field, where)
    rows = leaves["observations"][0].column.shape[0]
    for field, parts in leaves.items():
        for leaf in parts:
            if leaf.column.shape[0] != rows:
                raise InputError(
                    f"{where}: {join_names(field, leaf.name)} has {leaf.column.shape[0]} rows, but observations has "
                    f"{rows}; expected one per step"
                )
    if "next_observations" in leaves:
        _check_following(leaves, where)
    return _Picked(where, entries, rows, leaves, left_out)


def _check_kind(leaf: Leaf, field: str, where: str) -> None:
    """Refuses an array of another type or shape than its field stands for, before it is read."""
    column, name = leaf.column, join_names(field, leaf.name)
    if isinstance(column, Mapping):
        raise InputError(f"{where}: {name} is a group of {listed(column)}, expected one array")
    shape, dtype = column.shape, column.dtype
    if shape is None:
        raise InputError(f"{where}: {name} is empty: it has a type, but no dataspace, expected an array")
    if field in STATE_FIELDS and len(shape) == 3 and dtype.kind == "f":
        raise InputError(
            f"{where}: {name} has shape {shape}; if that is (episodes, steps, features), save (rows, features) and an "
            "array 'timeouts', true in the last row of each episode; image observations cannot be learned"
        )
    if field in STATE_FIELDS and (len(shape) > 2 or dtype == np.uint8):
        raise InputError(f"{where} has image {name} (shape {shape}, {dtype}); only float vectors can be learned")
    if field == "actions" and dtype.kind in "iub":
        raise InputError(f"{where} has discrete actions ({dtype}); only continuous (float) actions can be learned")
    if dtype.kind not in ("fiub" if field == "rewards" else "f"):
        raise InputError(f"{where}: {name} holds {dtype} values, expected floating-point numbers")
    is_row_of_numbers = bool(shape) and shape[1:] in ((), (1,))
    if field == "rewards":
        if not is_row_of_numbers:
            raise InputError(f"{where}: {name} has shape {shape}, expected one number per row: (rows,)")
    elif not (len(shape) == 2 and shape[1] > 0) and not (leaf.name and is_row_of_numbers):
        raise InputError(f"{where}: {name} has shape {shape}, expected one vector per row: (rows, features)")


def _check_following(leaves: dict[str, list[Leaf]], where: str) -> None:
    """Checks that the states that followed are made of the same arrays as the states."""
    states, following = (
        ", ".join(f"{leaf.name} {leaf.column.shape}".strip() for leaf in leaves[field]) for field in STATE_FIELDS
    )
    if states != following:
        raise InputError(f"{where}: next_observations has shape {following}, expected that of observations, {states}")


def _check_alike(picked: Sequence[_Picked]) -> None:
    """Checks that all stretches have the same columns of the same widths."""
    first = picked[0]
    for part in picked[1:]:
        for field in {**first.leaves, **part.leaves}:
            one, other = (_described(p.leaves.get(field, [])) for p in (first, part))
            if one != other:
                raise InputError(
                    f"{part.where}: {field} is {other}, but {one} in {first.where}: trajectories of different kinds; "
                    "give one kind"
                )


def _described(leaves: list[Leaf]) -> str:
    return ", ".join(f"{leaf.name} {leaf.width} wide".strip() for leaf in leaves) or "missing"


# --- Joining ---


def _join(picked: Sequence[_Picked], field: str, dtype: type = np.float32) -> np.ndarray:
    """Reads a field of all stretches into one finite array, ``(N, features)`` or ``(N,)``.

    A single array that has the right type is not copied.
    """
    leaves = picked[0].leaves[field]
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and is reported below
        if len(picked) == len(leaves) == 1:
            column = leaves[0].column
            # An array in an HDF5 file converts block by block, with no second copy of the whole.
            values = np.ascontiguousarray((column if column.dtype == dtype else column.astype(dtype))[...])
        else:
            values = np.empty((sum(part.rows for part in picked), sum(leaf.width for leaf in leaves)), dtype)
            row = 0
            for part in picked:
                feature = 0
                for leaf in part.leaves[field]:
                    target = values[row : row + part.rows, feature : feature + leaf.width]
                    target[...] = leaf.column[...].reshape(target.shape)
                    feature += leaf.width
                row += part.rows
    values = values.reshape(-1) if field == "rewards" else values.reshape(len(values), -1)
    _check_finite(values, picked, field)
    return values


def _check_finite(values: np.ndarray, picked: Sequence[_Picked], field: str) -> None:
    for start in range(0, len(values), BLOCK_ROWS):
        block = values[start : start + BLOCK_ROWS]
        is_usable = np.isfinite(block) if block.dtype == np.float32 else np.abs(block) <= FLOAT32_MAX
        if is_usable.all():
            continue
        row, *feature = np.argwhere(~is_usable)[0].tolist()
        part, row = _find_row(picked, start + row)
        value = _value(part.leaves[field], row, feature[0] if feature else 0)
        raise InputError(
            f"{part.where}: {field} is {value} in row {row}, expected a finite number within float32; remove or repair "
            "that row"
        )


def _find_row(picked: Sequence[_Picked], row: int) -> tuple[_Picked, int]:
    """Returns the stretch that a row of all stretches together is in, and its number there."""
    for part in picked:
        if row < part.rows:
            return part, row
        row -= part.rows
    raise AssertionError("there are fewer rows")


def _value(leaves: list[Leaf], row: int, feature: int) -> float:
    """Returns a number as it stands in the file, before it was converted."""
    values = [np.ravel(leaf.column[row]) for leaf in leaves]
    return np.concatenate(values)[feature].item()


def _join_states(picked: Sequence[_Picked]) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Reads the states, in float64 where the file has it and float32 would lose something."""
    fields = [field for field in STATE_FIELDS if field in picked[0].leaves]
    leaves = [leaf for part in picked for field in fields for leaf in part.leaves[field]]
    unresolved = []
    if any(leaf.column.dtype.itemsize > 4 for leaf in leaves):
        for part in picked:  # what is still in the file is needed twice
            for field in fields:
                part.leaves[field] = [Leaf(leaf.name, leaf.column[...]) for leaf in part.leaves[field]]
        unresolved = unresolved_dimensions(*_sample(picked))
    dtype = np.float64 if unresolved else np.float32
    states = {field: _join(picked, field, dtype) for field in fields}
    return states, [precision_finding(unresolved)] if unresolved else []


def _sample(picked: Sequence[_Picked]) -> tuple[np.ndarray, np.ndarray]:
    """Returns some states and those that followed, both ``(rows, state_dim)`` in float64."""
    stride = max(1, sum(part.rows for part in picked) // SAMPLED_ROWS)
    states, following = [], []
    for part in picked:
        is_paired = "next_observations" not in part.leaves
        rows = np.arange(0, part.rows - is_paired, stride)
        states.append(_rows_of(part.leaves["observations"], rows))
        after = (part.leaves["observations"], rows + 1) if is_paired else (part.leaves["next_observations"], rows)
        following.append(_rows_of(*after))
    return np.concatenate(states), np.concatenate(following)


def _rows_of(leaves: list[Leaf], rows: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [leaf.column[rows].reshape(len(rows), leaf.width).astype(np.float64) for leaf in leaves], axis=1
    )


def _unread_findings(stretch: Stretch) -> list[Finding]:
    """Names simulator states that stand where they are not looked for, such as DAPG's initial ones."""
    names = [
        join_names(str(key), str(inner))
        for key, entry in stretch.entries.items()
        if isinstance(entry, Mapping) and key not in ("infos", "metadata", *STATE_FIELDS)
        for inner in entry
        if inner in SIMULATOR_LIKE
    ]
    if not names:
        return []
    found = Finding(
        name="entries not read",
        count=len(names),
        where=listed(names),
        effect="simulator states under these names are ignored; predictions need none, the oracle does",
        advice="for the oracle, store one per row as 'infos/qpos' and 'infos/qvel'",
        matters=False,
    )
    return [found]
