"""Trajectories and transitions in memory, and what was found out about them.

Letters in shapes: ``T`` rows of one trajectory, ``N`` rows of several. All arrays are in raw units and float32, except
that states are float64 in a dataset of which float32 would lose something. A row is one time step: the state, the
action taken in it and, where the file has them, the reward for it and the state that followed.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import numpy as np


def printable(text: str) -> str:
    """Returns a text with what is not printable escaped, such as control characters and lone surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Returns a value of any kind and size as it can stand in a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of too many digits
        return f"a {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 80


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

    def __post_init__(self) -> None:
        """Escapes what is not printable: names out of files end up in pages, tables and terminals."""
        for name in ("where", "effect", "advice"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.name}: {self.count:,} ({self.where}); {self.effect}; {self.advice}"


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
        parts: The datasets that it was joined from, whose trajectories follow each other in this order; empty for one
            dataset alone.
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


def gather_transitions(dataset: Dataset, indices: np.ndarray) -> Transitions:
    """Returns the transitions of the trajectories with these indices, in the order of the indices.

    With next observations every row is a transition, terminal ones included; without, neighbouring rows are paired.
    """
    chosen = [dataset.trajectories[index] for index in indices]
    following = [t.observations[1:] if t.next_observations is None else t.next_observations for t in chosen]
    has_rewards = all(t.rewards is not None for t in dataset.trajectories)
    return Transitions(
        states=_concatenate([t.observations[: t.num_transitions] for t in chosen], (dataset.state_dim,)),
        actions=_concatenate([t.actions[: t.num_transitions] for t in chosen], (dataset.action_dim,)),
        next_states=_concatenate(following, (dataset.state_dim,)),
        rewards=_concatenate([t.rewards[: t.num_transitions] for t in chosen], ()) if has_rewards else None,
    )


def _concatenate(arrays: list[np.ndarray], row_shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty((0, *row_shape), np.float32)
