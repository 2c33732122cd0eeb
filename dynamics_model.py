"""Learned dynamics ``s' = f(s, a)``: an ensemble with its members stacked, and one member by itself.

``DynamicsEnsemble`` stacks the parameters of E networks, ``(ensemble, in, out)``, and evaluates them by batched matrix
products. ``DynamicsModel``, one member, wraps an ensemble of one. A kind of ensemble is one file with a subclass of
each (``deterministic_model.py``, ``probabilistic_model.py``) and an entry in ``KINDS``. These files import PyTorch,
NumPy and each other only: a repository that loads ``model.pkl`` needs nothing else.

Shapes are given in words, ``...`` being any leading axes. Callers pass and get raw units; "normalised" means shifted by
mean and scaled by mean absolute deviation of the training rows: of states, actions and the change ``s' - s``, which
networks predict. Where it is constant in training, it is predicted as that constant and left out of losses and scores.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

FORMAT_VERSION = 1
CHUNK = 256  # rows of each member that are predicted at once
VARIANCE_FLOOR = 1e-12  # raw units; the variance given for dimensions that are predicted exactly
_ACTIVATIONS = {name: getattr(functional, name) for name in ("silu", "relu", "gelu", "elu")}
_ACTIVATIONS |= {"swish": functional.silu, "tanh": torch.tanh}
# The module of each kind of ensemble and the class of its members: what can be built, and all that model.pkl may name.
KINDS = {
    "deterministic": ("deterministic_model", "DeterministicModel"),
    "probabilistic": ("probabilistic_model", "ProbabilisticModel"),
    "faithful": ("probabilistic_model", "FaithfulModel"),
    "posthoc": ("probabilistic_model", "PosthocModel"),
}
_STEPS = b"RdioPQ\x82\x83\x84\x8f\x90\x91\x92\x96\x97\x98"  # of pickles: calls, sets, objects of other kinds
_PURPOSES = ("initialisation", "order", "bootstrap", "sampling", "propagation", "reward")  # the last is to initialise

Array = np.ndarray | Tensor
Disagreement = Literal["max_pairwise", "ensemble_std", "max_aleatoric", "total_std"]
DISAGREEMENTS: tuple[Disagreement, ...] = get_args(Disagreement)
Propagation = Literal["ts1", "tsinf", "mean", "member"]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # a function like stacked_linear
Members = Array | tuple[Tensor, Tensor]  # of rows: an index for each, or what DynamicsEnsemble.group makes of them
Predict = Callable[..., tuple]  # of states, actions, ...: (ensemble, batch, dim), each member's own


def member_class(kind: str) -> type[DynamicsModel]:
    """Returns the class of the members of a kind, a key of ``KINDS``; it knows the ensemble's class."""
    module, name = KINDS[kind]
    sys.path.insert(0, folder := str(Path(__file__).parent))  # its module lies here, whatever the current folder holds
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path.remove(folder)


def random_stream(seed: int, member: int, purpose: str, epoch: int = 0) -> Generator:
    """Returns the CPU random stream of one member, purpose and epoch, the same whatever else is drawn anywhere."""
    entropy = np.random.SeedSequence((seed, member, _PURPOSES.index(purpose), epoch))
    return Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What rebuilds a network before its weights are loaded."""

    state_dim: int
    action_dim: int
    hidden_size: tuple[int, ...]
    activation_fn: str = "silu"
    layer_norm: bool = False
    reward_hidden_size: tuple[int, ...] | None = None  # None: no reward is learned


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Shift and scale, mean and mean absolute deviation of the training rows, as float32 tensors."""

    input_shift: Tensor  # of states and actions, (state_dim + action_dim,)
    input_scale: Tensor  # 1 where an input is constant
    delta_shift: Tensor  # of the change s' - s, (state_dim,)
    delta_scale: Tensor  # 0 where the change is constant
    reward_shift: Tensor  # (1,)
    reward_scale: Tensor  # 1 where the reward is constant

    @classmethod
    def names(cls) -> list[str]:
        """Names of the tensors, as networks keep them."""
        return [field.name for field in dataclasses.fields(cls)]

    def equals(self, other: Normalisation) -> bool:
        """Whether all shifts and scales are the same."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in self.names())


def stacked_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight + bias`` of ``(ensemble, batch, in)``, ``(ensemble, in, out)`` and ``(ensemble, 1, out)``."""
    return torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias, inputs, weight)


class StackedMLP(nn.Module):
    """E multilayer perceptrons of equal shape, evaluated at once by batched matrix products.

    Weights and biases are drawn like those of ``nn.Linear``, uniformly within ``1 / sqrt(in)``, outputs head by head.

    Args:
        ensemble_size, in_dim, hidden_size: Number of networks, E; inputs, and units of each hidden layer, of each.
        head_dim, heads: Outputs of a head, and how many heads put theirs one after the other.
        activation_fn, layer_norm: The activation of hidden layers, and whether they are normalised before it.
        generator: Where initial weights are drawn from; None leaves them at zero, to be loaded.
    """

    def __init__(
        self,
        ensemble_size: int,
        in_dim: int,
        hidden_size: Sequence[int],
        head_dim: int,
        heads: int,
        activation_fn: str,
        layer_norm: bool,
        generator: Generator | None,
    ) -> None:
        super().__init__()
        self.activation, self.layer_norm = _ACTIVATIONS[activation_fn], layer_norm
        self.linear: Linear = stacked_linear  # training may know a faster function for its machine
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        layers = zip([in_dim, *hidden_size], [*hidden_size, head_dim], [1] * len(hidden_size) + [heads], strict=True)
        for fan_in, fan_out, parts in layers:
            weight = torch.zeros(ensemble_size, fan_in, fan_out * parts)
            bias = torch.zeros(ensemble_size, 1, fan_out * parts)
            if generator is not None:
                bound = 1 / math.sqrt(fan_in)
                for head in zip(weight.chunk(parts, dim=-1), bias.chunk(parts, dim=-1), strict=True):
                    for values in head:
                        values.uniform_(-bound, bound, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
        self.gains, self.offsets = nn.ParameterList(), nn.ParameterList()  # of layer normalisation
        for width in hidden_size if layer_norm else ():
            self.gains.append(nn.Parameter(torch.ones(ensemble_size, 1, width)))
            self.offsets.append(nn.Parameter(torch.zeros(ensemble_size, 1, width)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps ``(ensemble, batch, in_dim)`` to ``(ensemble, batch, heads * head_dim)``."""
        return self.output(self.features(inputs))

    def features(self, inputs: Tensor) -> Tensor:
        """Units of the last hidden layer, ``(ensemble, batch, hidden_size[-1])``; the inputs where there is none."""
        hidden = inputs
        for layer, (weight, bias) in enumerate(list(zip(self.weights, self.biases, strict=True))[:-1]):
            hidden = self.linear(hidden, weight, bias)  # (ensemble, batch, out)
            if self.layer_norm:
                hidden = functional.layer_norm(hidden, hidden.shape[-1:])
                hidden = torch.addcmul(self.offsets[layer], hidden, self.gains[layer])
            hidden = self.activation(hidden)
        return hidden

    def output(self, features: Tensor) -> Tensor:
        """The output layer alone, of what ``features`` returns."""
        return self.linear(features, self.weights[-1], self.biases[-1])


class DynamicsEnsemble(nn.Module):
    """Members of one kind, stacked: trains, predicts for planners, samples and rolls out all of them at once.

    A kind is a subclass. It says how many heads its networks have, what their outputs mean (``interpret``) and what
    they are trained on (``losses``); one that is no Gaussian overrides its likelihood (``nll``) and draws (``noise``).

    Args:
        architecture, normalisation: What the members share.
        ensemble_size: Number of members, E.
        generator, reward_generator: Where initial weights are drawn from; None leaves them at zero, to be loaded.
        seed: Seed of the ensemble's own streams, which ``sample`` and ``rollout`` draw from.

    Attributes:
        holdout_idx, metadata: Held-out rows, as members have them, or None; what ``model.pkl`` says of itself.
        elites: Indices of the members with the lowest validation errors, the best first; all members by default.
    """

    kind: ClassVar[str]  # as in KINDS
    heads: ClassVar[int]  # outputs of a network per learned dimension
    loss_name: ClassVar[str]  # of the reported loss, a column of metrics.csv
    disagreements: ClassVar[tuple[str, ...]] = DISAGREEMENTS  # those that this kind has
    clipped_apart: ClassVar[tuple[str, ...]] = ("reward",)  # networks whose gradients are clipped by themselves
    holdout_losses: ClassVar[Callable | None] = None  # as losses, of a second phase that learns from held-out rows

    def __init__(
        self,
        architecture: Architecture,
        normalisation: Normalisation,
        ensemble_size: int = 1,
        generator: Generator | None = None,
        reward_generator: Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.state_dim, self.action_dim = architecture.state_dim, architecture.action_dim
        self.holdout_idx: np.ndarray | None = None
        self.metadata: dict[str, Any] = {}
        self.architecture, self.elites, self.seed = architecture, list(range(ensemble_size)), seed
        for name in Normalisation.names():
            self.register_buffer(name, getattr(normalisation, name).clone())
        scale = normalisation.delta_scale
        self.register_buffer("learned", scale.nonzero().flatten(), persistent=False)  # the dimensions that vary
        self.learned_dim = len(self.learned)
        self.register_buffer("floor", VARIANCE_FLOOR * (scale == 0), persistent=False)
        self.register_buffer("delta_variance", scale.square(), persistent=False)
        # For each state dimension, the output that predicts it (any, where the change is constant: its scale is 0).
        self.register_buffer("output_of_dim", ((scale != 0).cumsum(dim=0) - 1).clamp(min=0), persistent=False)
        in_dim = architecture.state_dim + architecture.action_dim
        activation = (architecture.activation_fn, architecture.layer_norm)
        shape = (in_dim, architecture.hidden_size, self.learned_dim, self.heads)
        self.dynamics = StackedMLP(ensemble_size, *shape, *activation, generator)
        self.reward = None
        if (hidden := architecture.reward_hidden_size) is not None:
            in_dim += self.learned_dim
            self.reward = StackedMLP(ensemble_size, in_dim, hidden, 1, 1, *activation, reward_generator)
        self._sampling = [random_stream(seed, member, "sampling") for member in range(ensemble_size)]
        self._propagation = random_stream(seed, 0, "propagation")

    # --- What a kind defines ---

    def interpret(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits outputs ``(ensemble, batch, heads * learned_dim)`` into mean and log-variance (None for a point)."""
        raise NotImplementedError

    def losses(self, inputs: Tensor, targets: Tensor, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns each member's training objective, to be summed and differentiated, and its loss to report, detached.

        ``inputs`` and the change as ``targets``, ``(ensemble, batch, ...)``, are a minibatch per member, ``progress``
        is the share of training that is done, results are ``(ensemble,)``, means over batch and dimensions; normalised.
        Keyword-only arguments that a kind adds are settings, which training fills with those of the same name.
        """
        raise NotImplementedError

    def nll(self, truth: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Negative log-likelihood of each value in nats, constant included; all ``(...)``, in any one unit."""
        return 0.5 * ((mean - truth).square() / log_variance.exp() + log_variance + math.log(2 * math.pi))

    def score_terms(self, targets: Tensor, mean: Tensor, log_variance: Tensor | None) -> dict[str, Tensor]:
        """Scores each value of predictions ``(...)``, normalised units: squared error, and likelihood in nats."""
        return {"mse": (mean - targets).square(), "nll": self.nll(targets, mean, log_variance)}

    def noise(self, shape: Sequence[int], generator: Generator) -> Tensor:
        """Draws what a draw differs by from the mean, in standard deviations; on the CPU."""
        return torch.randn(shape, generator=generator)

    def completion(self, residual_variances: Callable[[], Any]) -> Any:
        """Variances to add to predicted ones so that points become distributions; 0 where they are already."""
        return 0.0

    def share_at_bounds(self, variance: Tensor) -> dict[str, Tensor]:
        """Shares of variances ``(ensemble, rows, learned_dim)`` at each learned bound: ``(learned_dim,)`` by name."""
        return {}

    def draws_per_member(self, wanted: int) -> int:
        """Draws that each member must give for at least ``wanted`` in all; one where all of a member's are equal."""
        return -(-wanted // len(self))

    # --- Members, and their memory ---

    @staticmethod
    def from_members(members: Sequence[DynamicsModel], seed: int = 0) -> DynamicsEnsemble:
        """Stacks copies of members, which must be of one kind, architecture and normalisation (else a ValueError)."""
        if not members:
            raise ValueError("an ensemble needs at least one member, got none")
        first = members[0]
        architecture, normalisation = first.network.architecture, first.network.normalisation
        for index, member in enumerate(members):
            if type(member) is not type(first) or member.network.architecture != architecture:
                raise ValueError(f"member {index} differs from member 0 in kind or architecture; stack equal ones only")
            if not member.network.normalisation.equals(normalisation):
                raise ValueError(f"member {index} was normalised differently from member 0; stack equal ones only")
        ensemble = first.ensemble_class(architecture, normalisation, len(members), seed=seed)
        with torch.no_grad():
            for stacked, *own in zip(ensemble.parameters(), *(member.parameters() for member in members), strict=True):
                stacked.copy_(torch.cat(own))
        ensemble.requires_grad_(next(first.parameters()).requires_grad)
        ensemble.holdout_idx = getattr(first, "holdout_idx", None)
        return ensemble

    def select(self, indices: Sequence[int]) -> DynamicsEnsemble:
        """Returns copies of some members, in the order given, with new random streams; a ValueError if one is not."""
        indices = torch.as_tensor(indices).tolist()
        if not indices or not set(indices) <= set(range(len(self))):
            raise ValueError(f"members {indices} were asked for; expected some of 0 to {len(self) - 1}")
        chosen = type(self)(self.architecture, self.normalisation, len(indices), seed=self.seed).to(self.device)
        chosen.load_state_dict(self.state_dict() | {name: own[indices] for name, own in self.named_parameters()})
        chosen.requires_grad_(next(self.parameters()).requires_grad)
        chosen.holdout_idx, chosen.metadata = self.holdout_idx, self.metadata
        chosen.elites = [indices.index(elite) for elite in self.elites if elite in indices]
        return chosen

    def members(self) -> list[DynamicsModel]:
        """Returns the members, each with its own copy of its weights, on the CPU."""
        members = [member_class(self.kind)(self.architecture, self.normalisation) for _ in range(len(self))]
        for index, member in enumerate(members):
            member.requires_grad_(False)
            for own, stacked in zip(member.parameters(), self.parameters(), strict=True):
                own.copy_(stacked[index : index + 1])
            if self.holdout_idx is not None:
                member.holdout_idx = self.holdout_idx.copy()
        return members

    def __len__(self) -> int:
        return len(self._sampling)

    @property
    def device(self) -> str:
        """Where weights and normalisation are."""
        return str(self.input_shift.device)

    @property
    def normalisation(self) -> Normalisation:
        """Shifts and scales, on the CPU."""
        return Normalisation(**{name: getattr(self, name).cpu() for name in Normalisation.names()})

    # --- Normalised units: what trains and scores ---

    def normalise_inputs(self, states: Tensor, actions: Tensor) -> Tensor:
        """Raw ``(..., state_dim)`` and ``(..., action_dim)`` to normalised ``(..., state_dim + action_dim)``."""
        return (torch.cat((states, actions), dim=-1) - self.input_shift) / self.input_scale

    def predict_change(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (or None) of the change for inputs ``(ensemble, batch, ...)``, normalised units."""
        return self.interpret(self.dynamics(inputs))

    def reward_loss(self, inputs: Tensor, targets: Tensor, rewards: Tensor) -> Tensor:
        """Mean squared error of the reward network per member, ``(ensemble,)``; arguments in normalised units."""
        predicted = self.reward(torch.cat((inputs, targets), dim=-1))
        return (predicted - rewards).square().mean(dim=(1, 2))

    # --- Raw units: what users call ---

    def predict(self, states: Array, actions: Array) -> tuple[Tensor, Tensor | None]:
        """Predicts the next state of the same rows, states and actions ``(..., dim)``, with every member; raw units.

        Returns mean and variance (None for deterministic members), ``(ensemble, ..., state_dim)``.
        """
        return self._predict_rows(self._predict_each, (states, actions))

    def moments(self, states: Array, actions: Array) -> tuple[Tensor, Tensor]:
        """Returns what ``predict`` does, with a variance of 0 where that is None."""
        return self._predict_rows(self._moments_each, (states, actions))

    def predict_members(self, states: Array, actions: Array, members: Members) -> tuple[Tensor, Tensor]:
        """As ``moments``, but each row with one member only, whose index is in ``members`` ``(...)``: all ``(...)``."""
        return self._predict_rows(self._moments_each, (states, actions), members)

    def draw_members(self, states: Array, actions: Array, members: Members, generator: Generator) -> Tensor:
        """Draws each row's next state ``(..., state_dim)`` from what ``predict_members`` predicts."""
        return self._predict_rows(
            lambda *rows: (self.draw(*self._moments_each(*rows), generator),), (states, actions), members
        )[0]

    def predict_each(self, states: Array, actions: Array) -> tuple[Tensor, Tensor | None]:
        """As ``predict``, but with rows of its own for each member: all ``(ensemble, batch, ...)``."""
        return self._in_chunks(self._predict_each, self._as_rows(states, actions))

    def predict_reward(
        self, states: Array, actions: Array, next_states: Array, members: Members | None = None
    ) -> Tensor:
        """Predicts the reward with every member, ``(ensemble, ...)``, or each row's own, ``(...)``; raw units."""
        if self.reward is None:
            raise ValueError("this model learned no reward; train one with --params learn_reward=true")
        return self._predict_rows(self._reward_each, (states, actions, next_states), members)[0].squeeze(-1)

    @torch.no_grad()
    def sample(self, states: Array, actions: Array, generator: Generator | None = None) -> Tensor:
        """Draws from every member, ``(ensemble, ..., state_dim)``: from the generator, or each from its own stream."""
        moments = self.moments(states, actions)
        if generator is not None:
            return self.draw(*moments, generator)
        return torch.stack([self.draw(*member) for member in zip(*moments, self._sampling, strict=True)])

    def draw(self, mean: Tensor, variance: Tensor, generator: Generator) -> Tensor:
        """Draws from predictions with these moments, all ``(...)``; a point prediction is its own draw."""
        return mean + variance.sqrt() * self.noise(mean.shape, generator).to(mean.device)

    @torch.no_grad()
    def disagreement(self, states: Array, actions: Array, kind: Disagreement, normalised: bool = False) -> Tensor:
        """Measures how unsure the ensemble is of each row, ``(...)``: an L2 norm over state dimensions.

        ``max_pairwise``: largest distance between two members' means (MOReL, Kidambi et al. 2020, eq. 3);
        ``ensemble_std``: standard deviation of the members' means, ddof 0; ``max_aleatoric``: largest member norm of
        sigma (MOPO, Yu et al. 2020, section 4.3); ``total_std``: standard deviation of the mixture of members.
        In raw units or, ``normalised``, in the change's mean absolute deviations, over the dimensions that vary.
        """
        mean, variance = self.moments(states, actions)  # (ensemble, ..., state_dim)
        if normalised:
            scale = self.delta_scale[self.learned]
            mean, variance = mean[..., self.learned] / scale, variance[..., self.learned] / scale.square()
        return self.disagreement_of(mean, variance, kind)

    def disagreement_of(self, mean: Tensor, variance: Tensor, kind: Disagreement) -> Tensor:
        """As ``disagreement``, of moments already predicted, ``(ensemble, ..., dimensions)``, and in their unit."""
        if kind not in DISAGREEMENTS:
            raise ValueError(f"disagreement {kind!r} is unknown; use {', '.join(DISAGREEMENTS[:-1])} or total_std")
        if kind not in self.disagreements:
            raise ValueError(f"{kind} needs probabilistic members; use max_pairwise or ensemble_std")
        if kind == "max_pairwise":
            first, second = torch.triu_indices(len(mean), len(mean), min(1, len(mean) - 1), device=mean.device)
            return (mean[first] - mean[second]).norm(dim=-1).amax(dim=0)
        if kind == "max_aleatoric":
            return variance.sum(dim=-1).sqrt().amax(dim=0)
        spread = mean.var(dim=0, correction=0) + (variance.mean(dim=0) if kind == "total_std" else 0.0)
        return spread.sum(dim=-1).sqrt()

    @torch.no_grad()
    def rollout(
        self,
        states: Array,
        actions: Array,
        propagation: Propagation = "tsinf",
        generator: Generator | None = None,
        clamp: tuple[Array, Array] | None = None,
    ) -> Tensor:
        """Rolls out open loop: applies given actions from given states, feeding predictions back; raw units.

        Returns states, the start first: ``(batch, horizon + 1, state_dim)``, or for ``member`` ``(ensemble, ...)``.

        Args:
            states: Start states, ``(batch, state_dim)``.
            actions: ``(batch, horizon, action_dim)``.
            propagation: ``tsinf``: each row is dealt a member for the whole rollout and draws from its distribution;
                ``ts1``: it is dealt one anew at each step (both PETS, Chua et al. 2018, section 5.2); ``mean``: the
                mean over members' means, fed back; ``member``: every member on its own mean.
            generator: Where members are dealt and states are drawn from; None: the ensemble's own stream.
            clamp: Lowest and highest states, ``(state_dim,)`` each, which bound those after every step.
        """
        if propagation not in get_args(Propagation):
            raise ValueError(f"propagation {propagation!r} is unknown; use ts1, tsinf, mean or member")
        states, actions = (as_tensor(part, self.input_shift.device) for part in (states, actions))
        plans = (*states.shape[:1], *actions.shape[1:2], self.action_dim)  # (batch, horizon, action_dim)
        if states.shape[1:] != (self.state_dim,) or actions.shape != plans:
            expected = f"(batch, state_dim) and (batch, horizon, action_dim) of {self.state_dim} and {self.action_dim}"
            found = f"rollout got states {tuple(states.shape)} and actions {tuple(actions.shape)}"
            raise ValueError(f"{found}; expected {expected}")
        if propagation == "member":
            states, actions = states.expand(len(self), -1, -1), actions.expand(len(self), -1, -1, -1)
        generator = self._propagation if generator is None else generator
        bounds = [as_tensor(bound, self.device) for bound in clamp or ()]
        members, trajectory = None, [states]
        for action in actions.unbind(dim=-2):
            if propagation == "mean":
                states = self.predict(states, action)[0].mean(dim=0)
            elif propagation == "member":
                states = self.predict_each(states, action)[0]
            else:
                members = self.deal(len(states), generator) if members is None or propagation == "ts1" else members
                states = self.draw_members(states, action, members, generator)
            states = states.clamp(*bounds) if bounds else states
            trajectory.append(states)
        return torch.stack(trajectory, dim=-2)

    def deal(self, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Deals rows to members at random, in numbers that differ by one at most: what ``group`` returns."""
        width, spare = -(-batch // len(self)), -batch % len(self)
        places = torch.arange(len(self) * width)
        if spare:  # some members, drawn at random, get one row less
            filled = torch.ones(len(self), width, dtype=torch.bool)
            filled[torch.randperm(len(self), generator=generator)[:spare], -1] = False
            places = places[filled.flatten()]
        rows = order = torch.randperm(batch, generator=generator)
        if spare:
            rows = torch.zeros(len(self) * width, dtype=torch.long).scatter_(0, places, order)
        rows, place = rows.view(len(self), width), torch.empty_like(order).scatter_(0, order, places)
        return rows.to(self.input_shift.device), place.to(self.input_shift.device)

    def deal_members(self, particles: int, starts: int, generator: Generator) -> Tensor:
        """Deals the particles of each start to members, at random and evenly: ``(particles, starts)``, on the CPU."""
        rank = torch.rand(particles, starts, generator=generator).argsort(dim=0).argsort(dim=0)
        return torch.randperm(len(self), generator=generator)[rank % len(self)]  # who gets one more is random, too

    def _predict_each(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, log_variance = self.predict_change(self.normalise_inputs(states, actions))
        next_states = states + (self._every_dim(mean) * self.delta_scale + self.delta_shift)
        if log_variance is None:
            return next_states, None
        return next_states, torch.addcmul(self.floor, self._every_dim(log_variance).exp(), self.delta_variance)

    def _moments_each(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._predict_each(states, actions)
        return mean, torch.zeros_like(mean) if variance is None else variance

    def _reward_each(self, states: Tensor, actions: Tensor, next_states: Tensor) -> tuple[Tensor]:
        change = (next_states - states - self.delta_shift)[..., self.learned] / self.delta_scale[self.learned]
        inputs = torch.cat((self.normalise_inputs(states, actions), change), dim=-1)
        return (self.reward(inputs) * self.reward_scale + self.reward_shift,)  # (ensemble, batch, 1)

    def _every_dim(self, outputs: Tensor) -> Tensor:
        """Spreads ``(..., learned_dim)`` over ``(..., state_dim)``; constant dimensions get a value of scale 0."""
        return outputs if self.learned_dim == self.state_dim else outputs[..., self.output_of_dim]

    def _predict_rows(self, predict_each: Predict, parts: Sequence[Array], members: Members | None = None) -> tuple:
        """Predicts rows with every member, ``(ensemble, ..., dim)``, or each with its own, ``(..., dim)``."""
        parts = self._as_rows(*parts)
        leading, flat = parts[0].shape[:-1], [part.reshape(-1, part.shape[-1]) for part in parts]
        if members is None:
            leading = (len(self), *leading)
            tables = [part.expand(len(self), -1, -1) for part in flat]
        else:
            rows, place = members if isinstance(members, tuple) else self.group(members)
            tables = [part.index_select(0, rows.flatten()).view(*rows.shape, part.shape[-1]) for part in flat]
        predicted = self._in_chunks(predict_each, tables)
        if members is not None:
            predicted = [None if part is None else part.flatten(0, 1).index_select(0, place) for part in predicted]
        return tuple(None if part is None else part.reshape(*leading, part.shape[-1]) for part in predicted)

    def _in_chunks(self, predict_each: Predict, parts: Sequence[Tensor]) -> tuple:
        """Predicts ``(ensemble, batch, dim)`` in chunks of so many rows that a cache holds their hidden units."""
        if parts[0].shape[1] <= CHUNK:
            return predict_each(*parts)
        chunks = zip(*(part.split(CHUNK, dim=1) for part in parts), strict=True)
        predicted = zip(*(predict_each(*chunk) for chunk in chunks), strict=True)
        return tuple(None if part[0] is None else torch.cat(part, dim=1) for part in predicted)

    def group(self, members: Array) -> tuple[Tensor, Tensor]:
        """Arranges rows by their members ``(...)``: a table of rows ``(ensemble, width)``, filled up, and places."""
        members = torch.as_tensor(members).flatten().cpu()
        counts = torch.bincount(members, minlength=len(self))
        order = members.argsort(stable=True)
        filled = torch.arange(int(counts.max())) < counts[:, None]  # (ensemble, width)
        rows = torch.zeros(filled.shape, dtype=torch.long).masked_scatter(filled, order)
        place = torch.empty_like(order).scatter_(0, order, filled.flatten().nonzero().squeeze(1))
        return rows.to(self.input_shift.device), place.to(self.input_shift.device)

    def _as_rows(self, *parts: Array) -> list[Tensor]:
        """Brings states, actions and, if given, next states to the device; a ValueError if shapes do not fit."""
        rows = [as_tensor(part, self.input_shift.device) for part in parts]
        leading, dims = rows[0].shape[:-1], (self.state_dim, self.action_dim, self.state_dim)
        for name, part, dim in zip(("states", "actions", "next states"), rows, dims, strict=False):
            if part.shape != (*leading, dim):
                expected = f"expected leading axes {tuple(leading)} and a last axis of {dim}"
                raise ValueError(f"{name} have shape {tuple(part.shape)}; {expected}")
        return rows


class DynamicsModel(nn.Module):
    """One member of an ensemble: what ``model.pkl`` holds a list of. It is built like an ensemble of one.

    Pickles hold plain Python only, tensors as bytes. A loaded member is on the CPU, without gradients at first.

    Attributes:
        network: The member as an ensemble of one, which has its weights and its mathematics.
        holdout_idx: Held-out rows in the concatenation of ``observations[:-1]`` over trajectories, int; may be absent.
    """

    ensemble_class: ClassVar[type[DynamicsEnsemble]]  # of the same kind

    def __init__(self, architecture: Architecture, normalisation: Normalisation, *generators: Generator | None) -> None:
        super().__init__()
        self.network = self.ensemble_class(architecture, normalisation, 1, *generators)

    @property
    def nn(self) -> DynamicsModel:
        """The member as a callable ``torch.nn.Module``: itself, under the name that planners look for."""
        return self

    @property
    def device(self) -> str:
        """Where weights and normalisation are."""
        return self.network.device

    def forward(self, states: Array, actions: Array) -> Tensor | tuple[Tensor, Tensor]:
        """As the ensemble's ``predict``: next state or mean and variance; differentiable, safe under ``torch.func``."""
        raise NotImplementedError

    def predict(self, states: Array, actions: Array) -> np.ndarray:
        """Predicts the mean of the next state, raw units, without gradients: ``(..., state_dim)``."""
        with torch.no_grad():
            return self.network.predict(states, actions)[0][0].cpu().numpy()

    def predict_batched(self, states: Array, actions: Array, batch_size: int = 256) -> np.ndarray:
        """As ``predict``, of states and actions ``(rows, ...)``, ``batch_size`` rows at a time: every row is there."""
        chunks = (slice(start, start + batch_size) for start in range(0, max(len(states), 1), batch_size))
        return np.concatenate([self.predict(states[chunk], actions[chunk]) for chunk in chunks])

    def compute_loss_batched(self, states: Array, actions: Array, next_states: Array, batch_size: int = 256) -> float:
        """Mean squared error over every row and dimension, raw units, of next states ``(rows, state_dim)``."""
        predicted, truth = self.predict_batched(states, actions, batch_size), torch.as_tensor(next_states).cpu().numpy()
        if truth.shape != predicted.shape:
            raise ValueError(f"next states have shape {truth.shape}; expected {predicted.shape}")
        return float(np.mean((predicted.astype(np.float64) - truth) ** 2))

    def predict_reward(self, states: Array, actions: Array, next_states: Array) -> np.ndarray:
        """As the ensemble's: ``(...)``, NumPy, without gradients."""
        with torch.no_grad():
            return self.network.predict_reward(states, actions, next_states)[0].cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        state = {"format_version": FORMAT_VERSION, "architecture": dataclasses.asdict(self.network.architecture)}
        state["tensors"] = {name: _pack(tensor) for name, tensor in self.network.state_dict().items()}
        if hasattr(self, "holdout_idx"):
            state["holdout_idx"] = _pack(torch.as_tensor(self.holdout_idx))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["format_version"] != FORMAT_VERSION:
            found = f"this model has format version {state['format_version']}, expected {FORMAT_VERSION}"
            raise ValueError(f"{found}; load it with the release that wrote it")
        tensors = {name: _unpack(packed) for name, packed in state["tensors"].items()}
        normalisation = Normalisation(**{name: tensors[name] for name in Normalisation.names()})
        # Files of earlier versions keep settings of the loss here, too.
        architecture = {name: value for name, value in state["architecture"].items() if not name.startswith("beta_nll")}
        with torch.device("meta"):  # an architecture that the tensors do not fit takes no memory
            self.__init__(Architecture(**architecture), normalisation)
        self.network.load_state_dict(tensors, assign=True)
        self.requires_grad_(False).eval()
        if "holdout_idx" in state:
            self.holdout_idx = _unpack(state["holdout_idx"]).numpy()


class _ModelUnpickler(pickle._Unpickler):
    """For files from strangers: makes members and plain Python, with texts as keys, whose hashes nobody can choose."""

    dispatch: ClassVar[dict] = {code: step for code, step in pickle._Unpickler.dispatch.items() if code not in _STEPS}

    def find_class(self, module: str, name: str) -> type:
        kinds = {names: kind for kind, names in KINDS.items()}
        if (module, name) not in kinds:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no model holds")
        return member_class(kinds[module, name])

    def _build(self) -> None:
        state = self.stack.pop()
        self.stored -= sum(len(packed["bytes"]) for packed in state["tensors"].values())
        if self.stored < 0:
            raise pickle.UnpicklingError("it holds fewer bytes than its tensors")
        DynamicsModel.__setstate__(self.stack[-1], state)

    def _set(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or not all(type(key) is str for key in items[::2]):
            raise pickle.UnpicklingError("it has keys that are no texts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set(self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self._set([self.stack.pop(-2), self.stack.pop()])


def load_models(path: str | os.PathLike[str]) -> tuple[list[DynamicsModel], dict[str, Any]]:
    """Reads members and metadata as ``pickle.load`` would, but runs nothing; a ValueError if the file is no model."""
    content = b"" if Path(path).is_fifo() or Path(path).is_char_device() else Path(path).read_bytes()
    unpickler = _ModelUnpickler(io.BytesIO(content))
    unpickler.stored = len(content)
    try:
        models, metadata = unpickler.load()
        if type(models) is not list or not models or not all(hasattr(model, "network") for model in models):
            raise TypeError("it holds no members")
        for index, model in enumerate(models):
            if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
                raise ValueError(f"member {index} has {bad[0]} that are not finite; train it with a lower fit_lr")
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it has format version {metadata['format_version']}, expected {FORMAT_VERSION}")
        is_name = re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,250}", metadata.get("run_name") or "none")  # of a folder
        numbers = [metadata["seed"], *metadata.get("elites", [])]
        if not is_name or not all(type(number) is int and 0 <= number < 2**64 for number in numbers):
            raise ValueError("its run_name is no name, or its seed or elites are no numbers")
        return models, metadata
    except Exception as error:  # a damaged or hostile pickle can raise anything
        why = " ".join(str(error).split())[:300] or "Ran out of input"
        why = f"is not a model that learn_model.py wrote ({why}); expected a model.pkl"
        raise ValueError(f"{os.fspath(path)!r} {why}") from error


def load_ensemble(path: str | os.PathLike[str], device: str = "cpu", elites: bool = False) -> DynamicsEnsemble:
    """Reads ``model.pkl`` as ``load_models`` does, and stacks its members, or its elites alone, on a device."""
    models, metadata = load_models(path)
    ensemble = DynamicsEnsemble.from_members(models, metadata["seed"]).to(device)
    ensemble.metadata, ensemble.elites = metadata, metadata.get("elites", ensemble.elites)
    return ensemble.select(ensemble.elites) if elites else ensemble


def as_tensor(values: Array, device: str | torch.device) -> Tensor:
    """Brings values to a device as float32."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # PyTorch knows no read-only memory, and warns
    return torch.as_tensor(values, dtype=torch.float32, device=device)


def _pack(tensor: Tensor) -> dict[str, Any]:
    array = tensor.detach().cpu().contiguous().numpy()
    return {"bytes": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}


def _unpack(packed: dict[str, Any]) -> Tensor:
    if packed["dtype"] not in ("<f4", "<i8"):
        raise ValueError(f"it has values of type {packed['dtype']!r:.20}")
    return torch.from_numpy(np.frombuffer(packed["bytes"], packed["dtype"]).reshape(packed["shape"]).copy())
