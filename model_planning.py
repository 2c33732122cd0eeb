"""Planning inside a learned ensemble: the cross-entropy method, from a batch of states, guided by a policy or not.

    core = ModelEnv(load_ensemble("model.pkl"), "Hopper-v5")
    planner = CEM(core, horizon=20, prior=clone_policy(states, actions))
    action = planner.plan(state)        # (batch, action_dim), for as many environments as there are states

``CEM`` is iCEM (Pinneri et al. 2020, "Sample-efficient cross-entropy method for real-time planning"): noise that is
correlated over time, elites that are kept between iterations and between steps, fewer candidates in later iterations.
Particles carry each candidate through the ensemble's propagation, as in PETS (Chua et al. 2018).

In a model of offline data, free planning finds the actions about which the model is wrong. With a ``prior``, a policy
cloned from the data, candidates are deviations from what that policy does in the states that the model predicts, which
is the idea of MBOP (Argenson and Dulac-Arnold 2021).

Shapes are ``(batch, ...)``; states, actions and rewards are in raw units. Nothing loops over members, candidates or
environments. This module imports PyTorch, NumPy and the model modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from dynamics_model import Array, as_tensor, random_stream
from model_env import ModelEnv

Policy = Callable[[Tensor], Tensor]
"""From states ``(batch, state_dim)`` to actions ``(batch, action_dim)``, raw units."""


class CEM:
    """Plans for every state by itself; keeps its plans from one step to the next.

    Differences from iCEM: a batch of states is planned for at once, and candidates can be deviations from a policy.
    What a plan earns after its episode has ended is ``reward_after_end``: sums that go on as if nothing had happened
    overrate what dies, and 0, where rewards are negative, makes ending an aim.

    Args:
        core: What is planned in; it needs ``action_bounds``.
        horizon: Steps to look ahead.
        population: Candidates per state in the first iteration.
        iterations: Of the search, each step.
        particles: Paths of each candidate through the ensemble.
        prior: A policy whose actions candidates deviate from; None searches all actions.
        elite_share: Share of the candidates that the next iteration is drawn around.
        kept_share: Share of the elites that stay candidates, in the next iteration and, moved on, in the next step.
        spread: Standard deviation of the first candidates, in half widths of the action bounds.
        noise_beta: Exponent of the noise's spectrum ``1 / f^beta``: 0 is white, 2 drifts slowly.
        momentum: Weight of the old mean and deviation in the new ones.
        discount: Per step.
        reward_after_end: Paid for each step of the horizon behind an episode's end; None: the lowest reward of the
            model's data, where the model knows it and it is negative, else 0.
        generator: Of candidates and of what the model draws; None: a stream of the ensemble's seed.
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
        elite_share: float = 0.1,
        kept_share: float = 0.3,
        spread: float = 0.5,
        noise_beta: float = 2.0,
        momentum: float = 0.1,
        discount: float = 1.0,
        reward_after_end: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        for name, value, lowest in (
            ("horizon", horizon, 1),
            ("population", population, 2),
            ("iterations", iterations, 1),
            ("particles", particles, 1),
        ):
            if value < lowest:
                raise ValueError(f"{name} is {value}; expected at least {lowest}")
        if core.action_bounds is None:
            raise ValueError("the bounds of actions are unknown; give the ModelEnv a task, such as task='Hopper-v5'")
        self.core, self.prior = core, prior
        self.horizon, self.population, self.iterations, self.particles = horizon, population, iterations, particles
        self.elite_share, self.kept_share, self.spread = elite_share, kept_share, spread
        self.noise_beta, self.momentum, self.discount = noise_beta, momentum, discount
        if reward_after_end is None:
            lowest_reward = core.ensemble.metadata.get("data", {}).get("lowest_reward")
            reward_after_end = min(0.0, lowest_reward) if lowest_reward is not None else 0.0
        self.reward_after_end = reward_after_end
        self.generator = random_stream(core.ensemble.seed, 1, "propagation") if generator is None else generator
        self._low, self._high = core.action_bounds
        self._mean: Tensor | None = None  # (batch, horizon, action_dim), of the step before, moved on by one
        self._kept: Tensor | None = None  # (batch, kept, horizon, action_dim), likewise

    def reset(self, ended: Tensor | None = None) -> None:
        """Forgets the plans of the environments that have ``ended``, bool ``(batch,)``; of all where it is None."""
        if ended is None or self._mean is None:
            self._mean = self._kept = None
        else:
            self._mean[ended] = self._centre
            self._kept[ended] = self._centre

    @torch.no_grad()
    def plan(self, states: Array) -> Tensor:
        """Returns the first action of the best plan from each state: ``(batch, action_dim)``.

        Args:
            states: ``(batch, state_dim)``. Row by row the environments of the call before, one step later; another
                number of rows starts anew.
        """
        states = as_tensor(states, self.core.ensemble.device)
        if self._mean is None or len(self._mean) != len(states):
            self._mean = self._centre.expand(len(states), self.horizon, -1).clone()
            self._kept = self._mean[:, None][:, :0]
        mean, std = self._mean, (self.spread * (self._high - self._low) / 2).expand_as(self._mean)
        kept, size = self._kept, self.population
        for iteration in range(self.iterations):
            candidates = torch.cat([self._draw(mean, std, size), kept], dim=1)
            if iteration == self.iterations - 1:
                candidates = torch.cat([candidates, mean[:, None]], dim=1)
            returns = self.evaluate(states, candidates)  # (batch, candidates)
            elites = returns.topk(max(2, round(self.elite_share * self.population)), dim=1).indices
            best = candidates.gather(1, elites[..., None, None].expand(-1, -1, *candidates.shape[2:]))
            mean = self.momentum * mean + (1 - self.momentum) * best.mean(dim=1)
            std = self.momentum * std + (1 - self.momentum) * best.std(dim=1)
            kept = best[:, : max(1, round(self.kept_share * best.shape[1]))]
            size = max(2 * best.shape[1], round(size / 1.25))
        first = best[:, 0, 0]  # the best candidate's first action, or deviation
        self._mean = self._move_on(mean)
        self._kept = self._move_on(kept)
        return self._act(states, first)

    def evaluate(self, states: Tensor, candidates: Tensor) -> Tensor:
        """Returns what candidates earn, a mean over particles: ``(batch, candidates)``; ``-inf`` for what is no number.

        Args:
            states: Starts, ``(batch, state_dim)``.
            candidates: Actions, or deviations from the prior's, ``(batch, candidates, horizon, action_dim)``.
        """
        batch, count = candidates.shape[:2]
        paths = count * self.particles
        state = self.core.start(states.repeat_interleave(paths, dim=0), self.generator)
        sequences = candidates.repeat_interleave(self.particles, dim=1).flatten(0, 1)  # (batch * paths, horizon, ...)
        total = torch.zeros(batch * paths, device=states.device)
        alive = torch.ones_like(total, dtype=torch.bool)
        for step in range(self.horizon):
            taken = self.core.step(state, self._act(state.states, sequences[:, step]), self.generator)
            total += self.discount**step * torch.where(alive, taken.reward, self.reward_after_end)
            alive &= ~(taken.terminated | taken.halted)
            state = taken.state
        returns = total.view(batch, count, self.particles).mean(dim=-1)
        return torch.where(returns.isnan(), -torch.inf, returns)

    def _act(self, states: Tensor, values: Tensor) -> Tensor:
        """Returns actions inside their bounds: the values themselves, or the prior's actions with these deviations."""
        actions = values if self.prior is None else self.prior(states) + values
        return actions.clamp(self._low, self._high)

    def _draw(self, mean: Tensor, std: Tensor, count: int) -> Tensor:
        """Draws candidates ``(batch, count, horizon, action_dim)`` around means ``(batch, horizon, action_dim)``."""
        shape = (len(mean), count, mean.shape[2], self.horizon)
        noise = coloured_noise(shape, self.noise_beta, self.generator).to(mean.device).movedim(-1, -2)
        drawn = mean[:, None] + std[:, None] * noise
        return drawn.clamp(self._low, self._high) if self.prior is None else drawn

    @property
    def _centre(self) -> Tensor:
        """What plans start from, ``(action_dim,)``: no deviation, or the middle of the bounds."""
        return torch.zeros_like(self._low) if self.prior is not None else (self._low + self._high) / 2

    def _move_on(self, plans: Tensor) -> Tensor:
        """Drops the step that is taken now from plans ``(..., horizon, action_dim)``, and repeats the last one."""
        return torch.cat([plans[..., 1:, :], plans[..., -1:, :]], dim=-2)


def coloured_noise(shape: tuple[int, ...], beta: float, generator: Generator) -> Tensor:
    """Draws Gaussian noise whose power falls as ``1 / f^beta`` along the last axis, with a standard deviation of 1.

    By way of the spectrum (Timmer and Koenig 1995), as iCEM draws it.
    """
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


def clone_policy(
    states: Array,
    actions: Array,
    hidden_size: tuple[int, ...] = (128, 128),
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Policy:
    """Clones the policy that took these actions, by least squares: behaviour cloning.

    Args:
        states: ``(rows, state_dim)``, raw units.
        actions: Those taken in them, ``(rows, action_dim)``.
        hidden_size: Units of each hidden layer.
        epochs: Passes over the rows.
        batch_size: Rows per step.
        learning_rate: Of Adam at the start; it falls to 0 along a cosine.
        seed: Of initial weights and of the order of rows.
    """
    states, actions = (as_tensor(part, torch.device("cpu")) for part in (states, actions))
    shift, scale = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    widths = [states.shape[1], *hidden_size, actions.shape[1]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    network = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.SiLU())), layers[-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    batches = -(-len(states) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    inputs = (states - shift) / scale
    for _ in range(epochs):
        for rows in torch.randperm(len(states), generator=generator).split(batch_size):
            loss = (network(inputs[rows]) - actions[rows]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.requires_grad_(False)

    def policy(states: Tensor) -> Tensor:
        inputs = (states - shift.to(states.device)) / scale.to(states.device)
        return network.to(states.device)(inputs)

    return policy
