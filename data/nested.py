"""Observations that are one array, or nested dictionaries of arrays: which of them make the state, in which order.

The order is that of ``gymnasium.spaces.flatten``: by key, depth first, tuples by position. It is part of what is found
about a dataset, since whoever uses a model must give states in the same order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data.trajectories import Finding, printable
from utils import InputError, did_you_mean

MAX_DEPTH, MAX_ENTRIES = 16, 10_000  # a file may nest a group in itself, or one in another in many places
SHOWN_NAMES, LONGEST_NAME = 12, 80  # in messages; the second in characters


class Column(Protocol):
    """An array, or one that is still in its file; ``column[...]`` reads it."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Its shape; None for an array of HDF5 that has a type, but no dataspace."""

    @property
    def dtype(self) -> np.dtype:
        """Its type."""

    def __getitem__(self, index: Any) -> Any:
        """Reads a part of it."""


@dataclass(frozen=True)
class Leaf:
    """One of the arrays that make a column, side by side.

    Attributes:
        name: Its name inside nested observations, such as ``achieved_goal/kettle``; empty for a single array.
        column: Its rows, ``(N, features)`` or ``(N,)``.
    """

    name: str
    column: Column

    @property
    def width(self) -> int:
        """How many features it has."""
        return self.column.shape[1] if len(self.column.shape) > 1 else 1


def pick_leaves(tree: Any, keys: Sequence[str], where: str) -> tuple[list[Leaf], list[str]]:
    """Chooses what makes the state.

    Args:
        tree: An array, or nested mappings of arrays.
        keys: Names in the tree, of arrays or of whole branches, in the order wanted; none: every float vector.
        where: Where it is from, for messages.

    Returns:
        The leaves in order, and the names of those that are no float vectors and were left out.

    Raises:
        InputError: If a key does not exist, or nothing can be learned.
    """
    if not isinstance(tree, Mapping):
        if keys:
            raise InputError(f"{where} is one array, of which no keys can be chosen; leave '::{','.join(keys)}' out")
        return [Leaf("", tree)], []
    found = list(_leaves(map_arrays(lambda array: array, tree, where)))
    if keys:
        return [leaf for key in keys for leaf in _under(found, key, where)], []
    usable = [leaf for leaf in found if is_vector(leaf.column)]
    if not usable:
        kinds = [f"{leaf.name} {leaf.column.shape} {leaf.column.dtype}" for leaf in found]
        raise InputError(
            f"{where} has no float vector but {listed(kinds)}; image observations and discrete ones cannot be learned"
        )
    return usable, [leaf.name for leaf in found if leaf not in usable]


def nested_findings(leaves: Sequence[Leaf], left_out: Sequence[str]) -> list[Finding]:
    """Returns what is to be said of the state that these leaves make."""
    if leaves[0].name == "":
        return []
    ends = np.cumsum([leaf.width for leaf in leaves]).tolist()
    order = (f"{leaf.name} {end - leaf.width}:{end}" for leaf, end in zip(leaves, ends, strict=True))
    made = Finding(
        name="nested observations",
        count=len(leaves),
        where=", ".join(order),
        effect="these entries, side by side in this order, make the state",
        advice="give states in this order to the model; choose others with NAME::KEY,KEY",
        matters=True,
    )
    if not left_out:
        return [made]
    missing = Finding(
        name="observations left out",
        count=len(left_out),
        where=listed(left_out),
        effect="only float vectors are learned, so the state may lack something",
        advice="if it does, give a dataset that has it as vectors; to choose what is read, give NAME::KEY,KEY",
        matters=True,
    )
    return [made, missing]


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Returns names for a message, not more than fit into a line or two."""
    names = sorted(printable(str(name))[:LONGEST_NAME] for name in names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return (", ".join(names[:SHOWN_NAMES]) + more) or "none"


def join_names(outer: str, inner: str) -> str:
    """Returns the name of an entry inside another."""
    return f"{outer}/{inner}" if outer and inner else outer or inner


def map_arrays(function: Callable[[Any], Any], tree: Any, where: str) -> Any:
    """Returns an array, or nested mappings of arrays, with a function applied to each of them.

    Raises:
        InputError: If it is nested too deeply, or in too many places.
    """
    steps = itertools.count()

    def apply(entry: Any, depth: int) -> Any:
        if not isinstance(entry, Mapping):
            return entry if entry is None else function(entry)
        if depth > MAX_DEPTH:
            raise InputError(f"{where} is nested deeper than {MAX_DEPTH} levels; flatten it")
        return {key: apply(entry[key], depth + 1) for key in entry if _may_go_on(steps, where)}

    return apply(tree, 0)


def _may_go_on(steps: Iterator[int], where: str) -> bool:
    if next(steps) >= MAX_ENTRIES:
        raise InputError(f"{where} has more than {MAX_ENTRIES:,} entries; give one array, or fewer")
    return True


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[Leaf]:
    for key in sorted(tree, key=_position):
        name, entry = join_names(prefix, str(key)), tree[key]
        if isinstance(entry, Mapping):
            yield from _leaves(entry, name)
        elif entry is not None:
            yield Leaf(name, entry)


def _position(key: str) -> tuple[int, str]:
    """Sorts Minari's names of a tuple's parts, such as ``_index_10``, by number, and all others as text."""
    match = re.fullmatch(r"_index_([0-9]{1,9})", str(key))
    return (int(match[1]), "") if match else (-1, str(key))


def _under(leaves: list[Leaf], key: str, where: str) -> list[Leaf]:
    chosen = [leaf for leaf in leaves if leaf.name == key or leaf.name.startswith(f"{key}/")]
    if not chosen:
        names = [leaf.name for leaf in leaves]
        raise InputError(f"{where} has no key {key!r}{did_you_mean(key, names)}; it has: {listed(names)}")
    return chosen


def is_vector(column: Column) -> bool:
    """Whether an array has a float vector, or one float, per row."""
    shape = column.shape
    return shape is not None and column.dtype.kind == "f" and len(shape) in (1, 2) and 0 not in shape[1:]
