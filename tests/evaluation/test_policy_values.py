"""Values of policies in models whose paths can be worked out, and in the real simulator."""

import dataclasses

import numpy as np
import pytest
import torch

from data.behaviour import SquashedGaussianPolicy
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from evaluation.policy_values import (
    PolicyTruths,
    StackedPolicies,
    imagine_policies,
    perturb,
    policy_values,
    score_values,
    simulate_policies,
    standard_noise,
)
from model_env import ModelEnv
from mujoco_tasks import Task, task

gymnasium = pytest.importorskip("gymnasium")
UNBOUNDED = (np.full(2, -100.0), np.full(2, 100.0))


class Noise:
    """Stands for a random generator, and gives the noise that it was made of."""

    def __init__(self, values):
        self.values = values

    def standard_normal(self, size, dtype):
        assert size == len(self.values)
        return self.values


def random_policy(seed, state_dim=2, action_dim=1):
    random = np.random.default_rng(seed)
    shapes = {"weight_0": (8, state_dim), "bias_0": (8,), "weight_1": (6, 8), "bias_1": (6,)}
    shapes |= {f"{head}_weight": (action_dim, 6) for head in ("mean", "log_std")}
    shapes |= {f"{head}_bias": (action_dim,) for head in ("mean", "log_std")}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    bounds = {"low": np.full(action_dim, -1, np.float32), "high": np.full(action_dim, 1, np.float32)}
    return SquashedGaussianPolicy(arrays | bounds, description="random weights")


def pay_position(states, actions, next_states):
    return next_states[..., 0]


def pay_action(states, actions, next_states):
    return actions[..., 0]


def reaches_three(states, actions, next_states):
    return next_states[..., 0] >= 3


@pytest.fixture
def line():
    """A task whose episodes end when the first entry of the state reaches 3."""
    return Task("Line-v0", (2,), 1, 1.0, 1000, reaches_three, pay_position, "formula", "it is known")


@pytest.fixture
def step_up(constant_member):
    """Three members that all predict a change of (1, 0)."""
    return DynamicsEnsemble.from_members([constant_member(DeterministicModel, [1.0, 0.0]) for _ in range(3)])


@pytest.fixture
def truths():
    """Made-up truths of two policies, from a start at 0 and one at 1."""
    returns = np.array([[[6.0, 4.0], [8.0, 8.0]], [[5.0, 3.0], [7.0, 7.0]]])
    return PolicyTruths(("bad", "good"), np.float32([[0, 0], [1, 0]]), returns, returns + 1, seed=7, steps=10)


@pytest.fixture
def policies():
    return StackedPolicies([random_policy(0), random_policy(1)])


def test_stacked_policies_act_as_they_do_one_by_one():
    alone = [random_policy(seed, state_dim=3, action_dim=2) for seed in range(4)]
    random = np.random.default_rng(0)
    states, noise = random.normal(size=(4, 5, 3)).astype(np.float32), random.normal(size=(5, 2))
    actions = StackedPolicies(alone).act(torch.as_tensor(states), torch.as_tensor(noise)).numpy()
    for index, policy in enumerate(alone):
        for start in range(5):
            assert actions[index, start] == pytest.approx(policy(states[index, start], Noise(noise[start])), abs=1e-7)


def test_perturbed_copy_differs_in_its_weights_but_not_in_its_bounds():
    policy = random_policy(0)
    copy = perturb(policy, 0.1, np.random.default_rng(0))
    relative = copy.arrays["weight_1"] / policy.arrays["weight_1"] - 1
    assert 0.05 < relative.std() < 0.15
    assert np.array_equal(copy.arrays["high"], policy.arrays["high"])
    assert "perturbed by 0.1" in copy.description


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_returns_in_a_model_that_steps_up_are_those_worked_out(step_up, policies, truths, line, propagation):
    table = policy_values(step_up, policies, truths, line, pay_position, UNBOUNDED, propagations=[propagation])
    own = table[table.propagation == propagation].set_index(["policy", "horizon"])
    # From 0 it is paid 1, 2 and 3, and ends; from 1 it is paid 2 and 3.
    assert own.loc[("bad", "truncated"), "predicted"] == pytest.approx((6 + 5) / 2)
    discounted = (1 + 0.99 * 2 + 0.99**2 * 3 + 2 + 0.99 * 3) / 2
    assert own.loc[("good", "discounted"), "predicted"] == pytest.approx(discounted)
    assert own.loc[("bad", "truncated"), "true"] == 5
    assert own.loc[("good", "discounted"), "true"] == 7
    assert (own.escaped == 0).all()


def test_truth_paid_by_the_reward_model_has_rows_of_its_own(step_up, policies, truths, line):
    table = policy_values(step_up, policies, truths, line, pay_position, UNBOUNDED)
    assert list(table.propagation.unique()) == ["simulator", "ts1", "tsinf"]
    simulated = table[table.propagation == "simulator"]
    assert (simulated.predicted - simulated.true).tolist() == [1, 1, 1, 1]


def test_states_are_clamped_and_paths_that_left_the_bounds_are_counted(step_up, policies, truths, line):
    bounds = np.array([-10.0, -10.0]), np.array([2.5, 10.0])
    table = policy_values(step_up, policies, truths, line, pay_position, bounds, propagations=["ts1"])
    own = table.query("propagation == 'ts1' and horizon == 'truncated'")
    assert own.predicted.tolist() == pytest.approx([(1 + 2 + 2.5 + 2 + 2.5) / 2] * 2)
    assert own.escaped.tolist() == [1, 1]


def test_path_that_came_back_has_still_left_the_bounds(constant_member, policies, truths, line):
    falling = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [-1.0, 0.0])])
    bounds = np.array([-100.0, -10.0]), np.array([0.5, 10.0])  # left in the first step from 2 only
    started = dataclasses.replace(truths, starts=np.float32([[1, 0], [2, 0]]))
    table = policy_values(falling, policies, started, line, pay_position, bounds, propagations=["ts1"])
    assert table.query("propagation == 'ts1'").escaped.tolist() == [0.5] * 4


def test_particle_of_tsinf_keeps_its_member_when_others_have_ended(constant_member, line):
    changes = (4.0, -1.0, -2.0)
    members = [constant_member(DeterministicModel, [change, 0.0], delta_scale=[1.0, 1.0]) for change in changes]
    ensemble = DynamicsEnsemble.from_members(members)
    starts = np.zeros((9, 2), np.float32)
    truths = PolicyTruths(("one",), starts, np.zeros((2, 1, 9)), np.zeros((2, 1, 9)), seed=0, steps=4)
    core = ModelEnv(ensemble, line, reward=pay_position, propagation="tsinf", members="all", state_bounds=UNBOUNDED)
    paid, _ = imagine_policies(core, StackedPolicies([random_policy(0)]), truths)
    # Three have each member: 4 and the end; -1, -2, -3, -4; twice that.
    assert sorted(paid.sum(axis=0).flatten().tolist()) == [-20] * 3 + [-10] * 3 + [4] * 3


def test_policies_act_in_the_model_with_the_noise_of_the_simulator(constant_member, policies, truths, line):
    still = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [0.0, 0.0], delta_scale=[1.0, 1.0])])
    table = policy_values(still, policies, truths, line, pay_action, UNBOUNDED, propagations=["tsinf"])
    own = table.query("propagation == 'tsinf' and horizon == 'truncated'")
    noise = standard_noise(truths.seed, 0, (truths.steps, 2, 1))
    for index, name in enumerate(truths.names):
        policy = random_policy(index)
        expected = [policy(truths.starts[start], Noise(noise[t, start]))[0] for t in range(10) for start in range(2)]
        row = own[own.policy == name]
        assert row.predicted.item() == pytest.approx(np.sum(expected) / 2, abs=1e-5)


def test_simulated_returns_are_those_of_episodes_played_one_by_one():
    alone = [random_policy(seed, state_dim=11, action_dim=3) for seed in range(2)]
    truths = simulate_policies(
        ["a", "b"], StackedPolicies(alone), task("Hopper-v5"), task("Hopper-v5").reward, starts=2, seed=5, steps=40
    )
    noise = standard_noise(5, 0, (40, 2, 3))
    env = gymnasium.make("Hopper-v5")
    for index, policy in enumerate(alone):
        for start in range(2):
            state, _ = env.reset(seed=5 + start)
            assert truths.starts[start] == pytest.approx(state, abs=1e-6)
            rewards = []
            for step in range(40):
                state, reward, terminated, *_ = env.step(policy(state, Noise(noise[step, start])))
                rewards.append(reward)
                if terminated:
                    break
            assert truths.returns[0, index, start] == pytest.approx(sum(rewards), rel=1e-4)
            discounted = np.sum(rewards * 0.99 ** np.arange(len(rewards)))
            assert truths.returns[1, index, start] == pytest.approx(discounted, rel=1e-4)
    # The formula is right to 0.005 a step or so: no step is missing, and none is paid after an end.
    assert np.abs(truths.model_paid - truths.returns).max() < 0.5


def test_process_noise_changes_the_simulator_only():
    played = [
        simulate_policies(
            ["a"],
            StackedPolicies([random_policy(0, state_dim=11, action_dim=3)]),
            task("Hopper-v5"),
            task("Hopper-v5").reward,
            starts=1,
            seed=5,
            process_noise=noise,
            steps=10,
        )
        for noise in (0.0, 0.5)
    ]
    assert np.array_equal(played[0].starts, played[1].starts)
    assert played[0].returns[0] != pytest.approx(played[1].returns[0], rel=1e-3)


def test_scores_are_shares_of_the_range_of_true_values():
    scores = score_values(np.array([0.0, 5.0, 10.0]), np.array([1.0, 8.0, 6.0]))
    assert scores.error == pytest.approx((1 + 3 + 4) / 3 / 10)
    assert scores.spearman == pytest.approx(0.5)
    assert scores.regret == pytest.approx(0.5)  # it holds the second for the best
