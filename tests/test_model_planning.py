"""model_planning: plans on a line whose dynamics are known, s' = s + 0.5 a: the best action can be worked out."""

import copy

import numpy as np
import pytest
import torch

from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble
from model_env import ModelEnv, ModelState, ModelStep
from model_planning import CEM, clone_policy, coloured_noise, fit_value
from mujoco_tasks import Task


@pytest.fixture
def line(unit_normalisation):
    """Returns a function that builds a ModelEnv of members on the line, with actions in [-1, 1].

    A member has its own gain: ``s' = s + gain a``.
    """

    def build(
        reward,
        ends=lambda next_states: torch.zeros(len(next_states), dtype=torch.bool),
        lowest_reward=None,
        gains=(0.5, 0.5),
        **options,
    ):
        members = []
        for gain in gains:
            member = DeterministicModel(Architecture(1, 1, hidden_size=()), unit_normalisation(1, 1))
            with torch.no_grad():
                member.network.dynamics.weights[0].copy_(torch.tensor([[[0.0], [gain]]]))
            members.append(member)
        ensemble = DynamicsEnsemble.from_members(members)
        if lowest_reward is not None:
            ensemble.metadata = {"data": {"lowest_reward": lowest_reward}}
        task = Task("Line", (1,), 1, 1.0, 100, lambda s, a, n: ends(n[..., 0]), None, "learned", "a test's own")
        return ModelEnv(ensemble, task, reward=lambda s, a, n: reward(n[..., 0]), state_bounds=None, **options)

    return build


class Recording(CEM):
    """Remembers the candidates of each iteration, and what they were found to earn."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def evaluate(self, states, candidates):
        returns = super().evaluate(states, candidates)
        self.seen.append((candidates, returns))
        return returns


def to_zero(next_states):
    return -next_states.square()


def test_best_action_is_found_for_each_state_of_a_batch(line):
    planner = CEM(line(to_zero), horizon=3, population=256, iterations=5, particles=2)
    actions = planner.plan(np.array([[0.2], [-0.3], [3.0], [0.0]], dtype=np.float32))
    assert actions.shape == (4, 1)
    # s' = 0 takes an action of -2 s, as far as the bounds allow
    assert actions[:, 0].tolist() == pytest.approx([-0.4, 0.6, -1.0, 0.0], abs=0.12)


def test_plans_are_kept_from_step_to_step_and_forgotten_where_an_episode_has_ended(line):
    planner = Recording(line(to_zero), horizon=6, population=32, iterations=2, particles=1)
    states = torch.tensor([[3.0], [-3.0]])
    planner.plan(states)
    candidates, returns = planner.seen[-1]
    best = candidates[[0, 1], returns.argmax(dim=1)]  # (batch, horizon, action_dim)
    kept_planner, planner = planner, copy.deepcopy(planner)
    planner.reset(np.array([True, False]))
    for each, kept in ((kept_planner, (True, True)), (planner, (False, True))):
        each.plan(states)
        candidates = each.seen[2][0]
        mean = candidates[:, -1, :3].mean(dim=(1, 2)).tolist()
        for row, sign in enumerate((-1, 1)):
            moved_on = (candidates[row, :, :-1] == best[row, 1:]).all(dim=(1, 2)).any()
            assert moved_on == kept[row], "the best plan is a candidate again, a step later"
            assert sign * mean[row] > 0.3 if kept[row] else mean[row] == 0, "and the mean is"
    planner.reset()
    assert planner.plan(states[:1]).shape == (1, 1)


def test_the_step_that_comes_into_the_horizon_is_as_the_one_before_or_what_the_prior_does(line):
    for prior, expected in ((None, "as before"), (lambda states: 0 * states, "no deviation")):
        planner = Recording(line(to_zero), horizon=4, population=16, iterations=1, particles=1, prior=prior)
        for _ in range(2):
            planner.plan([[3.0]])
        *_, before, last = planner.seen[1][0][0, -1, :, 0].tolist()  # of the mean
        assert before != 0 and last == {"as before": before, "no deviation": 0}[expected]


def test_search_goes_on_from_elites_with_fewer_candidates(line):
    planner = Recording(line(to_zero), horizon=3, population=100, iterations=3, particles=1)
    planner.plan([[3.0]])
    sizes = [candidates.shape[1] for candidates, _ in planner.seen]
    assert sizes == [100 + 3 + 1, 80 + 3, 64 + 3 + 1], "drawn, kept from 10 elites, the mean first and last"
    bests = [returns.max().item() for _, returns in planner.seen]
    assert bests == sorted(bests), "the best so far stays a candidate"


def test_a_step_of_the_horizon_is_one_step_of_the_model_for_all_states_candidates_and_particles(line):
    core, rows = line(to_zero), []
    step = core.step
    core.step = lambda state, *rest: rows.append(len(state.states)) or step(state, *rest)
    CEM(core, horizon=4, population=10, iterations=1, particles=3, elite_share=0.2).plan(np.zeros((5, 1)))
    assert rows == [5 * (10 + 1 + 1) * 3] * 4


def test_particles_of_every_candidate_keep_the_same_members(line):
    """Equal candidates earn the same: none has drawn better members than another."""
    core = line(lambda next_states: next_states, gains=(0.1, 0.5, 0.9), propagation="tsinf")
    planner = CEM(core, horizon=2, particles=2)
    earned = {planner.evaluate(torch.zeros(2, 1), torch.ones(2, 6, 2, 1)).unique().numpy().item() for _ in range(30)}
    # A member of gain g earns g + 2 g; two of three members are dealt.
    assert sorted(earned) == pytest.approx([0.9, 1.5, 2.1])


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


def test_prior_goes_on_alone_behind_the_horizon_and_the_last_state_counts_by_its_value(line):
    """From 0, one step of 0.5 + 1 and two of the prior's 0.5, each times the gain of 0.5."""
    seen = []

    def value(states):
        return seen.append(states.clone()) or 10 * states[:, 0]

    guides = {"prior": lambda states: torch.full_like(states, 0.5), "tail": 2, "value": value}
    planner = CEM(line(lambda next_states: next_states), horizon=1, particles=1, discount=0.5, **guides)
    returns = planner.evaluate(torch.zeros(1, 1), torch.tensor([[[[1.0]], [[-0.5]]]]))
    assert [states.flatten().tolist() for states in seen] == [[1.0, 0.5]]
    # Actions of 1 (the bound), 0.5 and 0.5; then of 0, 0.5 and 0.5.
    assert returns.tolist() == [[0.5 + 0.75 / 2 + 1.0 / 4 + 10 * 1.0 / 8, 0.25 / 2 + 0.5 / 4 + 10 * 0.5 / 8]]
    with pytest.raises(ValueError, match="tail is 2, steps in which the prior acts; give a prior"):
        CEM(line(to_zero), tail=2)


@pytest.mark.parametrize(("worth", "expected"), [(7.0, [10.0, 1.0]), (-7.0, [-4.0, -6.0])])
def test_an_end_is_worth_nothing_but_no_more_than_to_go_on(line, worth, expected):
    core = line(lambda next_states: torch.ones_like(next_states), ends=lambda next_states: next_states > 1)
    planner = CEM(core, horizon=3, particles=1, value=lambda states: torch.full_like(states[:, 0], worth))
    assert planner.evaluate(torch.tensor([[0.9]]), torch.tensor([[[[0.0]] * 3, [[1.0]] * 3]])).tolist() == [expected]


def test_a_path_that_runs_away_is_the_worst_and_does_not_stop_the_others(line):
    """The prior's action in such a state is no number, which the model refuses."""
    core = line(lambda next_states: next_states.square(), gains=(torch.inf, 0.5), propagation="tsinf")
    planner = CEM(core, horizon=3, particles=1, prior=lambda states: 0 * states)
    for _ in range(8):
        returns = planner.evaluate(torch.zeros(1, 1), torch.tensor([[[[1.0]] * 3, [[0.0]] * 3]]))
        assert returns[0, 0] in (-torch.inf, 0.25 + 1 + 2.25)


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


def test_anything_that_steps_can_be_planned_in():
    """Such as a simulator: here the line itself, with a hidden second state."""

    class Line:
        action_bounds = torch.tensor([-1.0]), torch.tensor([1.0])

        def start(self, states, generator):
            return ModelState(states, None)

        def step(self, state, actions, generator):
            states = torch.cat([state.states[:, :1] + 0.5 * actions, state.states[:, 1:] + 1], dim=1)
            reward, never = -states[:, 0].square(), torch.zeros(len(states), dtype=torch.bool)
            return ModelStep(ModelState(states, None), reward, reward, never, never, never, None)

    planner = CEM(Line(), horizon=4, particles=1, reward_after_end=0.0, generator=torch.Generator().manual_seed(0))
    assert planner.plan([[0.2, 5.0]]).item() == pytest.approx(-0.4, abs=0.12)


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


@pytest.fixture(scope="module")
def recorded():
    """States far from unit scale, and actions that depend on them."""
    random = np.random.default_rng(0)
    states = (random.normal(size=(4000, 3)) * [1, 10, 0.1] + [0, 5, 1]).astype(np.float32)
    return states, np.tanh((states - [0, 5, 1]) @ [[1.0, 0.0], [0.1, 0.05], [0.0, 10.0]]).astype(np.float32)


def test_policy_is_cloned_from_what_it_did(recorded):
    states, actions = recorded
    policy = clone_policy(states, actions)
    error = (policy(torch.as_tensor(states)) - torch.as_tensor(actions)).square().mean().sqrt()
    assert error < 0.1
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    torch.rand(1)
    assert torch.equal(clone_policy(states, actions)(torch.as_tensor(states[:5])), policy(torch.as_tensor(states[:5])))


def test_value_is_what_was_earned_in_the_next_steps(recorded):
    """Two episodes: 6 rows and an end, 5 rows and a cut. The states tell the rows apart."""
    rewards = np.array([1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50], np.float32)
    states = np.eye(11, dtype=np.float32)
    terminals, timeouts = np.arange(11) == 5, np.zeros(11, bool)
    value = fit_value(states, rewards, terminals, timeouts, steps=3, hidden_size=(32,), epochs=600)
    worth = value(torch.as_tensor(states))
    assert worth.shape == (11,)
    seen = [6, 9, 12, 15, 11, 6, 60, 90, 120]  # the last two rows do not show three steps
    assert worth[:9].tolist() == pytest.approx(seen, abs=1)

    timeouts[5], terminals[5] = True, False
    cut = fit_value(states, rewards, terminals, timeouts, steps=3, hidden_size=(32,), epochs=600)
    assert cut(torch.as_tensor(states))[[0, 1, 2, 3, 6, 7, 8]].tolist() == pytest.approx(seen[:4] + seen[6:], abs=1)
    with pytest.raises(ValueError, match="no row is followed by 9 steps or a terminal state"):
        fit_value(states, rewards, terminals, timeouts, steps=9)


@pytest.mark.parametrize(
    ("name", "value"), [("horizon", 0), ("population", 1), ("iterations", 0), ("particles", 0), ("tail", -1)]
)
def test_sizes_that_make_no_sense_are_refused(line, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at least"):
        CEM(line(to_zero), **{name: value})
