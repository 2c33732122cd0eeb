"""The weights that training ends with: each member's best ones, or its last good ones where it goes astray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dynamics_model import DynamicsEnsemble


class BestWeights:
    """Keeps each member's weights from the epoch of its lowest validation error; without validation, its latest.

    A member that has run out of patience keeps its best weights, however good later epochs are. A member has failed
    once its loss or one of its weights is not a finite number: it keeps what was kept before, and no later epoch
    counts. One without any finite validation error has failed, too.

    Args:
        ensemble: The ensemble that is trained; its weights are kept until the first ``update``.
        patience: Epochs without improvement after which a member stops; None never stops one.

    Attributes:
        scores: Lowest validation error of each member, infinite before the first.
        epochs_since_best: Epochs since each member last improved.
        failed: Whether each member has failed.
    """

    def __init__(self, ensemble: DynamicsEnsemble, patience: int | None) -> None:
        self.patience = patience
        self.scores = [math.inf] * len(ensemble)
        self.epochs_since_best = [0] * len(ensemble)
        self.failed = [False] * len(ensemble)
        self._weights = [parameter.detach().clone() for parameter in ensemble.parameters()]

    @property
    def stopped(self) -> list[bool]:
        """Whether each member has failed or run out of patience."""
        return [
            failed or (self.patience is not None and epochs >= self.patience)
            for failed, epochs in zip(self.failed, self.epochs_since_best, strict=True)
        ]

    def update(
        self, ensemble: DynamicsEnsemble, losses: Sequence[float], scores: Sequence[float] | None = None
    ) -> None:
        """Takes over the weights of the members that have just improved; without scores, of all that have not failed.

        Args:
            ensemble: The weights at the end of an epoch.
            losses: Loss of each member in that epoch.
            scores: Validation error of each member; a NaN is no improvement.
        """
        for member, (loss, finite) in enumerate(zip(losses, finite_members(ensemble.parameters()), strict=True)):
            self.failed[member] |= not (finite and math.isfinite(loss))
        improved = [not stopped for stopped in self.stopped]
        for member, score in enumerate(scores or []):
            improved[member] &= score < self.scores[member]
            self.scores[member] = score if improved[member] else self.scores[member]
            self.epochs_since_best[member] = 0 if improved[member] else self.epochs_since_best[member] + 1
        mask = torch.tensor(improved, device=self._weights[0].device).view(-1, 1, 1)
        for kept, parameter in zip(self._weights, ensemble.parameters(), strict=True):
            kept.copy_(torch.where(mask, parameter.detach(), kept))

    def restore(self, ensemble: DynamicsEnsemble) -> list[int]:
        """Gives every member the weights back that were kept.

        Returns:
            The members that have not failed.

        Raises:
            FloatingPointError: If all have.
        """
        for member, (score, epochs) in enumerate(zip(self.scores, self.epochs_since_best, strict=True)):
            self.failed[member] |= epochs > 0 and not math.isfinite(score)  # no validation error was ever finite
        good = [member for member, failed in enumerate(self.failed) if not failed]
        if not good:
            raise FloatingPointError(
                "every member diverged: no error is a finite number; lower fit_lr or set grad_clip"
            )
        with torch.no_grad():
            for kept, parameter in zip(self._weights, ensemble.parameters(), strict=True):
                parameter.copy_(kept)
        return good

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "scores": self.scores,
            "epochs_since_best": self.epochs_since_best,
            "failed": self.failed,
            "weights": self._weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.scores, self.epochs_since_best = list(state["scores"]), list(state["epochs_since_best"])
        self.failed = list(state["failed"])
        for kept, saved in zip(self._weights, state["weights"], strict=True):
            kept.copy_(saved)


def finite_members(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Returns whether all numbers of each member are finite, of tensors with a leading axis of members."""
    return torch.stack([tensor.detach().flatten(1).isfinite().all(dim=1) for tensor in tensors]).all(dim=0).tolist()
