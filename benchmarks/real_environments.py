"""Real environments that the bundled datasets are of: to act in and to plan in; and the policies that made the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from mujoco.rollout import rollout
from torch import Generator, Tensor, nn

from model_env import ModelState, ModelStep
from model_planning import Policy, clone_policy, fit_value
from mujoco_tasks import Task, task
from utils import ROOT


class Guides(NamedTuple):
    """What a dataset shows of the policy that made it, from states ``(batch, state_dim)``."""

    prior: Policy
    value: Callable[[Tensor], Tensor]


class Rewards(NamedTuple):
    """What episodes paid.

    Attributes:
        paid: ``(steps, episodes)``; 0 after an episode's end.
        lengths: Steps of each episode, ``(episodes,)``.
    """

    paid: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Domain:
    """An environment, a dataset of it and the policy that made the dataset.

    Attributes:
        name: In configs/ and results.
        task: Its known functions.
        dataset: Name of the bundled dataset.
        policy: Name of the file in data/policies.
        params: Settings of models, as ``--params`` takes them.
    """

    name: str
    task: Task
    dataset: str
    policy: str
    params: tuple[str, ...] = ()

    def guides(self, epochs: int) -> Guides:
        """Fits what guides planning to the dataset."""
        names = ("observations", "actions", "rewards", "terminals", "timeouts")
        with h5py.File(ROOT / "data" / "bundled" / f"{self.dataset}.hdf5") as file:
            states, actions, *ends = (file[name][:] for name in names)
        return Guides(clone_policy(states, actions, epochs=epochs), fit_value(states, *ends, epochs=epochs))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Arrays of the policy."""
        with np.load(ROOT / "data" / "policies" / f"{self.policy}.npz") as file:
            return {name: torch.as_tensor(file[name]) for name in file.files if file[name].ndim}

    def play(self, act: Policy, episodes: Sequence[int], steps: int, in_simulator: bool = False) -> Rewards:
        """Acts in the real environment.

        Args:
            act: What acts.
            episodes: Seeds of the start states; episodes run at once.
            steps: After so many, they are cut.
            in_simulator: Whether to show ``act`` all of the simulator's state rather than observations.
        """
        envs = gymnasium.make_vec(self.task.env_name, len(episodes), vectorization_mode="sync")
        states, alive = envs.reset(seed=list(episodes))[0], np.ones(len(episodes), dtype=bool)
        paid, lengths = np.zeros((steps, len(episodes))), np.zeros(len(episodes), dtype=int)
        for step in range(steps):
            if in_simulator:
                simulations = [env.unwrapped.data for env in envs.envs]
                states = np.stack([np.concatenate([each.qpos, each.qvel]) for each in simulations])
            actions = act(torch.as_tensor(states, dtype=torch.float32)).numpy()
            states, rewards, terminated, truncated, _ = envs.step(actions)
            paid[step], lengths = rewards * alive, lengths + alive
            alive &= ~(terminated | truncated)
            if not alive.any():
                break
        envs.close()
        return Rewards(paid, lengths)

    def starts(self, episodes: Sequence[int]) -> np.ndarray:
        """Returns where the episodes with these seeds start, ``(episodes, state_dim)``."""
        envs = gymnasium.make_vec(self.task.env_name, len(episodes), vectorization_mode="sync")
        return envs.reset(seed=list(episodes))[0]


DOMAINS = {
    "hopper": Domain("hopper", task("Hopper-v5"), "hopper-medium-demo", "hopper-medium"),
    "halfcheetah": Domain(
        "halfcheetah",
        task("HalfCheetah-v5"),
        "halfcheetah-medium-demo",
        "halfcheetah-medium",
        ("learn_reward=true",),  # the velocities that are observed give the reward to 0.15 only
    ),
}


class Simulator:
    """What a ``ModelEnv`` is, without errors; its states are the simulator's positions and velocities.

    Rewards are those of the task's formula, at true states.
    """

    def __init__(self, domain: Domain) -> None:
        env = gymnasium.make(domain.task.env_name).unwrapped
        self._model, self._data, self._frames = env.model, mujoco.MjData(env.model), env.frame_skip
        self._task, self._limit = domain.task, math.inf if domain.name == "halfcheetah" else 10.0
        bound = torch.full((domain.task.action_dim,), domain.task.action_bound)
        self.action_bounds = -bound, bound

    def observe(self, states: Tensor) -> Tensor:
        """Leaves the position along the track out, and clips velocities as the environment does."""
        positions = self._model.nq
        return torch.cat([states[:, 1:positions], states[:, positions:].clamp(-self._limit, self._limit)], dim=1)

    def start(self, states: Tensor, generator: Generator) -> ModelState:
        """As ``ModelEnv`` has it."""
        return ModelState(states, None)

    def step(self, state: ModelState, actions: Tensor, generator: Generator) -> ModelStep:
        """As ``ModelEnv`` has it."""
        full = np.insert(state.states.double().numpy(), 0, 0.0, axis=1)  # the time comes first
        control = actions.double().numpy()[:, None].repeat(self._frames, axis=1)
        following = rollout(self._model, self._data, full, control)[0][:, -1, 1:]
        states = torch.as_tensor(following, dtype=torch.float32)
        seen = self.observe(state.states), actions, self.observe(states)
        ended, never = self._task.termination(*seen), torch.zeros(len(states), dtype=torch.bool)
        reward = self._task.reward(*seen, ended)
        return ModelStep(ModelState(states, None), reward, reward, ended, never, never, None)


def squashed_gaussian(weights: dict[str, Tensor], noise: float, perturbation: float, seed: int) -> Policy:
    """Returns the actor of soft actor-critic, with so many times its own noise, and relative noise on its weights."""
    random = Generator().manual_seed(0)  # every seed has the same policy
    own = {
        name: values
        if name in ("low", "high")
        else values * (1 + perturbation * torch.randn(values.shape, generator=random))
        for name, values in weights.items()
    }
    random.manual_seed(seed)
    depth = sum(name.startswith("weight_") for name in own)

    def policy(states: Tensor) -> Tensor:
        hidden = states
        for layer in range(depth):
            hidden = nn.functional.linear(hidden, own[f"weight_{layer}"], own[f"bias_{layer}"]).relu()
        mean, log_std = (
            nn.functional.linear(hidden, own[f"{head}_weight"], own[f"{head}_bias"]) for head in ("mean", "log_std")
        )
        drawn = mean + noise * log_std.clamp(-20, 2).exp() * torch.randn(mean.shape, generator=random)
        return own["low"] + (drawn.tanh() + 1) / 2 * (own["high"] - own["low"])

    return policy
