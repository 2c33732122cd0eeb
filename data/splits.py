"""Who trains, who validates, who tests: splits by whole trajectory, copies together, long recordings in blocks.

Letters in shapes: ``N`` rows of all trajectories, one after the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.trajectories import Dataset, Finding, Trajectory, Transitions, gather_transitions
from utils import InputError

BLOCKS = 10  # into which a recording is cut where there are too few trajectories to divide
GAP = 0.1  # of a block: what is left out before a piece that lies behind one of another side
FEWEST_ROWS = 10  # of a block


@dataclass(frozen=True)
class Split:
    """Indices into ``Dataset.trajectories``: sorted 1-D int64 arrays, disjoint and together complete."""

    train: np.ndarray
    holdout: np.ndarray
    test: np.ndarray


class Piece(NamedTuple):
    """Rows of a trajectory: the first, and the one behind the last."""

    trajectory: int
    start: int
    stop: int


@dataclass(frozen=True)
class Division:
    """A dataset and how it is divided.

    Attributes:
        whole: The dataset as it was read.
        dataset: What ``split`` has the indices of: the same, or its pieces.
        split: Who trains, validates and tests.
        pieces: What each trajectory of ``dataset`` is of the whole ones; None where they are whole.
        holdout_dataset: What validates, where that is a dataset of its own, less copies of trajectories of ``whole``.
        copies_left_out: How many of its trajectories these were.
    """

    whole: Dataset
    dataset: Dataset
    split: Split
    pieces: tuple[Piece, ...] | None = None
    holdout_dataset: Dataset | None = None
    copies_left_out: int = 0

    def with_holdout(self, other: Dataset) -> Division:
        """Returns the same with a dataset of its own to validate.

        Raises:
            InputError: If it has other dimensions, or nothing but copies of trajectories that train or test.
        """
        shapes = [f"{d.state_dim} state and {d.action_dim} action dimensions" for d in (other, self.whole)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"--holdout_dataset {other.name} has {shapes[0]}, but {self.whole.name} has {shapes[1]}; give data of "
                "the same environment"
            )
        kept = unlike(other.trajectories, fingerprints(self.whole.trajectories))
        if not sum(other.trajectories[index].num_transitions for index in kept):
            raise InputError(
                f"--holdout_dataset {other.name} has nothing but copies of trajectories of {self.whole.name}; give "
                "another"
            )
        left_out = len(other.trajectories) - len(kept)
        other = dataclasses.replace(other, trajectories=[other.trajectories[index] for index in kept])
        return dataclasses.replace(self, holdout_dataset=other, copies_left_out=left_out)

    def training(self) -> Transitions:
        """Returns the transitions that train."""
        return gather_transitions(self.dataset, self.split.train)

    def holdout(self) -> Transitions | None:
        """Returns the transitions that validate, if there are any."""
        if self.holdout_dataset is not None:
            return gather_transitions(self.holdout_dataset, np.arange(len(self.holdout_dataset.trajectories)))
        return gather_transitions(self.dataset, self.split.holdout) if self.split.holdout.size else None

    def fingerprints(self, side: str) -> list[str]:
        """Returns the fingerprints, sorted, of all whole trajectories of which something trains, validates or tests."""
        if side == "holdout" and self.holdout_dataset is not None:
            return sorted(fingerprints(self.holdout_dataset.trajectories))
        indices = getattr(self.split, side).tolist()
        if self.pieces is not None:
            indices = {self.pieces[index].trajectory for index in indices}
        return sorted(fingerprints(self.whole.trajectories[index] for index in indices))

    def holdout_rows(self) -> np.ndarray | None:
        """Returns where held-out rows are in the concatenation of ``observations[:-1]`` over all whole trajectories.

        Published planners index held-out rows like this (``model.holdout_idx``), whether or not the file has next
        observations. None where none of this dataset are held out, or rows are in no order that they could share.
        """
        if not all(trajectory.in_order for trajectory in self.whole.trajectories):
            return None
        ends = np.cumsum([len(trajectory) - 1 for trajectory in self.whole.trajectories])
        starts = np.concatenate(([0], ends[:-1]))
        pieces = self.pieces or [Piece(index, 0, len(t)) for index, t in enumerate(self.whole.trajectories)]
        held_out = [pieces[index] for index in self.split.holdout]
        rows = [starts[piece.trajectory] + np.arange(piece.start, piece.stop - 1) for piece in held_out]
        return np.concatenate(rows) if sum(map(len, rows)) else None

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``restore`` needs, and who trained and validated, in plain Python types."""
        held_out = self.holdout_dataset
        return {
            "sha256": self.whole.sha256,
            "trajectories": len(self.whole.trajectories),
            "parts": [dataclasses.asdict(part) for part in self.whole.parts],
            "pieces": None if self.pieces is None else [list(piece) for piece in self.pieces],
            "split": {field.name: getattr(self.split, field.name).tolist() for field in dataclasses.fields(Split)},
            "holdout_dataset": None if held_out is None else {"name": held_out.name, "sha256": held_out.sha256},
            "fingerprints": {side: self.fingerprints(side) for side in ("train", "holdout")},
        }

    @classmethod
    def restore(cls, dataset: Dataset, record: Mapping[str, Any]) -> Division | None:
        """Returns how a dataset was divided, alone or joined with others.

        Args:
            dataset: The dataset, or one of those that were joined.
            record: What ``to_dict`` gave; that of an older version may lack all but checksum and split.

        Returns:
            None if the dataset, as it is now, had no part in it.
        """
        first, count = 0, len(dataset.trajectories)
        if dataset.sha256 != record["sha256"]:
            for part in record.get("parts", []):
                count = part["num_trajectories"]
                if part["sha256"] == dataset.sha256:
                    break
                first += count
            else:
                return None
        if count != len(dataset.trajectories):  # where others have next observations, a single row makes no transition
            dataset = dataclasses.replace(dataset, trajectories=[t for t in dataset.trajectories if t.num_transitions])
        pieces = record.get("pieces")
        own = range(first, first + count)  # what of the record's trajectories, or pieces, this dataset has
        if pieces is not None:
            own = [number for number, piece in enumerate(pieces) if piece[0] in own]
        place = {number: index for index, number in enumerate(own)}
        split = Split(
            **{
                side: np.array([place[number] for number in numbers if number in place], dtype=np.int64)
                for side, numbers in record["split"].items()
            }
        )
        if pieces is None:
            return cls(dataset, dataset, split)
        taken = tuple(Piece(pieces[number][0] - first, *pieces[number][1:]) for number in own)
        return cls(dataset, take_pieces(dataset, taken), split, taken)

    def findings(self) -> list[Finding]:
        """Returns what must be known of the division."""
        findings = []
        if self.pieces is not None:
            findings.append(
                Finding(
                    name="recordings divided in blocks",
                    count=len(self.pieces),
                    where=f"{len(self.whole.trajectories):,} trajectories in {len(self.pieces):,} pieces",
                    effect="pieces of one recording are on both sides of the split, with a gap between them: errors on "
                    "held-out pieces say less about another recording than whole trajectories would",
                    advice="record more trajectories, or hold out another recording by --holdout_dataset",
                    matters=True,
                )
            )
        if self.copies_left_out:
            findings.append(
                Finding(
                    name="copies in the holdout dataset",
                    count=self.copies_left_out,
                    where=self.holdout_dataset.name,
                    effect="these trajectories equal some that train or test, so they were left out of the holdout",
                    advice="nothing to do",
                    matters=True,
                )
            )
        return findings


def divide(
    dataset: Dataset,
    split_seed: int,
    *,
    holdout_ratio: float = 0.0,
    holdout_samples: int | None = None,
    test_ratio: float = 0.0,
    blocks: int | None = None,
) -> Division:
    """Divides a dataset by whole trajectories or, where there are too few of them, by blocks of rows.

    Args:
        dataset: What to divide.
        split_seed: As for ``split_trajectories``, and so are the shares.
        holdout_ratio: Share to hold out.
        holdout_samples: Instead of the ratio: how many transitions to hold out.
        test_ratio: Share to keep for testing.
        blocks: Into how many blocks to cut every trajectory; None decides: ``BLOCKS`` where there are fewer
            trajectories, copies not counted, than sides, and none otherwise.

    Raises:
        InputError: As ``split_trajectories``, or if no trajectory is long enough for so many blocks.
    """
    check_shares(holdout_ratio, holdout_samples, test_ratio, blocks)
    shares = {"holdout_ratio": holdout_ratio, "holdout_samples": holdout_samples, "test_ratio": test_ratio}
    sides = 1 + (holdout_ratio > 0 or holdout_samples is not None) + (test_ratio > 0)
    longest = max(map(len, dataset.trajectories))
    distinct = count_distinct(dataset.trajectories, find_copies(dataset.trajectories))
    if blocks is None and distinct < sides and longest >= BLOCKS * FEWEST_ROWS:
        blocks = BLOCKS
    if blocks is None:
        return Division(dataset, dataset, split_trajectories(dataset, split_seed, **shares))
    if longest < blocks * FEWEST_ROWS:
        raise InputError(
            f"--holdout_blocks is {blocks}, but the longest trajectory has {longest} rows; a block needs at least "
            f"{FEWEST_ROWS}: give fewer blocks, or a recording to hold out by --holdout_dataset"
        )
    return _divide_blocks(dataset, split_seed, blocks, shares)


def count_distinct(trajectories: Sequence[Trajectory], original: np.ndarray) -> int:
    """Returns how many trajectories with a transition there are, copies (as ``find_copies`` tells them) not counted."""
    return sum(
        first == index and trajectory.num_transitions > 0
        for index, (first, trajectory) in enumerate(zip(original, trajectories, strict=True))
    )


def split_trajectories(
    dataset: Dataset,
    split_seed: int,
    *,
    holdout_ratio: float = 0.0,
    holdout_samples: int | None = None,
    test_ratio: float = 0.0,
) -> Split:
    """Divides whole trajectories at random into training, holdout and test; copies go where their original goes.

    ``np.random.default_rng(split_seed).permutation(len(trajectories))`` orders the trajectories. The test set is taken
    from the front and the holdout from the back, so that neither depends on the size of the other.

    Args:
        dataset: What to divide.
        split_seed: Seed of the order.
        holdout_ratio: Share of all transitions to hold out, 0 <= ratio < 1. Of the shares that whole trajectories can
            make up, the nearest is taken.
        holdout_samples: Instead of the ratio: hold out whole trajectories until they have this many transitions.
        test_ratio: Share of all transitions to keep for testing, taken like ``holdout_ratio``.

    Raises:
        InputError: If a ratio is out of range, both holdout sizes are given, or a side would get no transition.
    """
    check_shares(holdout_ratio, holdout_samples, test_ratio)
    transitions = np.array([trajectory.num_transitions for trajectory in dataset.trajectories])
    copies = find_copies(dataset.trajectories)
    return _split_groups(copies, transitions, split_seed, holdout_ratio, holdout_samples, test_ratio)


def check_shares(
    holdout_ratio: float, holdout_samples: int | None, test_ratio: float, blocks: int | None = None
) -> None:
    """Checks what can be checked before the dataset is loaded.

    Raises:
        InputError: If a ratio or the number of blocks is out of range, or both holdout sizes are given.
    """
    for flag, ratio in (("holdout_ratio", holdout_ratio), ("test_ratio", test_ratio)):
        if not 0 <= ratio < 1:
            raise InputError(f"{flag} is {ratio}; expected a share of the data, 0 <= {flag} < 1")
    if holdout_ratio and holdout_samples is not None:
        raise InputError("holdout_ratio and holdout_samples are both given; give one of them")
    if blocks is not None and blocks < 2:
        raise InputError(f"holdout_blocks is {blocks}; expected into how many blocks to cut each trajectory, 2 or more")


def _split_groups(
    group: np.ndarray,
    transitions: np.ndarray,
    split_seed: int,
    holdout_ratio: float,
    holdout_samples: int | None,
    test_ratio: float,
) -> Split:
    """Divides things of which some belong together.

    Args:
        group: The first thing that each belongs with, ``(things,)``; itself for most.
        transitions: How many each has, ``(things,)``.
        split_seed: Seed of the order.
        holdout_ratio: As for ``split_trajectories``.
        holdout_samples: Likewise.
        test_ratio: Likewise.
    """
    order = np.random.default_rng(split_seed).permutation(len(group))
    order = order[group[order] == order]  # one of each group
    sizes = np.bincount(group, transitions, len(group)).astype(np.int64)[order]
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
    return Split(*(np.flatnonzero(np.isin(group, part)).astype(np.int64) for part in parts))


def _count_for_ratio(sizes: np.ndarray, ratio: float) -> int:
    """Returns how many trajectories to take from the front for their share of all transitions to be nearest to a ratio.

    A ratio above 0 takes at least one transition and leaves at least one.

    Args:
        sizes: Transitions of each trajectory, ``(trajectories,)``.
        ratio: The share asked for.
    """
    if ratio == 0:
        return 0
    share = np.cumsum(sizes) / sizes.sum()
    return int(np.argmin(np.where((share > 0) & (share < 1), np.abs(share - ratio), np.inf))) + 1


def _count_for_samples(sizes: np.ndarray, samples: int) -> int:
    """Returns how many trajectories from the front it takes to have that many transitions."""
    if not 1 <= samples < sizes.sum():
        raise InputError(
            f"holdout_samples is {samples}; expected at least 1 and fewer than the dataset's {sizes.sum()} transitions"
        )
    return int(np.searchsorted(np.cumsum(sizes), samples)) + 1


# --- Copies ---


def find_copies(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Returns for each trajectory the first that it is a copy of, itself if none: ``(trajectories,)`` of indices.

    Two are copies if they have the same states and actions, or if one is the beginning of the other.
    """
    original = np.arange(len(trajectories))
    by_first_row = defaultdict(list)
    for index, trajectory in enumerate(trajectories):
        first_row = (trajectory.observations[:1], trajectory.actions[:1])
        by_first_row[b"".join(part.astype(np.float32, copy=False).tobytes() for part in first_row)].append(index)
    for alike in by_first_row.values():
        if len(alike) < 2:
            continue
        equal = defaultdict(list)  # by fingerprint, of which few are different, however many copies there are
        for index, digest in zip(alike, fingerprints(trajectories[index] for index in alike), strict=True):
            equal[digest].append(index)
        contents = {digest: _row_bytes(trajectories[indices[0]]) for digest, indices in equal.items()}
        beginning, together = None, []
        for digest in sorted(equal, key=contents.__getitem__):  # a beginning stands before all that go on from it
            if beginning is None or not contents[digest].startswith(beginning):
                beginning, together = contents[digest], []
            together += equal[digest]
            original[together] = min(together)
    return original


def _row_bytes(trajectory: Trajectory) -> bytes:
    """Returns states and actions as float32, row by row."""
    parts = (trajectory.observations, trajectory.actions)
    return np.hstack([part.astype(np.float32, copy=False) for part in parts]).tobytes()


def fingerprints(trajectories: Iterable[Trajectory]) -> list[str]:
    """Returns 12 hexadecimal digits for each trajectory, equal where states and actions are."""
    digests = []
    for trajectory in trajectories:
        digest = hashlib.blake2b(digest_size=6)
        for part in (trajectory.observations, trajectory.actions):
            digest.update(np.ascontiguousarray(part, dtype=np.float32))
        digests.append(digest.hexdigest())
    return digests


def row_keys(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Returns 64 bits for each row, ``(rows,)``, equal where states and actions are, and hardly ever elsewhere.

    They are the sum of odd factors, each times the bits of a number in float32.
    """
    columns = [part.astype(np.float32, copy=False).view(np.uint32) for part in (states, actions)]
    columns = [column for part in columns for column in part.T]
    factors = np.random.default_rng(0).integers(2**63, size=len(columns), dtype=np.uint64)
    keys = np.zeros(len(states), np.uint64)
    for column, factor in zip(columns, 2 * factors + 1, strict=True):
        keys += column * factor
    return keys


def unlike(trajectories: Sequence[Trajectory], known: Collection[str]) -> np.ndarray:
    """Returns the indices of the trajectories whose fingerprint is none of the known ones."""
    digests = fingerprints(trajectories)
    return np.flatnonzero(~np.isin(digests, list(known))) if digests else np.empty(0, np.int64)


# --- Blocks of long recordings ---


def _divide_blocks(dataset: Dataset, split_seed: int, blocks: int, shares: dict[str, float | int | None]) -> Division:
    """Cuts trajectories into blocks and divides these; a piece is a run of neighbouring blocks of one side.

    A trajectory that is too short for so many blocks stays whole, as one.
    """
    copies = find_copies(dataset.trajectories)
    longest = np.zeros(len(copies), dtype=int)  # of each trajectory and its copies, so that equal rows are cut alike
    np.maximum.at(longest, copies, [len(trajectory) for trajectory in dataset.trajectories])
    cut, group, first_like = [], [], {}
    for index, trajectory in enumerate(dataset.trajectories):
        count = blocks if longest[copies[index]] >= blocks * FEWEST_ROWS else 1
        edges = np.minimum(np.linspace(0, longest[copies[index]], count + 1).astype(int), len(trajectory))
        for number, (start, stop) in enumerate(itertools.pairwise(np.unique(edges).tolist())):
            group.append(first_like.setdefault((copies[index], number), len(cut)))
            cut.append(Piece(index, start, stop))
    rows = np.array([block.stop - block.start for block in cut])
    drawn = _split_groups(np.array(group), rows, split_seed, **shares)
    side = np.empty(len(cut), dtype=int)
    for number, part in enumerate((drawn.train, drawn.holdout, drawn.test)):
        side[part] = number
    pieces, sides = [], []
    for block, own in zip(cut, side.tolist(), strict=True):
        if block.start == 0:
            pieces.append(block)
            sides.append(own)
        elif own == sides[-1]:
            pieces[-1] = pieces[-1]._replace(stop=block.stop)
        else:
            pieces.append(block._replace(start=block.start + round(GAP * (block.stop - block.start))))
            sides.append(own)
    split = Split(*(np.flatnonzero(np.array(sides) == number).astype(np.int64) for number in range(3)))
    return Division(dataset, take_pieces(dataset, pieces), split, tuple(pieces))


def take_pieces(dataset: Dataset, pieces: Iterable[Piece]) -> Dataset:
    """Returns a dataset whose trajectories are pieces of the given one's."""
    taken = []
    for piece in pieces:
        whole, rows = dataset.trajectories[piece.trajectory], slice(piece.start, piece.stop)
        values = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
        arrays = {name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)}
        ends_with_it = whole.terminated and piece.stop == len(whole)
        taken.append(dataclasses.replace(whole, **arrays, terminated=ends_with_it))
    return dataclasses.replace(dataset, trajectories=taken)
