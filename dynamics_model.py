"""Learned dynamics ``s' = f(s, a)``: one member (``DynamicsModel``) and members stacked (``DynamicsEnsemble``).

The mathematics stands once, in ``DynamicsNetwork``: E networks whose parameters carry a leading ensemble axis
``(ensemble, in, out)``, evaluated by batched matrix products. A member is a stack of one; an ensemble is its members'
stacks put together, and can be taken apart again. What differs between kinds of ensemble is one subclass of the
network and one of the member, in ``deterministic_model.py`` and ``probabilistic_model.py``.

Shapes are given in words: ``state_dim``, ``action_dim``; ``(ensemble, batch, ...)`` for stacked arrays; ``...`` for any
leading axes. Callers pass and get raw units; "normalised" means shifted by the mean and scaled by the mean absolute
deviation of the training rows, of states, actions and of the change ``s' - s``, which is what networks predict.
Dimensions of the change that are constant on the training rows are no outputs at all: they are predicted as that
constant and left out of every loss and score in normalised units.

This module and its two siblings import PyTorch, NumPy and each other only: a repository that loads ``model.pkl`` needs
these three files and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import math
import os
import pickle
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FORMAT_VERSION = 1
VARIANCE_FLOOR = 1e-12  # raw units; the variance given for dimensions that are predicted exactly
_SCORE_ROWS = 4096  # rows per forward pass when every row of a dataset is scored
_ACTIVATIONS = {
    "silu": functional.silu,
    "swish": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "elu": functional.elu,
    "tanh": torch.tanh,
}
# oneDNN multiplies one member's matrices at a time, which pays where none of their sides is shorter than this.
_ONEDNN_SIDE = 160
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def processor_says(word: str) -> bool:
    """Whether a word, such as a maker or an instruction set, is in what the system says of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return word in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


# PyTorch's own products are Intel's (MKL), which take twice oneDNN's time on AMD's processors and less on Intel's.
USES_ONEDNN = _HAS_ONEDNN and processor_says("AMD")
_PURPOSES = ("initialisation", "order", "bootstrap", "sampling", "propagation", "reward")

Array = np.ndarray | Tensor
Disagreement = Literal["max_pairwise", "ensemble_std", "max_aleatoric", "total_std"]
Propagation = Literal["ts1", "tsinf", "mean", "member"]


def random_stream(seed: int, member: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """Returns the CPU random stream of one member and purpose, the same whatever else is drawn anywhere.

    A member's draws depend neither on how many members there are nor on their kind, so two kinds of ensemble can be
    compared member by member. The stream starts anew each epoch: a resumed run needs no generator's state.

    Args:
        seed: Seed of the run.
        member: Index of the member.
        purpose: ``initialisation``, ``reward`` (its initialisation), ``order``, ``bootstrap``, ``sampling`` or
            ``propagation``.
        epoch: Epoch from 0, for purposes that draw once per epoch.
    """
    entropy = np.random.SeedSequence((seed, member, _PURPOSES.index(purpose), epoch))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@dataclass(frozen=True)
class Architecture:
    """What rebuilds a network before its weights are loaded."""

    state_dim: int
    action_dim: int
    hidden_size: tuple[int, ...]
    activation_fn: str = "silu"
    layer_norm: bool = False
    reward_hidden_size: tuple[int, ...] | None = None  # None: no reward is learned
    beta_nll: float = 0.0  # of the probabilistic loss, as config.py explains
    beta_nll_decay: float = 0.0


@dataclass(frozen=True)
class Normalisation:
    """Shift and scale of inputs, of the change ``s' - s`` and of the reward, as float32 tensors.

    Attributes:
        input_shift: Mean of states and actions, ``(state_dim + action_dim,)``.
        input_scale: Mean absolute deviation of the same; 1 where an input is constant.
        delta_shift: Mean change, ``(state_dim,)``.
        delta_scale: Mean absolute deviation of the change; 0 where the change is constant.
        reward_shift: Mean reward, ``(1,)``.
        reward_scale: Mean absolute deviation of the reward; 1 where it is constant.
    """

    input_shift: Tensor
    input_scale: Tensor
    delta_shift: Tensor
    delta_scale: Tensor
    reward_shift: Tensor
    reward_scale: Tensor

    @classmethod
    def from_transitions(cls, transitions: Transitions) -> Normalisation:
        """Measures training rows, raw units.

        Raises:
            ValueError: If every state dimension changes by a constant, so that there is nothing to learn.
        """
        states, actions, next_states = transitions.states, transitions.actions, transitions.next_states
        rows = len(states)
        state_shift, state_scale = _shift_and_scale(lambda chunk: states[chunk], rows)
        action_shift, action_scale = _shift_and_scale(lambda chunk: actions[chunk], rows)
        delta_shift, delta_scale = _shift_and_scale(lambda chunk: _change(states[chunk], next_states[chunk]), rows)
        reward_shift, reward_scale = _shift_and_scale(lambda chunk: transitions.rewards[chunk, None], rows)
        if not delta_scale.any():
            raise ValueError("every state dimension changes by a constant in the training rows: nothing to learn")
        input_scale = np.concatenate([state_scale, action_scale])
        return cls(
            input_shift=_float32(np.concatenate([state_shift, action_shift])),
            input_scale=_float32(np.where(input_scale > 0, input_scale, 1.0)),
            delta_shift=_float32(delta_shift),
            delta_scale=_float32(delta_scale),
            reward_shift=_float32(reward_shift),
            reward_scale=_float32(np.where(reward_scale > 0, reward_scale, 1.0)),
        )

    @classmethod
    def names(cls) -> list[str]:
        """Names of the tensors, as networks keep them."""
        return [field.name for field in dataclasses.fields(cls)]

    def equals(self, other: Normalisation) -> bool:
        """Whether all shifts and scales are the same."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in self.names())

    @property
    def learned(self) -> Tensor:
        """Indices of the state dimensions whose change varies: the outputs of a network."""
        return self.delta_scale.nonzero().flatten()


class Transitions(Protocol):
    """Rows of a dataset in raw units, float32, such as ``dataset.Transitions``."""

    states: np.ndarray  # (rows, state_dim)
    actions: np.ndarray  # (rows, action_dim)
    next_states: np.ndarray  # (rows, state_dim)
    rewards: np.ndarray  # (rows,)


class NormalisedRows(NamedTuple):
    """Transitions as networks train on them, in normalised units."""

    inputs: Tensor  # (rows, state_dim + action_dim)
    targets: Tensor  # (rows, learned_dim)
    rewards: Tensor | None  # (rows, 1); None where no reward is learned

    def select(self, rows: Tensor) -> NormalisedRows:
        """Gathers ``(ensemble, batch)`` row indices in one read: ``(ensemble, batch, ...)``."""
        flat = rows.reshape(-1)
        return NormalisedRows(*(part if part is None else part[flat].view(*rows.shape, -1) for part in self))

    def chunks(self, size: int) -> Iterator[NormalisedRows]:
        """Yields every row once, ``size`` at a time, the last chunk holding what is left."""
        for start in range(0, len(self.inputs), size):
            yield NormalisedRows(*(part if part is None else part[start : start + size] for part in self))


class _OneDnnLinear(torch.autograd.Function):
    """``inputs @ weight + bias`` of every member through oneDNN, which PyTorch's own batched products do not use.

    The operator is the one that ``torch.compile`` emits for linear layers on CPUs. It knows no derivatives and no
    transforms; here it gets all that ``torch.func`` needs, derivatives of any order included.
    """

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        biases = [None] * len(weight) if bias is None else [own[0] for own in bias]
        products = [
            torch.ops.mkldnn._linear_pointwise.default(rows, matrix.mT, own, "none", [], "")
            for rows, matrix, own in zip(inputs, weight, biases, strict=True)
        ]
        return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            stacked_linear(gradient, weight.mT) if needs_inputs else None,
            stacked_linear(inputs.mT, gradient) if needs_weight else None,
            gradient.sum(dim=1, keepdim=True) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, inputs: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        primal_inputs, primal_weight = ctx.saved_tensors
        terms = []
        if inputs is not None:
            terms.append(stacked_linear(inputs, primal_weight))
        if weight is not None:
            terms.append(stacked_linear(primal_inputs, weight))
        if bias is not None:
            terms.append(bias.expand(-1, primal_inputs.shape[1], -1))
        return sum(terms)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Tensor | None) -> tuple[Tensor, int]:
        inputs, weight, bias = (
            operand if dim is None else operand.movedim(dim, 0) for operand, dim in zip(operands, in_dims, strict=True)
        )
        product = torch.matmul(inputs, weight)
        return (product if bias is None else product + bias), 0


def stacked_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``inputs @ weight + bias`` of every member: ``(ensemble, batch, out)``.

    Args:
        inputs: ``(ensemble, batch, in)``.
        weight: ``(ensemble, in, out)``.
        bias: ``(ensemble, 1, out)``; None adds none.
    """
    if (
        USES_ONEDNN
        and inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and min(*inputs.shape[1:], weight.shape[2]) >= _ONEDNN_SIDE
    ):
        return _OneDnnLinear.apply(inputs, weight, bias)
    return torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias, inputs, weight)


class StackedMLP(nn.Module):
    """E multilayer perceptrons of equal shape, evaluated at once by batched matrix products.

    Weights and biases are drawn like those of ``nn.Linear``, uniformly within ``1 / sqrt(in)``. The output layer is
    drawn head by head, so that a network with more heads starts with the same first one.

    Args:
        ensemble_size: Number of networks, E.
        in_dim: Inputs of each network.
        hidden_size: Units of each hidden layer.
        head_dim: Outputs of each head.
        heads: Number of heads; the outputs are theirs, one after the other.
        activation_fn: Name of the activation.
        layer_norm: Whether hidden layers are layer-normalised before their activation.
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
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation_fn]
        self.layer_norm = layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        widths = [in_dim, *hidden_size]
        shapes = [(fan_in, fan_out, 1) for fan_in, fan_out in itertools.pairwise(widths)]
        for fan_in, fan_out, parts in [*shapes, (widths[-1], head_dim, heads)]:
            weight = torch.zeros(ensemble_size, fan_in, fan_out * parts)
            bias = torch.zeros(ensemble_size, 1, fan_out * parts)
            if generator is not None:
                bound = 1 / math.sqrt(fan_in)
                for part in range(parts):
                    columns = slice(part * fan_out, (part + 1) * fan_out)
                    weight[..., columns].uniform_(-bound, bound, generator=generator)
                    bias[..., columns].uniform_(-bound, bound, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
        self.gains, self.offsets = nn.ParameterList(), nn.ParameterList()  # of layer normalisation
        for width in hidden_size if layer_norm else ():
            self.gains.append(nn.Parameter(torch.ones(ensemble_size, 1, width)))
            self.offsets.append(nn.Parameter(torch.zeros(ensemble_size, 1, width)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps ``(ensemble, batch, in_dim)`` to ``(ensemble, batch, heads * head_dim)``."""
        last = len(self.weights) - 1
        hidden = inputs
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = stacked_linear(hidden, weight, bias)  # (ensemble, batch, out)
            if layer == last:
                break
            if self.layer_norm:
                hidden = functional.layer_norm(hidden, hidden.shape[-1:])
                hidden = torch.addcmul(self.offsets[layer], hidden, self.gains[layer])
            hidden = self.activation(hidden)
        return hidden


class DynamicsNetwork(nn.Module):
    """E networks of one kind with their common normalisation: the mathematics of members and of ensembles alike.

    A kind says how many heads its networks have, what their outputs mean (``interpret``) and what they are trained on
    (``losses``).

    Args:
        architecture: Sizes and options.
        normalisation: Of the training rows; belongs to the model, so that callers use raw units.
        ensemble_size: Number of networks, E.
        generator: Where initial weights are drawn from; None leaves them at zero, to be loaded.
        reward_generator: The same for the reward network, so that it is drawn apart from the kind's other weights.
    """

    heads: ClassVar[int]

    def __init__(
        self,
        architecture: Architecture,
        normalisation: Normalisation,
        ensemble_size: int = 1,
        generator: torch.Generator | None = None,
        reward_generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.ensemble_size = ensemble_size
        for name in Normalisation.names():
            self.register_buffer(name, getattr(normalisation, name).clone())
        self.register_buffer("learned", normalisation.learned, persistent=False)
        self.learned_dim = len(normalisation.learned)
        # For each state dimension, the output that predicts it (any, where the change is constant: its scale is 0).
        output = torch.zeros(architecture.state_dim, dtype=torch.long)
        output[normalisation.learned] = torch.arange(self.learned_dim)
        self.register_buffer("output_of_dim", output, persistent=False)
        in_dim = architecture.state_dim + architecture.action_dim
        activation = (architecture.activation_fn, architecture.layer_norm)
        self.dynamics = StackedMLP(
            ensemble_size, in_dim, architecture.hidden_size, self.learned_dim, self.heads, *activation, generator
        )
        self.reward = None
        if (hidden_size := architecture.reward_hidden_size) is not None:
            self.reward = StackedMLP(
                ensemble_size, in_dim + self.learned_dim, hidden_size, 1, 1, *activation, reward_generator
            )

    @property
    def normalisation(self) -> Normalisation:
        """Shifts and scales, on the CPU."""
        return Normalisation(**{name: getattr(self, name).cpu() for name in Normalisation.names()})

    # --- What a kind defines ---

    def interpret(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits outputs into mean and log-variance (None for point predictions), normalised units.

        Args:
            outputs: ``(ensemble, batch, heads * learned_dim)``.

        Returns:
            Both ``(ensemble, batch, learned_dim)``.
        """
        raise NotImplementedError

    def losses(self, rows: NormalisedRows, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns each member's training objective and the loss to report, both ``(ensemble,)``.

        Args:
            rows: One minibatch per member, ``(ensemble, batch, ...)``.
            progress: Share of training that is done, from 0 to 1, for objectives that change with it.

        Returns:
            The objective, to be summed over members and differentiated, and the reported loss, detached: means over
            batch and dimensions, normalised units.
        """
        raise NotImplementedError

    # --- Normalised units: what trains and scores ---

    def normalised(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts the change: mean and log-variance (or None), ``(ensemble, batch, learned_dim)``.

        Args:
            inputs: ``(ensemble, batch, state_dim + action_dim)``.
        """
        return self.interpret(self.dynamics(inputs))

    def view(self, members: slice) -> DynamicsNetwork:
        """Returns a network of some of the members that shares their memory: to train it is to train them."""
        size = len(range(*members.indices(self.ensemble_size)))
        network = type(self)(self.architecture, self.normalisation, size).to(self.input_shift.device)
        for own, stacked in zip(network.parameters(), self.parameters(), strict=True):
            own.data = stacked.data[members]
        return network

    def parts(self) -> list[list[nn.Parameter]]:
        """Returns the parameters of the dynamics and, if it is learned, of the reward: no gradient joins the two."""
        reward = [] if self.reward is None else list(self.reward.parameters())
        known = {id(parameter) for parameter in reward}
        dynamics = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return [dynamics, reward] if reward else [dynamics]

    def normalise_inputs(self, states: Tensor, actions: Tensor) -> Tensor:
        """Raw ``(..., state_dim)`` and ``(..., action_dim)`` to normalised ``(..., state_dim + action_dim)``."""
        return (torch.cat((states, actions), dim=-1) - self.input_shift) / self.input_scale

    def reward_loss(self, rows: NormalisedRows) -> Tensor:
        """Mean squared error of the reward network per member, ``(ensemble,)``, normalised units."""
        predicted = self.reward(torch.cat((rows.inputs, rows.targets), dim=-1))
        return (predicted - rows.rewards).square().mean(dim=(1, 2))

    @torch.no_grad()
    def score(self, rows: NormalisedRows) -> dict[str, list[float]]:
        """Scores every row, per member, in normalised units.

        Returns:
            ``mse``, mean over rows and dimensions; ``nll``, the same of the Gaussian negative log-likelihood in nats,
            constant included, where members predict a variance; ``reward_mse`` where a reward is learned.
        """
        sums: dict[str, Tensor] = {}
        for chunk in rows.chunks(_SCORE_ROWS):
            stacked = NormalisedRows(
                *(part if part is None else part.expand(self.ensemble_size, -1, -1) for part in chunk)
            )
            mean, log_variance = self.normalised(stacked.inputs)
            squared_error = (mean - stacked.targets).square()
            terms = {"mse": squared_error}
            if log_variance is not None:
                terms["nll"] = 0.5 * (squared_error / log_variance.exp() + log_variance + math.log(2 * math.pi))
            totals = {name: term.mean(dim=-1).double().sum(dim=1) for name, term in terms.items()}
            if self.reward is not None:
                totals["reward_mse"] = self.reward_loss(stacked).double() * len(chunk.inputs)
            for name, total in totals.items():
                sums[name] = sums[name] + total if name in sums else total
        return {name: (total / len(rows.inputs)).tolist() for name, total in sums.items()}

    # --- Raw units: what users call ---

    def as_rows(self, *parts: Array) -> list[Tensor]:
        """Brings states, actions and, if given, next states to the device, and checks that their shapes fit together.

        Args:
            *parts: ``(..., state_dim)``, ``(..., action_dim)`` and ``(..., state_dim)``, NumPy or PyTorch.

        Raises:
            ValueError: If a last axis is not as long as it should be, or leading axes differ.
        """
        names = ("states", "actions", "next states")
        dims = (self.architecture.state_dim, self.architecture.action_dim, self.architecture.state_dim)
        rows = [_as_tensor(part, self.input_shift.device) for part in parts]
        for name, part, dim in zip(names, rows, dims, strict=False):
            if part.shape != (*rows[0].shape[:-1], dim):
                expected = f"{tuple(rows[0].shape[:-1])} and a last axis of {dim}"
                raise ValueError(f"{name} have shape {tuple(part.shape)}; expected leading axes {expected}")
        return rows

    def predict(self, states: Array, actions: Array) -> tuple[Tensor, Tensor | None]:
        """Predicts the next state of the same rows with every member, raw units.

        Args:
            states: ``(..., state_dim)``, NumPy or PyTorch; moved to the device.
            actions: ``(..., action_dim)``.

        Returns:
            Mean and variance (None for point predictions), ``(ensemble, ..., state_dim)``.

        Raises:
            ValueError: If shapes do not fit.
        """
        states, actions = self.as_rows(states, actions)
        leading = states.shape[:-1]
        states = states.reshape(1, -1, states.shape[-1]).expand(self.ensemble_size, -1, -1)
        actions = actions.reshape(1, -1, actions.shape[-1]).expand(self.ensemble_size, -1, -1)
        mean, variance = self._predict_each(states, actions)
        shape = (self.ensemble_size, *leading, mean.shape[-1])
        return mean.reshape(shape), None if variance is None else variance.reshape(shape)

    def predict_each(self, states: Array, actions: Array) -> tuple[Tensor, Tensor | None]:
        """Predicts with each member the next state of its own rows, raw units.

        Args:
            states: ``(ensemble, batch, state_dim)``, NumPy or PyTorch; moved to the device.
            actions: ``(ensemble, batch, action_dim)``.

        Returns:
            Mean and variance (None for point predictions), ``(ensemble, batch, state_dim)``.

        Raises:
            ValueError: If shapes do not fit.
        """
        return self._predict_each(*self.as_rows(states, actions))

    def _predict_each(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, log_variance = self.normalised(self.normalise_inputs(states, actions))
        mean = states + (self._every_dim(mean) * self.delta_scale + self.delta_shift)
        if log_variance is None:
            return mean, None
        variance = self._every_dim(log_variance).exp() * self.delta_scale.square()
        return mean, torch.where(self.delta_scale > 0, variance, VARIANCE_FLOOR)

    def predict_reward(self, states: Array, actions: Array, next_states: Array) -> Tensor:
        """Predicts the reward of transitions with every member, raw units: ``(ensemble, ...)``.

        Raises:
            ValueError: If no reward was learned, or shapes do not fit.
        """
        if self.reward is None:
            raise ValueError("this model learned no reward; train one with --params learn_reward=true")
        states, actions, next_states = self.as_rows(states, actions, next_states)
        change = (next_states - states - self.delta_shift)[..., self.learned] / self.delta_scale[self.learned]
        inputs = torch.cat((self.normalise_inputs(states, actions), change), dim=-1)
        flat = inputs.reshape(1, -1, inputs.shape[-1]).expand(self.ensemble_size, -1, -1)
        rewards = self.reward(flat) * self.reward_scale + self.reward_shift  # (ensemble, batch, 1)
        return rewards.reshape(self.ensemble_size, *states.shape[:-1])

    def _every_dim(self, outputs: Tensor) -> Tensor:
        """Spreads ``(..., learned_dim)`` over ``(..., state_dim)``; constant dimensions get a value of scale 0."""
        if self.learned_dim == self.architecture.state_dim:
            return outputs
        return outputs[..., self.output_of_dim]


class DynamicsModel(nn.Module):
    """One member of an ensemble: what ``model.pkl`` holds a list of, and the base of the two kinds.

    Pickling keeps plain Python only (tensors as bytes, type and shape): no code of PyTorch runs when a file is loaded,
    members share nothing, and a loaded member is on the CPU with gradients of its parameters switched off
    (``requires_grad_(True)`` switches them on again to train it further).

    Args:
        architecture: Sizes and options.
        normalisation: Of the training rows.
        generator: Where initial weights are drawn from; None leaves them at zero, to be loaded.
        reward_generator: The same for the reward network.

    Attributes:
        holdout_idx: Held-out rows in the concatenation of ``observations[:-1]`` over trajectories, ``(rows,)`` of int;
            absent when nothing was held out.
    """

    network_class: ClassVar[type[DynamicsNetwork]]

    def __init__(
        self,
        architecture: Architecture,
        normalisation: Normalisation,
        generator: torch.Generator | None = None,
        reward_generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.network = self.network_class(architecture, normalisation, 1, generator, reward_generator)

    @property
    def nn(self) -> DynamicsModel:
        """The member as a callable ``torch.nn.Module``: itself, under the name that planners look for."""
        return self

    @property
    def device(self) -> str:
        """Where weights and normalisation are."""
        return str(self.network.input_shift.device)

    def forward(self, states: Array, actions: Array) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts the next state, raw units: differentiable, and safe under ``torch.func``.

        Args:
            states: ``(..., state_dim)``, NumPy or PyTorch; moved to ``device``.
            actions: ``(..., action_dim)``.

        Returns:
            The next state ``(..., state_dim)`` for a deterministic member; mean and variance, both
            ``(..., state_dim)``, for a probabilistic one.
        """
        raise NotImplementedError

    def predict(self, states: Array, actions: Array) -> np.ndarray:
        """Predicts the mean of the next state, raw units, without gradients: ``(..., state_dim)``."""
        with torch.no_grad():
            mean, _ = self.network.predict(states, actions)
        return mean[0].cpu().numpy()

    def predict_batched(self, states: Array, actions: Array, batch_size: int = 256) -> np.ndarray:
        """Predicts the mean next state of every row, ``batch_size`` rows at a time.

        Args:
            states: ``(rows, state_dim)``, raw units.
            actions: ``(rows, action_dim)``, raw units.
            batch_size: Rows per forward pass.

        Returns:
            ``(rows, state_dim)``, raw units.
        """
        starts = range(0, max(len(states), 1), batch_size)
        return np.concatenate(
            [self.predict(states[start : start + batch_size], actions[start : start + batch_size]) for start in starts]
        )

    def compute_loss_batched(self, states: Array, actions: Array, next_states: Array, batch_size: int = 256) -> float:
        """Returns the mean squared error over every row and dimension, raw units squared.

        Args:
            states: ``(rows, state_dim)``, raw units.
            actions: ``(rows, action_dim)``, raw units.
            next_states: ``(rows, state_dim)``, raw units: the truth.
            batch_size: Rows per forward pass.
        """
        predicted, truth = self.predict_batched(states, actions, batch_size), torch.as_tensor(next_states).cpu().numpy()
        if truth.shape != predicted.shape:
            raise ValueError(f"next states have shape {truth.shape}; expected {predicted.shape}")
        return float(np.mean((predicted.astype(np.float64) - truth) ** 2))

    def predict_reward(self, states: Array, actions: Array, next_states: Array) -> np.ndarray:
        """Predicts the reward of transitions, raw units: ``(...)``.

        Raises:
            ValueError: If no reward was learned.
        """
        with torch.no_grad():
            rewards = self.network.predict_reward(states, actions, next_states)
        return rewards[0].cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        state = {
            "format_version": FORMAT_VERSION,
            "architecture": dataclasses.asdict(self.network.architecture),
            "tensors": {name: _pack(tensor) for name, tensor in self.network.state_dict().items()},
        }
        if hasattr(self, "holdout_idx"):
            state["holdout_idx"] = _pack(torch.as_tensor(self.holdout_idx))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"this model has format version {state['format_version']}, expected {FORMAT_VERSION}; "
                "load it with the release that wrote it"
            )
        tensors = {name: _unpack(packed) for name, packed in state["tensors"].items()}
        normalisation = Normalisation(**{name: tensors[name] for name in Normalisation.names()})
        self.__init__(Architecture(**state["architecture"]), normalisation)
        self.network.load_state_dict(tensors)
        self.requires_grad_(False)
        self.eval()
        if "holdout_idx" in state:
            self.holdout_idx = _unpack(state["holdout_idx"]).numpy()


class DynamicsEnsemble(nn.Module):
    """Members of one kind, stacked: trains, predicts for planners, samples and rolls out all of them at once.

    Args:
        members: Of one kind, architecture and normalisation; their weights are copied.
        seed: Seed of the streams that ``sample`` and ``rollout`` draw from.

    Raises:
        ValueError: If there is no member, or members differ in kind, architecture or normalisation.
    """

    def __init__(self, members: Sequence[DynamicsModel], seed: int = 0) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member, got none")
        first = members[0]
        self.member_class = type(first)
        self.holdout_idx: np.ndarray | None = getattr(first, "holdout_idx", None)
        architecture, normalisation = first.network.architecture, first.network.normalisation
        for index, member in enumerate(members):
            if type(member) is not self.member_class or member.network.architecture != architecture:
                raise ValueError(f"member {index} differs from member 0 in kind or architecture; stack equal ones only")
            if not member.network.normalisation.equals(normalisation):
                raise ValueError(f"member {index} was normalised differently from member 0; stack equal ones only")
        self.network = self.member_class.network_class(architecture, normalisation, len(members))
        with torch.no_grad():
            for stacked, *own in zip(
                self.network.parameters(), *(member.parameters() for member in members), strict=True
            ):
                stacked.copy_(torch.cat(own))
        self.requires_grad_(next(first.parameters()).requires_grad)
        self._sampling = [random_stream(seed, member, "sampling") for member in range(len(members))]
        self._propagation = random_stream(seed, 0, "propagation")

    def __len__(self) -> int:
        return self.network.ensemble_size

    @property
    def device(self) -> str:
        """Where weights and normalisation are."""
        return str(self.network.input_shift.device)

    @property
    def state_dim(self) -> int:
        """Dimensions of a state."""
        return self.network.architecture.state_dim

    @property
    def action_dim(self) -> int:
        """Dimensions of an action."""
        return self.network.architecture.action_dim

    def members(self) -> list[DynamicsModel]:
        """Returns the members, each with its own copy of its weights, on the CPU."""
        members = []
        for index in range(len(self)):
            member = self.member_class(self.network.architecture, self.network.normalisation)
            member.requires_grad_(False)
            for own, stacked in zip(member.parameters(), self.network.parameters(), strict=True):
                own.copy_(stacked[index : index + 1])
            if self.holdout_idx is not None:
                member.holdout_idx = self.holdout_idx.copy()
            members.append(member)
        return members

    def normalise(self, transitions: Transitions) -> NormalisedRows:
        """Brings transitions to normalised units once, on the ensemble's device, for training and scoring."""
        states, actions, next_states = transitions.states, transitions.actions, transitions.next_states
        network = self.network
        learned = network.learned.cpu().numpy()
        shift, scale = (
            getattr(network, name).cpu().double().numpy()[learned] for name in ("delta_shift", "delta_scale")
        )
        targets = np.empty((len(states), len(learned)), dtype=np.float32)
        for rows in _row_chunks(len(states)):
            targets[rows] = (_change(states[rows], next_states[rows])[:, learned] - shift) / scale
        inputs = network.normalise_inputs(*(torch.as_tensor(part, device=self.device) for part in (states, actions)))
        scaled_rewards = None
        if network.reward is not None:
            scaled_rewards = torch.as_tensor(transitions.rewards, device=self.device).view(-1, 1)
            scaled_rewards = (scaled_rewards - network.reward_shift) / network.reward_scale
        return NormalisedRows(inputs, torch.as_tensor(targets, device=self.device), scaled_rewards)

    def predict(self, states: Array, actions: Array) -> tuple[Tensor, Tensor | None]:
        """Predicts the next state of the same rows with every member, raw units.

        Args:
            states: ``(..., state_dim)``, NumPy or PyTorch; moved to ``device``.
            actions: ``(..., action_dim)``.

        Returns:
            Mean and variance (None for deterministic members), ``(ensemble, ..., state_dim)``.
        """
        return self.network.predict(states, actions)

    def predict_each(self, states: Array, actions: Array) -> tuple[Tensor, Tensor | None]:
        """Predicts with each member the next state of its own rows, all ``(ensemble, batch, ...)``, raw units."""
        return self.network.predict_each(states, actions)

    @torch.no_grad()
    def sample(self, states: Array, actions: Array) -> Tensor:
        """Draws one next state per row from every member's distribution; a point prediction is its own draw.

        Args:
            states: ``(..., state_dim)``, raw units.
            actions: ``(..., action_dim)``, raw units.

        Returns:
            ``(ensemble, ..., state_dim)``, raw units.
        """
        return self._draw(*self.predict(states, actions))

    @torch.no_grad()
    def disagreement(self, states: Array, actions: Array, kind: Disagreement, normalised: bool = False) -> Tensor:
        """Measures per row how unsure the ensemble is: an L2 norm over state dimensions; spreads have ddof 0.

        Args:
            states: ``(..., state_dim)``, raw units.
            actions: ``(..., action_dim)``, raw units.
            kind: ``max_pairwise``: largest distance between two members' means (MOReL, Kidambi et al. 2020, eq. 3);
                ``ensemble_std``: standard deviation of the members' means; ``max_aleatoric``: largest member norm of
                sigma (MOPO, Yu et al. 2020, section 4.3); ``total_std``: standard deviation of the mixture of members.
            normalised: Measure in units of the change's mean absolute deviation, over the dimensions that vary.

        Returns:
            ``(...)``, raw units unless ``normalised``.

        Raises:
            ValueError: If the kind is unknown, or ``max_aleatoric`` is asked of deterministic members.
        """
        mean, variance = self.predict(states, actions)  # (ensemble, ..., state_dim)
        if normalised:
            learned, scale = self.network.learned, self.network.delta_scale[self.network.learned]
            mean = mean[..., learned] / scale
            variance = None if variance is None else variance[..., learned] / scale.square()
        if kind == "max_pairwise":
            first, second = torch.triu_indices(len(self), len(self), device=mean.device)
            return (mean[first] - mean[second]).norm(dim=-1).amax(dim=0)
        if kind == "max_aleatoric":
            if variance is None:
                raise ValueError("max_aleatoric needs probabilistic members; use max_pairwise or ensemble_std")
            return variance.sum(dim=-1).sqrt().amax(dim=0)
        if kind not in ("ensemble_std", "total_std"):
            raise ValueError(
                f"disagreement {kind!r} is unknown; use max_pairwise, ensemble_std, max_aleatoric or total_std"
            )
        spread = mean.var(dim=0, correction=0)
        if kind == "total_std" and variance is not None:
            spread = spread + variance.mean(dim=0)
        return spread.sum(dim=-1).sqrt()

    @torch.no_grad()
    def rollout(self, states: Array, actions: Array, propagation: Propagation = "tsinf") -> Tensor:
        """Rolls out open loop: applies given actions from given states, feeding predictions back.

        Args:
            states: Start states, ``(batch, state_dim)``, raw units.
            actions: ``(batch, horizon, action_dim)``, raw units.
            propagation: ``tsinf``: each row keeps one member for the whole rollout; ``ts1``: each row is dealt a
                member anew at each step, both drawing from that member's distribution (PETS, Chua et al. 2018,
                section 5.2), members being dealt evenly at random; ``mean``: the mean over members' means, fed back;
                ``member``: every member on its own mean.

        Returns:
            States with the start first, ``(batch, horizon + 1, state_dim)``; for ``member``
            ``(ensemble, batch, horizon + 1, state_dim)``; raw units.

        Raises:
            ValueError: If the propagation is unknown or shapes do not fit.
        """
        device = self.network.input_shift.device
        states, actions = _as_tensor(states, device), _as_tensor(actions, device)
        fits = states.ndim == 2 and actions.ndim == 3 and len(states) == len(actions)
        if not fits or (states.shape[-1], actions.shape[-1]) != (self.state_dim, self.action_dim):
            raise ValueError(
                f"rollout got states {tuple(states.shape)} and actions {tuple(actions.shape)}; expected "
                f"(batch, state_dim) and (batch, horizon, action_dim) of {self.state_dim} and {self.action_dim}"
            )
        if propagation == "member":
            states = states.expand(len(self), -1, -1)
            actions = actions.expand(len(self), -1, -1, -1)
        elif propagation not in ("ts1", "tsinf", "mean"):
            raise ValueError(f"propagation {propagation!r} is unknown; use ts1, tsinf, mean or member")
        dealt = self._deal(len(states)) if propagation == "tsinf" else None
        trajectory = [states]
        for step in range(actions.shape[-2]):
            action = actions[..., step, :]
            if propagation == "mean":
                states = self.network.predict(states, action)[0].mean(dim=0)
            elif propagation == "member":
                states = self.network.predict_each(states, action)[0]
            else:
                states = self._step_dealt(states, action, self._deal(len(states)) if dealt is None else dealt)
            trajectory.append(states)
        return torch.stack(trajectory, dim=-2)

    def _deal(self, batch: int) -> tuple[Tensor, Tensor]:
        """Deals rows to members at random and evenly: in number, no two members differ by more than one row.

        Returns:
            The rows of each member, ``(ensemble, ceil(batch / ensemble))``, a member with fewer holding any row in its
            spare place; and the place of each row in that table, flattened, ``(batch,)``.
        """
        rows = torch.randperm(batch, generator=self._propagation)
        members = torch.randperm(len(self), generator=self._propagation)  # who gets one more is random, too
        width, turn = -(-batch // len(self)), torch.arange(batch)
        place = torch.empty_like(rows)
        place[rows] = members[turn % len(self)] * width + turn // len(self)
        dealt = torch.zeros(len(self) * width, dtype=torch.long)
        dealt[place] = torch.arange(batch)
        return dealt.view(len(self), width).to(self.device), place.to(self.device)

    def _step_dealt(self, states: Tensor, actions: Tensor, dealt: tuple[Tensor, Tensor]) -> Tensor:
        """Draws each row's next state from the member it was dealt to: ``(batch, state_dim)``."""
        rows, place = dealt
        drawn = self._draw(*self.network.predict_each(states[rows], actions[rows]))
        return drawn.flatten(0, 1)[place]

    def _draw(self, mean: Tensor, variance: Tensor | None) -> Tensor:
        """Draws from Gaussians ``(ensemble, ..., state_dim)``, each member's noise from its own stream."""
        if variance is None:
            return mean
        noise = torch.stack([torch.randn(mean.shape[1:], generator=stream) for stream in self._sampling])
        return mean + variance.sqrt() * noise.to(mean.device)


# --- model.pkl ---


class _ModelUnpickler(pickle.Unpickler):
    """Admits the member classes and plain Python, so that a file from a stranger cannot run code."""

    _ADMITTED: ClassVar = {
        ("deterministic_model", "DeterministicModel"),
        ("probabilistic_model", "ProbabilisticModel"),
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no model holds")
        return getattr(importlib.import_module(module), name)


def load_models(path: str | os.PathLike[str]) -> tuple[list[DynamicsModel], dict[str, Any]]:
    """Reads ``model.pkl`` without running anything that the file could bring along.

    Returns:
        The members and the metadata, as ``pickle.load`` would.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no model, is cut off, or names anything but the member classes.
    """
    content = Path(path).read_bytes()
    try:
        models, metadata = _ModelUnpickler(io.BytesIO(content)).load()
        if not models or not all(isinstance(model, DynamicsModel) and hasattr(model, "network") for model in models):
            raise TypeError("it holds no members")
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it has format version {metadata['format_version']}, expected {FORMAT_VERSION}")
        random_stream(metadata["seed"], 0, "sampling")
        return list(models), dict(metadata)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise ValueError(
            f"{os.fspath(path)!r} is not a model that learn_model.py wrote ({error}); expected a model.pkl"
        ) from error


def load_ensemble(path: str | os.PathLike[str], device: str = "cpu") -> DynamicsEnsemble:
    """Reads ``model.pkl`` as a stacked ensemble, safely even for a file from a stranger.

    Args:
        path: A file that ``learn_model.py`` wrote.
        device: Where to compute, such as ``cpu`` or ``cuda:0``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no model, is cut off, or names anything but the member classes.
    """
    models, metadata = load_models(path)
    return DynamicsEnsemble(models, seed=metadata["seed"]).to(device)


def _as_tensor(values: Array, device: torch.device) -> Tensor:
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # PyTorch knows no read-only memory, and warns
    return torch.as_tensor(values, dtype=torch.float32, device=device)


def _pack(tensor: Tensor) -> dict[str, Any]:
    array = tensor.detach().cpu().contiguous().numpy()
    return {"bytes": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}


def _unpack(packed: dict[str, Any]) -> Tensor:
    array = np.frombuffer(packed["bytes"], dtype=np.dtype(packed["dtype"])).reshape(packed["shape"])
    return torch.from_numpy(array.copy())


# --- Statistics of training rows, in float64 and by chunks, so that no float64 copy of a dataset exists ---


def _row_chunks(rows: int, size: int = 65536) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def _change(states: np.ndarray, next_states: np.ndarray) -> np.ndarray:
    return next_states.astype(np.float64) - states


def _shift_and_scale(values_of: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and mean absolute deviation per column; the deviation is exactly 0 where all values are equal."""
    first = values_of(slice(0, 1)).astype(np.float64)[0]
    total, varies = 0.0, False
    for chunk in _row_chunks(rows):
        values = values_of(chunk).astype(np.float64)
        total = total + values.sum(axis=0)
        varies = varies | (values != first).any(axis=0)
    mean = np.where(varies, total / rows, first)
    deviation = sum(np.abs(values_of(chunk).astype(np.float64) - mean).sum(axis=0) for chunk in _row_chunks(rows))
    return mean, deviation / rows


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
