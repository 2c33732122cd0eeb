"""Deterministic ensembles: members predict the next state as a point, trained on squared error or on Huber's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dynamics_model import Array, DynamicsEnsemble, DynamicsModel


def point_error(mean: Tensor, targets: Tensor, huber_width: float | None) -> Tensor:
    """Error of each value ``(...)``, normalised units: squared or, given a width, Huber's loss (Huber 1964).

    Huber's loss is scaled to equal the squared error within the width, so that its gradient is that of squared error
    there. Beyond it, it is ``2 * width * |error| - width^2``: no error, however large, has more pull than the width.
    """
    if huber_width is None:
        return (mean - targets).square()
    return 2 * functional.huber_loss(mean, targets, reduction="none", delta=huber_width)


def point_losses(mean: Tensor, targets: Tensor, huber_width: float | None) -> tuple[Tensor, Tensor]:
    """``point_error``, and squared error without gradients: means of ``(ensemble, batch, ...)``, per member."""
    squared = (mean - targets).square().mean(dim=(1, 2))
    objective = squared if huber_width is None else point_error(mean, targets, huber_width).mean(dim=(1, 2))
    return objective, squared.detach()


class DeterministicEnsemble(DynamicsEnsemble):
    """Members with one head, the predicted change.

    A point has neither variance nor likelihood. Where a distribution is needed, the variance of a member's residuals
    completes it to a Gaussian.
    """

    kind: ClassVar[str] = "deterministic"
    heads: ClassVar[int] = 1
    loss_name: ClassVar[str] = "mse_loss"
    disagreements: ClassVar[tuple[str, ...]] = ("max_pairwise", "ensemble_std", "total_std")

    def interpret(self, outputs: Tensor) -> tuple[Tensor, None]:
        """The outputs are the mean; there is no variance."""
        return outputs, None

    def losses(
        self, inputs: Tensor, targets: Tensor, progress: float = 0.0, *, huber_width: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean ``point_error`` per member, and mean squared error to report, ``(ensemble,)``, whatever the progress."""
        mean, _ = self.predict_change(inputs)
        return point_losses(mean, targets, huber_width)

    def score_terms(self, targets: Tensor, mean: Tensor, log_variance: None) -> dict[str, Tensor]:
        """Squared error of each value ``(...)``, normalised units."""
        return {"mse": (mean - targets).square()}

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A point is its own draw: it differs from the mean by nothing."""
        return torch.zeros(tuple(shape))

    def draw(self, mean: Tensor, variance: Tensor, generator: torch.Generator) -> Tensor:
        """As the base class draws, in less time."""
        return mean

    def completion(self, residual_variances: Callable[[], Any]) -> Any:
        """The variances of members' residuals stand for those that they do not predict."""
        return residual_variances()

    def draws_per_member(self, wanted: int) -> int:
        """One: all draws from a member are equal."""
        return 1


class DeterministicModel(DynamicsModel):
    """A member that predicts a point."""

    ensemble_class: ClassVar[type[DynamicsEnsemble]] = DeterministicEnsemble

    def forward(self, states: Array, actions: Array) -> Tensor:
        """Predicts the next state ``(..., state_dim)``, raw units."""
        mean, _ = self.network.predict(states, actions)
        return mean[0]
