"""The published way to train an ensemble: a Python loop over members, each with its own ``nn.Linear`` layers and Adam.

The benchmarks compare the product's stacked training with it. The mathematics is the same: the losses of
``deterministic_model.py`` and ``probabilistic_model.py`` (without beta-NLL), the same normalised rows and, where
weights are copied, the same weights.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from config import LearnConfig
from dynamics_model import DynamicsEnsemble
from training.batches import NormalisedRows

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU}


class PlainMember(nn.Module):
    """One network of ``nn.Linear`` layers that predicts the normalised change; ``KINDS`` lists its two kinds.

    Args:
        in_dim: Dimensions of state and action together.
        out_dim: State dimensions whose change varies.
        config: Layers and activation.
    """

    heads: ClassVar[int]  # outputs per dimension of the change

    def __init__(self, in_dim: int, out_dim: int, config: LearnConfig) -> None:
        super().__init__()
        widths = [in_dim, *config.hidden_size]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[config.activation_fn]()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], self.heads * out_dim))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts mean and log-variance (or None) of the change, both ``(batch, out_dim)``, normalised units."""
        raise NotImplementedError

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the training objective of a batch, a scalar."""
        raise NotImplementedError

    @torch.no_grad()
    def copy_weights(self, ensemble: DynamicsEnsemble, member: int) -> None:
        """Takes over the weights of one member of the product's ensemble."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer, weight, bias in zip(linear, ensemble.dynamics.weights, ensemble.dynamics.biases, strict=True):
            layer.weight.copy_(weight[member].T)
            layer.bias.copy_(bias[member, 0])


class PlainDeterministic(PlainMember):
    """A point prediction, trained on squared error."""

    heads: ClassVar[int] = 1

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        """Predicts the mean."""
        return self.layers(inputs), None

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return functional.mse_loss(self.layers(inputs), targets)


class PlainProbabilistic(PlainMember):
    """A Gaussian prediction, trained on its negative log-likelihood with learned bounds of the log-variance (PETS)."""

    heads: ClassVar[int] = 2

    def __init__(self, in_dim: int, out_dim: int, config: LearnConfig) -> None:
        super().__init__(in_dim, out_dim, config)
        self.max_logvar = nn.Parameter(torch.full((1, out_dim), 0.5))
        self.min_logvar = nn.Parameter(torch.full((1, out_dim), -10.0))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts mean and soft-clamped log-variance."""
        mean, log_variance = self.layers(inputs).chunk(2, dim=-1)
        log_variance = self.max_logvar - functional.softplus(self.max_logvar - log_variance)
        return mean, self.min_logvar + functional.softplus(log_variance - self.min_logvar)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, and the term that draws the bounds together."""
        mean, log_variance = self(inputs)
        likelihood = ((mean - targets).square() * (-log_variance).exp() + log_variance).mean()
        return likelihood + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())

    def copy_weights(self, ensemble: DynamicsEnsemble, member: int) -> None:
        """Takes over a member's weights and bounds."""
        super().copy_weights(ensemble, member)
        with torch.no_grad():
            self.max_logvar.copy_(ensemble.max_logvar[member])
            self.min_logvar.copy_(ensemble.min_logvar[member])


KINDS = {"deterministic": PlainDeterministic, "probabilistic": PlainProbabilistic}


def plain_member(config: LearnConfig, ensemble: DynamicsEnsemble, member: int = 0) -> PlainMember:
    """Returns a member of the product's ensemble as a plain network with the same weights."""
    plain = KINDS[ensemble.kind](len(ensemble.input_shift), ensemble.learned_dim, config)
    plain.copy_weights(ensemble, member)
    return plain


def train_steps(
    member: PlainMember, optimizer: torch.optim.Optimizer, rows: NormalisedRows, order: Tensor, batch_size: int
) -> None:
    """Takes one gradient step per batch, the last of which may be smaller.

    Args:
        member: What to train.
        optimizer: Steps it.
        rows: Training rows.
        order: Which of them to train on, in this order: ``(count,)`` row indices.
        batch_size: Rows per step.
    """
    for batch in order.split(batch_size):
        loss = member.loss(rows.inputs[batch], rows.targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def training_flops(sizes: tuple[int, ...]) -> int:
    """Returns the FLOPs that one row costs in training, counting matrix products only: forward, and twice back.

    Backward, each layer has a product for its weights' gradient and one for its inputs', except the first layer, whose
    inputs need none.

    Args:
        sizes: Widths of the layers, input first.
    """
    multiply_adds = sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(sizes))
    return 6 * multiply_adds - 2 * sizes[0] * sizes[1]
