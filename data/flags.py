"""Where a file says that episodes end: flags per row, under the many names that programs give them.

D4RL has ``terminals`` (the environment ended the episode) and ``timeouts`` (it was cut off). Every other name in
``FLAGS`` is read as one of the two. A name that looks like such a flag and is none of them is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.trajectories import Finding
from utils import InputError

# By the file's name: what a true flag means. "done" tells of an end without its reason: see ``join_flags``.
FLAGS = {
    "terminals": "terminal",
    "terminations": "terminal",  # Minari
    "terminated": "terminal",  # Gymnasium's step; mjrl has one per path
    "timeouts": "cut",
    "truncations": "cut",  # Minari
    "truncated": "cut",  # Gymnasium's step
    "episode_terminals": "cut",  # d3rlpy 1: the last step of an episode, terminal or not
    "dones": "done",
    "done": "done",
}
D4RL_FLAGS = ("terminals", "timeouts")  # what is wrong with these is an error, with the others a finding
FLAG_LIKE = re.compile(
    r"done|terminal|terminat|truncat|time_?out|time_?limit|absorbing|masks?$|valids?$|is_(first|last)$|"
    r"(episode|traj|trajectory|path)s?_?(id|idx|ind|index|end|start|len|length)e?s?$|resets?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Flags:
    """The flags of a stretch of rows.

    Attributes:
        rows: How many rows it has.
        read: Bool ``(rows,)`` by the file's name.
        unread: By the file's name, why it could not be read as flags.
    """

    rows: int
    read: dict[str, np.ndarray] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def read_flags(entries: Mapping[str, Any], rows: int, where: str, *, is_episode: bool) -> Flags:
    """Reads every flag of a stretch of rows.

    Args:
        entries: What the file has there, by name.
        rows: How many rows it has.
        where: Where it is, for messages.
        is_episode: Whether it is one episode: then a single flag may stand for its last row.

    Raises:
        InputError: If one of D4RL's flags is no flag.
    """
    flags = Flags(rows)
    for name in entries:
        if name not in FLAGS and not FLAG_LIKE.search(str(name)):
            continue
        column = entries[name]
        if name not in FLAGS:
            if getattr(column, "shape", None) in ((), (1,), (rows,), (rows, 1)):
                flags.unread[name] = "a name that is not known"
            continue
        if column is None:
            continue
        try:
            flags.read[name] = _as_flags(column, rows, is_episode)
        except ValueError as error:
            if name in D4RL_FLAGS:
                raise InputError(f"{where}: {name} {error}; remove or repair it") from None
            flags.unread[name] = str(error)
    return flags


def _as_flags(column: Any, rows: int, is_episode: bool) -> np.ndarray:
    """Returns a column as bool ``(rows,)``; raises a ValueError that says why it is none."""
    if isinstance(column, Mapping):
        raise ValueError("is a group, expected one flag per row")
    if column.shape is None:
        raise ValueError("is empty: it has a type, but no dataspace, expected one flag per row")
    if column.dtype.kind not in "fiub":
        raise ValueError(f"holds {column.dtype} values, expected 0 or 1")
    if column.shape == () and is_episode:
        values = np.zeros(rows, column.dtype)
        values[-1:] = column[...]
    elif len(column.shape) == 0 or column.shape[1:] not in ((), (1,)):
        raise ValueError(f"has shape {column.shape}, expected one flag per row: (rows,)")
    elif column.shape[0] != rows:
        raise ValueError(f"has {column.shape[0]} rows, but observations has {rows}; expected one per step")
    else:
        values = np.asarray(column[...]).reshape(-1)
    if values.dtype == bool:
        return values
    is_unset = values == 0
    for on in (1, 255):
        is_set = values == on
        if (is_set | is_unset).all():
            return is_set
    row = int(np.argmin((values == 1) | is_unset))
    raise ValueError(f"is {values[row]} in row {row}, expected 0 or 1")


def join_flags(
    stretches: Sequence[Flags], *, stretches_are_episodes: bool
) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Joins the flags of all stretches.

    A ``done`` that stands beside flags for terminals is an episode's end for another reason, beside flags for cuts it
    is a terminal where no cut is, and alone it is taken for a terminal.

    Args:
        stretches: The flags of each, in order.
        stretches_are_episodes: Whether the last row of each is an episode's end.

    Returns:
        ``terminals`` and, if anything tells of other ends, ``timeouts``, bool ``(N,)``, empty where the file has no
        flags; and what was found.
    """
    names = {name for stretch in stretches for name in stretch.read}
    by_name = {name: _concatenate(stretches, name) for name in sorted(names)}
    given = {
        meaning: [flags for name, flags in by_name.items() if FLAGS[name] == meaning] for meaning in FLAGS.values()
    }
    joined = {meaning: np.logical_or.reduce(flags) for meaning, flags in given.items() if flags}
    done = joined.pop("done", None)
    if done is not None and "terminal" in joined:
        joined["cut"] = joined.get("cut", False) | (done & ~joined["terminal"])
    elif done is not None:
        joined["terminal"] = done & ~joined.get("cut", np.False_)
    if stretches_are_episodes:
        is_last = np.zeros(sum(stretch.rows for stretch in stretches), bool)
        ends = np.cumsum([stretch.rows for stretch in stretches if stretch.rows])
        is_last[ends - 1] = True
        joined["cut"] = joined.get("cut", False) | (is_last & ~joined.get("terminal", np.False_))
    if "cut" in joined:
        joined.setdefault("terminal", np.zeros_like(joined["cut"]))
    columns = {
        key: joined[meaning] for key, meaning in (("terminals", "terminal"), ("timeouts", "cut")) if meaning in joined
    }
    return columns, [*_read_findings(by_name), *_unread_findings(stretches)]


def _concatenate(stretches: Sequence[Flags], name: str) -> np.ndarray:
    parts = [stretch.read.get(name) for stretch in stretches]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(
        [np.zeros(stretch.rows, bool) if part is None else part for part, stretch in zip(parts, stretches, strict=True)]
    )


def _read_findings(by_name: Mapping[str, np.ndarray]) -> list[Finding]:
    others = [name for name in by_name if name not in D4RL_FLAGS]
    if not others:
        return []
    is_done_alone = all(FLAGS[name] == "done" for name in by_name)
    effect = (
        "episodes end there; each is taken for a terminal, since nothing says which ones are time limits"
        if is_done_alone
        else "episodes end there"
    )
    found = Finding(
        name="flags",
        count=int(np.logical_or.reduce([by_name[name] for name in others]).sum()),
        where=", ".join(f"{name} (true in {int(by_name[name].sum())} rows)" for name in others),
        effect=effect,
        advice="to say it in D4RL's words, store 'terminals' and 'timeouts'",
        matters=is_done_alone,
    )
    return [found]


def _unread_findings(stretches: Sequence[Flags]) -> list[Finding]:
    reasons = {name: reason for stretch in reversed(stretches) for name, reason in stretch.unread.items()}
    if not reasons:
        return []
    found = Finding(
        name="flags not read",
        count=len(reasons),
        where="; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items())),
        effect="if they tell where episodes end, some of those ends are missed",
        advice="store such ends as 'timeouts' (or 'terminals'), one flag per row",
        matters=True,
    )
    return [found]
