"""One-step predictions of an ensemble, and of a linear baseline, for recorded rows.

Letters in shapes, here and in the whole package: ``E`` members, ``N`` rows, ``D`` state dimensions, ``L`` learned ones,
which are those whose change varied in the training rows. (The change of the others is predicted as constant, and they
are left out of every score.)

Predictions are NumPy arrays in normalised units: divided by the model's ``delta_scale``, the mean absolute deviation of
the change in its training rows, so that 1 is a typical one-step change in every dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.trajectories import Dataset, Transitions, gather_transitions
from dynamics_model import DynamicsEnsemble

_MEMBER_ROWS_PER_CALL = 32768  # rows times members that are predicted at once, which bounds the memory needed


@dataclass(frozen=True)
class Rows:
    """Transitions of some trajectories, one trajectory after the other, raw units, float32.

    Attributes:
        states: ``(N, D)``.
        actions: ``(N, action_dim)``.
        next_states: ``(N, D)``.
        trajectory: Index of each row's trajectory in its dataset, ``(N,)``.
        step: Index of each row in its trajectory, ``(N,)``.
        steps_left: Transitions from each row to the end of its trajectory, its own included, ``(N,)``; 1 where rows
            are in no order.
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    trajectory: np.ndarray
    step: np.ndarray
    steps_left: np.ndarray

    def __len__(self) -> int:
        return len(self.states)


def gather_rows(dataset: Dataset, indices: np.ndarray) -> Rows:
    """Returns the transitions of some trajectories, with the place of each in its trajectory."""
    transitions = gather_transitions(dataset, indices)
    lengths = np.array([dataset.trajectories[index].num_transitions for index in indices], dtype=np.int64)
    step = np.concatenate([np.arange(length) for length in lengths])
    in_order = np.repeat([dataset.trajectories[index].in_order for index in indices], lengths)
    return Rows(
        transitions.states,
        transitions.actions,
        transitions.next_states,
        trajectory=np.repeat(np.asarray(indices, dtype=np.int64), lengths),
        step=step,
        steps_left=np.where(in_order, np.repeat(lengths, lengths) - step, 1),
    )


@dataclass(frozen=True)
class Scale:
    """How normalised units relate to raw ones.

    Attributes:
        learned: Indices of the learned state dimensions, ``(L,)``.
        factor: Raw units per normalised unit, ``(L,)`` float64.
    """

    learned: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, ensemble: DynamicsEnsemble) -> Scale:
        """Returns the scale of an ensemble's outputs."""
        learned = ensemble.learned.cpu().numpy()
        return cls(learned, ensemble.delta_scale.cpu().double().numpy()[learned])

    def divide(self, values: np.ndarray) -> np.ndarray:
        """Divides raw ``(..., D)`` by the factor: the learned dimensions in normalised units, ``(..., L)`` float64."""
        return values[..., self.learned].astype(np.float64) / self.factor


# --- The ensemble ---


@dataclass(frozen=True)
class OneStep:
    """One-step predictions of the change ``s' - s``, normalised units.

    Attributes:
        change: The true change, ``(N, L)``.
        means: Each member's mean, ``(E, N, L)``.
        variances: Each member's variance, ``(E, N, L)``; 0 where members predict points.
    """

    change: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Mean minus truth of each member, ``(E, N, L)``."""
        return self.means - self.change


@torch.no_grad()
def predict_one_step(
    ensemble: DynamicsEnsemble, states: np.ndarray, actions: np.ndarray, next_states: np.ndarray
) -> OneStep:
    """Predicts every row with every member.

    Args:
        ensemble: The ensemble that predicts.
        states: ``(N, D)``, raw units.
        actions: ``(N, action_dim)``, raw units.
        next_states: The truth, ``(N, D)``, raw units.
    """
    scale = Scale.of(ensemble)
    means = np.empty((len(ensemble), len(states), len(scale.learned)))
    variances = np.empty_like(means)
    for rows in _chunks(ensemble, len(states)):
        mean, variance = (part.cpu().numpy() for part in ensemble.moments(states[rows], actions[rows]))
        means[:, rows] = scale.divide(mean.astype(np.float64) - states[rows])
        variances[:, rows] = scale.divide(variance) / scale.factor
    return OneStep(scale.divide(next_states.astype(np.float64) - states), means, variances)


@torch.no_grad()
def member_nll(ensemble: DynamicsEnsemble, change: np.ndarray, means: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of the true change under each member, by the density of the ensemble's kind, in nats.

    Args:
        ensemble: The ensemble that predicted.
        change: The truth, ``(N, L)``.
        means: ``(E, N, L)``, in the truth's unit.
        variances: ``(E, N, L)``, in its square; above 0.

    Returns:
        ``(E, N, L)``.
    """
    nll = np.empty_like(means)
    for rows in _chunks(ensemble, len(change)):
        parts = change[rows], means[:, rows], np.log(variances[:, rows])
        truth, mean, log_variance = (torch.from_numpy(part).to(ensemble.device) for part in parts)
        nll[:, rows] = ensemble.nll(truth.expand_as(mean), mean, log_variance).cpu().numpy()
    return nll


@dataclass(frozen=True)
class Uncertainty:
    """How unsure the ensemble is of each row and how wrong, in the same unit.

    Attributes:
        units: ``normalised`` or ``raw``.
        measures: The measures of disagreement that the ensemble's kind has, ``(N,)`` by name.
        error: L2 norm of the error of the ensemble's mean, ``(N,)``.
    """

    units: str
    measures: dict[str, np.ndarray]
    error: np.ndarray


def measure_uncertainty(ensemble: DynamicsEnsemble, one_step: OneStep) -> list[Uncertainty]:
    """Returns measures of disagreement and errors in normalised and in raw units."""
    factor = Scale.of(ensemble).factor
    return [
        Uncertainty(
            units,
            disagreements(ensemble, one_step.means * unit, one_step.variances * np.square(unit)),
            np.linalg.norm(one_step.errors.mean(axis=0) * unit, axis=-1),
        )
        for units, unit in (("normalised", np.ones_like(factor)), ("raw", factor))
    ]


def disagreements(ensemble: DynamicsEnsemble, means: np.ndarray, variances: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every measure of disagreement that the ensemble's kind has, ``(N,)`` by name, of ``(E, N, L)`` moments.

    They are those of ``DynamicsEnsemble.disagreement``, in the unit of the means.
    """
    measures = {name: np.empty(means.shape[1]) for name in ensemble.disagreements}
    for rows in _chunks(ensemble, means.shape[1]):
        moments = torch.from_numpy(means[:, rows]), torch.from_numpy(variances[:, rows])
        for name, values in measures.items():
            values[rows] = ensemble.disagreement_of(*moments, name).numpy()
    return measures


def _chunks(ensemble: DynamicsEnsemble, rows: int) -> Iterator[slice]:
    """Cuts rows into chunks that are small enough for all members at once."""
    size = max(_MEMBER_ROWS_PER_CALL // len(ensemble), 1)
    return (slice(start, start + size) for start in range(0, rows, size))


# --- A baseline ---


def predict_linearly(rows: Rows, scale: Scale, fold: np.ndarray, training: Transitions | None) -> np.ndarray | None:
    """Predicts the change by least squares from states, actions and a constant.

    Args:
        rows: The rows to predict.
        scale: Scale of the ensemble that the baseline is compared with.
        fold: Fold of each row, ``(N,)``.
        training: Rows to fit the coefficients on; None fits them, for each fold, on the rows of the other folds.

    Returns:
        ``(N, L)``, normalised units; None where there is nothing to fit on.
    """

    def inputs_of(part: Rows | Transitions) -> np.ndarray:
        return np.column_stack([part.states, part.actions, np.ones(len(part))]).astype(np.float64)

    def change_of(part: Rows | Transitions) -> np.ndarray:
        return scale.divide(part.next_states.astype(np.float64) - part.states)

    inputs = inputs_of(rows)
    if training is not None:
        return inputs @ np.linalg.lstsq(inputs_of(training), change_of(training), rcond=None)[0]
    if len(np.unique(fold)) < 2:
        return None
    change = change_of(rows)
    predicted = np.empty_like(change)
    for current in np.unique(fold):
        inside, outside = fold == current, fold != current
        predicted[inside] = inputs[inside] @ np.linalg.lstsq(inputs[outside], change[outside], rcond=None)[0]
    return predicted
