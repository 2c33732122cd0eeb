"""Probabilistic ensembles: members predict a Gaussian over the next state.

``ProbabilisticEnsemble`` is trained on its negative log-likelihood, as PETS is (Chua et al. 2018, appendix A.1):
``mean((mu - y)^2 / var + logvar)`` with the log-variance soft-clamped between bounds that are learned, and
``0.01 * (sum(max_logvar) - sum(min_logvar))`` that draws the bounds together. Differences:

- With ``beta_nll`` above 0, each term is weighted by the variance to that power, taken as a constant (beta-NLL, Seitzer
  et al. 2022, eq. 5). This keeps badly predicted rows from being ignored as noise. Each dimension's term of the bounds
  is weighted by its mean weight (ours): unweighted, it would outweigh the likelihood and close the bounds.
- With ``beta_nll_decay``, that power falls linearly to 0 over the given share of training (ours): the mean is learned
  first, and training ends on the plain likelihood, which alone is calibrated.

In the other kinds, the likelihood has no say in the mean, which is that of a deterministic ensemble (squared error, or
Huber's loss), to the last bit: it starts with the same weights, gets the same gradients and is clipped by itself.

- ``FaithfulEnsemble`` (Stirn et al. 2023, "Faithful Heteroscedastic Regression with Neural Networks"): the variance is
  a second head on the features of the mean's network, and learns at the same time. Its gradients do not pass into
  features and residuals. Differences: the likelihood is PETS's, bounds included, and squared error is not halved.
- ``PosthocEnsemble``: a second network, of the mean's architecture, learns the variance of the mean's residuals on the
  held-out rows once the mean has been trained. Those rows selected the mean's best weights, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from deterministic_model import point_error, point_losses
from dynamics_model import Architecture, Array, DynamicsEnsemble, DynamicsModel, Normalisation, StackedMLP

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
        return mean, self.clamp_softly(log_variance)

    def clamp_softly(self, log_variance: Tensor) -> Tensor:
        """Brings log-variances ``(ensemble, batch, learned_dim)`` smoothly between their bounds."""
        log_variance = self.max_logvar - functional.softplus(self.max_logvar - log_variance)
        return self.min_logvar + functional.softplus(log_variance - self.min_logvar)

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
        beta = beta_nll if beta_nll_decay == 0 else beta_nll * max(0.0, 1 - progress / beta_nll_decay)
        return self.likelihood_losses(mean - targets, log_variance, beta)

    def likelihood_losses(self, residuals: Tensor, log_variance: Tensor, beta: float = 0.0) -> tuple[Tensor, Tensor]:
        """As ``losses``, of residuals and log-variances ``(ensemble, batch, learned_dim)``, with beta-NLL's power."""
        terms = residuals.square() * (-log_variance).exp() + log_variance
        reported = terms.detach().mean(dim=(1, 2))
        bounds = self.max_logvar - self.min_logvar
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


class _MeanApart(ProbabilisticEnsemble):
    """Members whose mean has ``dynamics`` for itself: the likelihood neither reaches it nor has a part in its clipping.

    Attributes:
        variance: The network of the log-variance; its weights are drawn after those of ``dynamics``, and do not decay.
    """

    heads: ClassVar[int] = 1  # of `dynamics`
    clipped_apart: ClassVar[tuple[str, ...]] = ("dynamics", "reward")

    def __init__(
        self,
        architecture: Architecture,
        normalisation: Normalisation,
        ensemble_size: int = 1,
        generator: Generator | None = None,
        *streams: Any,
        seed: int = 0,
    ) -> None:
        super().__init__(architecture, normalisation, ensemble_size, generator, *streams, seed=seed)
        widths = (architecture.state_dim + architecture.action_dim, *architecture.hidden_size)
        in_dim, *hidden_size = self.variance_widths(widths)
        activation = (architecture.activation_fn, architecture.layer_norm)
        self.variance = StackedMLP(ensemble_size, in_dim, hidden_size, self.learned_dim, 1, *activation, generator)

    def variance_widths(self, widths: Sequence[int]) -> Sequence[int]:
        """Returns the inputs and hidden units of ``variance``, given those of ``dynamics``."""
        raise NotImplementedError


class FaithfulEnsemble(_MeanApart):
    """Members whose variance is a second head on the features of the mean's network, learned along with the mean."""

    kind: ClassVar[str] = "faithful"

    def variance_widths(self, widths: Sequence[int]) -> Sequence[int]:
        """A linear layer on the last hidden units."""
        return widths[-1:]

    def predict_change(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the change, both ``(ensemble, batch, learned_dim)``, normalised units."""
        features = self.dynamics.features(inputs)
        return self.dynamics.output(features), self.clamp_softly(self.variance(features))

    def losses(
        self, inputs: Tensor, targets: Tensor, progress: float = 0.0, *, huber_width: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Error of the mean plus the loss of the variance per member, and the NLL to report, ``(ensemble,)``."""
        features = self.dynamics.features(inputs)
        mean, log_variance = self.dynamics.output(features), self.clamp_softly(self.variance(features.detach()))
        likelihood, reported = self.likelihood_losses(mean.detach() - targets, log_variance)
        return point_error(mean, targets, huber_width).mean(dim=(1, 2)) + likelihood, reported


class PosthocEnsemble(_MeanApart):
    """Members whose mean is trained first; the variance of its residuals is learned afterwards, from held-out rows."""

    kind: ClassVar[str] = "posthoc"
    loss_name: ClassVar[str] = "mse_loss"

    def variance_widths(self, widths: Sequence[int]) -> Sequence[int]:
        """A network like the mean's."""
        return widths

    def predict_change(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the change, both ``(ensemble, batch, learned_dim)``, normalised units."""
        return self.dynamics(inputs), self.clamp_softly(self.variance(inputs))

    def losses(
        self, inputs: Tensor, targets: Tensor, progress: float = 0.0, *, huber_width: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Error of the mean per member, and its mean squared error to report, ``(ensemble,)``."""
        return point_losses(self.dynamics(inputs), targets, huber_width)

    def holdout_losses(self, inputs: Tensor, targets: Tensor, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """Loss of the variance per member, and the NLL to report, ``(ensemble,)``; the mean gets no gradients."""
        with torch.no_grad():
            residuals = self.dynamics(inputs) - targets
        return self.likelihood_losses(residuals, self.clamp_softly(self.variance(inputs)))


class ProbabilisticModel(DynamicsModel):
    """A member that predicts a Gaussian."""

    ensemble_class: ClassVar[type[DynamicsEnsemble]] = ProbabilisticEnsemble

    def forward(self, states: Array, actions: Array) -> tuple[Tensor, Tensor]:
        """Predicts mean and variance of the next state, both ``(..., state_dim)``, raw units (squared)."""
        mean, variance = self.network.predict(states, actions)
        return mean[0], variance[0]


class FaithfulModel(ProbabilisticModel):
    """A member that predicts a Gaussian whose mean the likelihood has no say in."""

    ensemble_class: ClassVar[type[DynamicsEnsemble]] = FaithfulEnsemble


class PosthocModel(ProbabilisticModel):
    """A member that predicts a Gaussian whose variance was learned after its mean."""

    ensemble_class: ClassVar[type[DynamicsEnsemble]] = PosthocEnsemble
