"""model_planning: plans on a line whose dynamics are known, s' = s + 0.5 a: the best action can be worked out."""

import numpy as np
import pytest
import torch

from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble
from model_env import ModelEnv
from model_planning import CEM, clone_policy, coloured_noise
from mujoco_tasks import Task


@pytest.fixture
def line(unit_normalisation):
    """Returns a function that builds a ModelEnv of two equal members on the line, with actions in [-1, 1]."""

    def build(reward, ends=lambda next_states: torch.zeros(len(next_states), dtype=torch.bool), lowest_reward=None):
        member = DeterministicModel(Architecture(1, 1, hidden_size=()), unit_normalisation(1, 1))
        with torch.no_grad():
            member.network.dynamics.weights[0].copy_(torch.tensor([[[0.0], [0.5]]]))
        ensemble = DynamicsEnsemble.from_members([member, member])
        if lowest_reward is not None:
            ensemble.metadata = {"data": {"lowest_reward": lowest_reward}}
        task = Task("Line", (1,), 1, 1.0, 100, lambda s, a, n: ends(n[..., 0]), None, "learned", "a test's own")
        return ModelEnv(ensemble, task, reward=lambda s, a, n: reward(n[..., 0]), state_bounds=None)

    return build


def to_zero(next_states):
    return -next_states.square()


def test_best_action_is_found_for_each_state_of_a_batch(line):
    planner = CEM(line(to_zero), horizon=4, population=64, iterations=5, particles=2)
    actions = planner.plan(np.array([[0.2], [-0.3], [3.0], [0.0]], dtype=np.float32))
    assert actions.shape == (4, 1)
    # s' = 0 takes an action of -2 s, as far as the bounds allow
    assert actions[:, 0].tolist() == pytest.approx([-0.4, 0.6, -1.0, 0.0], abs=0.12)


def test_plans_are_kept_from_step_to_step_and_forgotten_where_an_episode_has_ended(line):
    planner = CEM(line(to_zero), horizon=6, population=32, iterations=2, particles=1)
    states = torch.tensor([[3.0], [-3.0]])
    planner.plan(states)
    assert planner._mean[0, :3].mean() < -0.3 and planner._mean[1, :3].mean() > 0.3, "the plans, moved on"
    planner.reset(torch.tensor([True, False]))
    assert (planner._mean[0] == 0).all() and planner._mean[1, :3].mean() > 0.3
    planner.reset()
    assert planner.plan(states[:1]).shape == (1, 1)


def test_same_seed_plans_the_same_and_another_differently(line):
    def plan(seed):
        generator = torch.Generator().manual_seed(seed)
        return CEM(line(to_zero), horizon=3, population=16, iterations=1, generator=generator).plan([[0.2]] * 3)

    assert torch.equal(plan(1), plan(1))
    assert not torch.equal(plan(1), plan(2))


def test_prior_is_what_candidates_deviate_from(line):
    """With no spread there is nothing to search: the plan is the prior's own action, inside the bounds."""
    planner = CEM(line(to_zero), horizon=3, population=8, iterations=2, prior=lambda states: -states, spread=0.0)
    assert planner.plan([[0.25], [7.0]])[:, 0].tolist() == pytest.approx([-0.25, -1.0])


def test_prior_acts_in_the_states_that_the_model_predicts(line):
    seen = []

    def prior(states):
        seen.append(states.clone())
        return torch.ones_like(states)

    planner = CEM(line(to_zero), horizon=3, population=2, iterations=1, particles=1, prior=prior, spread=0.0)
    planner.evaluate(torch.tensor([[0.0]]), torch.zeros(1, 1, 3, 1))
    assert [states.item() for states in seen] == [0.0, 0.5, 1.0]


def test_what_follows_an_end_is_not_counted(line):
    """Two candidates: one stays, one crosses 1 at its first step, where the episode ends although rewards go on."""
    core = line(lambda next_states: torch.ones_like(next_states), ends=lambda next_states: next_states > 1)
    planner = CEM(core, horizon=5, particles=1)
    candidates = torch.stack([torch.zeros(5, 1), torch.ones(5, 1)])[None]
    assert planner.evaluate(torch.tensor([[0.9]]), candidates).tolist() == [[5.0, 1.0]]


def test_ending_is_no_way_out_of_negative_rewards(line):
    """Every step costs 1: to cross 1 and die must not look better than to live."""

    def cost(next_states):
        return -torch.ones_like(next_states) - 0.01 * next_states.square()

    core = line(cost, ends=lambda next_states: next_states > 1, lowest_reward=-1.5)
    planner = CEM(core, horizon=6, population=64, iterations=4, particles=1)
    assert planner.reward_after_end == -1.5
    assert planner.plan([[0.8]]).item() < 0
    naive = CEM(core, horizon=6, population=64, iterations=4, particles=1, reward_after_end=0.0)
    assert naive.plan([[0.8]]).item() > 0.4, "the test can tell"


def test_candidates_that_are_no_numbers_are_the_worst(line):
    core = line(lambda next_states: torch.where(next_states > 0.4, torch.nan, -10 + next_states))
    planner = CEM(core, horizon=2, population=64, iterations=3, particles=1)
    returns = planner.evaluate(torch.tensor([[0.0]]), torch.tensor([[[[1.0], [0.0]], [[-1.0], [0.0]]]]))
    assert returns[0, 0] == -torch.inf and returns[0, 1] == pytest.approx(-21.0)
    assert planner.plan([[0.0]]).item() < 0.8


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("length", [1, 2, 15, 16])
def test_coloured_noise_has_unit_variance_at_every_step(beta, length):
    noise = coloured_noise((20_000, length), beta, torch.Generator().manual_seed(0))
    assert noise.shape == (20_000, length)
    assert noise.mean(dim=0).abs().max() < 0.04
    assert noise.std(dim=0).numpy() == pytest.approx(np.ones(length), abs=0.04)


def test_larger_exponents_make_neighbouring_steps_more_alike():
    correlations = []
    for beta in (0.0, 1.0, 2.0):
        noise = coloured_noise((5000, 20), beta, torch.Generator().manual_seed(0)).numpy()
        correlations.append(np.corrcoef(noise[:, 9], noise[:, 10])[0, 1])
    assert abs(correlations[0]) < 0.05 and correlations[0] < correlations[1] - 0.2 < correlations[2] - 0.3


def test_policy_is_cloned_from_what_it_did():
    random = np.random.default_rng(0)
    states = (random.normal(size=(4000, 3)) * [1, 10, 0.1]).astype(np.float32)
    actions = np.tanh(states @ [[1.0, 0.0], [0.1, 0.05], [0.0, 10.0]]).astype(np.float32)
    policy = clone_policy(states, actions)
    error = (policy(torch.as_tensor(states)) - torch.as_tensor(actions)).square().mean().sqrt()
    assert error < 0.1
    again = clone_policy(states, actions)
    assert torch.equal(policy(torch.as_tensor(states[:5])), again(torch.as_tensor(states[:5])))


@pytest.mark.parametrize(("name", "value"), [("horizon", 0), ("population", 1), ("iterations", 0), ("particles", 0)])
def test_sizes_that_make_no_sense_are_refused(line, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at least"):
        CEM(line(to_zero), **{name: value})
