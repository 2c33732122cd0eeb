"""Best weights: those that each member had at its lowest validation error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dynamics_model import DynamicsEnsemble


class BestWeights:
    """Keeps each member's weights from the epoch of its lowest validation error, and counts the epochs since then.

    A member that has run out of patience keeps its best weights, however good later epochs are.

    Args:
        ensemble: The ensemble that is trained.
        patience: Epochs without improvement after which a member stops; None never stops one.

    Attributes:
        scores: Lowest validation error of each member, infinite before the first.
        epochs_since_best: Epochs since each member last improved.
    """

    def __init__(self, ensemble: DynamicsEnsemble, patience: int | None) -> None:
        self.patience = patience
        self.scores = [math.inf] * len(ensemble)
        self.epochs_since_best = [0] * len(ensemble)
        self._weights = [parameter.detach().clone() for parameter in ensemble.parameters()]

    @property
    def stopped(self) -> list[bool]:
        """Whether each member has run out of patience."""
        return [self.patience is not None and epochs >= self.patience for epochs in self.epochs_since_best]

    def update(self, ensemble: DynamicsEnsemble, scores: Sequence[float]) -> None:
        """Takes over the weights of the members that have just improved.

        Args:
            ensemble: The weights that were scored.
            scores: Validation error of each member; a NaN is no improvement.
        """
        improved = [
            score < best and not stopped for score, best, stopped in zip(scores, self.scores, self.stopped, strict=True)
        ]
        for member, (score, better) in enumerate(zip(scores, improved, strict=True)):
            self.scores[member] = score if better else self.scores[member]
            self.epochs_since_best[member] = 0 if better else self.epochs_since_best[member] + 1
        mask = torch.tensor(improved, device=self._weights[0].device).view(-1, 1, 1)
        for kept, parameter in zip(self._weights, ensemble.parameters(), strict=True):
            kept.copy_(torch.where(mask, parameter.detach(), kept))

    def restore(self, ensemble: DynamicsEnsemble) -> None:
        """Gives every member its best weights back.

        Raises:
            FloatingPointError: If a member never had a finite validation error.
        """
        for member, score in enumerate(self.scores):
            if not math.isfinite(score):
                raise FloatingPointError(
                    f"member {member} diverged: it never had a finite validation error; lower fit_lr or set grad_clip"
                )
        with torch.no_grad():
            for kept, parameter in zip(self._weights, ensemble.parameters(), strict=True):
                parameter.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"scores": self.scores, "epochs_since_best": self.epochs_since_best, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.scores, self.epochs_since_best = list(state["scores"]), list(state["epochs_since_best"])
        for kept, saved in zip(self._weights, state["weights"], strict=True):
            kept.copy_(saved)
