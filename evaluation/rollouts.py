"""Open-loop rollouts from recorded states along the recorded actions, so that the record is the truth.

Letters in shapes: ``P`` particles, ``S`` start points, ``K`` steps, the others as in ``predictions.py``; errors and
variances are in normalised units where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data.trajectories import Dataset
from dynamics_model import DynamicsEnsemble, Propagation
from evaluation import metrics
from evaluation.predictions import Rows, Scale, gather_rows

PARTICLES = 20  # per start point, at least; as many as PETS (Chua et al. 2018)
# A path farther outside the data's range has left it or exploded, in widths of the range; and where clamping stops it.
LEFT, EXPLODED, CLAMPED = 0.05, 1.0, 0.5


@dataclass(frozen=True)
class Forecast:
    """One open-loop forecast per start point, normalised units; nan after the end of a start point's trajectory.

    Attributes:
        error: The forecast's mean minus the truth, ``(K, S, L)``; infinite where the mean is not a number.
        variance: The forecast's variance, ``(K, S, L)``; nan where the forecast is a point.
        energy_score: Of the sampled states, ``(K, S)``, see ``metrics.energy_score``; for a point its error.
        left_range: Share of the simulated paths that have left the data's range so far, ``(K, S)``: by more than a
            twentieth of its width.
        exploded: Share that have gone farther outside than the range is wide, ``(K, S)``.
    """

    error: np.ndarray
    variance: np.ndarray
    energy_score: np.ndarray
    left_range: np.ndarray
    exploded: np.ndarray

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
        low, high = self.widened(widths)
        is_inside = (states[..., dims] >= low[dims]) & (states[..., dims] <= high[dims])
        return ~is_inside.all(axis=-1)  # so that nan counts as outside

    def widened(self, widths: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns low and high, ``(D,)`` each, of the range with so many widths of it added on both sides."""
        margin = widths * (self.high - self.low)
        return self.low - margin, self.high + margin


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
    """Forecasts with every propagation, with single members, and with baselines that know no dynamics.

    Args:
        ensemble: The ensemble that forecasts.
        rows: Recorded states and actions.
        starts: Row indices of start points, those with most steps left first, ``(S,)``.
        horizon: Steps to go at most; fewer where no trajectory is so long.
        completion: What ``calibration.completion`` adds to the members' variances, ``(E, N, L)``. It is added once to
            each forecast of ``ts1`` and ``tsinf``, for the error of the last step.
        state_range: The range that rollouts may leave; where they are clamped, by half its width.
        seed: Seed of draws and of dealing members.

    Returns:
        Forecasts by propagation: ``no_change``, ``mean_state``, ``mean``, ``mean_clamped``, ``ts1``, ``tsinf``,
        ``tsinf_clamped``, ``member_0``, ``member_1``, ...
    """

    def forecast(propagation: Propagation, **options: Any) -> list[Forecast]:
        return roll_out(ensemble, rows, starts, horizon, propagation, state_range, seed, **options)

    lacking = completion[:, starts].mean(axis=0)
    forecasts = forecast_baselines(ensemble, rows, starts, horizon)
    forecasts["mean"], forecasts["mean_clamped"] = forecast("mean", also_clamped=True)
    (forecasts["ts1"],) = forecast("ts1", lacking=lacking)
    forecasts["tsinf"], forecasts["tsinf_clamped"] = forecast("tsinf", lacking=lacking, also_clamped=True)
    return forecasts | {f"member_{index}": each for index, each in enumerate(forecast("member"))}


def roll_out(
    ensemble: DynamicsEnsemble,
    rows: Rows,
    starts: np.ndarray,
    horizon: int,
    propagation: Propagation,
    state_range: StateRange,
    seed: int,
    *,
    lacking: np.ndarray | float = 0.0,
    also_clamped: bool = False,
) -> list[Forecast]:
    """Forecasts along the recorded actions, each start point until its trajectory ends or ``horizon`` is reached.

    The propagations are those of ``DynamicsEnsemble.rollout``; the other positional arguments are those of
    ``forecast_all``. A variance ``lacking`` in sampled forecasts, ``(S, L)`` or 0, is added to them. ``also_clamped``
    asks for a second forecast, in which each state is clamped to the range widened by half its width.

    Returns:
        One forecast, or the free one and the clamped one; for ``member`` one per member.
    """
    count = len(ensemble) if propagation == "member" else 1
    steps = min(horizon, rows.steps_left[starts].max())
    scale = Scale.of(ensemble)
    records = [_Record(count, steps, len(starts), scale, state_range) for _ in range(1 + also_clamped)]
    clamp = state_range.widened(CLAMPED) if also_clamped else None
    random = np.random.default_rng(seed)
    for step, variants in enumerate(simulate(ensemble, rows, starts, steps, propagation, seed, clamp)):
        particles, alive, _ = variants[0].particles.shape
        truth = rows.next_states[starts[:alive] + step].astype(np.float64)
        missing = np.broadcast_to(lacking, (len(starts), len(scale.learned)))[:alive]
        noise = np.sqrt(missing) * random.standard_normal((particles, *missing.shape)) if missing.any() else 0.0
        for record, state in zip(records, variants, strict=True):
            arrays = (None if part is None else part.cpu().numpy() for part in state)
            record.add(step, *arrays, truth, missing, noise)
    return [forecast for record in records for forecast in record.forecasts()]


class _Record:
    """Gathers the forecasts of one simulation, step by step."""

    def __init__(self, forecasts: int, steps: int, starts: int, scale: Scale, state_range: StateRange) -> None:
        self.scale, self.state_range = scale, state_range
        shape = (forecasts, steps, starts)
        self.error = np.full((*shape, len(scale.learned)), np.nan)
        self.variance = np.full_like(self.error, np.nan)
        self.energy_score, self.left_range, self.exploded = np.full((3, *shape), np.nan)
        self.has_left, self.has_exploded = np.zeros((2, 1, starts), dtype=bool)

    def add(
        self,
        step: int,
        particles: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray | None,
        truth: np.ndarray,
        missing: np.ndarray,
        noise: np.ndarray | float,
    ) -> None:
        """Adds what ``SimulatedStates`` are, and the variance that they lack, with draws of it, normalised units."""
        count, alive = len(self.error), particles.shape[1]
        dims = self.scale.learned
        self.has_left = self.has_left[:, :alive] | self.state_range.is_left_by(particles, LEFT, dims)
        self.has_exploded = self.has_exploded[:, :alive] | self.state_range.is_left_by(particles, EXPLODED, dims)
        self.left_range[:, step, :alive] = self.has_left.reshape(count, -1, alive).mean(axis=1)
        self.exploded[:, step, :alive] = self.has_exploded.reshape(count, -1, alive).mean(axis=1)
        deviation = self.scale.divide(mean - truth)
        deviation = np.where(np.isfinite(deviation), deviation, np.inf)
        self.error[:, step, :alive] = deviation
        if variance is None:
            self.energy_score[:, step, :alive] = metrics.rmse(deviation, axis=-1)
        else:
            self.variance[:, step, :alive] = self.scale.divide(variance) / self.scale.factor + missing
            drawn = self.scale.divide(particles - truth) + noise
            self.energy_score[:, step, :alive] = metrics.energy_score(drawn, np.zeros_like(missing))

    def forecasts(self) -> list[Forecast]:
        """Returns what was gathered."""
        parts = self.error, self.variance, self.energy_score, self.left_range, self.exploded
        return [Forecast(*each) for each in zip(*parts, strict=True)]


class SimulatedStates(NamedTuple):
    """One step of a simulation: the states of the ``S`` start points whose trajectories last so long, raw units.

    Attributes:
        particles: State of each simulated path, ``(P, S, D)``.
        mean: Mean of each forecast, ``(forecasts, S, D)``.
        variance: Variance of the forecast, ``(1, S, D)``; None where forecasts are points.
    """

    particles: Tensor
    mean: Tensor
    variance: Tensor | None


@torch.no_grad()
def simulate(
    ensemble: DynamicsEnsemble,
    rows: Rows,
    starts: np.ndarray,
    steps: int,
    propagation: Propagation,
    seed: int,
    clamp: tuple[np.ndarray, np.ndarray] | None = None,
) -> Iterator[list[SimulatedStates]]:
    """Yields the states after each step.

    For ``ts1`` and ``tsinf`` every start point has the same number of particles on every member, and the forecast at a
    step is the mixture of the members' one-step predictions, given the particles' states before that step: one step
    ahead it is the ensemble's own mixture, whatever was drawn.

    Given a ``clamp``, low and high, ``(D,)`` each, a second simulation with the same draws keeps every state within it;
    for ``mean`` and ``tsinf`` only. Only those of its paths are predicted that differ from the free ones.

    Yields:
        The free states and, if asked for, the clamped ones.
    """
    generator = torch.Generator().manual_seed(seed)
    is_sampled = propagation in ("ts1", "tsinf")
    draws = ensemble.draws_per_member(PARTICLES) if is_sampled else 1
    members = torch.arange(len(ensemble)).repeat_interleave(draws)[:, None]  # the member of each particle, (P, 1)
    count = 1 if propagation == "mean" else len(members)

    def predict(states: Tensor, actions: Tensor, members: Tensor) -> tuple[Tensor, Tensor | None]:
        if propagation == "mean":
            return ensemble.predict(states, actions)[0].mean(dim=0), None
        if propagation == "member":
            return ensemble.predict_each(states, actions)[0], None
        return ensemble.predict_members(states, actions, members)

    def advance(means: Tensor, variances: Tensor | None, keep: Callable[[Tensor], Tensor]) -> SimulatedStates:
        means = keep(means)
        if variances is None:
            return SimulatedStates(means, means, None)
        drawn = keep(means + variances.sqrt() * noise)
        return SimulatedStates(drawn, *_mix(means, variances))

    if clamp is not None:
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=ensemble.device) for bound in clamp)
    particles = clamped = torch.as_tensor(rows.states[starts], device=ensemble.device).expand(count, -1, -1)
    for step in range(steps):
        alive = np.count_nonzero(rows.steps_left[starts] > step)  # the start points that end first come last
        particles = particles[:, :alive]
        actions = torch.as_tensor(rows.actions[starts[:alive] + step], device=ensemble.device)
        actions = actions.expand(count, -1, -1)
        if propagation == "ts1" and step > 0:
            members = ensemble.deal_members(count, alive, generator)
        dealt = members[:count].expand(-1, alive)
        moments = predict(particles, actions, dealt)
        noise = ensemble.noise(particles.shape, generator).to(particles.device) if is_sampled else None
        following = [advance(*moments, keep=lambda states: states)]
        if clamp is not None:
            clamped = clamped[:, :alive]
            if (apart := (clamped != particles).any(dim=-1)).any():  # (P, S)
                of_apart = predict(clamped[apart], actions[apart], dealt[apart.cpu()])
                moments = [
                    m if m is None else m.index_put((apart,), own) for m, own in zip(moments, of_apart, strict=True)
                ]
            following.append(advance(*moments, keep=lambda states: states.clamp(low, high)))
            clamped = following[1].particles
        particles = following[0].particles
        yield following


def _mix(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture over particles ``(P, S, D)``: both ``(1, S, D)``."""
    mean = means.mean(dim=0, keepdim=True)
    return mean, means.var(dim=0, correction=0, keepdim=True) + variances.mean(dim=0, keepdim=True)


# --- Baselines, and skill against them ---


def forecast_baselines(ensemble: DynamicsEnsemble, rows: Rows, starts: np.ndarray, horizon: int) -> dict[str, Forecast]:
    """Forecasts what knows no dynamics; the arguments are those of ``forecast_all``.

    Returns:
        ``no_change``: the state stays what it was at the start; ``mean_state``: it is the mean training state at every
        step, which no forecast that has lost its way can beat.
    """
    scale = Scale.of(ensemble)
    mean_state = ensemble.input_shift[: ensemble.state_dim].cpu().numpy()
    steps = np.arange(min(horizon, rows.steps_left[starts].max()))[:, None]  # (K, 1)
    is_alive = steps < rows.steps_left[starts]  # (K, S)
    truth = rows.next_states[np.where(is_alive, starts + steps, 0)]  # (K, S, D)
    never = np.where(is_alive, 0.0, np.nan)
    forecasts = {}
    for name, states in (("no_change", rows.states[starts]), ("mean_state", mean_state)):
        error = np.where(is_alive[..., None], scale.divide(states.astype(np.float64) - truth), np.nan)
        forecasts[name] = Forecast(error, np.full_like(error, np.nan), metrics.rmse(error, axis=-1), never, never)
    return forecasts


def skill(forecast: Forecast, baseline: Forecast) -> np.ndarray:
    """One minus the ratio of the median errors of forecast and baseline, ``(K,)``; nan where the baseline has none."""
    error, reference = (metrics.observed_quantiles(each.distance, [0.5])[0] for each in (forecast, baseline))
    return 1 - error / np.where(reference > 0, reference, np.nan)


def validation_skill(
    ensemble: DynamicsEnsemble,
    dataset: Dataset,
    indices: np.ndarray,
    horizons: Sequence[int],
    max_starts: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Skill of the ``mean`` propagation alone, cheap enough for trials: a horizon may be chosen by it.

    Args:
        ensemble: The ensemble that forecasts.
        dataset: The dataset.
        indices: Trajectories of it that validate.
        horizons: Steps from the start; those that no trajectory reaches are left out.
        max_starts: Start points at most, evenly spread over the rows.
        seed: Seed of the choice of start points.

    Returns:
        - horizon: steps from the start;
        - starts: start points whose trajectory lasts so long;
        - skill: against ``mean_state``, as in ``rollout_tables.rollout_table``.
    """
    rows = gather_rows(dataset, indices)
    starts = choose_starts(rows, max_starts, seed)
    (forecast,) = roll_out(ensemble, rows, starts, max(horizons), "mean", StateRange.of(dataset), seed)
    by_step = skill(forecast, forecast_baselines(ensemble, rows, starts, max(horizons))["mean_state"])
    reached = np.array([horizon for horizon in horizons if horizon <= len(forecast.error)], dtype=int)
    return pd.DataFrame(
        {
            "horizon": reached,
            "starts": np.count_nonzero(~np.isnan(forecast.distance), axis=1)[reached - 1],
            "skill": by_step[reached - 1],
        }
    )
