"""Known functions of Gymnasium's MuJoCo environments: when an episode terminates, and what a step is paid.

``task("Hopper-v5")`` gives the functions of one environment, for use inside a learned model that predicts only states.
Each version has its own rule. They differ in the healthy bonus: v4 pays it at every step, the terminal one included,
v5 only where the state after the step is healthy. Reacher-v4 rewards the distance before the step, v5 the one after it.

Shapes: ``states`` and ``next_states`` are ``(..., state_dim)``, ``actions`` are ``(..., action_dim)``, with any leading
axes; a function gives one value per row, ``(...)``. Everything is in raw units: observations and actions as the
environment gives and takes them. The functions follow their arguments' device and floating-point type, and rewards can
be differentiated with respect to the arguments that they depend on.

What the observation does not tell:

- The forward reward is the distance covered in a step over its duration, and observations leave the position out. The
  formulas take a mean of the velocities before and after the step instead.
- Hopper terminates where any velocity reaches 100, but observed velocities are clipped at 10. A clipped velocity counts
  as healthy: good policies often exceed 10, while even random full-strength actions stay below 20.
- InvertedDoublePendulum takes its tip's position from inside the last substep, before the observation: up to 0.0002 m
  away, or 0.015 m while the cart hits an end of its rail. A termination is rarely told a step early or late for that
  (about 1 in 10,000). Its velocities are clipped at 10, too, so that the penalty on faster ones is too small.
- Ant-v5 pays for contact forces. Without them in the observation (27 entries), this cost, at most 0.039, is left out.

A state with an entry that is not finite terminates every task, HalfCheetah, Swimmer and Reacher included, which
terminate for no other reason.

This module imports PyTorch and the standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

StateTest = Callable[[Tensor], Tensor]
"""Takes states ``(..., state_dim)``; gives booleans ``(...)``."""
StepFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes states, actions and next states; gives one value per row ``(...)``."""


@dataclass(frozen=True)
class Task:
    """What is known of an environment besides its dynamics.

    Attributes:
        env_name: the environment's id, such as "Hopper-v5".
        state_dim: accepted sizes of an observation, the default one first; options of the environment give the others.
        action_dim: the size of an action.
        action_bound: actions lie within plus and minus this; the simulator acts on larger ones as if they did.
        horizon: the time limit of an episode in steps. Reaching it truncates the episode and does not terminate it.
        termination: maps states, actions and next states to booleans ``(...)``: the step ended the episode.
        base_reward: maps the same to rewards ``(...)`` without the healthy bonus. Every task here has one; in a task of
            your own, None says that the observation does not suffice.
        reward_source: the source of rewards to prefer inside a model: this formula, or a learned reward.
        reward_reason: why, in words.
        bonus: the healthy bonus of a step.
        bonus_at_end: whether a step that terminates pays the bonus, too.
    """

    env_name: str
    state_dim: tuple[int, ...]
    action_dim: int
    action_bound: float
    horizon: int
    termination: StepFunction
    base_reward: StepFunction | None
    reward_source: Literal["formula", "learned"]
    reward_reason: str
    bonus: float = 0.0
    bonus_at_end: bool = False

    def reward(self, states: Tensor, actions: Tensor, next_states: Tensor, terminated: Tensor | None = None) -> Tensor:
        """Returns what steps are paid, ``(...)``, bonus included.

        Args:
            states: see the module's docstring, like the next two.
            actions: as given to the environment.
            next_states: states after the step.
            terminated: which steps terminated, ``(...)``, if that is known already.
        """
        base = self.base_reward(states, actions, next_states)
        if self.bonus_at_end or self.bonus == 0:
            return base + self.bonus
        if terminated is None:
            terminated = self.termination(states, actions, next_states)
        return torch.where(terminated, base, base + self.bonus)


def task(env_name: str) -> Task:
    """Returns the task of an environment.

    Raises:
        ValueError: the environment is not known here. The message names the closest one that is.
    """
    if env_name not in TASKS:
        [closest] = difflib.get_close_matches(str(env_name), TASKS, n=1, cutoff=0)
        known = ", ".join(sorted({name.rpartition("-")[0] for name in TASKS}))
        raise ValueError(
            f"there is no task {env_name!r}: did you mean {closest!r}? Known are {known}, each as -v4 and -v5"
        )
    return TASKS[env_name]


# --- Healthy states ---
# Comparisons with NaN are false, so each test is written for what is healthy.


def _within(values: Tensor, low: float, high: float) -> Tensor:
    """Tells which values lie strictly between two bounds, in the values' own precision."""
    return (values > low) & (values < high)


def _hopper_healthy(states: Tensor) -> Tensor:
    """Height above 0.7 m, torso within 0.2 rad of upright, all other joints and velocities within 100."""
    others = states[..., 1:].abs()
    return (states[..., 0] > 0.7) & (others[..., 0] < 0.2) & (others < 100).all(-1)


def _walker2d_healthy(states: Tensor) -> Tensor:
    """Height between 0.8 and 2 m, torso within 1 rad of upright."""
    return _within(states[..., 0], 0.8, 2) & (states[..., 1].abs() < 1)


def _ant_healthy(states: Tensor) -> Tensor:
    """Height from 0.2 to 1 m, bounds included."""
    return (states[..., 0] >= 0.2) & (states[..., 0] <= 1)


def _humanoid_healthy(states: Tensor) -> Tensor:
    """Height between 1 and 2 m."""
    return _within(states[..., 0], 1, 2)


def _pendulum_healthy(states: Tensor) -> Tensor:
    """Pole at most 0.2 rad from upright."""
    return states[..., 1].abs() <= 0.2


def _tip_up(states: Tensor) -> Tensor:
    """Tip of the second pole higher than 1 m."""
    return _double_pendulum_tip(states)[1] > 1


def _always_healthy(states: Tensor) -> Tensor:
    """True for every row."""
    return torch.ones_like(states[..., 0], dtype=torch.bool)


def _double_pendulum_tip(states: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the tip of the second pole is, sideways and upwards, each ``(...)`` in metres.

    Both poles are 0.6 m long; the angle of the second is relative to the first.
    """
    cart, sin1, sin2, cos1, cos2 = states[..., :5].unbind(-1)
    x = cart + 0.6 * (sin1 + sin1 * cos2 + cos1 * sin2)
    y = 0.6 * (cos1 + cos1 * cos2 - sin1 * sin2)
    return x, y


# --- Rewards without the healthy bonus ---


def _squared(values: Tensor) -> Tensor:
    """Returns the sum of squares over the last axis."""
    return values.square().sum(-1)


def _forward_reward(
    states: Tensor, actions: Tensor, next_states: Tensor, *, velocity: int, control_cost: float, after: float = 0.5
) -> Tensor:
    """Forward speed minus the cost of control.

    Args:
        states: see the module's docstring, like the next two.
        actions: the cost is of the actions as given, not clipped to the environment's range.
        next_states: states after the step.
        velocity: the entry of the observation that is the forward velocity, in m/s.
        control_cost: the weight of the sum of squared actions.
        after: the weight of the velocity after the step; the velocity before it has the rest. One half is the
            trapezoid rule.
    """
    speed = torch.lerp(states[..., velocity], next_states[..., velocity], after)
    return speed - control_cost * _squared(actions)


def _ant_reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """Forward speed minus the costs of control and, where the observation has contact forces, of contact.

    The observation holds the forces clipped to [-1, 1]. Predicted forces are clipped again, as the environment clips.
    """
    contact_cost = 0.0005 * _squared(next_states[..., 27:].clamp(-1, 1))
    return _forward_reward(states, actions, next_states, velocity=13, control_cost=0.5) - contact_cost


def _humanoid_speed(states: Tensor, bodies: int) -> Tensor:
    """Returns the forward velocity of the centre of mass in m/s, ``(...)``.

    The observation gives for each body, after 45 positions and velocities, ten numbers of inertia (six of the tensor,
    mass times offset from the centre of mass, mass) and six of velocity (angular, linear) about the same centre. A
    body's momentum is its mass times the linear velocity plus the angular velocity crossed with mass times offset.
    """
    inertia = states[..., 45 : 45 + 10 * bodies].unflatten(-1, (bodies, 10))
    velocity = states[..., 45 + 10 * bodies : 45 + 16 * bodies].unflatten(-1, (bodies, 6))
    mass = inertia[..., 9]
    turning = velocity[..., 1] * inertia[..., 8] - velocity[..., 2] * inertia[..., 7]  # x of the cross product
    return (mass * velocity[..., 3] + turning).sum(-1) / mass.sum(-1)


def _humanoid_v4_reward(states: Tensor, actions: Tensor, next_states: Tensor, *, bodies: int = 14) -> Tensor:
    """Forward speed of the centre of mass minus the cost of control; version 4 counts the world as a body."""
    speed = (_humanoid_speed(states, bodies) + _humanoid_speed(next_states, bodies)) / 2
    return 1.25 * speed - 0.1 * _squared(actions)


def _humanoid_v5_reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """The reward of version 4 minus the cost of contact forces, which is at most 10."""
    contact_cost = (5e-7 * _squared(next_states[..., 270:])).clamp(max=10)
    return _humanoid_v4_reward(states, actions, next_states, bodies=13) - contact_cost


def _no_reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """Nothing: the healthy bonus is all the reward."""
    return torch.zeros_like(next_states[..., 0])


def _double_pendulum_reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """Penalties on the tip's distance from upright and on the poles' angular velocities, after the step."""
    x, y = _double_pendulum_tip(next_states)
    distance_penalty = 0.01 * x.square() + (y - 2).square()
    velocity_penalty = 0.001 * next_states[..., 6].square() + 0.005 * next_states[..., 7].square()
    return -distance_penalty - velocity_penalty


def _reacher_v4_reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """Minus the distance from fingertip to target before the step, minus the cost of control."""
    return -torch.linalg.vector_norm(states[..., 8:], dim=-1) - _squared(actions)


def _reacher_v5_reward(states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
    """Minus the distance from fingertip to target after the step, minus the cost of control."""
    return _reacher_v4_reward(next_states, actions, next_states)


# --- The table of tasks ---


def _terminated(states: Tensor, actions: Tensor, next_states: Tensor, *, healthy: StateTest) -> Tensor:
    """Tells which steps ended their episode: the next state is unhealthy or has an entry that is not finite."""
    return ~(healthy(next_states) & next_states.isfinite().all(-1))


def _task(
    env_name: str,
    state_dim: tuple[int, ...],
    action_dim: int,
    reward: StepFunction,
    preference: tuple[Literal["formula", "learned"], str],
    *,
    healthy: StateTest = _always_healthy,
    bonus: float = 0.0,
    bound: float = 1.0,
    horizon: int = 1000,
) -> Task:
    """Returns a task, given its reward without the healthy bonus, its test of a healthy state, and its bonus.

    The preference is the source of rewards to prefer, and why; the bound is that of the actions.
    """
    termination, at_end = partial(_terminated, healthy=healthy), env_name.endswith("-v4")
    return Task(
        env_name,
        state_dim,
        action_dim,
        bound,
        horizon,
        termination,
        reward,
        *preference,
        bonus=bonus,
        bonus_at_end=at_end,
    )


_hopper_reward = partial(_forward_reward, velocity=5, control_cost=0.001)
_walker2d_reward = partial(_forward_reward, velocity=8, control_cost=0.001)
_swimmer_reward = partial(_forward_reward, velocity=3, control_cost=0.0001)
# This simulator moves by the velocity at the end of each of 5 substeps. Under constant acceleration their mean is 0.4
# of the velocity before the step and 0.6 of the one after it. (The other simulators integrate by Runge-Kutta.)
_half_cheetah_reward = partial(_forward_reward, velocity=8, control_cost=0.1, after=0.6)

# Which source of rewards to prefer, and why; errors are mean absolute ones of the formula at true states.
_HOPPER = "formula", "the mean of the forward velocities before and after a step gives the reward to 0.005"
_WALKER2D = "formula", "the mean of the forward velocities before and after a step gives the reward to 0.015"
_HALF_CHEETAH = "learned", "observed velocities give the reward to 0.15 on medium data, a learned reward to 0.02"
_ANT = "learned", "observed velocities give the reward to 0.05 only, under random actions"
_SWIMMER = "formula", "the mean of the forward velocities before and after a step gives the reward to 0.008"
_HUMANOID = (
    "learned",
    "the formula, right to 0.002, reads some 200 entries that a model must predict well: inertias and velocities",
)
_EXACT = "formula", "the formula gives the reward to 0.0002"

TASKS: dict[str, Task] = {
    known.env_name: known
    for known in (
        _task("Hopper-v4", (11,), 3, _hopper_reward, _HOPPER, healthy=_hopper_healthy, bonus=1),
        _task("Hopper-v5", (11,), 3, _hopper_reward, _HOPPER, healthy=_hopper_healthy, bonus=1),
        _task("Walker2d-v4", (17,), 6, _walker2d_reward, _WALKER2D, healthy=_walker2d_healthy, bonus=1),
        _task("Walker2d-v5", (17,), 6, _walker2d_reward, _WALKER2D, healthy=_walker2d_healthy, bonus=1),
        _task("HalfCheetah-v4", (17,), 6, _half_cheetah_reward, _HALF_CHEETAH),
        _task("HalfCheetah-v5", (17,), 6, _half_cheetah_reward, _HALF_CHEETAH),
        _task("Ant-v4", (27, 111), 8, _ant_reward, _ANT, healthy=_ant_healthy, bonus=1),
        _task("Ant-v5", (105, 27), 8, _ant_reward, _ANT, healthy=_ant_healthy, bonus=1),
        _task("Humanoid-v4", (376,), 17, _humanoid_v4_reward, _HUMANOID, healthy=_humanoid_healthy, bonus=5, bound=0.4),
        _task("Humanoid-v5", (348,), 17, _humanoid_v5_reward, _HUMANOID, healthy=_humanoid_healthy, bonus=5, bound=0.4),
        _task("Swimmer-v4", (8,), 2, _swimmer_reward, _SWIMMER),
        _task("Swimmer-v5", (8,), 2, _swimmer_reward, _SWIMMER),
        _task("InvertedPendulum-v4", (4,), 1, _no_reward, _EXACT, healthy=_pendulum_healthy, bonus=1, bound=3),
        _task("InvertedPendulum-v5", (4,), 1, _no_reward, _EXACT, healthy=_pendulum_healthy, bonus=1, bound=3),
        _task("InvertedDoublePendulum-v4", (11,), 1, _double_pendulum_reward, _EXACT, healthy=_tip_up, bonus=10),
        _task("InvertedDoublePendulum-v5", (9,), 1, _double_pendulum_reward, _EXACT, healthy=_tip_up, bonus=10),
        _task("Reacher-v4", (11,), 2, _reacher_v4_reward, _EXACT, horizon=50),
        _task("Reacher-v5", (10,), 2, _reacher_v5_reward, _EXACT, horizon=50),
    )
}
