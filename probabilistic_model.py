"""Probabilistic ensembles: members predict a Gaussian over the next state, trained on its negative log-likelihood.

The loss is that of PETS (Chua et al. 2018, appendix A.1): ``mean((mu - y)^2 / var + logvar)`` with the log-variance
soft-clamped between bounds that are learned, and ``0.01 * (sum(max_logvar) - sum(min_logvar))`` that draws the bounds
together. Differences:

- With ``beta_nll`` above 0, each term is weighted by the variance to that power, taken as a constant (beta-NLL, Seitzer
  et al. 2022, eq. 5). This keeps badly predicted rows from being ignored as noise. Each dimension's term of the bounds
  is weighted by its mean weight (ours): unweighted, it would outweigh the likelihood and close the bounds.
- With ``beta_nll_decay``, that power falls linearly to 0 over the given share of training (ours): the mean is learned
  first, and training ends on the plain likelihood, which alone is calibrated.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynamics_model import Architecture, Array, DynamicsEnsemble, DynamicsModel, Normalisation

_INITIAL_MAX_LOGVAR = 0.5
_INITIAL_MIN_LOGVAR = -10.0
_BOUNDS_WEIGHT = 0.01
_NEAR_BOUND = 0.1  # nats; a log-variance so close to a bound counts as being at it


class ProbabilisticEnsemble(DynamicsEnsemble):
    """Members with two heads: mean and log-variance of the change.

    Attributes:
        max_logvar: Upper bound of the log-variance, ``(ensemble, 1, learned_dim)``, learned, normalised units.
        min_logvar: Lower bound of the same.
    """

    kind: ClassVar[str] = "probabilistic"
    heads: ClassVar[int] = 2
    loss_name: ClassVar[str] = "gauss_loss"

    def __init__(
        self,
        architecture: Architecture,
        normalisation: Normalisation,
        ensemble_size: int = 1,
        *streams: Any,
        seed: int = 0,
    ) -> None:
        super().__init__(architecture, normalisation, ensemble_size, *streams, seed=seed)
        self.max_logvar = nn.Parameter(torch.full((ensemble_size, 1, self.learned_dim), _INITIAL_MAX_LOGVAR))
        self.min_logvar = nn.Parameter(torch.full((ensemble_size, 1, self.learned_dim), _INITIAL_MIN_LOGVAR))

    def interpret(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Splits outputs into mean and soft-clamped log-variance, both ``(ensemble, batch, learned_dim)``."""
        mean, log_variance = outputs.chunk(2, dim=-1)
        log_variance = self.max_logvar - functional.softplus(self.max_logvar - log_variance)
        log_variance = self.min_logvar + functional.softplus(log_variance - self.min_logvar)
        return mean, log_variance

    def losses(
        self,
        inputs: Tensor,
        targets: Tensor,
        progress: float = 0.0,
        *,
        beta_nll: float = 0.0,
        beta_nll_decay: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(beta-)NLL with the regulariser of the bounds per member, and the plain NLL to report, ``(ensemble,)``."""
        mean, log_variance = self.predict_change(inputs)
        terms = (mean - targets).square() * (-log_variance).exp() + log_variance
        reported = terms.detach().mean(dim=(1, 2))
        bounds = self.max_logvar - self.min_logvar
        beta = beta_nll if beta_nll_decay == 0 else beta_nll * max(0.0, 1 - progress / beta_nll_decay)
        if beta > 0:
            weight = (beta * log_variance.detach()).exp()
            terms, bounds = terms * weight, bounds * weight.mean(dim=1, keepdim=True)
        return terms.mean(dim=(1, 2)) + _BOUNDS_WEIGHT * bounds.sum(dim=(1, 2)), reported

    @torch.no_grad()
    def share_at_bounds(self, variance: Tensor) -> dict[str, Tensor]:
        """Shares of log-variances that are within 0.1 nats of their bounds, ``(learned_dim,)`` each."""
        log_variance = variance.log()
        return {
            "at_max": (log_variance > self.max_logvar.to(log_variance) - _NEAR_BOUND).double().mean(dim=(0, 1)),
            "at_min": (log_variance < self.min_logvar.to(log_variance) + _NEAR_BOUND).double().mean(dim=(0, 1)),
        }


class ProbabilisticModel(DynamicsModel):
    """A member that predicts a Gaussian."""

    ensemble_class: ClassVar[type[DynamicsEnsemble]] = ProbabilisticEnsemble

    def forward(self, states: Array, actions: Array) -> tuple[Tensor, Tensor]:
        """Predicts mean and variance of the next state, both ``(..., state_dim)``, raw units (squared)."""
        mean, variance = self.network.predict(states, actions)
        return mean[0], variance[0]
