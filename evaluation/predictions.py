"""What an ensemble predicts for recorded rows, one step ahead.

Letters in shapes: ``E`` members, ``N`` rows, ``D`` state dimensions, ``L`` learned ones (those whose change varies; the
others are predicted exactly and left out of every score). Predictions come back as NumPy arrays in normalised units:
divided by the model's ``delta_scale``, the mean absolute deviation of the change in its training rows, so that 1 is a
typical one-step change in every dimension. Times the scale they are raw units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.trajectories import Dataset, gather_transitions
from dynamics_model import DynamicsEnsemble

_MEMBER_ROWS_PER_CALL = 32768


@dataclass(frozen=True)
class Rows:
    """Transitions of some trajectories, one behind the other, raw units, float32.

    Attributes:
        states: ``(N, D)``.
        actions: ``(N, action_dim)``.
        next_states: ``(N, D)``.
        trajectory: Index of the row's trajectory in its dataset, ``(N,)``.
        step: Place in its trajectory, from 0, ``(N,)``.
        steps_left: Transitions from this row to the end of its trajectory, itself included, ``(N,)``.
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    trajectory: np.ndarray
    step: np.ndarray
    steps_left: np.ndarray

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Scale:
    """Between normalised and raw units.

    Attributes:
        learned: Indices of the learned state dimensions, ``(L,)``.
        factor: Raw units per normalised unit, ``(L,)`` float64.
    """

    learned: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, ensemble: DynamicsEnsemble) -> Scale:
        """Returns the scale of an ensemble's outputs."""
        learned = ensemble.network.learned.cpu().numpy()
        return cls(learned, ensemble.network.delta_scale.cpu().double().numpy()[learned])

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Brings ``(..., D)`` in raw units to ``(..., L)`` in normalised units, float64."""
        return values[..., self.learned].astype(np.float64) / self.factor


@dataclass(frozen=True)
class OneStep:
    """One-step predictions of the change ``s' - s``, normalised units.

    Attributes:
        change: The truth, ``(N, L)``.
        means: ``(E, N, L)``.
        variances: ``(E, N, L)``; None for deterministic members.
    """

    change: np.ndarray
    means: np.ndarray
    variances: np.ndarray | None

    @property
    def errors(self) -> np.ndarray:
        """Prediction minus truth of each member, ``(E, N, L)``."""
        return self.means - self.change


def gather_rows(dataset: Dataset, indices: np.ndarray) -> Rows:
    """Returns the transitions of some trajectories with their place in time."""
    transitions = gather_transitions(dataset, indices)
    lengths = np.array([dataset.trajectories[index].num_transitions for index in indices], dtype=np.int64)
    step = np.concatenate([np.arange(length) for length in lengths])
    return Rows(
        transitions.states,
        transitions.actions,
        transitions.next_states,
        trajectory=np.repeat(np.asarray(indices, dtype=np.int64), lengths),
        step=step,
        steps_left=np.repeat(lengths, lengths) - step,
    )


def draw_trajectories(dataset: Dataset, indices: np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """Draws whole trajectories until there are ``max_rows`` transitions; all of them where there are fewer.

    Returns:
        Sorted indices, at least two where there are two.
    """
    order = np.random.default_rng(seed).permutation(np.asarray(indices, dtype=np.int64))
    rows_before = np.cumsum([0, *(dataset.trajectories[index].num_transitions for index in order)])[:-1]
    return np.sort(order[(rows_before < max_rows) | (np.arange(len(order)) < 2)])


# --- One step ---


@torch.no_grad()
def predict_one_step(
    ensemble: DynamicsEnsemble, states: np.ndarray, actions: np.ndarray, next_states: np.ndarray
) -> OneStep:
    """Predicts every row with every member.

    Args:
        ensemble: What predicts.
        states: ``(N, D)``, raw units.
        actions: ``(N, action_dim)``, raw units.
        next_states: The truth, ``(N, D)``, raw units.
    """
    scale = Scale.of(ensemble)
    means = np.empty((len(ensemble), len(states), len(scale.learned)))
    variances = None
    for rows in _chunks(len(states), _MEMBER_ROWS_PER_CALL // len(ensemble)):
        mean, variance = ensemble.predict(states[rows], actions[rows])
        means[:, rows] = scale.normalise(mean.cpu().numpy().astype(np.float64) - states[rows])
        if variance is not None:
            variances = np.empty_like(means) if variances is None else variances
            variances[:, rows] = scale.normalise(variance.cpu().numpy()) / scale.factor
    return OneStep(scale.normalise(next_states.astype(np.float64) - states), means, variances)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, max(size, 1)))
