"""The numbers that training reports: per epoch and member while it runs, and per member at its end.

All are in normalised units, where 1 is a dimension's mean absolute deviation of the change; likelihoods in nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsEnsemble
from training.batches import NormalisedRows
from training.optimisation import learning_rate

STRAY = 5.0  # a member is stray whose error is more than so many times the median's
_ROWS_PER_CALL = 4096  # rows that a member scores in one forward pass

Scores = dict[str, list[float]]
"""By name, one number per member."""


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch; scores are measured on the weights at its end.

    Attributes:
        index: From 0.
        losses: Reported loss of each member, the mean over the epoch's minibatches.
        train_scores: Scores of the training rows; empty in epochs that do not measure them.
        holdout_scores: Scores of the holdout; empty without one.
        failed: Whether each member has failed, now or before: its numbers are not finite.
        checkpoint: Returns the state to resume training from; call it before the next epoch begins.
    """

    index: int
    losses: list[float]
    train_scores: Scores
    holdout_scores: Scores
    failed: tuple[bool, ...]
    checkpoint: Callable[[], dict[str, Any]]


@torch.no_grad()
def score_rows(ensemble: DynamicsEnsemble, rows: NormalisedRows) -> Scores:
    """Scores every row with every member.

    Returns:
        What the kind's ``score_terms`` names, means over rows and dimensions: ``mse``, and ``nll`` where members
        predict a variance; ``reward_mse`` where a reward is learned.
    """
    sums: dict[str, Tensor] = {}
    for chunk in rows.chunks(_ROWS_PER_CALL):
        stacked = NormalisedRows(*(part if part is None else part.expand(len(ensemble), -1, -1) for part in chunk))
        terms = ensemble.score_terms(stacked.targets, *ensemble.predict_change(stacked.inputs))
        totals = {name: term.mean(dim=-1).double().sum(dim=1) for name, term in terms.items()}
        if rows.rewards is not None:
            totals["reward_mse"] = ensemble.reward_loss(*stacked).double() * len(chunk.inputs)
        for name, total in totals.items():
            sums[name] = sums[name] + total if name in sums else total
    return {name: (total / len(rows.inputs)).tolist() for name, total in sums.items()}


def metric_columns(ensemble: DynamicsEnsemble) -> list[str]:
    """Returns the columns of ``metrics.csv``, the published ones first."""
    columns = ["step", "model_id", ensemble.loss_name, "lr", "train_mse", "val_mse", "nll"]
    return columns if ensemble.reward is None else [*columns, "reward_train_mse", "reward_val_mse"]


def metric_rows(ensemble: DynamicsEnsemble, config: LearnConfig, epoch: Epoch) -> list[dict[str, float | int | None]]:
    """Returns an epoch's rows of ``metrics.csv``, one per member; None is a number that was not measured.

    ``train_mse``, ``val_mse`` and ``nll`` (on the holdout) are those of the epoch's final weights; the loss is the mean
    over its minibatches, and ``lr`` the rate at its first step. What is measured of a member that has failed is nan.
    """
    missing = [None] * len(ensemble)
    columns = {
        "step": [epoch.index] * len(ensemble),
        "model_id": range(len(ensemble)),
        ensemble.loss_name: epoch.losses,
        "lr": [learning_rate(config, epoch.index)] * len(ensemble),
        "train_mse": epoch.train_scores.get("mse", missing),
        "val_mse": epoch.holdout_scores.get("mse", missing),
        "nll": epoch.holdout_scores.get("nll", missing),
        "reward_train_mse": epoch.train_scores.get("reward_mse", missing),
        "reward_val_mse": epoch.holdout_scores.get("reward_mse", missing),
    }
    names = metric_columns(ensemble)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]
    for row in rows:
        if epoch.failed[row["model_id"]]:
            row |= {name: math.nan for name in names[2:] if name != "lr" and row[name] is not None}
    return rows


def score_members(
    ensemble: DynamicsEnsemble, train: NormalisedRows, holdout: NormalisedRows | None
) -> list[dict[str, float | None]]:
    """Scores each member's final weights: the ones that are saved.

    A member has failed, too, if one of these scores is not finite; it is then taken from the ensemble's elites.

    Returns:
        Per member ``train_mse``, ``val_mse`` and ``nll`` (of the holdout); None for those that cannot be measured, and
        for all of a member that has failed: it is not among the ensemble's elites.

    Raises:
        FloatingPointError: If all members have failed.
    """
    train_scores = score_rows(ensemble, train)
    holdout_scores = score_rows(ensemble, holdout) if holdout is not None else {}
    none = [None] * len(ensemble)
    columns = {
        "train_mse": train_scores["mse"],
        "val_mse": holdout_scores.get("mse", none),
        "nll": holdout_scores.get("nll", none),
    }
    scores = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    measured = zip(*train_scores.values(), *holdout_scores.values(), strict=True)  # those of rewards, too
    finite = [all(map(math.isfinite, values)) for values in measured]
    ensemble.elites = [member for member in ensemble.elites if finite[member]]
    if not ensemble.elites:
        raise FloatingPointError("every member diverged: no error is a finite number; lower fit_lr or set grad_clip")
    return [score if member in ensemble.elites else dict.fromkeys(score, None) for member, score in enumerate(scores)]


def failed_members(scores: list[dict[str, float | None]]) -> list[int]:
    """Returns the members that ``score_members`` has no score of."""
    return [member for member, score in enumerate(scores) if all(value is None for value in score.values())]


def stray_members(scores: list[dict[str, float | None]]) -> dict[int, float]:
    """Returns how many times the median's error those members have that are stray.

    The error is the validation error, or that of the training rows without a holdout.
    """
    measured = {member: score for member, score in enumerate(scores) if member not in failed_members(scores)}
    name = "val_mse" if any(score["val_mse"] is not None for score in measured.values()) else "train_mse"
    errors = {member: score[name] for member, score in measured.items()}
    median = statistics.median(errors.values())
    return {member: error / median for member, error in errors.items() if error > STRAY * median > 0}


def mean_scores(scores: list[dict[str, float | None]]) -> dict[str, float]:
    """Returns the means over the members that have not failed, of the scores that exist."""
    measured = [score for member, score in enumerate(scores) if member not in failed_members(scores)]
    names = [name for name, value in measured[0].items() if value is not None]
    return {name: sum(score[name] for score in measured) / len(measured) for name in names}


def rank_elites(scores: list[dict[str, float | None]], num_elites: int | None) -> list[int]:
    """Returns the members with the lowest validation errors, best first; all of them in order without a holdout.

    Members that have failed are left out.
    """
    members = [member for member in range(len(scores)) if member not in failed_members(scores)]
    if scores[members[0]]["val_mse"] is None:
        return members
    return sorted(members, key=lambda member: scores[member]["val_mse"])[:num_elites]
