"""Known functions of MuJoCo environments, held to the simulators: terminations exactly, rewards to stated accuracy."""

import ast
import math
import pickle
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mujoco_tasks import TASKS, task

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date")  # Gymnasium's word on version 4

STEPS = 3000
DOUBLE_PENDULUM_BOUND = math.acos(1 / 1.2)  # rad; with both poles in line the tip is 1 m high


class Forward(NamedTuple):
    """The entries of the observation that hold forward speed, its weight in the reward, the formula's accuracy."""

    entries: slice
    weight: float
    error: float  # mean absolute, under random actions


FORWARD = {
    "Hopper": Forward(slice(5, 6), 1, 0.005),
    "Walker2d": Forward(slice(8, 9), 1, 0.015),
    "HalfCheetah": Forward(slice(8, 9), 1, 0.1),
    "Ant": Forward(slice(13, 14), 1, 0.08),
    "Swimmer": Forward(slice(3, 4), 1, 0.01),
    "Humanoid-v4": Forward(slice(185, 269), 1.25, 0.003),
    "Humanoid-v5": Forward(slice(175, 253), 1.25, 0.003),
}
# Entries of qpos that decide on termination, each with a bound.
BOUNDS = {
    "Hopper": [(1, 0.7), (2, -0.2), (2, 0.2)],
    "Walker2d": [(1, 0.8), (1, 2), (2, -1), (2, 1)],
    "Ant": [(2, 0.2), (2, 1)],
    "Humanoid": [(2, 1), (2, 2)],
    "InvertedPendulum": [(1, -0.2), (1, 0.2)],
    "InvertedDoublePendulum": [(1, -DOUBLE_PENDULUM_BOUND), (1, DOUBLE_PENDULUM_BOUND)],
}
OPTIONS = {
    "Ant-v4 with contact forces": {"use_contact_forces": True},
    "Ant-v5 without contact forces": {"include_cfrc_ext_in_observation": False},
}


def make(case):
    """Returns the bare simulator of an environment's id, which may be followed by words for its options."""
    name = case.split()[0]
    try:
        env = gymnasium.make(name, **OPTIONS.get(case, {}))
    except Exception as error:
        if name.endswith("v4"):
            pytest.skip(f"the installed Gymnasium cannot make {name}: {error}")
        raise
    return env.unwrapped


def family(case):
    return case.partition("-")[0]


class Recording(NamedTuple):
    """Real steps of an environment; rows are float64."""

    case: str
    states: torch.Tensor
    actions: torch.Tensor
    next_states: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    speeds: torch.Tensor  # forward velocity over the step as the environment measures it; 0 where it measures none
    natural: torch.Tensor  # whether the episode began at the environment's own reset, not near a bound

    @property
    def task(self):
        return task(self.case.split()[0])

    @property
    def forward(self):
        return FORWARD.get(self.case.split()[0]) or FORWARD.get(family(self.case)) or Forward(slice(0), 0, 1e-4)

    @property
    def triple(self):
        return self.states, self.actions, self.next_states


def start_near_bound(env, case, random):
    """Puts the simulator near a bound of its termination, so that the next step may cross it either way."""
    bounds = BOUNDS[family(case)]
    index, bound = bounds[random.integers(len(bounds))]
    qpos = env.data.qpos.copy()
    qpos[index] = bound + 0.02 * random.normal()
    env.set_state(qpos, 0.5 * random.normal(size=env.model.nv))
    return env._get_obs()


def record(case):
    """Takes random actions in natural episodes and, between two of these, from near bounds, a few steps each."""
    env, random, rows = make(case), np.random.default_rng(0), []
    state, natural, left = env.reset(seed=0)[0], True, 60
    for _ in range(STEPS):
        action = random.uniform(env.action_space.low, env.action_space.high)
        next_state, reward, terminated, _, info = env.step(action)
        rows.append((state, action, next_state, reward, terminated, info.get("x_velocity", 0.0), natural))
        state, left = next_state, left - 1
        if terminated or left == 0:
            natural, left = family(case) not in BOUNDS or random.random() < 0.1, 60
            state = env.reset()[0]
            if not natural:
                state, left = start_near_bound(env, case, random), 3
    env.close()
    return Recording(case, *(torch.as_tensor(np.array(column)) for column in zip(*rows, strict=True)))


@pytest.fixture(scope="module", params=[*TASKS, *OPTIONS])
def recording(request):
    return record(request.param)


def test_no_termination_is_wrong(recording):
    for dtype in (torch.float64, torch.float32):
        predicted = recording.task.termination(*(part.to(dtype) for part in recording.triple))
        assert predicted.dtype == torch.bool and predicted.shape == (STEPS,)
        assert (predicted == recording.terminated).all()
    ends = recording.terminated.sum()
    assert 100 < ends < STEPS - 100 if family(recording.case) in BOUNDS else ends == 0


def test_rewards_are_as_accurate_as_stated(recording):
    error = recording.task.reward(*recording.triple) - recording.rewards
    assert error[recording.natural].abs().mean() < recording.forward.error


def test_rewards_besides_forward_speed_are_exact(recording):
    states, next_states = recording.states.clone(), recording.next_states.clone()
    states[:, recording.forward.entries] = next_states[:, recording.forward.entries] = 0.0
    rest = recording.rewards - recording.forward.weight * recording.speeds
    error = recording.task.reward(states, recording.actions, next_states) - rest
    if recording.case == "Ant-v5 without contact forces":  # their cost is left out, as they are not observed
        assert error.min() > -1e-9 and 0.001 < error.max() <= 0.039
    else:  # the double pendulum's tip is not measured at the observed state, but within the substep before it
        assert error.abs().max() < (1e-3 if family(recording.case) == "InvertedDoublePendulum" else 1e-9)


def test_sizes_and_time_limits_are_those_of_the_environment(recording):
    env, known = make(recording.case), recording.task
    size = env.observation_space.shape[0]
    assert size == known.state_dim[0] if recording.case in TASKS else size in known.state_dim[1:]
    assert env.action_space.shape == (known.action_dim,)
    assert (env.action_space.low == np.float32(-known.action_bound)).all()
    assert (env.action_space.high == np.float32(known.action_bound)).all()
    assert gymnasium.spec(known.env_name).max_episode_steps == known.horizon
    assert known.env_name == recording.case.split()[0]


def test_leading_axes_devices_precision_and_gradients(recording):
    triple = [part[:600].to(torch.float32) for part in recording.triple]
    for function in (recording.task.termination, recording.task.reward):
        flat = function(*triple)
        nested = function(*(part.reshape(3, 200, -1) for part in triple))
        assert nested.shape == (3, 200) and torch.equal(nested.flatten(), flat)
        assert torch.equal(function(*(part[7] for part in triple)), flat[7])
        assert torch.equal(torch.func.vmap(function)(*triple), flat)
        assert function(*(part.to("meta") for part in triple)).is_meta  # no tensor of another device takes part
    rewards = recording.task.reward(*triple)
    exact = recording.task.reward(*(part.double() for part in triple))
    assert rewards.dtype == torch.float32 and exact.dtype == torch.float64
    assert torch.allclose(rewards.double(), exact, rtol=1e-3, atol=1e-3)
    if family(recording.case) != "InvertedPendulum":  # whose reward is a constant wherever it has a derivative
        leaves = [part.requires_grad_() for part in triple]
        gradients = torch.autograd.grad(recording.task.reward(*leaves).sum(), leaves, allow_unused=True)
        gradients = [gradient for gradient in gradients if gradient is not None]
        assert gradients and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_terminates(recording, bad):
    states, actions, next_states = (part[:1] for part in recording.triple)
    size = next_states.shape[1]
    spoiled = next_states.repeat(size, 1)
    spoiled[torch.arange(size), torch.arange(size)] = bad
    assert recording.task.termination(states.repeat(size, 1), actions.repeat(size, 1), spoiled).all()


def values_at(case, bound):
    """Returns positions at a bound and as close to it as float64 allows, or as the simulator's geometry does."""
    if family(case) == "InvertedDoublePendulum":
        return [bound - 1e-9, bound + 1e-9]
    return [np.nextafter(bound, -np.inf), float(bound), np.nextafter(bound, np.inf)]


@pytest.mark.parametrize("case", [name for name in TASKS if family(name) in BOUNDS])
def test_bounds_are_strict_or_inclusive_as_the_environment_has_them(case):
    env = make(case)
    env.reset(seed=0)
    start, rest = env.init_qpos.copy(), np.zeros(env.model.nv)
    env.frame_skip = 0  # a step then stays where it is and reports on that state
    bounds = BOUNDS[family(case)] + ([(3, -100), (3, 100)] if family(case) == "Hopper" else [])
    for index, bound in bounds:
        outcomes = []
        for value in values_at(case, bound):
            qpos = start.copy()
            qpos[index] = value
            env.set_state(qpos, rest)
            with np.errstate(all="ignore"):  # no time passes: the forward velocity is 0 / 0
                state, _, terminated, _, _ = env.step(np.zeros(env.model.nu))
            rows = torch.as_tensor(state), torch.zeros(env.model.nu), torch.as_tensor(state)
            assert task(case).termination(*rows).item() == terminated, (index, value)
            outcomes.append(terminated)
        assert len(set(outcomes)) == 2


@pytest.mark.parametrize("case", ["Hopper-v4", "Hopper-v5"])
def test_hopper_sees_velocities_of_100_only_where_they_are_not_clipped(case):
    env = make(case)
    env.reset(seed=0)
    env.set_state(env.init_qpos, np.full(env.model.nv, 100.0))
    assert not env.is_healthy
    action, clipped = torch.zeros(3), torch.as_tensor(env._get_obs())
    unclipped = torch.as_tensor(env.state_vector()[1:])
    assert not task(case).termination(clipped, action, clipped)
    assert task(case).termination(unclipped, action, unclipped)


@pytest.mark.parametrize(
    ("name", "bonus"),
    {"Hopper": 1, "Walker2d": 1, "Ant": 1, "InvertedPendulum": 1, "InvertedDoublePendulum": 10}.items(),
)
def test_version_4_pays_the_healthy_bonus_at_the_end_and_version_5_does_not(name, bonus):
    states = torch.zeros(2, task(f"{name}-v5").state_dim[0], dtype=torch.float64)
    states[0, 1] = 5.0  # terminates
    states[1, 0] = 0.9
    if name == "InvertedDoublePendulum":
        states[1, 3:5] = 1.0  # cosines of upright poles
    actions = torch.zeros(2, task(f"{name}-v5").action_dim, dtype=torch.float64)
    paid = [task(f"{name}-{version}").reward(states, actions, states) for version in ("v4", "v5")]
    assert task(f"{name}-v5").termination(states, actions, states).tolist() == [True, False]
    assert (paid[0] - paid[1]).tolist() == [bonus, 0]


def test_a_step_that_is_known_to_have_terminated_is_not_judged_again():
    states, actions = torch.ones(2, 11), torch.zeros(2, 3)
    for name, bonus in (("Hopper-v4", [1, 1]), ("Hopper-v5", [0, 1])):
        paid = task(name).reward(states, actions, states, torch.tensor([True, False]))
        assert (paid - task(name).base_reward(states, actions, states)).tolist() == bonus


def test_predicted_contact_forces_of_ant_are_clipped_before_they_cost():
    states, actions = torch.zeros(1, 105), torch.zeros(1, 8)
    pushed = states.clone()
    states[:, 0] = pushed[:, 0] = 0.5
    pushed[0, 27:30] = torch.tensor([5.0, -3.0, 0.5])
    reward = task("Ant-v5").reward
    cost = reward(states, actions, states) - reward(states, actions, pushed)
    assert cost.item() == pytest.approx(0.0005 * (1 + 1 + 0.25), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "error"), [("hopper-medium", 0.005), ("hopper-random", 0.005), ("halfcheetah-medium", 0.15)]
)
def test_the_bundled_datasets_follow_the_formulas(name, error):
    h5py = pytest.importorskip("h5py")
    with h5py.File(Path(__file__).parent.parent / "data" / "bundled" / f"{name}-demo.hdf5") as file:
        known = task(file.attrs["env_name"])
        states, actions, rewards, terminals, timeouts = (
            torch.as_tensor(file[key][:]) for key in ("observations", "actions", "rewards", "terminals", "timeouts")
        )
        if "next_observations" in file:
            next_states, rows = torch.as_tensor(file["next_observations"][:]), slice(None)
        else:
            next_states, rows = states.roll(-1, 0), ~(terminals | timeouts)
            rows[-1] = False
    triple = states[rows], actions[rows], next_states[rows]
    assert len(triple[0]) > 40_000
    assert torch.equal(known.termination(*triple), terminals[rows])
    assert (known.reward(*triple) - rewards[rows]).abs().mean() < error


def test_formulas_are_recommended_where_their_error_is_small_against_the_reward():
    learned = {known.env_name for known in TASKS.values() if known.reward_source == "learned"}
    assert learned == {f"{name}-{version}" for name in ("HalfCheetah", "Ant", "Humanoid") for version in ("v4", "v5")}
    assert all(known.reward_source in ("formula", "learned") and known.reward_reason for known in TASKS.values())


def test_a_recommended_formula_errs_by_less_than_a_40th_of_the_rewards_spread(recording):
    if recording.task.reward_source == "learned":
        pytest.skip("a learned reward is recommended")
    error = (recording.task.reward(*recording.triple) - recording.rewards)[recording.natural].abs().mean()
    assert error <= recording.rewards.double().std() / 40  # which is 0 for InvertedPendulum-v4


@pytest.mark.parametrize(
    ("name", "closest"),
    [("Hoper-v5", "Hopper-v5"), ("hopper-v4", "Hopper-v4"), ("Walker-v5", "Walker2d-v5"), ("Ant-v2", "Ant-v")],
)
def test_an_unknown_name_is_told_the_closest_known(name, closest):
    with pytest.raises(ValueError, match=rf"no task '{name}': did you mean '{closest}.*Known are Ant, HalfCheetah, "):
        task(name)
    with pytest.raises(ValueError, match="no task None"):
        task(None)


def test_tasks_cannot_be_changed_and_travel_to_other_processes():
    known = task("Ant-v5")
    with pytest.raises(FrozenInstanceError):
        known.horizon = 5
    states, actions = torch.zeros(2, 105), torch.zeros(2, 8)
    copy = pickle.loads(pickle.dumps(known))
    assert torch.equal(copy.reward(states, actions, states), known.reward(states, actions, states))


def test_the_module_imports_pytorch_and_the_standard_library_only():
    source = (Path(__file__).parent.parent / "mujoco_tasks.py").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch"}
