"""Trajectories and transitions in memory; splits by whole trajectory.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are in raw units and float32, except
that states are float64 in a dataset of which float32 would lose something. A row is one time step: the state, the
action taken in it and, where the file has them, the reward for it and the state that followed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils import InputError


@dataclass(frozen=True)
class Trajectory:
    """One episode, or the part of it that was recorded: rows in time order.

    Attributes:
        observations: States, ``(T, state_dim)``.
        actions: Actions taken in them, ``(T, action_dim)``.
        rewards: Rewards of those steps, ``(T,)``; None where the file has none.
        next_observations: States that followed, ``(T, state_dim)``; None where the file has none.
        terminated: Whether the last row ended in a terminal state, not at a time limit or the file's end.
        qpos: Simulator positions, ``(T, positions)``; None unless asked for and in the file.
        qvel: Simulator velocities, ``(T, velocities)``; None unless asked for and in the file.
        in_order: Whether each row follows the one before. Rows in no known order have next observations, and are kept
            in groups that a split can divide.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray | None
    next_observations: np.ndarray | None
    terminated: bool
    qpos: np.ndarray | None = None
    qvel: np.ndarray | None = None
    in_order: bool = True

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def num_transitions(self) -> int:
        """One per row where there are next observations, else one per pair of neighbouring rows."""
        return len(self) if self.next_observations is not None else len(self) - 1


@dataclass(frozen=True)
class Finding:
    """Something about a dataset that decides what a model trained on it is worth.

    Attributes:
        name: What was found, in one or two words, such as ``copies``.
        count: How many there are.
        where: Where they are, in words, such as ``trajectories 3, 7 and 12 more``.
        effect: What it does to the result.
        advice: What to do about it.
        matters: Whether to say it before training; if not, it is shown with the whole audit only.
    """

    name: str
    count: int
    where: str
    effect: str
    advice: str
    matters: bool


@dataclass(frozen=True)
class Part:
    """One of the datasets that were joined.

    Attributes:
        name: The name as the user gave it.
        sha256: Its digest, as in ``Dataset``.
        num_trajectories: How many trajectories came from it.
    """

    name: str
    sha256: str
    num_trajectories: int


@dataclass(frozen=True)
class Dataset:
    """Validated trajectories and where they came from.

    Attributes:
        name: The name as the user gave it.
        env_name: The environment, as far as the name or the file says.
        sha256: Digest of the source file's bytes; for a Minari dataset, of its arrays.
        trajectories: In the file's order, at least one of them with a transition.
        findings: What was found while reading.
        parts: The datasets that it was joined from, whose trajectories follow each other in this order; empty where it is
            one dataset.
    """

    name: str
    env_name: str | None
    sha256: str
    trajectories: list[Trajectory]
    findings: tuple[Finding, ...] = ()
    parts: tuple[Part, ...] = ()

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
    """What models train on: one transition per row.

    Attributes:
        states: ``(N, state_dim)``.
        actions: ``(N, action_dim)``.
        next_states: ``(N, state_dim)``.
        rewards: ``(N,)``; None where the dataset has none.
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    rewards: np.ndarray | None

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Split:
    """Indices into ``Dataset.trajectories``: sorted 1-D int64 arrays, disjoint and together complete."""

    train: np.ndarray
    holdout: np.ndarray
    test: np.ndarray


def split_trajectories(
    dataset: Dataset,
    split_seed: int,
    *,
    holdout_ratio: float = 0.0,
    holdout_samples: int | None = None,
    test_ratio: float = 0.0,
) -> Split:
    """Divides whole trajectories at random into training, holdout and test.

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


def check_shares(holdout_ratio: float, holdout_samples: int | None, test_ratio: float) -> None:
    """Checks what can be checked before the dataset is loaded.

    Raises:
        InputError: If a ratio is out of range, or both holdout sizes are given.
    """
    for flag, ratio in (("holdout_ratio", holdout_ratio), ("test_ratio", test_ratio)):
        if not 0 <= ratio < 1:
            raise InputError(f"{flag} is {ratio}; expected a share of the data, 0 <= {flag} < 1")
    if holdout_ratio and holdout_samples is not None:
        raise InputError("holdout_ratio and holdout_samples are both given; give one of them")


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


def gather_transitions(dataset: Dataset, indices: np.ndarray) -> Transitions:
    """Returns the transitions of the trajectories with these indices, in the order of the indices.

    With next observations every row is a transition, terminal ones included; without, neighbouring rows are paired.
    """
    chosen = [dataset.trajectories[index] for index in indices]
    paired = dataset.trajectories[0].next_observations is None
    has_rewards = dataset.trajectories[0].rewards is not None
    if paired:
        following = [trajectory.observations[1:] for trajectory in chosen]
    else:
        following = [trajectory.next_observations for trajectory in chosen]
    return Transitions(
        states=_concatenate([t.observations[: t.num_transitions] for t in chosen], (dataset.state_dim,)),
        actions=_concatenate([t.actions[: t.num_transitions] for t in chosen], (dataset.action_dim,)),
        next_states=_concatenate(following, (dataset.state_dim,)),
        rewards=_concatenate([t.rewards[: t.num_transitions] for t in chosen], ()) if has_rewards else None,
    )


def _concatenate(arrays: list[np.ndarray], row_shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty((0, *row_shape), np.float32)


def holdout_rows(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """Returns where the rows of some trajectories are in the concatenation of ``observations[:-1]`` over all.

    Published planners index held-out rows like this (``model.holdout_idx``), whether or not the file has next
    observations.
    """
    ends = np.cumsum([len(trajectory) - 1 for trajectory in dataset.trajectories])
    starts = np.concatenate(([0], ends[:-1]))
    rows = [np.arange(starts[index], ends[index]) for index in indices]
    return np.concatenate(rows) if rows else np.empty(0, np.int64)
