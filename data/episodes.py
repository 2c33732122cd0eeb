"""Where episodes end: recorded rows in, trajectories out.

What the file says counts first (timeouts, terminals), then what the data show: a row that does not follow the one
before ends an episode, too. ``RULES`` lists data sets that record their episodes in a way of their own.

Letters in shapes: ``N`` rows. A row is one time step, as in ``trajectories.py``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.trajectories import Finding, Trajectory

FLAGS = ("terminals", "timeouts")
SAMPLED_ROWS = 20_000  # from which units of changes and distances are taken
LARGE = 10.0  # times the usual change: what may be a jump
GROUPS = 100  # of rows in no order: how many trajectories they make, so that a split has something to divide


@dataclass(frozen=True)
class EpisodeRules:
    """How a data set records its episodes, where that differs from the usual.

    Attributes:
        terminals_end: Whether an episode ends at a terminal; else terminals mark rows at a goal, and it goes on.
        ends_at_limit: Whether the environment's limit ends episodes where no timeouts are recorded.
        starts_alike: Whether all episodes start in nearly the same state, so that resets can be seen in the data.
        repeats_last_row: Whether the row behind an episode is its last one again, with another action.
    """

    terminals_end: bool = True
    ends_at_limit: bool = True
    starts_alike: bool = False
    repeats_last_row: bool = False


# By the beginning of an id, or of the name that D4RL's server gives the file; the first that fits counts.
RULES = {
    # Terminals come in clusters at the goal. The timeouts of version 0 are not where the ant is put back.
    r"ant_?maze": EpisodeRules(terminals_end=False),
    # The controller is given a new goal, the maze goes on; the recording script keeps the last state for one more row.
    r"(bullet-)?maze2d-": EpisodeRules(repeats_last_row=True),
    # People were not stopped at the limit under which the tasks are registered.
    r"(pen|hammer|door|relocate)-human-(?!v1)": EpisodeRules(ends_at_limit=False, starts_alike=True),
    r"(pen|hammer|door|relocate)-v0_demos": EpisodeRules(ends_at_limit=False, starts_alike=True),
    r"(pen|hammer|door|relocate)-": EpisodeRules(starts_alike=True),
    # Some episodes of version 0 have fewer rows than the limit.
    r"(bullet-)?(halfcheetah|hopper|walker(2d)?|ant)[-_]": EpisodeRules(starts_alike=True),
}


def find_rules(name: str | None) -> EpisodeRules:
    """Returns the rules of a data set by its id or the name of its file; the usual ones for all others."""
    found = (rules for pattern, rules in RULES.items() if re.match(pattern, name or "", re.IGNORECASE))
    return next(found, EpisodeRules())


def cut_episodes(
    columns: Mapping[str, np.ndarray], limit: int | None = None, rules: EpisodeRules = EpisodeRules()
) -> tuple[list[Trajectory], list[Finding]]:
    """Cuts validated columns into episodes; trajectories are views, nothing is copied.

    Args:
        columns: Arrays by field of ``Trajectory``, ``(N, ...)``, and the flags ``terminals`` and, if there are any,
            ``timeouts``, bool ``(N,)``.
        limit: Steps after which the environment ends an episode, used where neither timeouts nor next observations are
            recorded.
        rules: How this data set records its episodes.

    Returns:
        The episodes in order, and what was found while cutting.
    """
    states, following = columns["observations"], columns.get("next_observations")
    terminals, timeouts = columns["terminals"], columns.get("timeouts")
    is_end, findings = _flagged_ends(terminals, timeouts, rules)
    is_end[-1] = True
    is_kept = np.ones(len(states), bool)
    if rules.repeats_last_row:
        stale = _repeated_rows(states)
        is_end[stale - 1] = is_end[stale] = True
        is_kept[stale] = False
        findings += _stale_findings(stale)
    if following is not None:
        seams = _find_seams(states, following, is_end)
        is_end[seams] = True
        if len(seams) > (len(states) - 1) / 2:
            return _group_rows(columns), [_no_order(len(seams))]
        findings += _seam_findings(seams)
    elif timeouts is None and (limit is not None or rules.starts_alike):
        ends, found = _guess_ends(states, is_end, limit if rules.ends_at_limit else None, rules.starts_alike)
        is_end[ends] = True
        findings += found
    return _slice(columns, is_end, is_kept, terminals & rules.terminals_end), findings


def _slice(
    columns: Mapping[str, np.ndarray], is_end: np.ndarray, is_kept: np.ndarray, is_terminal: np.ndarray
) -> list[Trajectory]:
    """Returns the rows up to each end as a trajectory, except those that are not kept."""
    ends = np.flatnonzero(is_end) + 1
    starts = np.concatenate(([0], ends[:-1]))
    fields = {key: column for key, column in columns.items() if key not in FLAGS}
    fields = dict.fromkeys(("rewards", "next_observations")) | fields
    episodes = []
    for start, end in zip(starts[is_kept[starts]].tolist(), ends[is_kept[starts]].tolist(), strict=True):
        rows = {field: None if column is None else column[start:end] for field, column in fields.items()}
        episodes.append(Trajectory(**rows, terminated=bool(is_terminal[end - 1])))
    return episodes


# --- What the flags say ---


def _flagged_ends(
    terminals: np.ndarray, timeouts: np.ndarray | None, rules: EpisodeRules
) -> tuple[np.ndarray, list[Finding]]:
    """Returns which rows are the last of an episode by the flags, ``(N,)``.

    Terminals that mostly stand one behind the other mark a state, such as being at the goal: where a row was recorded
    behind a terminal, the episode went on. Then timeouts say where it ends or, without any, the last of such a run.
    """
    has_timeouts = timeouts is not None and bool(timeouts.any())
    pairs = terminals[:-1] & terminals[1:]
    if has_timeouts:
        pairs &= ~timeouts[:-1]
    in_runs = np.count_nonzero(pairs)
    mark_a_state = not rules.terminals_end or (in_runs > 1 and 2 * in_runs >= np.count_nonzero(terminals))
    if not mark_a_state or not terminals.any():
        return (terminals.copy() if timeouts is None else terminals | timeouts), []
    if has_timeouts:
        ends, where_it_ends = timeouts.copy(), "timeouts"
    elif rules.terminals_end:
        ends, where_it_ends = terminals.copy(), "the last terminal of each run"
        ends[:-1] &= ~terminals[1:]
    else:
        ends, where_it_ends = np.zeros_like(terminals), "the limit, or where rows do not follow"
    inside = terminals & ~ends
    found = Finding(
        name="terminals inside episodes",
        count=int(np.count_nonzero(inside)),
        where=rows_text(np.flatnonzero(inside)),
        effect=f"they mark a state, such as being at the goal, and the episode goes on: it ends at {where_it_ends}",
        advice="nothing to do, unless every one of these rows did end an episode: then give timeouts there",
        matters=rules.terminals_end,
    )
    return ends, [found] if found.count else []


# --- What the data say ---


def _find_seams(states: np.ndarray, following: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """Returns the rows before an end whose next observation is not the observation of the next row.

    Rounding is no difference: it takes more than a hundredth of the dimension's mean change per step.
    """
    width = states.shape[1]
    differing = np.flatnonzero(following[:-1].reshape(-1) != states[1:].reshape(-1)) // width
    differing = np.unique(differing)
    differing = differing[~is_end[differing]]
    if not differing.size:
        return differing
    change = np.mean([np.abs(f - s).mean(axis=0, dtype=np.float64) for f, s in _blocks(following, states)], axis=0)
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(states.min(axis=0)), np.abs(states.max(axis=0)))
    gap = np.abs(following[differing] - states[differing + 1])
    return differing[(gap > 0.01 * change + rounding).any(axis=1)]


def _blocks(*arrays: np.ndarray, rows: int = 65536) -> list[tuple[np.ndarray, ...]]:
    """Cuts arrays into pieces of about equally many rows, so that no second copy of a whole array is needed."""
    pieces = max(1, len(arrays[0]) // rows)
    return list(zip(*(np.array_split(array, pieces) for array in arrays), strict=True))


def _seam_findings(seams: np.ndarray) -> list[Finding]:
    if not seams.size:
        return []
    found = Finding(
        name="rows that do not follow",
        count=len(seams),
        where=f"behind {rows_text(seams)}",
        effect="next_observations there is not the observation of the next row, so the trajectory ends there",
        advice="nothing to do; timeouts in the file would say the same",
        matters=True,
    )
    return [found]


def _no_order(count: int) -> Finding:
    return Finding(
        name="rows in no order",
        count=count,
        where="more than half of all rows",
        effect="their next_observations are not the observations of the next rows: a model can be trained, but "
        "rollouts of more than one step are refused, and rows of one episode may be on both sides of a split, which "
        "makes held-out errors look small",
        advice="give the rows in the order of their recording, or hold out another recording by --holdout_dataset",
        matters=True,
    )


def _group_rows(columns: Mapping[str, np.ndarray]) -> list[Trajectory]:
    """Returns rows that do not follow each other in groups, for a split to divide."""
    rows = len(columns["observations"])
    bounds = np.linspace(0, rows, min(GROUPS, rows) + 1).astype(int).tolist()
    fields = {"rewards": None} | {key: column for key, column in columns.items() if key not in FLAGS}
    return [
        Trajectory(
            **{field: None if column is None else column[start:end] for field, column in fields.items()},
            terminated=False,
            in_order=False,
        )
        for start, end in itertools.pairwise(bounds)
    ]


def _repeated_rows(states: np.ndarray) -> np.ndarray:
    """Returns the rows whose observation is exactly that of the row before."""
    candidates = np.flatnonzero(states[1:, 0] == states[:-1, 0]) + 1
    return candidates[(states[candidates] == states[candidates - 1]).all(axis=1)]


def _stale_findings(stale: np.ndarray) -> list[Finding]:
    if not stale.size:
        return []
    found = Finding(
        name="stale rows",
        count=len(stale),
        where=rows_text(stale),
        effect="they repeat the observation of the row before, although the state had moved on: they were left out, "
        "and trajectories end before them",
        advice="nothing to do; this is how the recording script of these data treats a goal that was reached",
        matters=False,
    )
    return [found]


def _guess_ends(
    states: np.ndarray, is_end: np.ndarray, limit: int | None, starts_alike: bool
) -> tuple[np.ndarray, list[Finding]]:
    """Returns ends that no flag tells of: where the limit is reached or, if the data disagree, where they show resets.

    Only episodes that the flags leave longer than the limit are looked at; without a limit, all of them.
    """
    by_limit = np.empty(0, np.int64) if limit is None else _limit_ends(is_end, limit)
    if limit is not None and not by_limit.size:
        return by_limit, []
    resets = find_resets(states, is_end, starts_alike)
    if limit is not None:
        resets = resets[np.isin(_episode_of(resets, is_end), _episode_of(by_limit, is_end))]
    agreeing = len(np.intersect1d(by_limit, resets))
    if not resets.size and limit is None:
        return resets, []
    if not resets.size or (limit is not None and 2 * agreeing >= len(by_limit)):
        seen = f"{agreeing} of these ends look like resets" if agreeing else "no reset can be seen in the data"
        found = Finding(
            name="episode ends from the limit",
            count=len(by_limit),
            where=f"behind {rows_text(by_limit)}",
            effect=f"no timeouts are recorded, so an episode ends {limit} steps after its start; {seen}",
            advice="if episodes do not end there, add a boolean array 'timeouts'",
            matters=not agreeing,
        )
        return by_limit, [found]
    reason = "demonstrations may be longer than the task's limit"
    ends = resets
    if limit is not None:
        is_cut = is_end.copy()
        is_cut[resets] = True
        ends = np.union1d(resets, _limit_ends(is_cut, limit))
        reason = f"of the ends after every {limit} steps, {agreeing} of {len(by_limit)} do"
    found = Finding(
        name="episode ends from resets",
        count=len(resets),
        where=f"behind {rows_text(resets)}",
        effect=f"no timeouts are recorded, so episodes end where the data look like a reset ({reason})",
        advice="if episodes do not end there, add a boolean array 'timeouts'",
        matters=True,
    )
    return ends, [found]


def _episode_of(rows: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """Returns in which episode rows are, by number."""
    return np.searchsorted(np.flatnonzero(is_end), rows)


def _limit_ends(is_end: np.ndarray, limit: int) -> np.ndarray:
    """Returns the last row of every full ``limit`` of rows inside an episode, except where the episode itself ends."""
    ends = np.flatnonzero(is_end) + 1
    starts = np.concatenate(([0], ends[:-1]))
    pieces = [np.arange(start + limit, end, limit) - 1 for start, end in zip(starts, ends, strict=True)]
    return np.concatenate(pieces)


def find_resets(states: np.ndarray, is_end: np.ndarray, starts_alike: bool) -> np.ndarray:
    """Returns the rows after which the data show a reset, though no end is known there.

    That is a change far outside all others (``find_jumps``). Where all episodes start alike, it is also a step to the
    known starts: to less than half the distance from them that rows mostly have, from more than twice as far, in one
    step of more than half of that distance.
    """
    inside = np.flatnonzero(~is_end[:-1])
    jumps = inside[find_jumps(states[inside + 1].astype(np.float64) - states[inside])]
    if not starts_alike:
        return jumps
    first_rows = np.concatenate(([0], np.flatnonzero(is_end[:-1]) + 1))
    starts = Starts.of(states[first_rows], states[:: max(1, len(states) // SAMPLED_ROWS)])
    distance = np.concatenate([starts.distance(block) for (block,) in _blocks(states)])
    usual = np.median(distance)
    rows = np.flatnonzero((distance[1:] < 0.5 * usual) & (distance[:-1] > 2 * distance[1:]) & ~is_end[:-1])
    rows = rows[starts.size(states[rows + 1].astype(np.float64) - states[rows]) > 0.5 * usual]
    return np.union1d(rows, jumps)


@dataclass(frozen=True)
class Starts:
    """Where episodes start.

    Attributes:
        center: Median of their first states, ``(D,)``.
        spread: Standard deviation of all states, ``(D,)``; infinite where they are constant.
    """

    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, first_states: np.ndarray, states: np.ndarray) -> Starts:
        """Returns the starts of episodes by their first states and by some states of all kinds, ``(rows, D)`` each."""
        spread = states.std(axis=0, dtype=np.float64)
        return cls(np.median(first_states, axis=0).astype(np.float64), np.where(spread > 0, spread, np.inf))

    def distance(self, states: np.ndarray) -> np.ndarray:
        """Returns how far states ``(rows, D)`` are from where episodes start, as ``size`` says it."""
        return self.size(states - self.center)

    def size(self, changes: np.ndarray) -> np.ndarray:
        """Root mean square over the dimensions that vary, in standard deviations of the states, ``(rows,)``."""
        varying = max(1, np.count_nonzero(np.isfinite(self.spread)))
        return np.sqrt(np.square(changes / self.spread).sum(axis=1) / varying)


def find_jumps(changes: np.ndarray) -> np.ndarray:
    """Returns the rows of ``(N, D)`` changes that are far outside all others."""
    if not len(changes):
        return np.empty(0, np.int64)
    rows, sizes = large_changes(changes, large_change(changes[:: max(1, len(changes) // SAMPLED_ROWS)]))
    return rows[are_jumps(sizes, len(changes))]


def large_change(changes: np.ndarray) -> np.ndarray:
    """Returns ``LARGE`` times what nine out of ten changes ``(rows, D)`` stay below, by dimension; infinite for 0."""
    usual = np.quantile(np.abs(changes), 0.9, axis=0)
    return np.where(usual > 0, LARGE * usual, np.inf)


def large_changes(changes: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that change by more than ``large_change`` in a dimension, and by how many times the usual.

    Args:
        changes: ``(rows, D)``.
        limit: As ``large_change`` gives it, ``(D,)``, or the same for each row.
    """
    size = np.abs(changes)
    rows = np.unique(np.flatnonzero((size > limit).reshape(-1)) // size.shape[1])
    return rows, LARGE * np.max(size[rows] / np.broadcast_to(limit, size.shape)[rows], axis=1)


def are_jumps(sizes: np.ndarray, count: int) -> np.ndarray:
    """Whether large changes are far outside all others: ``(large,)``.

    They are if a gap separates them from the rest: the smallest is at least twice the next smaller one of all ``count``
    changes (and twice ``LARGE``). Of fewer than 20, or where more than one in twenty is large, nothing can be said.
    """
    if not len(sizes) or count < 20 or len(sizes) > 0.05 * count:
        return np.zeros(len(sizes), bool)
    ordered = np.sort(sizes)[::-1]
    gaps = np.flatnonzero(ordered >= 2 * np.append(ordered[1:], LARGE))
    return sizes >= ordered[gaps[-1]] if gaps.size else np.zeros(len(sizes), bool)


# --- Words ---


def rows_text(rows: Sequence[int] | np.ndarray, noun: str = "row") -> str:
    """Returns numbers of rows in words, such as ``rows 3, 7, 12 and 40 more``."""
    shown = ", ".join(str(row) for row in rows[:3])
    more = f" and {len(rows) - 3:,} more" if len(rows) > 3 else ""
    return f"{noun}{'s' if len(rows) > 1 else ''} {shown}{more}"
