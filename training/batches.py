"""Training data as networks see it: normalised rows, and the order in which each member goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.audit import moves_rarely
from data.trajectories import Transitions
from dynamics_model import DynamicsEnsemble, Normalisation, random_stream
from utils import InputError


class NormalisedRows(NamedTuple):
    """Transitions in normalised units."""

    inputs: Tensor  # (rows, state_dim + action_dim)
    targets: Tensor  # (rows, learned_dim)
    rewards: Tensor | None  # (rows, 1); None where no reward is learned

    def select(self, rows: Tensor) -> NormalisedRows:
        """Returns the rows at indices ``(ensemble, batch)``, gathered in one read: ``(ensemble, batch, ...)``."""
        flat = rows.reshape(-1)
        return NormalisedRows(*(part if part is None else part[flat].view(*rows.shape, -1) for part in self))

    def chunks(self, size: int) -> Iterator[NormalisedRows]:
        """Yields all rows in chunks of ``size``; the last chunk may be shorter."""
        for start in range(0, len(self.inputs), size):
            yield NormalisedRows(*(part if part is None else part[start : start + size] for part in self))


def normalise_rows(ensemble: DynamicsEnsemble, transitions: Transitions) -> NormalisedRows:
    """Converts transitions to an ensemble's normalised units, on its device; training and scoring share the result."""
    states, actions, next_states = transitions.states, transitions.actions, transitions.next_states
    learned = ensemble.learned.cpu().numpy()
    shift, scale = (getattr(ensemble, name).cpu().double().numpy()[learned] for name in ("delta_shift", "delta_scale"))
    targets = np.empty((len(states), len(learned)), dtype=np.float32)
    for rows in _row_chunks(len(states)):
        targets[rows] = (_change(states[rows], next_states[rows])[:, learned] - shift) / scale
    inputs = _normalise_inputs(ensemble, states, actions)
    rewards = None
    if ensemble.reward is not None:
        rewards = torch.as_tensor(transitions.rewards, device=ensemble.device).view(-1, 1)
        rewards = (rewards - ensemble.reward_shift) / ensemble.reward_scale
    return NormalisedRows(inputs, torch.as_tensor(targets, device=ensemble.device), rewards)


def _normalise_inputs(ensemble: DynamicsEnsemble, states: np.ndarray, actions: np.ndarray) -> Tensor:
    """Normalises inputs; where states are float64, in float64, so that only the result is rounded to float32."""
    if states.dtype == np.float32:
        return ensemble.normalise_inputs(*(torch.as_tensor(part, device=ensemble.device) for part in (states, actions)))
    shift, scale = (getattr(ensemble, name).cpu().double().numpy() for name in ("input_shift", "input_scale"))
    inputs = np.empty((len(states), len(shift)), dtype=np.float32)
    for rows in _row_chunks(len(states)):
        inputs[rows] = (np.hstack([states[rows], actions[rows]]) - shift) / scale
    return torch.as_tensor(inputs, device=ensemble.device)


def draw_bootstrap(seed: int, ensemble_size: int, rows: int) -> Tensor:
    """Draws each member's own training rows with replacement: ``(ensemble, rows)`` row indices."""
    streams = (random_stream(seed, member, "bootstrap") for member in range(ensemble_size))
    return torch.stack([torch.randint(rows, (rows,), generator=stream) for stream in streams])


def draw_order(seed: int, ensemble_size: int, rows: int, epoch: int) -> Tensor:
    """Draws the order in which each member sees its rows in one epoch: ``(ensemble, rows)``, a permutation each."""
    streams = (random_stream(seed, member, "order", epoch) for member in range(ensemble_size))
    return torch.stack([torch.randperm(rows, generator=stream) for stream in streams])


# --- Statistics of training rows, in float64 and by chunks, so that no float64 copy of a dataset exists ---


def measure_normalisation(transitions: Transitions) -> Normalisation:
    """Measures shifts (means) and scales (mean absolute deviations) of training rows, raw units.

    The scale of a dimension that moves in a handful of rows (``moves_rarely``) is its standard deviation. Without
    rewards, the shift of rewards is 0 and their scale 1.

    Raises:
        InputError: If every state dimension changes by a constant, so that there is nothing to learn.
    """
    states, actions, next_states = transitions.states, transitions.actions, transitions.next_states
    rows = len(states)
    state_shift, state_scale = _shift_and_scale(lambda chunk: states[chunk], rows)
    action_shift, action_scale = _shift_and_scale(lambda chunk: actions[chunk], rows)
    delta_shift, delta_scale = _shift_and_scale(lambda chunk: _change(states[chunk], next_states[chunk]), rows)
    reward_shift, reward_scale = np.zeros(1), np.ones(1)
    if transitions.rewards is not None:
        reward_shift, reward_scale = _shift_and_scale(lambda chunk: transitions.rewards[chunk, None], rows)
    if not delta_scale.any():
        raise InputError(
            "every state dimension changes by a constant in the training rows: nothing to learn; give a dataset in "
            "which states move"
        )
    input_scale = np.concatenate([state_scale, action_scale])
    return Normalisation(
        input_shift=_float32(np.concatenate([state_shift, action_shift])),
        input_scale=_float32(np.where(input_scale > 0, input_scale, 1.0)),
        delta_shift=_float32(delta_shift),
        delta_scale=_float32(delta_scale),
        reward_shift=_float32(reward_shift),
        reward_scale=_float32(np.where(reward_scale > 0, reward_scale, 1.0)),
    )


def _row_chunks(rows: int, size: int = 65536) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def _change(states: np.ndarray, next_states: np.ndarray) -> np.ndarray:
    return next_states.astype(np.float64) - states


def _shift_and_scale(values_of: Callable[[slice], np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation per column; the deviation is exactly 0 where all values are equal.

    It is the mean absolute deviation or, where values move rarely, the standard deviation. One that float32 cannot tell
    from 0, as only that of float64 states can be, is 0.
    """
    first = values_of(slice(0, 1)).astype(np.float64)[0]
    total, varies = 0.0, False
    for chunk in _row_chunks(rows):
        values = values_of(chunk).astype(np.float64)
        total = total + values.sum(axis=0)
        varies = varies | (values != first).any(axis=0)
    mean = np.where(varies, total / rows, first)
    absolute, squared = 0.0, 0.0
    for chunk in _row_chunks(rows):
        distance = np.abs(values_of(chunk).astype(np.float64) - mean)
        absolute = absolute + distance.sum(axis=0)
        squared = squared + np.square(distance).sum(axis=0)
    deviation, standard = absolute / rows, np.sqrt(squared / rows)
    deviation = np.where(moves_rarely(standard, deviation), standard, deviation)
    return mean, np.where(deviation < np.finfo(np.float32).tiny, 0.0, deviation)


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
