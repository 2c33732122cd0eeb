"""Environments inside a learned ensemble: one batched step, and what Gymnasium and Stable-Baselines3 make of it.

    core = ModelEnv(load_ensemble("model.pkl"), "Hopper-v5")
    state = core.start(states)          # (batch, state_dim)
    step = core.step(state, actions)    # step.state, step.reward, step.terminated, ...

``ModelEnv`` is that step, for planners and for evaluating policies. ``VectorModelEnv`` and ``SingleModelEnv`` add
episodes to it, with starts and a time limit, as Gymnasium has them; ``as_sb3`` turns the former into what
Stable-Baselines3 trains on.

Why an episode ends is never mixed up. A step ``terminated`` if the task's own rule says so; it is ``halted`` if the
ensemble does not know the state and the action, and the pessimism stops here; an episode is ``truncated`` at the time
limit. Where Gymnasium knows two ends only, the pessimism says which of them a halt is.

Shapes are ``(batch, ...)``; states, actions and rewards are in raw units. Nothing loops over members or environments.

This module imports PyTorch, NumPy, Gymnasium and the model modules; Stable-Baselines3 only where ``as_sb3`` is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import Env, error, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Generator, Tensor

from dynamics_model import Array, Disagreement, DynamicsEnsemble, as_tensor, random_stream
from mujoco_tasks import TASKS, StepFunction, Task
from mujoco_tasks import task as known_task

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

Members = Literal["elites", "all"] | Sequence[int]
ROWS_AT_ONCE = 10_000  # of a dataset whose disagreement is measured


# --- Pessimism: what to do where the ensemble does not know ---


@dataclass(frozen=True)
class MOReL:
    """Halts where members disagree: MOReL (Kidambi et al. 2020, eq. 3 and the pessimistic MDP of section 4).

    In the paper an unknown state and action lead to an absorbing state that pays the halt reward for ever. Here it is
    paid once and the episode ends, so it must make up for all that could have followed.

    Attributes:
        threshold: The largest disagreement that counts as known, raw units; see ``disagreement_threshold``.
        halt_reward: Paid instead of the step's reward; the paper's is below the lowest reward of the data.
        on_halt: How the episode ends. Learners still value what would follow a truncated state, but nothing after a
            terminated one: only the latter teaches them to keep away.
        kind: What is measured; the paper's is the default.
    """

    threshold: float
    halt_reward: float
    on_halt: Literal["terminate", "truncate"] = "terminate"
    kind: Disagreement = "max_pairwise"

    def __post_init__(self) -> None:
        if self.on_halt not in ("terminate", "truncate"):
            raise ValueError(f"on_halt is {self.on_halt!r}; expected 'terminate' or 'truncate'")

    def apply(self, reward: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the reward to pay and whether the episode is halted, both ``(batch,)``."""
        halted = uncertainty > self.threshold
        return torch.where(halted, self.halt_reward, reward), halted


@dataclass(frozen=True)
class MOPO:
    """Pays less where the ensemble is unsure, ``reward - coef * uncertainty``: MOPO (Yu et al. 2020, section 4.3).

    As in the paper's published code, the uncertainty is the largest norm of a member's standard deviations; that code
    asks all members, though it predicts with its elites, and here those are asked that predict.

    Attributes:
        coef: The paper's lambda, in rewards per unit of uncertainty.
        kind: What is measured; the paper's is the default.
    """

    coef: float
    kind: Disagreement = "max_aleatoric"
    on_halt: ClassVar[str] = "terminate"  # never halts

    def apply(self, reward: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the reward to pay, and that no episode is halted, both ``(batch,)``."""
        return reward - self.coef * uncertainty, torch.zeros_like(reward, dtype=torch.bool)


def disagreement_threshold(
    ensemble: DynamicsEnsemble,
    states: Array,
    actions: Array,
    beta: float | None = None,
    quantile: float | None = None,
    *,
    kind: Disagreement = "max_pairwise",
    members: Members = "elites",
) -> float:
    """Returns a threshold for ``MOReL``, of the disagreement of the same members at these states and actions.

    Args:
        ensemble: The one that will predict.
        states: Of a dataset, ``(rows, state_dim)``, raw units.
        actions: Those taken in them, ``(rows, action_dim)``.
        beta: Gives the mean plus so many standard deviations, as the paper's published code does.
        quantile: Gives what this share of the rows does not exceed. With neither, the largest disagreement is given.
        kind: As ``MOReL`` has it.
        members: As ``ModelEnv`` has them.
    """
    if beta is not None and quantile is not None:
        raise ValueError(f"got beta {beta} and quantile {quantile}; give one of them")
    chosen = _select(ensemble, members)
    rows = (as_tensor(part, chosen.device).split(ROWS_AT_ONCE) for part in (states, actions))
    measured = torch.cat([chosen.disagreement(*part, kind) for part in zip(*rows, strict=True)]).cpu().double().numpy()
    if beta is not None:
        return float(measured.mean() + beta * measured.std())
    return float(np.quantile(measured, 1.0 if quantile is None else quantile))


def _select(ensemble: DynamicsEnsemble, members: Members) -> DynamicsEnsemble:
    """Returns a frozen copy of the members that predict."""
    named = {"elites": ensemble.elites, "all": range(len(ensemble))}
    if isinstance(members, str) and members not in named:
        raise ValueError(f"members is {members!r}; expected 'elites', 'all' or indices")
    indices = named[members] if isinstance(members, str) else members
    return ensemble.select(list(indices)).requires_grad_(False)


# --- The batched core ---


class ModelState(NamedTuple):
    """Where a batch of environments is.

    Attributes:
        states: ``(batch, state_dim)``, raw units.
        members: Index of the member that each environment keeps, ``(batch,)``; None unless ``tsinf``.
    """

    states: Tensor
    members: Tensor | None


class ModelStep(NamedTuple):
    """What a step gave; all but the state are ``(batch,)``.

    Attributes:
        state: Where environments are now. What ended is not started again.
        reward: The pessimism's.
        raw_reward: That of the task.
        terminated: The task's rule ended the episode; the rules known here and no rule count a prediction that is not
            finite as an end.
        halted: The pessimism ends the episode here.
        escaped: The prediction was outside of the bounds, and has been moved back.
        uncertainty: What the pessimism measured, at the state and action before the step; None without one.
    """

    state: ModelState
    reward: Tensor
    raw_reward: Tensor
    terminated: Tensor
    halted: Tensor
    escaped: Tensor
    uncertainty: Tensor | None


class ModelEnv:
    """Steps a batch of environments inside a learned ensemble. It holds no state: callers pass it and get the next.

    Steps keep a graph for gradients where states or actions have one.

    Args:
        ensemble: It is copied, so that training it further changes nothing here.
        task: An environment's id, such as "Hopper-v5", or a ``Task`` of your own: gives termination, time limit and
            perhaps rewards. None: that of the training data if it is known here, else no step terminates.
        reward: ``formula``: the task's; ``learned``: the ensemble's; ``auto``: which of them the task prefers; or a
            function of states, actions and next states. ``reward_source`` says which it is, ``reward_reason`` why.
        propagation: ``ts1``: each step is predicted by a member dealt anew, ``tsinf``: an environment keeps its member
            (both PETS, Chua et al. 2018, section 5.2, and both draw from the member's distribution); ``mean``: the mean
            over members' means.
        members: Which predict, give rewards and are asked for uncertainty: ``elites``, ``all``, or indices.
        pessimism: ``MOReL(...)``, ``MOPO(...)``, an object with their ``kind``, ``on_halt`` and ``apply``; None: none.
        state_bounds: What predictions are clamped to: ``data``, the range of the training data widened by half its
            width on either side; a pair (low, high); None: nothing. Without bounds, rollouts that leave the data can
            run away and earn rewards of 1e18. The bare range is no good bound, as most rollouts leave it.
        generator: Where members are dealt and states are drawn from, on the CPU; None: a stream of the ensemble's seed.

    Attributes:
        ensemble: The chosen members.
        task: The task, or None.
        reward_source: "formula", "learned" or "given".
        reward_reason: Why, in words.
        action_bounds: Pair of ``(action_dim,)`` that actions are clamped to, the task's or the data's; None: unknown.
    """

    def __init__(
        self,
        ensemble: DynamicsEnsemble,
        task: str | Task | None = None,
        *,
        reward: Literal["auto", "formula", "learned"] | StepFunction = "auto",
        propagation: Literal["ts1", "tsinf", "mean"] = "ts1",
        members: Members = "elites",
        pessimism: MOReL | MOPO | None = None,
        state_bounds: Literal["data"] | tuple[Array, Array] | None = "data",
        generator: Generator | None = None,
    ) -> None:
        if propagation not in ("ts1", "tsinf", "mean"):
            raise ValueError(f"propagation is {propagation!r}; expected ts1, tsinf or mean")
        self.ensemble = _select(ensemble, members)
        self.propagation, self._device = propagation, torch.device(ensemble.device)
        self.task = _find_task(ensemble, task)
        self.reward_source, self.reward_reason, self._reward = _find_reward(self.ensemble, self.task, reward)
        self.pessimism = pessimism
        _check_pessimism(self.ensemble, pessimism)
        self.generator = random_stream(ensemble.seed, 0, "propagation") if generator is None else generator
        self.state_bounds = self.action_bounds = None
        data = ensemble.metadata.get("data")
        if isinstance(state_bounds, str):
            if state_bounds != "data" or data is None:
                found = "this model.pkl does not know" if state_bounds == "data" else f"{state_bounds!r} is not"
                raise ValueError(f"{found} the range of its data; give state_bounds=(low, high), or None for no bounds")
            low, high = (torch.tensor(data["states"][end]) for end in ("low", "high"))
            state_bounds = low - (high - low) / 2, high + (high - low) / 2
        if state_bounds is not None:
            self.state_bounds = tuple(as_tensor(end, self._device) for end in state_bounds)
        if self.task is not None:
            bound = torch.full((ensemble.action_dim,), float(self.task.action_bound), device=self._device)
            self.action_bounds = -bound, bound
        elif data is not None:
            self.action_bounds = tuple(as_tensor(data["actions"][end], self._device) for end in ("low", "high"))

    def __repr__(self) -> str:
        rewards = f"rewards {self.reward_source} ({self.reward_reason})"
        ends = "no step terminates" if self.task is None else f"terminations of {self.task.env_name}"
        members = f"{len(self.ensemble)} {self.ensemble.kind} members, {self.propagation}"
        return f"ModelEnv({members}; {rewards}; {ends}; pessimism {self.pessimism})"

    def start(self, states: Array, generator: Generator | None = None) -> ModelState:
        """Places environments in states ``(batch, state_dim)``, and deals them members if they are to keep them."""
        states = self.rows(states, self.ensemble.state_dim, "states")
        kept = self.propagation == "tsinf"
        return ModelState(states, self.deal(len(states), generator) if kept else None)

    def deal(self, batch: int, generator: Generator | None = None) -> Tensor:
        """Deals members at random, in numbers that differ by one at most: indices ``(batch,)``."""
        return _indices(*self.ensemble.deal(batch, self.generator if generator is None else generator))

    def step(self, state: ModelState, actions: Array, generator: Generator | None = None) -> ModelStep:
        """Takes a step in each environment.

        Args:
            state: Where they are.
            actions: ``(batch, action_dim)``; those beyond ``action_bounds`` count as the bounds.
            generator: Where this step's draws come from; None: the environment's own stream.

        Raises:
            ValueError: If shapes do not fit, or an action is not finite.
        """
        states, members = state.states, None
        actions = self.rows(actions, self.ensemble.action_dim, "actions", len(states))
        if self.action_bounds is not None:
            actions = actions.clamp(*self.action_bounds)
        generator = self.generator if generator is None else generator
        if self.propagation == "ts1":
            members = self.ensemble.deal(len(states), generator)
        elif self.propagation == "tsinf":
            members = self.ensemble.group(state.members)
        predicted, uncertainty = self._predict(states, actions, members, generator)
        next_states = predicted
        if self.state_bounds is not None:
            low, high = self.state_bounds
            next_states = torch.fmin(torch.fmax(predicted, low), high)  # not-a-number becomes the lower bound
        if self.task is None:
            terminated = ~predicted.isfinite().all(dim=-1)
        else:
            terminated = self.task.termination(states, actions, predicted)
        raw_reward = self._reward(states, actions, next_states, terminated, members)
        if self.state_bounds is None:
            raw_reward = torch.where(next_states.isfinite().all(dim=-1), raw_reward, -torch.inf)
        if self.pessimism is None:
            reward, halted = raw_reward, torch.zeros_like(terminated)
        else:
            reward, halted = self.pessimism.apply(raw_reward, uncertainty)
        state = ModelState(next_states, state.members)
        escaped = (next_states != predicted).any(dim=-1)
        return ModelStep(state, reward, raw_reward, terminated, halted, escaped, uncertainty)

    def _predict(
        self, states: Tensor, actions: Tensor, members: tuple[Tensor, Tensor] | None, generator: Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Returns next states ``(batch, state_dim)`` and the pessimism's uncertainty ``(batch,)``; predicts once.

        The members are grouped, as ``DynamicsEnsemble.group`` does it; None stands for the mean of all.
        """
        if self.pessimism is None and members is not None:
            return self.ensemble.draw_members(states, actions, members, generator), None
        means, variances = self.ensemble.moments(states, actions)  # (ensemble, batch, state_dim)
        uncertainty = None
        if self.pessimism is not None:
            uncertainty = self.ensemble.disagreement_of(means, variances, self.pessimism.kind)
        if members is None:
            return means.mean(dim=0), uncertainty
        own = _indices(*members), torch.arange(len(states), device=means.device)
        return self.ensemble.draw(means[own], variances[own], generator), uncertainty

    def rows(self, values: Array, dim: int, name: str, batch: int | None = None) -> Tensor:
        """Brings ``(batch, dim)`` to the device; a ValueError if the shape is another or an entry not finite."""
        rows, batch = as_tensor(values, self._device), "batch" if batch is None else batch
        if rows.ndim != 2 or rows.shape[1] != dim or batch not in ("batch", len(rows)):
            raise ValueError(f"{name} have shape {tuple(rows.shape)}; expected ({batch}, {dim})")
        # The sum is finite if all entries are, and quickly found.
        if not math.isfinite(rows.detach().sum()) and (bad := int((~rows.isfinite()).any(dim=1).sum())):
            raise ValueError(f"{name} are not finite in {bad} of {len(rows)} rows")
        return rows


def _indices(rows: Tensor, place: Tensor) -> Tensor:
    """Returns the index of each row's member, ``(batch,)``, from what ``DynamicsEnsemble.group`` returns."""
    return place // max(rows.shape[1], 1)


def _find_task(ensemble: DynamicsEnsemble, task: str | Task | None) -> Task | None:
    """Returns the task that was asked for, or that of the training data; a ValueError if it does not fit."""
    if task is None:
        task = TASKS.get(ensemble.metadata.get("dataset", {}).get("env_name"))
    elif isinstance(task, str):
        task = known_task(task)
    if task is not None and (ensemble.state_dim not in task.state_dim or ensemble.action_dim != task.action_dim):
        sizes = " or ".join(map(str, task.state_dim))
        raise ValueError(
            f"{task.env_name} has states of {sizes} and actions of {task.action_dim} entries; this model has "
            f"{ensemble.state_dim} and {ensemble.action_dim}"
        )
    return task


def _find_reward(
    ensemble: DynamicsEnsemble, task: Task | None, reward: str | StepFunction
) -> tuple[str, str, Callable[..., Tensor]]:
    """Returns the source of rewards, why it was chosen, and the function.

    Its arguments are states, actions, next states, which steps terminated, and each row's member (None: all).
    """

    def learned(
        states: Tensor, actions: Tensor, next_states: Tensor, terminated: Tensor, members: Tensor | None
    ) -> Tensor:
        rewards = ensemble.predict_reward(states, actions, next_states, members)
        return rewards.mean(dim=0) if members is None else rewards

    if callable(reward):
        return "given", "a function of the caller's", lambda *step: reward(*step[:3])
    reason = "as asked for" if reward != "auto" else "no formula is known" if task is None else task.reward_reason
    if reward == "auto":
        reward = "learned" if task is None else task.reward_source
    if reward == "formula":
        if task is None or task.base_reward is None:
            raise ValueError("there is no formula of the reward; give a task that has one, such as task='Hopper-v5'")
        return "formula", reason, lambda *step: task.reward(*step[:4])
    if reward != "learned":
        raise ValueError(f"reward is {reward!r}; expected auto, formula, learned or a function")
    if ensemble.reward is None:
        raise ValueError(
            f"there is no reward to be had: this model learned none ({reason}); train one with --params "
            "learn_reward=true, or give a task and reward='formula', or a function of states, actions and next states"
        )
    return "learned", reason, learned


def _check_pessimism(ensemble: DynamicsEnsemble, pessimism: MOReL | MOPO | None) -> None:
    """Raises a ValueError if the ensemble cannot measure what the pessimism goes by."""
    if pessimism is None:
        return
    name, kind = type(pessimism).__name__, pessimism.kind
    if kind not in ensemble.disagreements:
        has = ", ".join(ensemble.disagreements)
        raise ValueError(f"{name} goes by {kind}, which {ensemble.kind} members do not have; they have kind={has}")
    if len(ensemble) < 2 and kind in ("max_pairwise", "ensemble_std"):
        raise ValueError(f"{name} goes by {kind}, which needs two members or more; there is one")


# --- Gymnasium ---


class VectorModelEnv(VectorEnv):
    """Episodes of ``ModelEnv``, many at a time, as Gymnasium's vector environments have them.

    Infos hold ``raw_reward``, ``halted``, ``escaped`` and, under pessimism, ``uncertainty`` of each step. With
    ``tsinf`` an environment keeps its member when it starts again, so that all members go on serving equally many;
    where there are fewer environments than members, it is dealt one anew.

    Args:
        core: The step. It can be shared: draws come from this environment's own stream, which ``reset`` seeds.
        num_envs: How many episodes run at a time.
        initial_states: What starts are drawn from, ``(starts, state_dim)``; None: those in ``model.pkl``.
        horizon: After how many steps episodes are truncated; None: at the task's time limit, if there is a task.
        autoreset_mode: When an environment that ended starts again: in the next step, in the same, or by ``reset``
            with ``options={"reset_mask": ...}``.
    """

    def __init__(
        self,
        core: ModelEnv,
        num_envs: int,
        *,
        initial_states: Array | None = None,
        horizon: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        data = core.ensemble.metadata.get("data")
        if initial_states is None and not (data and data["initial_states"]):
            raise ValueError("this model.pkl does not know where episodes start; give initial_states")
        if core.action_bounds is None:
            raise ValueError("this model.pkl does not know the bounds of actions; give ModelEnv a task")
        self.core, self.num_envs = core, num_envs
        starts = data["initial_states"] if initial_states is None else initial_states
        self.initial_states = core.rows(starts, core.ensemble.state_dim, "initial_states")
        self.horizon = core.task.horizon if horizon is None and core.task is not None else horizon
        self.metadata = {"autoreset_mode": AutoresetMode(autoreset_mode)}
        low, high = (end.cpu().numpy() for end in core.action_bounds)
        self.single_action_space = spaces.Box(low, high, dtype=np.float32)
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (core.ensemble.state_dim,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generator, self._state = None, None
        self._steps, self._ended = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts all environments, or those of ``options["reset_mask"]``, ``(num_envs,)`` of bool."""
        super().reset(seed=seed)
        if seed is not None or self._generator is None:
            self._generator = Generator().manual_seed(int(self.np_random.integers(2**62)))
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}; expected bool ({self.num_envs},)")
        if mask.all():
            self._state = None  # which deals members anew
        self._start(mask)
        return self._observations(), {}

    def step(self, actions: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes a step in each environment; what it gives has the form of Gymnasium's ``SyncVectorEnv``."""
        mode, restart = self.metadata["autoreset_mode"], self._ended
        if self._state is None or (mode == AutoresetMode.DISABLED and restart.any()):
            which = "all" if self._state is None else np.flatnonzero(restart).tolist()
            raise error.ResetNeeded(f"environments have ended or not yet started; reset these: {which}")
        with torch.no_grad():
            step = self.core.step(self._state, actions, self._generator)
        self._state, self._steps = step.state, self._steps + 1
        of_step = {"raw_reward": step.raw_reward, "halted": step.halted, "escaped": step.escaped}
        if step.uncertainty is not None:
            of_step["uncertainty"] = step.uncertainty
        of_step = {name: _array(values) for name, values in of_step.items()}
        rewards, terminated = _array(step.reward), _array(step.terminated)
        truncated = self._steps >= (np.inf if self.horizon is None else self.horizon)
        if self.core.pessimism is not None and self.core.pessimism.on_halt == "truncate":
            truncated = truncated | of_step["halted"]
        else:
            terminated = terminated | of_step["halted"]

        if restart.any():  # in NEXT_STEP mode, instead of taking a step
            zeroed = (np.where(restart, part.dtype.type(0), part) for part in (rewards, terminated, truncated))
            rewards, terminated, truncated = zeroed
        infos, ended, stepped = {}, terminated | truncated, ~restart
        if mode == AutoresetMode.SAME_STEP and ended.any():
            last, observations = np.full(self.num_envs, None, dtype=object), self._observations()[ended]
            last[ended] = np.fromiter(observations, dtype=object, count=len(observations))
            infos = {"final_obs": last, "_final_obs": ended.copy()}
            infos |= {"final_info": _masked(of_step, ended), "_final_info": ended.copy()}
            stepped, restart = ~ended, ended
        infos |= _masked(of_step, stepped)
        if restart.any():
            self._start(restart)
        self._ended = ended & (mode != AutoresetMode.SAME_STEP)
        return self._observations(), rewards, terminated, truncated, infos

    def _start(self, mask: np.ndarray) -> None:
        """Places environments in states drawn from the initial ones."""
        if self._state is None:
            mask = np.ones_like(mask)
        rows = torch.from_numpy(np.flatnonzero(mask)).to(self.initial_states.device)
        drawn = torch.randint(len(self.initial_states), (len(rows),), generator=self._generator)
        starts = self.initial_states[drawn.to(rows.device)]
        if self._state is None:
            self._state = self.core.start(starts, self._generator)
        else:
            states, members = self._state
            if members is not None and self.num_envs < len(self.core.ensemble):
                members = members.index_copy(0, rows, self.core.deal(len(rows), self._generator))
            self._state = ModelState(states.index_copy(0, rows, starts), members)
        self._steps, self._ended = np.where(mask, 0, self._steps), self._ended & ~mask

    def _observations(self) -> np.ndarray:
        return self._state.states.cpu().numpy().copy()


def _array(values: Tensor) -> np.ndarray:
    """Returns NumPy's booleans or, as Gymnasium has rewards, float64."""
    array = values.cpu().numpy()
    return array if array.dtype == bool else array.astype(np.float64)


def _masked(values: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Returns infos of the environments of the mask, as Gymnasium has them: ``name`` and ``_name``."""
    if not mask.any():
        return {}
    if not mask.all():
        values = {name: np.where(mask, value, value.dtype.type(0)) for name, value in values.items()}
    return values | {f"_{name}": mask.copy() for name in values}


class SingleModelEnv(Env):
    """One episode of ``ModelEnv`` at a time, as Gymnasium has it; arguments are those of ``VectorModelEnv``.

    With ``tsinf`` each episode is dealt a member anew.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, core: ModelEnv, *, initial_states: Array | None = None, horizon: int | None = None) -> None:
        options = {"initial_states": initial_states, "horizon": horizon, "autoreset_mode": AutoresetMode.DISABLED}
        self._vector = VectorModelEnv(core, 1, **options)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; there are no options."""
        super().reset(seed=seed)
        observations, _ = self._vector.reset(seed=seed)
        return observations[0], {}

    def step(self, action: Array) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes a step; the info has what ``VectorModelEnv`` tells of it."""
        observations, *others, infos = self._vector.step(np.asarray(action)[None])
        reward, terminated, truncated = (part.item() for part in others)
        info = {name: value.item() for name, value in infos.items() if not name.startswith("_")}
        return observations[0], reward, terminated, truncated, info


# --- Stable-Baselines3 ---


def as_sb3(env: VectorModelEnv) -> VecEnv:
    """Returns what Stable-Baselines3 trains on, from an environment with ``autoreset_mode="SameStep"``.

    The infos of an episode's last step hold ``terminal_observation``, ``TimeLimit.truncated``, and what
    ``VectorModelEnv`` tells of the step; others are empty.
    """
    mode = env.metadata["autoreset_mode"]
    if mode != AutoresetMode.SAME_STEP:
        raise ValueError(f"Stable-Baselines3 needs VectorModelEnv(..., autoreset_mode='SameStep'), got {mode.value!r}")
    from stable_baselines3.common.vec_env import VecEnv

    class ModelVecEnv(VecEnv):
        """Passes all on to the environment, and its results in the form of Stable-Baselines3."""

        def reset(self) -> np.ndarray:
            observations, _ = env.reset(seed=self._seeds[0])
            self._reset_seeds()
            self._reset_options()
            return observations

        def step_async(self, actions: np.ndarray) -> None:
            self._actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            observations, rewards, terminated, truncated, infos = env.step(self._actions)
            told: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            for index in np.flatnonzero(terminated | truncated):
                final = infos["final_info"].items()
                told[index] = {name: value[index].item() for name, value in final if not name.startswith("_")}
                told[index]["terminal_observation"] = infos["final_obs"][index]
                told[index]["TimeLimit.truncated"] = bool(truncated[index] and not terminated[index])
            return observations, rewards.astype(np.float32), terminated | truncated, told

        def close(self) -> None:
            env.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(env, attr_name) for _ in self._get_indices(indices)]

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            setattr(env, attr_name, value)

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError(f"{method_name} cannot be called: the environments are one batch")

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            return [False for _ in self._get_indices(indices)]

    return ModelVecEnv(env.num_envs, env.single_observation_space, env.single_action_space)
