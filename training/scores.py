"""The numbers of a training: per epoch and member while it runs, per member when it has ended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from config import LearnConfig

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from dynamics_model import DynamicsEnsemble, NormalisedRows


def metric_columns(ensemble: DynamicsEnsemble) -> list[str]:
    """Returns the columns of ``metrics.csv``, the published ones first."""
    columns = ["step", "model_id", ensemble.member_class.loss_name, "lr", "train_mse", "val_mse", "nll"]
    return columns if ensemble.network.reward is None else [*columns, "reward_train_mse", "reward_val_mse"]


def metric_rows(
    ensemble: DynamicsEnsemble,
    config: LearnConfig,
    epoch: int,
    losses: list[float],
    train_scores: dict[str, list[float]],
    holdout_scores: dict[str, list[float]],
) -> list[dict[str, float | int | None]]:
    """Returns one row of ``metrics.csv`` per member: errors in normalised units, None for what was not measured.

    ``train_mse``, ``val_mse`` and ``nll`` (nats, on the holdout) are those of the epoch's final weights; the loss is
    the mean over the epoch's minibatches, and ``lr`` the rate at the epoch's first step.
    """
    from training.optimisation import learning_rate

    missing = [None] * len(ensemble)
    columns = {
        "step": [epoch] * len(ensemble),
        "model_id": range(len(ensemble)),
        ensemble.member_class.loss_name: losses,
        "lr": [learning_rate(config, epoch)] * len(ensemble),
        "train_mse": train_scores.get("mse", missing),
        "val_mse": holdout_scores.get("mse", missing),
        "nll": holdout_scores.get("nll", missing),
        "reward_train_mse": train_scores.get("reward_mse", missing),
        "reward_val_mse": holdout_scores.get("reward_mse", missing),
    }
    names = metric_columns(ensemble)
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]


def score_members(
    ensemble: DynamicsEnsemble, train: NormalisedRows, holdout: NormalisedRows | None
) -> list[dict[str, float | None]]:
    """Scores each member's final weights: the ones that are saved.

    Returns:
        Per member ``train_mse``, ``val_mse`` and ``nll`` (of the holdout, in nats), normalised units; None for what
        does not exist.

    Raises:
        FloatingPointError: If a member's error is not finite.
    """
    train_scores = ensemble.network.score(train)
    holdout_scores = ensemble.network.score(holdout) if holdout is not None else {}
    none = [None] * len(ensemble)
    columns = {
        "train_mse": train_scores["mse"],
        "val_mse": holdout_scores.get("mse", none),
        "nll": holdout_scores.get("nll", none),
    }
    scores = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for member, score in enumerate(scores):
        if not all(value is None or math.isfinite(value) for value in score.values()):
            raise FloatingPointError(
                f"member {member} diverged: its error is not finite; lower fit_lr or set grad_clip"
            )
    rewards = train_scores.get("reward_mse", []) + holdout_scores.get("reward_mse", [])
    if not all(map(math.isfinite, rewards)):
        raise FloatingPointError("the reward network diverged: its error is not finite; lower fit_lr or set grad_clip")
    return scores


def rank_elites(scores: list[dict[str, float | None]], num_elites: int | None) -> list[int]:
    """Returns the members with the lowest validation errors, best first; all of them in order without a holdout."""
    members = list(range(len(scores)))
    if scores[0]["val_mse"] is None:
        return members
    return sorted(members, key=lambda member: scores[member]["val_mse"])[:num_elites]


def summarise(scores: list[dict[str, float | None]], elites: list[int]) -> dict[str, Any]:
    """Returns the final scores as trackers take them: their means over members, and each member's."""
    means = {
        name: sum(score[name] for score in scores) / len(scores) for name in scores[0] if scores[0][name] is not None
    }
    return {"metrics": means, "members": scores, "elites": elites}
