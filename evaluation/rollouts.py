"""Open-loop rollouts along recorded actions, with the dataset as truth: forecasts, and what they are worth.

Letters in shapes: ``E`` members, ``P`` particles, ``N`` rows, ``K`` steps, ``S`` start points, ``D`` state dimensions,
``L`` learned ones; units as in ``predictions.py``. No simulator is needed: from a recorded state, the recorded actions
lead to the recorded states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data.trajectories import Dataset
from dynamics_model import DynamicsEnsemble, Propagation
from evaluation import metrics
from evaluation.predictions import Rows, Scale

PARTICLES = 20  # per start point, at least; as many as PETS (Chua et al. 2018)
BAND = 0.9  # of the interval whose coverage decides the calibrated horizon
LEFT, DIVERGED = 0.05, 1.0  # widths of the data's range that a state may be outside of it
QUANTILES = {"q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9}


@dataclass(frozen=True)
class Forecast:
    """One open-loop forecast per start point, normalised units; nan behind the end of a start point's trajectory.

    Attributes:
        error: Forecast mean minus truth, ``(K, S, L)``; infinite where the forecast is no number.
        variance: Of the forecast's distribution, ``(K, S, L)``; None for a forecast that is a point.
        left_range: Share of the simulated paths that have left the data's range by then, ``(K, S)``: by more than a
            twentieth of its width.
        diverged: Share that have gone farther outside it than the range is wide, ``(K, S)``.
    """

    error: np.ndarray
    variance: np.ndarray | None
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
        """Takes every recorded state of a dataset."""
        parts = [
            part for t in dataset.trajectories for part in (t.observations, t.next_observations) if part is not None
        ]
        return cls(np.min([part.min(axis=0) for part in parts], axis=0), np.max([p.max(axis=0) for p in parts], axis=0))

    def is_left_by(self, states: np.ndarray, widths: float, dims: np.ndarray) -> np.ndarray:
        """Whether states ``(..., D)`` lie outside by more than some widths of the range in any of ``dims``."""
        margin = widths * (self.high - self.low)[dims]
        is_inside = (states[..., dims] >= self.low[dims] - margin) & (states[..., dims] <= self.high[dims] + margin)
        return ~is_inside.all(axis=-1)  # so that nan counts as outside


def evaluate_rollouts(
    ensemble: DynamicsEnsemble,
    rows: Rows,
    variances: np.ndarray,
    fold: np.ndarray,
    state_range: StateRange,
    *,
    horizons: Sequence[int],
    max_starts: int,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Rolls out from many start points with every propagation, and tabulates what came of it.

    Args:
        ensemble: What is evaluated.
        rows: The truth.
        variances: Of every member's one-step prediction, ``(E, N, L)``: what a step of deterministic members adds to
            their spread.
        fold: Of each row, ``(N,)``, whole trajectories, for recalibration.
        state_range: What rollouts may leave.
        horizons: Steps at which tables of start points and dimensions are kept; the largest is how far to go.
        max_starts: Number of start points.
        seed: Of start points and sampling.

    Returns:
        The tables that ``evaluation.evaluate`` describes.
    """
    scale, horizon = Scale.of(ensemble), max(horizons)
    starts = choose_starts(rows, max_starts, seed)
    named = {"no_change": persist(rows, starts, horizon, scale)}
    for propagation in ("mean", "ts1", "tsinf"):
        (named[propagation],) = roll_out(ensemble, rows, starts, horizon, propagation, state_range, seed)
    members = roll_out(ensemble, rows, starts, horizon, "member", state_range, seed)
    named |= {f"member_{index}": forecast for index, forecast in enumerate(members)}
    if ensemble.member_class.kind == "deterministic":
        for name in ("ts1", "tsinf"):
            named[name] = _add_variance(named[name], variances[:, starts].mean(axis=0))

    trajectory = rows.trajectory[starts]
    kept = [step for step in horizons if step <= len(named["mean"].error)]
    whole = {name: named[name] for name in ("mean", "ts1", "tsinf")}
    coverage = pd.concat(
        [coverage_table(name, named[name], trajectory, fold[starts]) for name in ("ts1", "tsinf")], ignore_index=True
    )
    return {
        "rollout": _joined(error_table(name, forecast, trajectory) for name, forecast in named.items()),
        "rollout_dimensions": _joined(dimension_table(name, part, kept, scale) for name, part in whole.items()),
        "rollout_coverage": coverage,
        "calibrated_horizon": calibrated_horizon_table(coverage),
        "starts": _joined(start_table(name, part, kept, trajectory, rows.step[starts]) for name, part in whole.items()),
    }


# --- Forecasts ---


def choose_starts(rows: Rows, max_starts: int, seed: int) -> np.ndarray:
    """Spreads start points evenly over all rows, so that every trajectory and phase has its share.

    Returns:
        Row indices, those with most steps left first, ``(min(max_starts, N),)``.
    """
    count = min(max_starts, len(rows))
    offset = np.random.default_rng(seed).uniform()
    starts = ((np.arange(count) + offset) * len(rows) / count).astype(np.int64)
    return starts[np.argsort(-rows.steps_left[starts], kind="stable")]


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

    The propagations are those of ``DynamicsEnsemble.rollout``. For ``ts1`` and ``tsinf`` every start point has the same
    number of particles on every member, and the distribution at step ``k`` is the mixture of the members' one-step
    predictions, given the particles' states at ``k - 1``: at one step it is the ensemble's own mixture, whatever was
    drawn. Deterministic members draw nothing, so that one particle each is enough.

    Args:
        ensemble: What predicts.
        rows: The truth.
        starts: Row indices of start points, those with most steps left first, ``(S,)``.
        horizon: Steps to go at most; K is smaller where no trajectory is so long.
        propagation: ``ts1``, ``tsinf``, ``mean`` or ``member``.
        state_range: What rollouts may leave.
        seed: Of noise and dealing.

    Returns:
        One forecast; for ``member`` one per member.
    """
    scale = Scale.of(ensemble)
    steps_left = rows.steps_left[starts]
    forecasts = len(ensemble) if propagation == "member" else 1
    shape = (min(horizon, steps_left.max()), len(starts))
    error = np.full((forecasts, *shape, len(scale.learned)), np.nan)
    variance = np.full((*shape, len(scale.learned)), np.nan) if propagation in ("ts1", "tsinf") else None
    left_range, diverged = np.full((2, forecasts, *shape), np.nan)
    for step, (states, mean, spread) in enumerate(simulate(ensemble, rows, starts, shape[0], propagation, seed)):
        alive = states.shape[1]
        if step == 0:
            has_left, has_diverged = np.zeros((2, *states.shape[:2]), dtype=bool)
        has_left = has_left[:, :alive] | state_range.is_left_by(states, LEFT, scale.learned)
        has_diverged = has_diverged[:, :alive] | state_range.is_left_by(states, DIVERGED, scale.learned)
        left_range[:, step, :alive] = has_left.reshape(forecasts, -1, alive).mean(axis=1)
        diverged[:, step, :alive] = has_diverged.reshape(forecasts, -1, alive).mean(axis=1)
        truth = rows.next_states[starts[:alive] + step].astype(np.float64)
        deviation = scale.normalise(mean - truth)
        error[:, step, :alive] = np.where(np.isfinite(deviation), deviation, np.inf)
        if variance is not None:
            variance[step, :alive] = scale.normalise(spread) / scale.factor
    return [Forecast(error[i], variance, left_range[i], diverged[i]) for i in range(forecasts)]


@torch.no_grad()
def simulate(
    ensemble: DynamicsEnsemble, rows: Rows, starts: np.ndarray, steps: int, propagation: Propagation, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields, step by step, the states that are simulated and the forecast they make, raw units.

    Start points whose trajectory is over are dropped, which come last: their number S shrinks.

    Yields:
        States ``(P, S, D)``; the forecast's mean ``(forecasts, S, D)`` and its variance ``(S, D)``, None for points.
    """
    generator = torch.Generator().manual_seed(seed)
    states = torch.as_tensor(rows.states[starts], device=ensemble.device)
    states = states.expand(_count_particles(ensemble, propagation), -1, -1)
    for step in range(steps):
        alive = np.count_nonzero(rows.steps_left[starts] > step)
        actions = torch.as_tensor(rows.actions[starts[:alive] + step], device=ensemble.device)
        states, mean, spread = _advance(ensemble, states[:, :alive], actions, propagation, generator)
        yield states.cpu().numpy(), mean.cpu().numpy(), None if spread is None else spread.cpu().numpy()


def _count_particles(ensemble: DynamicsEnsemble, propagation: Propagation) -> int:
    """Returns the paths simulated from each start point: the same number on every member."""
    if propagation == "mean":
        return 1
    draws = propagation != "member" and ensemble.member_class.kind == "probabilistic"
    return len(ensemble) * (-(-PARTICLES // len(ensemble)) if draws else 1)


def _advance(
    ensemble: DynamicsEnsemble, states: Tensor, actions: Tensor, propagation: Propagation, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Takes one step with every particle.

    Args:
        ensemble: What predicts.
        states: ``(P, S, D)``; the particles of one member are neighbours.
        actions: ``(S, action_dim)``.
        propagation: As above.
        generator: Of noise and dealing.

    Returns:
        The next states ``(P, S, D)``; the forecast's mean ``(forecasts, S, D)`` and its variance ``(S, D)`` or None.
    """
    if propagation == "mean":
        mean = ensemble.predict(states[0], actions)[0].mean(dim=0, keepdim=True)
        return mean, mean, None
    actions = actions.expand(len(states), -1, -1)
    if propagation == "ts1":  # each start point's particles are dealt to the members anew, then return to their places
        dealt = torch.rand(states.shape[:2], generator=generator).argsort(dim=0).to(states.device)[..., None]
        places = dealt.argsort(dim=0).expand_as(states)
        means, variances = _predict_particles(ensemble, states.gather(0, dealt.expand_as(states)), actions)
        means, variances = (part if part is None else part.gather(0, places) for part in (means, variances))
    else:
        means, variances = _predict_particles(ensemble, states, actions)
    if propagation == "member":
        return means, means, None
    mean, spread = means.mean(dim=0, keepdim=True), means.var(dim=0, correction=0)
    if variances is None:
        return means, mean, spread
    noise = torch.randn(means.shape, generator=generator).to(means.device)
    return means + variances.sqrt() * noise, mean, spread + variances.mean(dim=0)


def _predict_particles(ensemble: DynamicsEnsemble, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Predicts ``(P, S, ...)`` with the members in turn, each taking an equal share of the particles."""
    rows = (part.reshape(len(ensemble), -1, part.shape[-1]) for part in (states, actions))  # (E, P / E * S, ...)
    means, variances = ensemble.predict_each(*rows)
    return means.reshape_as(states), None if variances is None else variances.reshape_as(states)


def persist(rows: Rows, starts: np.ndarray, horizon: int, scale: Scale) -> Forecast:
    """Forecasts that the state stays what it is at the start: the baseline that every rollout should beat."""
    steps = np.arange(min(horizon, rows.steps_left[starts].max()))[:, None]  # (K, 1)
    is_alive = steps < rows.steps_left[starts]  # (K, S)
    at = np.where(is_alive, starts + steps, 0)
    error = scale.normalise(rows.states[starts].astype(np.float64) - rows.next_states[at])
    stays = np.where(is_alive, 0.0, np.nan)
    return Forecast(np.where(is_alive[..., None], error, np.nan), None, left_range=stays, diverged=stays)


def _add_variance(forecast: Forecast, variance: np.ndarray) -> Forecast:
    return Forecast(forecast.error, forecast.variance + variance, forecast.left_range, forecast.diverged)


# --- Tables ---


def error_table(propagation: str, forecast: Forecast, trajectory: np.ndarray) -> pd.DataFrame:
    """Quantiles over start points of the error, the spread and the shares of paths astray, at every step.

    Quantiles are observed values (the smallest with at least that share of start points at or below it), so that
    infinite errors are no obstacle.
    """
    records = []
    for step, distance in enumerate(forecast.distance):
        alive = ~np.isnan(distance)
        quantiles = np.quantile(distance[alive], list(QUANTILES.values()), method="inverted_cdf")
        spread = np.nan
        if forecast.variance is not None:
            spread = np.nanmedian(np.sqrt(forecast.variance[step, alive].mean(axis=-1)))
        record = {
            "propagation": propagation,
            "horizon": step + 1,
            "starts": int(alive.sum()),
            "trajectories": len(np.unique(trajectory[alive])),
            **dict(zip(QUANTILES, quantiles, strict=True)),
            "spread": spread,
            "left_range": forecast.left_range[step, alive].mean(),
            "diverged": forecast.diverged[step, alive].mean(),
        }
        records.append(record)
    return pd.DataFrame(records)


def dimension_table(propagation: str, forecast: Forecast, horizons: Sequence[int], scale: Scale) -> pd.DataFrame:
    """Median absolute error over start points of each dimension, at the horizons asked for."""
    tables = []
    for horizon in horizons:
        error = np.abs(forecast.error[horizon - 1])  # (S, L)
        median = np.quantile(error[~np.isnan(error[:, 0])], 0.5, axis=0, method="inverted_cdf")
        columns = {"dimension": scale.learned.astype(str), "median": median, "median_raw": median * scale.factor}
        tables.append(pd.DataFrame({"propagation": propagation, "horizon": horizon, **columns}))
    return _joined(tables)


def start_table(
    propagation: str, forecast: Forecast, horizons: Sequence[int], trajectory: np.ndarray, step: np.ndarray
) -> pd.DataFrame:
    """The error of every start point that lasts as long, at the horizons asked for."""
    tables = []
    for horizon in horizons:
        distance = forecast.distance[horizon - 1]
        columns = {"trajectory": trajectory, "start": step, "horizon": horizon, "error": distance}
        tables.append(pd.DataFrame({"propagation": propagation, **columns})[~np.isnan(distance)])
    return _joined(tables)


def coverage_table(propagation: str, forecast: Forecast, trajectory: np.ndarray, fold: np.ndarray) -> pd.DataFrame:
    """Coverage of the 90 % band at every step, as forecast and recalibrated per dimension and horizon.

    Recalibration ends at the step where a fold has no other fold to learn its scale from.

    Args:
        propagation: For the column of that name.
        forecast: With a variance.
        trajectory: Of each start point, ``(S,)``.
        fold: Of each start point, ``(S,)``.
    """
    with np.errstate(invalid="ignore"):
        z = forecast.error / np.sqrt(forecast.variance)  # (K, S, L)
    scale = metrics.cross_fitted_scale(z, fold)
    is_alive = ~np.isnan(forecast.error[..., 0])
    records = []
    for step, alive in enumerate(is_alive):
        variants = {"raw": z[step, alive]}
        if np.isfinite(scale[step, alive]).all():
            variants["recalibrated"] = z[step, alive] / scale[step, alive]
        for variant, values in variants.items():
            covered = metrics.is_covered(values, BAND).mean(axis=-1)
            mean, error = metrics.clustered_mean(covered, trajectory[alive])
            record = {"propagation": propagation, "variant": variant, "horizon": step + 1, "coverage": mean}
            record |= {"standard_error": error, "starts": len(covered)}
            records.append(record | {"trajectories": len(np.unique(trajectory[alive]))})
    return pd.DataFrame(records)


def calibrated_horizon_table(coverage: pd.DataFrame) -> pd.DataFrame:
    """Steps for which the band keeps its promise, and how many steps could be checked (two trajectories or more)."""
    records = []
    for (propagation, variant), table in coverage.groupby(["propagation", "variant"], sort=False):
        horizon = metrics.calibrated_horizon(table.coverage, table.standard_error, BAND)
        checked = int(table.standard_error.notna().sum())
        records.append({"propagation": propagation, "variant": variant, "horizon": horizon, "checked": checked})
    return pd.DataFrame(records)


def _joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)
