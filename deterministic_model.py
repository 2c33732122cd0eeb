"""Deterministic members: a point prediction of the next state, trained on squared error."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dynamics_model import Array, DynamicsModel, DynamicsNetwork, NormalisedRows


class DeterministicNetwork(DynamicsNetwork):
    """Networks with one head: the predicted change."""

    heads: ClassVar[int] = 1

    def interpret(self, outputs: Tensor) -> tuple[Tensor, None]:
        """The outputs are the mean; there is no variance."""
        return outputs, None

    def losses(self, rows: NormalisedRows, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean squared error per member, ``(ensemble,)``, all through training; also the reported loss."""
        mean, _ = self.normalised(rows.inputs)
        loss = (mean - rows.targets).square().mean(dim=(1, 2))
        return loss, loss.detach()


class DeterministicModel(DynamicsModel):
    """A member that predicts a point."""

    network_class: ClassVar[type[DynamicsNetwork]] = DeterministicNetwork
    kind: ClassVar[str] = "deterministic"
    loss_name: ClassVar[str] = "mse_loss"

    def forward(self, states: Array, actions: Array) -> Tensor:
        """Predicts the next state ``(..., state_dim)``, raw units."""
        mean, _ = self.network.predict(states, actions)
        return mean[0]
