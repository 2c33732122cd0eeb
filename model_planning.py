"""Planning inside a learned ensemble: the cross-entropy method, from a batch of states, guided by a policy or not.

    core = ModelEnv(load_ensemble("model.pkl"), "Hopper-v5")
    prior, value = clone_policy(states, actions), fit_value(states, rewards, terminals, timeouts)
    planner = CEM(core, horizon=10, prior=prior, tail=30, value=value, spread=0.1)
    actions = planner.plan(states)  # (batch, action_dim), for as many environments as there are states

``CEM`` is iCEM (Pinneri et al. 2020, "Sample-efficient cross-entropy method for real-time planning"): noise that is
correlated over time, elites that are kept between iterations and between steps, fewer candidates in later iterations.
Several particles carry each candidate through the ensemble, as in PETS (Chua et al. 2018).

Free planning finds the actions about which a model of offline data is wrong, and its horizon is too short to see that
Hopper will fall. It can be guided by the data, as in MBOP (Argenson and Dulac-Arnold 2021): candidates are deviations
from a cloned policy, the ``prior``, and the last state counts by its ``value``, what the data's policy earned from
there. Differences from MBOP: the best candidate acts, there a weighted mean of all; and in the ``tail`` the prior goes
on alone, back to states like the data's, where the value is right.

Shapes are ``(batch, ...)``; states, actions and rewards are in raw units. Nothing loops over members, candidates or
environments: a step of the horizon is one call of ``ModelEnv.step``. This module imports PyTorch and the model modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from dynamics_model import Array, as_tensor, random_stream

if TYPE_CHECKING:  # it needs Gymnasium, which planning does not
    from model_env import ModelEnv

Policy = Callable[[Tensor], Tensor]
"""From states ``(batch, state_dim)`` to actions ``(batch, action_dim)``, raw units."""


class CEM:
    """Plans for every state by itself; keeps its plans from one step to the next.

    Differences from iCEM: a batch of states is planned for at once; candidates can be deviations from a policy; and the
    mean is a candidate in the first iteration, too, so that what the prior does is always considered.

    Args:
        core: What is planned in. Anything with its ``start``, ``step`` and ``action_bounds`` will do, if
            ``reward_after_end`` and ``generator`` are given.
        horizon: Steps to look ahead.
        population: Candidates per state in the first iteration.
        iterations: Of the search, at each step.
        particles: Paths of each candidate through the ensemble.
        prior: A policy whose actions candidates deviate from; None searches all actions.
        tail: Steps behind the horizon in which the prior acts alone.
        value: What the state behind horizon and tail is worth, from ``(batch, state_dim)`` to ``(batch,)``; None: 0.
        elite_share: Share of the population that the next iteration is drawn around.
        kept_share: Share of the elites that stay candidates, in the next iteration and, moved on, in the next step.
        spread: Standard deviation of the first candidates, in half widths of the action bounds.
        noise_beta: Exponent of the noise's spectrum ``1 / f^beta``: 0 is white, 2 drifts slowly.
        momentum: Weight of the old mean and deviation in the new ones.
        discount: Per step.
        reward_after_end: Paid for each step behind an episode's end: 0 makes an end an aim where rewards are negative.
            None: the lowest reward of the model's data, where the model knows it and it is negative, else 0.
        generator: Of candidates and of what the model draws, on the CPU; None: a stream of the ensemble's seed.
    """

    def __init__(
        self,
        core: ModelEnv,
        horizon: int = 20,
        population: int = 128,
        iterations: int = 3,
        particles: int = 5,
        prior: Policy | None = None,
        *,
        tail: int = 0,
        value: Callable[[Tensor], Tensor] | None = None,
        elite_share: float = 0.1,
        kept_share: float = 0.3,
        spread: float = 0.5,
        noise_beta: float = 2.0,
        momentum: float = 0.1,
        discount: float = 1.0,
        reward_after_end: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        if tail > 0 and prior is None:
            raise ValueError(f"tail is {tail}, steps in which the prior acts; give a prior")
        if core.action_bounds is None:
            raise ValueError("the bounds of actions are unknown; give the ModelEnv a task, such as task='Hopper-v5'")
        self.core, self.prior, self.tail, self.value = core, prior, tail, value
        self.horizon, self.population, self.iterations, self.particles = horizon, population, iterations, particles
        self.spread, self.noise_beta, self.momentum, self.discount = spread, noise_beta, momentum, discount
        for name, least in {"horizon": 1, "population": 2, "iterations": 1, "particles": 1, "tail": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        self.elites = max(2, round(elite_share * population))
        self.kept = max(1, round(kept_share * self.elites))
        self.reward_after_end = reward_after_end
        if reward_after_end is None:
            self.reward_after_end = min(0.0, core.ensemble.metadata.get("data", {}).get("lowest_reward") or 0.0)
        self.generator = random_stream(core.ensemble.seed, 1, "propagation") if generator is None else generator
        self._low, self._high = core.action_bounds
        # What plans start from, (action_dim,): no deviation from the prior, or the middle of the bounds.
        self._centre = torch.zeros_like(self._low) if prior is not None else (self._low + self._high) / 2
        self._plans: Tensor | None = None  # (batch, 1 + kept, horizon, action_dim): mean and elites of the last step

    def reset(self, ended: Array | None = None) -> None:
        """Forgets the plans of the environments that have ``ended``, bool ``(batch,)``; of all where it is None."""
        if ended is None:
            self._plans = None
        elif self._plans is not None:
            self._plans[torch.as_tensor(ended, device=self._low.device)] = self._centre

    @torch.no_grad()
    def plan(self, states: Array) -> Tensor:
        """Returns the first action of the best plan from each state: ``(batch, action_dim)``.

        Args:
            states: ``(batch, state_dim)``. Row by row the environments of the call before, one step later; another
                number of rows starts anew.
        """
        states = as_tensor(states, self._low.device)
        if self._plans is None or len(self._plans) != len(states):
            self._plans = self._centre.repeat(len(states), 1 + self.kept, self.horizon, 1)
        mean, kept = self._plans[:, 0], self._plans[:, 1:]
        size, std = self.population, (self.spread * (self._high - self._low) / 2).expand_as(mean)
        kept[:, :, -1] = self._draw(mean, std, self.kept)[:, :, -1]  # the new step, which is drawn anew for elites
        for iteration in range(self.iterations):
            candidates = [self._draw(mean, std, size), kept]
            if iteration in (0, self.iterations - 1):
                candidates.append(mean[:, None])  # at first the plan of the step before, or what the prior does
            candidates = torch.cat(candidates, dim=1)
            returns, best = self.evaluate(states, candidates).topk(self.elites, dim=1)  # (batch, elites)
            best = torch.where(returns.isfinite(), best, best[:, :1])
            elites = candidates[torch.arange(len(states), device=best.device)[:, None], best]
            mean = self.momentum * mean + (1 - self.momentum) * elites.mean(dim=1)
            std = self.momentum * std + (1 - self.momentum) * elites.std(dim=1, correction=0)
            kept = elites[:, : self.kept]
            size = max(2 * self.elites, round(size / 1.25))
        plans = torch.cat([mean[:, None], kept], dim=1)
        # A step on, the one that comes into the horizon is like the one before it, or what the prior does.
        new = plans[:, :, -1:] if self.prior is None else torch.zeros_like(plans[:, :, -1:])
        self._plans = torch.cat([plans[:, :, 1:], new], dim=2)
        return self._act(states, elites[:, 0, 0])

    @torch.no_grad()
    def evaluate(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Returns what candidates earn, a mean over particles: ``(batch, candidates)``; ``-inf`` for what is no number.

        Args:
            states: Starts, ``(batch, state_dim)``.
            candidates: Actions, or deviations from the prior's, ``(batch, candidates, horizon, action_dim)``.
        """
        batch, count = candidates.shape[:2]
        state = self.core.start(states.repeat_interleave(count * self.particles, dim=0), self.generator)
        if state.members is not None:  # a candidate's particles keep different members, the same for all candidates
            dealt = self.core.deal(self.particles, self.generator)
            state = state._replace(members=dealt.repeat(batch * count))
        sequences = functional.pad(candidates, (0, 0, 0, self.tail)).repeat_interleave(self.particles, dim=1)
        total = torch.zeros(len(state.states), device=states.device)
        ended = torch.zeros_like(total, dtype=torch.bool)
        for step, values in enumerate(sequences.flatten(0, 1).unbind(dim=1)):
            taken = self.core.step(state, self._act(state.states, values), self.generator)
            total += self.discount**step * torch.where(ended, self.reward_after_end, taken.reward)
            ended |= taken.terminated | taken.halted
            state = taken.state
        if self.value is not None:
            worth = self.value(state.states)  # an end is worth 0, but no more than to go on: it must not be an aim
            total += self.discount ** (self.horizon + self.tail) * torch.where(ended, worth.clamp(max=0), worth)
        returns = total.view(batch, count, self.particles).mean(dim=-1)
        return torch.where(returns.isfinite(), returns, -torch.inf)

    def _act(self, states: Tensor, values: Tensor) -> Tensor:
        """Returns actions inside their bounds: the values themselves, or the prior's actions with these deviations."""
        actions = values if self.prior is None else self.prior(states) + values
        return actions.nan_to_num(0.0).clamp(self._low, self._high)  # a path that is no number earns none, either

    def _draw(self, mean: Tensor, std: Tensor, count: int) -> Tensor:
        """Draws candidates ``(batch, count, horizon, action_dim)`` around means ``(batch, horizon, action_dim)``."""
        shape = (len(mean), count, mean.shape[2], self.horizon)
        noise = coloured_noise(shape, self.noise_beta, self.generator).to(mean.device).movedim(-1, -2)
        drawn = mean[:, None] + std[:, None] * noise
        return drawn.clamp(self._low, self._high) if self.prior is None else drawn


def coloured_noise(shape: tuple[int, ...], beta: float, generator: Generator) -> Tensor:
    """Draws Gaussian noise of deviation 1 with a spectrum of ``1 / f^beta`` along the last axis, as iCEM does."""
    length = shape[-1]
    if length == 1:
        return torch.randn(shape, generator=generator)
    frequency = torch.fft.rfftfreq(length)
    frequency[0] = 1 / length  # the mean counts as the lowest frequency
    weight = frequency ** (-beta / 2)
    spectrum = torch.complex(*torch.randn((2, *shape[:-1], len(weight)), generator=generator)) * weight
    spectrum[..., 0].imag.zero_()
    power = 4 * weight.square()  # of each frequency in the variance: it stands for its mirror image, too
    power[0] /= 4
    if length % 2 == 0:
        spectrum[..., -1].imag.zero_()
        power[-1] /= 4
    return torch.fft.irfft(spectrum, n=length) * (length / power.sum().sqrt())


# --- What guides a plan, from a dataset ---


def clone_policy(states: Array, actions: Array, **options: Any) -> nn.Sequential:
    """Clones the policy that took these actions: behaviour cloning.

    Args:
        states: ``(rows, state_dim)``, raw units.
        actions: Those taken in them, ``(rows, action_dim)``.
        **options: See ``fit_network``.

    Returns:
        A ``Policy`` on the CPU that gives the mean action in a state, without bounds.
    """
    return fit_network(states, actions, **options)


def fit_value(
    states: Array, rewards: Array, terminals: Array, timeouts: Array, steps: int = 100, **options: Any
) -> nn.Sequential:
    """Fits what a dataset's policy earns in so many steps from a state, as MBOP does; less if it ends before that.

    Rows from which a timeout or the file's end hides what would have been earned are left out.

    Args:
        states: ``(rows, state_dim)``, raw units, in time order.
        rewards: ``(rows,)``.
        terminals: Which rows ended in a terminal state, ``(rows,)``.
        timeouts: After which rows an episode was cut, ``(rows,)``.
        steps: How far to look.
        **options: See ``fit_network``.

    Returns:
        A function on the CPU from states ``(batch, state_dim)`` to values ``(batch,)``.
    """
    states, rewards, rows = as_tensor(states, "cpu"), as_tensor(rewards, "cpu").double(), torch.arange(len(states))
    terminals, timeouts = (torch.as_tensor(part, dtype=torch.bool) for part in (terminals, timeouts))
    last = (terminals | timeouts | (rows == rows[-1])).nonzero().squeeze(1)
    last = last[torch.searchsorted(last, rows)]  # of each row's episode
    stop = (rows + steps).clamp(max=last + 1)
    earned = functional.pad(rewards.cumsum(dim=0), (1, 0))
    returns = (earned[stop] - earned[rows]).float()
    seen = (stop == rows + steps) | terminals[last]
    if not seen.any():
        raise ValueError(f"no row is followed by {steps} steps or a terminal state; give fewer steps")
    return fit_network(states[seen], returns[seen, None], **options).append(nn.Flatten(0))


def fit_network(
    inputs: Array,
    targets: Array,
    hidden_size: tuple[int, ...] = (128, 128),
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> nn.Sequential:
    """Fits a network by least squares; it takes and gives raw units, and is on the CPU.

    Args:
        inputs: ``(rows, inputs)``.
        targets: ``(rows, outputs)``.
        hidden_size: Units of each hidden layer.
        epochs: Passes over the rows.
        batch_size: Rows per step.
        learning_rate: Of Adam at the start; it falls to 0 along a cosine.
        seed: Of weights and of the order of rows.
    """
    inputs, targets = (as_tensor(part, "cpu") for part in (inputs, targets))
    (in_shift, in_scale), (out_shift, out_scale) = (
        (part.mean(dim=0), part.std(dim=0, correction=0).clamp(min=1e-6)) for part in (inputs, targets)
    )
    inputs, targets = (inputs - in_shift) / in_scale, (targets - out_shift) / out_scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [inputs.shape[1], *hidden_size, targets.shape[1]]
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    network = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.SiLU())), layers[-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(inputs) // batch_size))
    generator = Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(batch_size):
            loss = (network(inputs[rows]) - targets[rows]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.requires_grad_(False)
    layers[0].weight /= in_scale  # from here on raw units
    layers[0].bias -= layers[0].weight @ in_shift
    layers[-1].weight *= out_scale[:, None]
    layers[-1].bias.mul_(out_scale).add_(out_shift)
    return network
