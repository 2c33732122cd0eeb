"""What the data say before training: everything about a dataset that decides what a model trained on it is worth.

``audit`` looks at validated trajectories, whatever format they came in. It never stops a run: a finding says how many
there are, where, what they do to the result and what to do about them. Some 10,000 transitions, evenly spread, show
what is usual; what is rare by nature (copies, repeated and empty rows, jumps) is looked for in all of them.

Letters in shapes: ``N`` transitions of all trajectories, one after the other; ``D`` state dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.episodes import Starts, are_jumps, large_change, large_changes
from data.splits import count_distinct, find_copies, row_keys
from data.trajectories import Dataset, Finding, Trajectory

SAMPLED = 10_000  # transitions
GATHERED = 16_384  # transitions that are looked at together
KEY_DIMENSIONS = 3  # that tell one state from another, in most data
FEW = 0.05  # of the transitions: a dimension that moves in fewer is looked at in all of them
UNRESOLVED = 16  # float32's steps that a dimension should move by
UNORDERED = 0.8  # of the distance between any two rows: how far apart neighbours without order are


def audit(dataset: Dataset) -> list[Finding]:
    """Returns everything that was found about a dataset, while it was read and now."""
    original = find_copies(dataset.trajectories)
    sample = _Sample.of(dataset)
    scan = _Scan.of(dataset, sample)
    return [
        *dataset.findings,
        *_find_copies(dataset, original),
        *_find_repeats(scan, dataset),
        *_find_jumps(scan, dataset, sample),
        *_find_empty_rows(scan),
        *_find_constants(dataset, sample),
        *_find_rare_moves(dataset, sample),
        *_find_rounded(sample, dataset.trajectories[0].observations.dtype),
        *_find_disorder(dataset, sample),
        *_find_too_few(dataset, original),
    ]


def to_markdown(findings: Sequence[Finding]) -> str:
    """Returns findings as a Markdown table, those that matter in bold; a sentence where there are none."""
    if not findings:
        return "Nothing was found.\n"
    lines = ["| finding | count | where | what it does | what to do |", "| --- | --- | --- | --- | --- |"]
    for finding in findings:
        name = f"**{finding.name}**" if finding.matters else finding.name
        cells = (name, f"{finding.count:,}", finding.where, finding.effect, finding.advice)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# --- All transitions ---


def _columns(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns states, actions and next states of the transitions of a trajectory; nothing is copied."""
    states, following = trajectory.observations, trajectory.next_observations
    if following is None:
        return states[:-1], trajectory.actions[:-1], states[1:]
    return states, trajectory.actions, following


def _gather(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the columns of all transitions in order, some rows at a time."""
    waiting, rows = [], 0
    for trajectory in dataset.trajectories:
        columns = _columns(trajectory)
        for start in range(0, len(columns[0]), GATHERED):
            whole = len(columns[0]) <= GATHERED
            piece = columns if whole else [column[start : start + GATHERED] for column in columns]
            waiting.append(piece)
            rows += len(piece[0])
            if rows >= GATHERED:
                yield tuple(map(np.concatenate, zip(*waiting, strict=True)))
                waiting, rows = [], 0
    if waiting:
        yield tuple(map(np.concatenate, zip(*waiting, strict=True)))


@dataclass(frozen=True)
class _Sample:
    """Evenly spread transitions, in float64.

    Attributes:
        states: ``(rows, D)``.
        actions: ``(rows, action_dim)``.
        next_states: ``(rows, D)``.
        trajectory: Which trajectory each is of, ``(rows,)``.
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    trajectory: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> _Sample:
        """Takes one of so many transitions that ``SAMPLED`` or up to twice as many come together."""
        stride = max(1, dataset.num_transitions // SAMPLED)
        taken, before = [], 0
        for trajectory in dataset.trajectories:
            columns = _columns(trajectory)
            taken.append([column[-before % stride :: stride] for column in columns])
            before += len(columns[0])
        columns = (np.concatenate(parts).astype(np.float64) for parts in zip(*taken, strict=True))
        return cls(*columns, np.repeat(np.arange(len(taken)), [len(states) for states, _, _ in taken]))

    @property
    def changes(self) -> np.ndarray:
        """Next states less states, ``(rows, D)``."""
        return self.next_states - self.states


@dataclass(frozen=True)
class _Scan:
    """What was seen of every transition. Transitions are meant by their number among all.

    Attributes:
        ends: How many transitions there are up to the end of each trajectory, ``(trajectories,)``.
        may_repeat: Whether some state is there twice, by the dimensions that vary most.
        large: Transitions with large changes, as ``large_changes`` finds them.
        sizes: How large these are.
        reached: The states that they lead to, ``(large, D)``.
        empty: Transitions whose states and actions are all zero.
    """

    ends: np.ndarray
    may_repeat: bool
    large: np.ndarray
    sizes: np.ndarray
    reached: np.ndarray
    empty: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, sample: _Sample) -> _Scan:
        dtype = dataset.trajectories[0].observations.dtype
        limit = np.tile(large_change(sample.changes).astype(dtype), (2 * GATHERED, 1))  # rows like rows compare faster
        varied = np.argsort([-len(np.unique(column)) for column in sample.states.T])[:KEY_DIMENSIONS]
        keys, large, sizes, reached, empty, before = [], [], [], [], [], 0
        for states, actions, next_states in _gather(dataset):
            keys.append(row_keys(states[:, varied], actions[:, :0]))
            found, size = large_changes(next_states - states, limit[: len(states)])
            large.append(before + found)
            sizes.append(size)
            reached.append(next_states[found])
            zero = np.flatnonzero(states[:, 0] == 0)
            is_empty = ~(states[zero].any(axis=1) | actions[zero].any(axis=1) | next_states[zero].any(axis=1))
            empty.append(before + zero[is_empty])
            before += len(states)
        ordered = np.sort(np.concatenate(keys))
        ends = np.cumsum([trajectory.num_transitions for trajectory in dataset.trajectories])
        may_repeat = bool((ordered[1:] == ordered[:-1]).any())
        return cls(ends, may_repeat, *map(np.concatenate, (large, sizes, reached, empty)))

    @property
    def count(self) -> int:
        """How many transitions there are."""
        return int(self.ends[-1])

    def trajectories(self, transitions: np.ndarray) -> np.ndarray:
        """Returns which trajectories transitions are of."""
        return np.searchsorted(self.ends, transitions, side="right")

    def places(self, transitions: np.ndarray) -> str:
        """Returns where transitions are in words, such as ``trajectory 3 step 17, trajectory 5 step 2 and 4 more``."""
        shown = transitions[:3]
        of = self.trajectories(shown)
        steps = shown - np.concatenate(([0], self.ends))[of]
        more = f" and {len(transitions) - 3:,} more" if len(transitions) > 3 else ""
        return ", ".join(f"trajectory {index} step {step}" for index, step in zip(of, steps, strict=True)) + more


# --- Rows ---


def _find_copies(dataset: Dataset, original: np.ndarray) -> list[Finding]:
    copies = np.flatnonzero(original != np.arange(len(original)))
    if not copies.size:
        return []
    shown = ", ".join(f"{copy} (of {original[copy]})" for copy in copies[:3])
    more = f" and {len(copies) - 3:,} more" if len(copies) > 3 else ""
    transitions = sum(dataset.trajectories[index].num_transitions for index in copies)
    found = Finding(
        name="copies of trajectories",
        count=len(copies),
        where=f"trajectories {shown}{more}",
        effect=f"{transitions:,} of {dataset.num_transitions:,} transitions are there already and weigh more; with a "
        "copy in training, held-out errors would measure memory, so copies go to the same side of a split",
        advice="nothing to do, or remove them so that every trajectory weighs the same",
        matters=True,
    )
    return [found]


def _find_repeats(scan: _Scan, dataset: Dataset) -> list[Finding]:
    """Counts transitions whose state and action their trajectory had before."""
    if not scan.may_repeat:
        return []
    keys = np.concatenate([row_keys(states, actions) for states, actions, _ in _gather(dataset)])
    of = scan.trajectories(np.arange(scan.count))
    order = np.lexsort((keys, of))
    again = order[1:][(keys[order[1:]] == keys[order[:-1]]) & (of[order[1:]] == of[order[:-1]])]
    if not again.size:
        return []
    share = len(again) / scan.count
    found = Finding(
        name="repeated transitions",
        count=len(again),
        where=scan.places(np.sort(again)),
        effect=f"{share:.1%} of all transitions have a state and action that their trajectory had before; these weigh "
        "more",
        advice="if nothing stood still there, the recording wrote rows twice: remove them",
        matters=share > 0.01,
    )
    return [found]


def _find_jumps(scan: _Scan, dataset: Dataset, sample: _Sample) -> list[Finding]:
    is_jump = are_jumps(scan.sizes, scan.count)
    jumps = scan.large[is_jump]
    if not jumps.size:
        return []
    starts = Starts.of(np.array([t.observations[0] for t in dataset.trajectories if len(t)]), sample.states)
    usual = np.median(starts.distance(sample.states))
    resets = np.count_nonzero(starts.distance(scan.reached[is_jump]) < 0.5 * usual)
    like = f"; {resets} of them look like resets" if resets else ""
    found = Finding(
        name="jumps",
        count=len(jumps),
        where=scan.places(jumps),
        effect=f"these changes are at least {scan.sizes[is_jump].min():,.0f} times the usual in a dimension, and far "
        f"from all others{like}: a few such rows can dominate loss and scores",
        advice="if an episode ends there, say so by a boolean array 'timeouts'; if a sensor failed, remove these rows",
        matters=True,
    )
    return [found]


def _find_empty_rows(scan: _Scan) -> list[Finding]:
    if len(scan.empty) < 2:  # one may be a start
        return []
    found = Finding(
        name="empty rows",
        count=len(scan.empty),
        where=scan.places(scan.empty),
        effect="states and actions are all zero there, as in a buffer that was not filled",
        advice="remove these rows, unless the system really rests at zero",
        matters=True,
    )
    return [found]


# --- Dimensions ---


def _find_constants(dataset: Dataset, sample: _Sample) -> list[Finding]:
    kinds = (
        ("state", "observations", sample.states, "they are predicted as they are and left out of scores"),
        ("action", "actions", sample.actions, "what they do cannot be learned: predictions for other values are void"),
    )
    findings = []
    for kind, field, values, effect in kinds:
        constant = [
            index
            for index in np.flatnonzero((values == values[0]).all(axis=0)).tolist()
            if all((getattr(t, field)[:, index] == values[0, index]).all() for t in dataset.trajectories)
        ]
        if constant:
            findings.append(
                Finding(
                    name=f"constant {kind} dimensions",
                    count=len(constant),
                    where=_dimensions_text(constant),
                    effect=effect,
                    advice="nothing to do" if kind == "state" else "record other actions too, or leave these out",
                    matters=kind == "action",
                )
            )
    return findings


def moves_rarely(standard_deviation: np.ndarray, mean_absolute_deviation: np.ndarray) -> np.ndarray:
    """Whether dimensions move, or move far, in a handful of rows only, which mean absolute deviations are no unit for.

    It is where the standard deviation is more than three times as large. A Gaussian's is 1.25 times, that of a Laplace
    distribution 1.41 times, and where one row in 400 has a step and the others none, it is ten times.
    """
    return standard_deviation > 3.0 * mean_absolute_deviation


def _find_rare_moves(dataset: Dataset, sample: _Sample) -> list[Finding]:
    change = sample.changes
    deviation = np.abs(change - change.mean(axis=0)).mean(axis=0)
    is_candidate = (change.std(axis=0) > 2 * deviation) | ((change != change[0]).mean(axis=0) < FEW)
    rare = {}
    for index in np.flatnonzero(is_candidate).tolist():
        columns = [_columns(trajectory) for trajectory in dataset.trajectories]
        parts = [following[:, index].astype(np.float64) - states[:, index] for states, _, following in columns]
        distance = np.abs(np.concatenate(parts) - np.mean(np.concatenate(parts)))
        spread = np.sqrt(np.mean(np.square(distance)))
        if moves_rarely(spread, distance.mean()):
            rare[index] = np.count_nonzero(distance > spread)
    if not rare:
        return []
    moves = [f"{index} ({count:,} of {dataset.num_transitions:,} transitions)" for index, count in rare.items()]
    more = f" and {len(moves) - 3:,} more" if len(moves) > 3 else ""
    found = Finding(
        name="dimensions with rare large moves",
        count=len(rare),
        where=f"state dimension{'s' if len(rare) > 1 else ''} {', '.join(moves[:3])}{more}",
        effect="in units of the mean absolute deviation each such move would outweigh all else in loss and selection, "
        "so they are scaled by the standard deviation",
        advice="judge them by the scores of their own: a model can have small errors and miss every move",
        matters=True,
    )
    return [found]


def _find_rounded(sample: _Sample, dtype: np.dtype) -> list[Finding]:
    """Names the dimensions whose changes are mostly rounding; readers keep float64 where that helps."""
    if dtype != np.float32:
        return []
    change = np.abs(sample.changes)
    magnitude = np.abs(sample.states).max(axis=0)
    step = np.spacing(magnitude.astype(np.float32)).astype(np.float64)
    usual = np.array([np.median(column[column > 0]) if column.any() else np.inf for column in change.T])
    rounded = np.flatnonzero(usual < UNRESOLVED * step).tolist()
    if not rounded:
        return []
    worst = max(rounded, key=lambda index: step[index] / usual[index])
    found = Finding(
        name="dimensions that float32 does not resolve",
        count=len(rounded),
        where=_dimensions_text(rounded),
        effect=f"float32 has steps of {step[worst]:.2g} near {magnitude[worst]:.3g} (dimension {worst}), and the usual "
        f"change is {usual[worst]:.2g}: much of it is rounding, which no model can predict",
        advice="record in float64, or subtract an offset before rounding",
        matters=True,
    )
    return [found]


def _dimensions_text(indices: Sequence[int]) -> str:
    more = f" and {len(indices) - 8:,} more" if len(indices) > 8 else ""
    return f"dimension{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices[:8]))}{more}"


# --- The whole ---


def _find_disorder(dataset: Dataset, sample: _Sample) -> list[Finding]:
    """Looks whether rows that are taken to follow each other are any more alike than others."""
    if dataset.trajectories[0].next_observations is not None:
        return []  # what follows what was compared when the file was read
    first = np.searchsorted(sample.trajectory, sample.trajectory, side="left")
    count = np.searchsorted(sample.trajectory, sample.trajectory, side="right") - first
    rows = np.flatnonzero(count > 1)
    if len(rows) < 200:
        return []
    # Half a trajectory on, or back: rows that have little to do with each other.
    other = first[rows] + (rows - first[rows] + count[rows] // 2) % count[rows]
    near = np.abs(sample.changes[rows]).mean(axis=0)
    far = np.abs(sample.next_states[other] - sample.states[rows]).mean(axis=0)
    if not far.any() or (near < UNORDERED * far).any():
        return []
    found = Finding(
        name="rows without visible order",
        count=dataset.num_rows,
        where="all rows",
        effect="neighbours are as far apart as any two rows, in every dimension: if they were shuffled, what is "
        "learned is no transition",
        advice="give rows in the order of their recording, or next_observations",
        matters=True,
    )
    return [found]


def _find_too_few(dataset: Dataset, original: np.ndarray) -> list[Finding]:
    distinct = count_distinct(dataset.trajectories, original)
    if distinct >= 5:
        return []
    found = Finding(
        name="few trajectories",
        count=distinct,
        where="all data, copies not counted",
        effect="none can be held out whole, so a share to hold out is taken in contiguous blocks"
        if distinct < 2
        else "a split by whole trajectories is coarse, and standard errors come from few of them",
        advice="record more of them, or hold out another recording by --holdout_dataset",
        matters=False,  # what is done about it when something is held out does
    )
    return [found]
