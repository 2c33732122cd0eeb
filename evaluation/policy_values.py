"""What policies earn inside a model, beside what they earn in the simulator: off-policy evaluation.

The measures are those of DOPE (Fu et al. 2021, "Benchmarks for deep off-policy evaluation"): error of the value, rank
correlation, regret. Model and simulator start from the same states and draw the same noise for the policies' actions,
and one reward model pays all ensembles, so that they differ in their dynamics only. The simulator's episodes are paid
by that reward model, too: what is left of the error then is what no dynamics can help.

Letters in shapes: ``P`` policies, ``S`` start states, ``H`` steps, ``D`` and ``A`` dimensions of states and actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from data.behaviour import LOG_STD_RANGE, SquashedGaussianPolicy
from dynamics_model import DynamicsEnsemble
from evaluation import metrics
from mujoco_tasks import StepFunction, Task

if TYPE_CHECKING:
    from model_env import ModelEnv

STEPS = 250  # after which episodes are cut
DISCOUNT = 0.99
HORIZONS = ("truncated", "discounted")  # returns: plain, and discounted; both of the episodes that are cut
SIMULATOR = "simulator"  # in the column ``propagation``: true dynamics, paid by the reward model
ACTION_NOISE, PROCESS_NOISE = 0, 1  # each purpose draws from its own random stream


# --- Policies ---


class StackedPolicies:
    """Policies of one architecture, evaluated at once in float64, as ``SquashedGaussianPolicy`` does one by one.

    Args:
        policies: One or more.
    """

    def __init__(self, policies: Sequence[SquashedGaussianPolicy]) -> None:
        names = policies[0].arrays
        stacked = {name: np.stack([policy.weights[name] for policy in policies]) for name in names}
        self._weights = {name: torch.as_tensor(values) for name, values in stacked.items()}
        self._depth, self._size = policies[0].depth, len(policies)

    def __len__(self) -> int:
        return self._size

    @property
    def state_dim(self) -> int:
        """Length of the observations that they act on."""
        first = "weight_0" if self._depth else "mean_weight"
        return self._weights[first].shape[2]

    @property
    def action_dim(self) -> int:
        """Length of their actions."""
        return self._weights["mean_weight"].shape[1]

    def act(self, states: Tensor, noise: Tensor) -> Tensor:
        """Returns actions ``(P, S, A)``, float32.

        Args:
            states: Those of each policy, ``(P, S, D)``, raw units.
            noise: Standard normal, ``(S, A)``: shared by all policies, so that their values differ the less by chance.
        """
        hidden = states.float().double()  # as datasets hold it
        for layer in range(self._depth):
            hidden = self._linear(hidden, f"weight_{layer}", f"bias_{layer}").relu()
        mean = self._linear(hidden, "mean_weight", "mean_bias")
        log_std = self._linear(hidden, "log_std_weight", "log_std_bias").clamp(*LOG_STD_RANGE)
        low, high = (self._weights[name][:, None] for name in ("low", "high"))
        action = low + 0.5 * ((mean + log_std.exp() * noise).tanh() + 1.0) * (high - low)
        return action.clamp(low, high).float()

    def _linear(self, inputs: Tensor, weight: str, bias: str) -> Tensor:
        return torch.baddbmm(self._weights[bias][:, None], inputs, self._weights[weight].transpose(1, 2))


def perturb(policy: SquashedGaussianPolicy, level: float, random: np.random.Generator) -> SquashedGaussianPolicy:
    """Returns a copy, each weight and bias of which was multiplied by one plus so many times a standard normal."""
    arrays = {
        name: array if name in ("low", "high") else array * (1 + level * random.standard_normal(array.shape))
        for name, array in policy.arrays.items()
    }
    description = f"{policy.description}; weights perturbed by {level:g}"
    return SquashedGaussianPolicy({name: array.astype(np.float32) for name, array in arrays.items()}, description)


# --- The truth ---


@dataclass(frozen=True)
class PolicyTruths:
    """What policies earn in the simulator.

    Attributes:
        names: Of the policies.
        starts: Where episodes start, ``(S, D)``.
        returns: By ``HORIZONS``, ``(2, P, S)``.
        model_paid: The same episodes, paid by the reward model.
        seed: Episode ``s`` was started with the seed ``seed + s``; it fixes all noise, too.
        steps: After so many, episodes were cut.
    """

    names: tuple[str, ...]
    starts: np.ndarray
    returns: np.ndarray
    model_paid: np.ndarray
    seed: int
    steps: int


def standard_noise(seed: int, purpose: int, shape: Sequence[int]) -> np.ndarray:
    """Draws standard normal noise, the same for model and simulator."""
    return np.random.default_rng([seed, purpose]).standard_normal(shape)


def simulate_policies(
    names: Sequence[str],
    policies: StackedPolicies,
    task: Task,
    reward: StepFunction,
    *,
    starts: int,
    seed: int,
    process_noise: float = 0.0,
    steps: int = STEPS,
) -> PolicyTruths:
    """Plays episodes of all policies in the simulator, each from every start.

    Args:
        names: Of the policies.
        policies: Those that act.
        task: Of the environment.
        reward: The reward model.
        starts: How many start states.
        seed: As ``PolicyTruths`` has it.
        process_noise: Standard deviation of the noise on executed actions, as ``collect_dataset.py`` adds it.
        steps: After so many, episodes are cut.
    """
    import gymnasium

    envs = [gymnasium.make(task.env_name, disable_env_checker=True) for _ in names]
    low, high = envs[0].action_space.low, envs[0].action_space.high
    shape = (steps, starts, policies.action_dim)
    noise = torch.as_tensor(standard_noise(seed, ACTION_NOISE, shape))
    disturbance = process_noise * standard_noise(seed, PROCESS_NOISE, shape)
    paid, model_paid = np.zeros((2, steps, len(names), starts))
    first = []
    for start in range(starts):
        states = np.stack([env.reset(seed=seed + start)[0] for env in envs])
        first.append(states[0].copy())
        alive = np.ones(len(envs), dtype=bool)
        for step in range(steps):
            actions = policies.act(torch.as_tensor(states)[:, None], noise[step, start, None])[:, 0].numpy()
            before = states.copy()
            executed = np.clip(actions + disturbance[step, start], low, high).astype(np.float32)
            going = alive.copy()
            for index in np.flatnonzero(going):
                states[index], paid[step, index, start], ended, *_ = envs[index].step(executed[index])
                alive[index] = not ended
            rows = (torch.as_tensor(part[going], dtype=torch.float32) for part in (before, actions, states))
            model_paid[step, going, start] = reward(*rows).numpy()
            if not alive.any():
                break
    for env in envs:
        env.close()
    returns = (np.stack(list(returns_of(rewards))) for rewards in (paid, model_paid))
    return PolicyTruths(tuple(names), np.array(first, dtype=np.float32), *returns, seed, steps)


class Returns(NamedTuple):
    """Returns of episodes, in the order of ``HORIZONS``."""

    truncated: np.ndarray
    discounted: np.ndarray


def returns_of(rewards: np.ndarray) -> Returns:
    """Returns the returns ``(...)`` of rewards ``(H, ...)``, which are 0 after an episode's end."""
    discounts = DISCOUNT ** np.arange(len(rewards))
    return Returns(rewards.sum(axis=0), np.tensordot(discounts, rewards, axes=1))


# --- The model ---


def policy_values(
    ensemble: DynamicsEnsemble,
    policies: StackedPolicies,
    truths: PolicyTruths,
    task: Task,
    reward: StepFunction,
    state_bounds: tuple[np.ndarray, np.ndarray],
    *,
    propagations: Sequence[Literal["ts1", "tsinf", "mean"]] = ("ts1", "tsinf"),
) -> pd.DataFrame:
    """Runs policies in a model from the start states of their episodes in the simulator, all at once.

    Args:
        ensemble: The model; all its members predict.
        policies: Those of ``truths``.
        truths: What they earn in the simulator.
        task: Says when episodes terminate.
        reward: The reward model, as the truths have it.
        state_bounds: Lowest and highest states, ``(D,)`` each, that predictions are clamped to.
        propagations: As ``ModelEnv`` has them.

    Returns:
        One row per policy, propagation and horizon:

        - policy: its name;
        - propagation: those asked for, and ``simulator``: true dynamics, paid by the reward model;
        - horizon: ``truncated`` or ``discounted``;
        - true: mean return of its episodes in the simulator;
        - predicted: mean return of those in the model;
        - escaped: share of the latter in which a prediction left the bounds.
    """
    from model_env import ModelEnv  # needs Gymnasium, which evaluation does not

    tables = [_values(truths, SIMULATOR, truths.model_paid, np.zeros(len(truths.names)))]
    for propagation in propagations:
        core = ModelEnv(
            ensemble, task, reward=reward, propagation=propagation, members="all", state_bounds=state_bounds
        )
        paid, escaped = imagine_policies(core, policies, truths)
        tables.append(_values(truths, propagation, np.stack(list(returns_of(paid))), escaped.mean(axis=1)))
    return pd.concat(tables, ignore_index=True)


def _values(truths: PolicyTruths, propagation: str, returns: np.ndarray, escaped: np.ndarray) -> pd.DataFrame:
    """Returns the rows of one propagation, whose returns are ``(2, P, S)``."""
    parts = []
    for horizon, true, predicted in zip(HORIZONS, truths.returns, returns, strict=True):
        named = {"policy": truths.names, "propagation": propagation, "horizon": horizon}
        values = {"true": true.mean(axis=1), "predicted": predicted.mean(axis=1), "escaped": escaped}
        parts.append(pd.DataFrame(named | values))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def imagine_policies(core: ModelEnv, policies: StackedPolicies, truths: PolicyTruths) -> tuple[np.ndarray, np.ndarray]:
    """Returns what policies are paid in a model, ``(H, P, S)``, 0 after an end, and who left its bounds, ``(P, S)``."""
    from model_env import ModelState

    size = (len(policies), len(truths.starts))
    noise = standard_noise(truths.seed, ACTION_NOISE, (truths.steps, size[1], policies.action_dim))
    generator = Generator().manual_seed(truths.seed)
    states = torch.as_tensor(truths.starts).repeat(size[0], 1)  # (P * S, D)
    paid, escaped = torch.zeros(truths.steps, len(states)), torch.zeros(len(states), dtype=torch.bool)
    state = core.start(states.clone(), generator)
    rows = torch.arange(len(states))  # of the episodes that go on
    for step, drawn in enumerate(torch.as_tensor(noise)):
        states[rows] = state.states.cpu()
        actions = policies.act(states.view(*size, -1), drawn).flatten(0, 1)[rows]
        result = core.step(state, actions, generator)
        paid[step, rows] = result.raw_reward.cpu()
        escaped[rows] |= result.escaped.cpu()
        going = ~result.terminated
        rows = rows[going.cpu()]
        if not len(rows):
            break
        kept = result.state.members
        state = ModelState(result.state.states[going], None if kept is None else kept[going.to(kept.device)])
    return paid.double().view(-1, *size).numpy(), escaped.view(size).numpy()


# --- Scores ---


class ValueScores(NamedTuple):
    """How well a model evaluates policies; errors and regret are shares of the range of true values.

    Attributes:
        error: Mean absolute error of the values.
        spearman: Rank correlation of predicted with true values.
        regret: True value lost by taking the policy that the model holds for the best.
    """

    error: float
    spearman: float
    regret: float


def score_values(true: np.ndarray, predicted: np.ndarray) -> ValueScores:
    """Scores values of policies, ``(P,)`` each (Fu et al. 2021, section 4)."""
    width = np.ptp(true)
    regret = (true.max() - true[predicted.argmax()]) / width
    error = np.abs(predicted - true).mean() / width
    return ValueScores(float(error), metrics.spearman(predicted, true), float(regret))
