"""Open-loop rollouts from recorded states along the recorded actions, so that the record is the truth.

Letters in shapes: ``P`` particles, ``S`` start points, ``K`` steps, the others as in ``predictions.py``; errors and
variances are in normalised units where nothing else is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.trajectories import Dataset
from dynamics_model import DynamicsEnsemble, Propagation
from evaluation import metrics
from evaluation.predictions import Rows, Scale

PARTICLES = 20  # per start point, at least; as many as PETS (Chua et al. 2018)
LEFT, DIVERGED = 0.05, 1.0  # a path farther outside the data's range has left it or diverged, in widths of the range


@dataclass(frozen=True)
class Forecast:
    """One open-loop forecast per start point, normalised units; nan after the end of a start point's trajectory.

    Attributes:
        error: The forecast's mean minus the truth, ``(K, S, L)``; infinite where the mean is not a number.
        variance: The forecast's variance, ``(K, S, L)``; nan where the forecast is a point.
        left_range: Share of the simulated paths that have left the data's range so far, ``(K, S)``: by more than a
            twentieth of its width.
        diverged: Share that have gone farther outside than the range is wide, ``(K, S)``.
    """

    error: np.ndarray
    variance: np.ndarray
    left_range: np.ndarray
    diverged: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """Root mean square of the error over dimensions, ``(K, S)``."""
        return metrics.rmse(self.error, axis=-1)


@dataclass(frozen=True)
class StateRange:
    """The range of a dataset's states, ``(D,)`` each, raw units."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> StateRange:
        """Returns the range of all recorded states of a dataset."""
        recorded = [part for t in dataset.trajectories for part in (t.observations, t.next_observations)]
        states = [part for part in recorded if part is not None]
        return cls(np.min([s.min(axis=0) for s in states], axis=0), np.max([s.max(axis=0) for s in states], axis=0))

    def is_left_by(self, states: np.ndarray, widths: float, dims: np.ndarray) -> np.ndarray:
        """Whether states ``(..., D)`` are outside by more than so many widths of the range, in any of ``dims``."""
        margin = widths * (self.high - self.low)[dims]
        is_inside = (states[..., dims] >= self.low[dims] - margin) & (states[..., dims] <= self.high[dims] + margin)
        return ~is_inside.all(axis=-1)  # so that nan counts as outside


def choose_starts(rows: Rows, max_starts: int, seed: int) -> np.ndarray:
    """Spreads start points evenly over all rows, so that every trajectory and phase has its share.

    Returns:
        Row indices, those with most steps left first, ``(min(max_starts, N),)``.
    """
    count = min(max_starts, len(rows))
    offset = np.random.default_rng(seed).uniform()
    starts = ((np.arange(count) + offset) * len(rows) / count).astype(np.int64)
    return starts[np.argsort(-rows.steps_left[starts], kind="stable")]


def forecast_all(
    ensemble: DynamicsEnsemble,
    rows: Rows,
    starts: np.ndarray,
    horizon: int,
    completion: np.ndarray,
    state_range: StateRange,
    seed: int,
) -> dict[str, Forecast]:
    """Forecasts with every propagation, with single members, and with the baseline that nothing changes.

    Args:
        ensemble: The ensemble that forecasts.
        rows: Recorded states and actions.
        starts: Row indices of start points, those with most steps left first, ``(S,)``.
        horizon: Steps to go at most; fewer where no trajectory is so long.
        completion: What ``calibration.completion`` adds to the members' variances, ``(E, N, L)``. It is added once to
            each forecast of ``ts1`` and ``tsinf``, for the error of the last step.
        state_range: The range that rollouts may leave.
        seed: Seed of draws and of dealing members.

    Returns:
        Forecasts by propagation: ``no_change``, ``mean``, ``ts1``, ``tsinf``, ``member_0``, ``member_1``, ...
    """

    def forecast(propagation: Propagation) -> list[Forecast]:
        return roll_out(ensemble, rows, starts, horizon, propagation, state_range, seed)

    forecasts = {"no_change": persist(rows, starts, horizon, Scale.of(ensemble))}
    (forecasts["mean"],) = forecast("mean")
    for propagation in ("ts1", "tsinf"):
        (sampled,) = forecast(propagation)
        variance = sampled.variance + completion[:, starts].mean(axis=0)
        forecasts[propagation] = dataclasses.replace(sampled, variance=variance)
    return forecasts | {f"member_{index}": each for index, each in enumerate(forecast("member"))}


def roll_out(
    ensemble: DynamicsEnsemble,
    rows: Rows,
    starts: np.ndarray,
    horizon: int,
    propagation: Propagation,
    state_range: StateRange,
    seed: int,
) -> list[Forecast]:
    """Forecasts along the recorded actions, each start point until its trajectory ends or ``horizon`` is reached.

    The propagations are those of ``DynamicsEnsemble.rollout``; the other arguments are those of ``forecast_all``.

    Returns:
        One forecast; for ``member`` one per member.
    """
    scale = Scale.of(ensemble)
    steps_left = rows.steps_left[starts]
    forecasts = len(ensemble) if propagation == "member" else 1
    shape = (forecasts, min(horizon, steps_left.max()), len(starts))
    error = np.full((*shape, len(scale.learned)), np.nan)
    variance = np.full_like(error[:1], np.nan)  # single members' forecasts are points: all their variances are nan
    left_range, diverged = np.full((2, *shape), np.nan)
    has_left, has_diverged = np.zeros((2, 1, len(starts)), dtype=bool)
    for step, state in enumerate(simulate(ensemble, rows, starts, shape[1], propagation, seed)):
        alive = state.particles.shape[1]
        has_left = has_left[:, :alive] | state_range.is_left_by(state.particles, LEFT, scale.learned)
        has_diverged = has_diverged[:, :alive] | state_range.is_left_by(state.particles, DIVERGED, scale.learned)
        left_range[:, step, :alive] = has_left.reshape(forecasts, -1, alive).mean(axis=1)
        diverged[:, step, :alive] = has_diverged.reshape(forecasts, -1, alive).mean(axis=1)
        truth = rows.next_states[starts[:alive] + step].astype(np.float64)
        deviation = scale.divide(state.mean - truth)
        error[:, step, :alive] = np.where(np.isfinite(deviation), deviation, np.inf)
        variance[:, step, :alive] = scale.divide(state.variance) / scale.factor
    variance = np.broadcast_to(variance, error.shape)
    return [Forecast(*parts) for parts in zip(error, variance, left_range, diverged, strict=True)]


@dataclass(frozen=True)
class SimulatedStates:
    """One step of a simulation: the states of the ``S`` start points whose trajectories last so long, raw units.

    Attributes:
        particles: State of each simulated path, ``(P, S, D)``.
        mean: Mean of each forecast, ``(forecasts, S, D)``.
        variance: Variance of the forecast, ``(1, S, D)``; nan where forecasts are points.
    """

    particles: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


@torch.no_grad()
def simulate(
    ensemble: DynamicsEnsemble, rows: Rows, starts: np.ndarray, steps: int, propagation: Propagation, seed: int
) -> Iterator[SimulatedStates]:
    """Yields the states after each step.

    For ``ts1`` and ``tsinf`` every start point has the same number of particles on every member, and the forecast at a
    step is the mixture of the members' one-step predictions, given the particles' states before that step: one step
    ahead it is the ensemble's own mixture, whatever was drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = ensemble.draws_per_member(PARTICLES) if propagation in ("ts1", "tsinf") else 1
    members = torch.arange(len(ensemble)).repeat_interleave(draws)[:, None]  # the member of each particle, (P, 1)
    count = 1 if propagation == "mean" else len(members)
    particles = torch.as_tensor(rows.states[starts], device=ensemble.device).expand(count, -1, -1)
    for step in range(steps):
        alive = np.count_nonzero(rows.steps_left[starts] > step)  # the start points that end first come last
        particles = particles[:, :alive]
        actions = torch.as_tensor(rows.actions[starts[:alive] + step], device=ensemble.device)
        actions = actions.expand(count, -1, -1)
        if propagation == "mean":
            mean = particles = ensemble.predict(particles[0], actions[0])[0].mean(dim=0, keepdim=True)
            variance = torch.full_like(mean, torch.nan)
        elif propagation == "member":
            mean = particles = ensemble.predict_each(particles, actions)[0]
            variance = torch.full_like(mean[:1], torch.nan)
        else:
            if propagation == "ts1" and step > 0:
                members = ensemble.deal_members(count, alive, generator)
            means, variances = ensemble.predict_members(particles, actions, members.expand(-1, alive))
            mean, variance = _mix(means, variances)
            particles = ensemble.draw(means, variances, generator)
        yield SimulatedStates(*(part.cpu().numpy() for part in (particles, mean, variance)))


def _mix(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture over particles ``(P, S, D)``: both ``(1, S, D)``."""
    mean = means.mean(dim=0, keepdim=True)
    return mean, means.var(dim=0, correction=0, keepdim=True) + variances.mean(dim=0, keepdim=True)


def persist(rows: Rows, starts: np.ndarray, horizon: int, scale: Scale) -> Forecast:
    """Forecasts that the state never changes: the baseline that every rollout should beat."""
    steps = np.arange(min(horizon, rows.steps_left[starts].max()))[:, None]  # (K, 1)
    is_alive = steps < rows.steps_left[starts]  # (K, S)
    at = np.where(is_alive, starts + steps, 0)
    error = scale.divide(rows.states[starts].astype(np.float64) - rows.next_states[at])
    error = np.where(is_alive[..., None], error, np.nan)
    never = np.where(is_alive, 0.0, np.nan)
    return Forecast(error, variance=np.full_like(error, np.nan), left_range=never, diverged=never)
