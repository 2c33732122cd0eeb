"""model_env: the batched step worked out by hand, pessimism, Gymnasium's and Stable-Baselines3's contracts, simulators.

Members without hidden layers predict what can be worked out: a constant change, or the action as the change.
"""

import copy
import re
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.passive_env_checker import env_reset_passive_checker, env_step_passive_checker
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import learn_model
from deterministic_model import DeterministicEnsemble, DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble, Normalisation, load_ensemble, random_stream
from model_env import (
    MOPO,
    ModelEnv,
    ModelState,
    MOReL,
    SingleModelEnv,
    VectorModelEnv,
    as_sb3,
    disagreement_threshold,
)
from mujoco_tasks import Task, task
from probabilistic_model import ProbabilisticModel

DATA = {"states": {"low": [-2.0, -2.0], "high": [2.0, 2.0]}, "actions": {"low": [-1.0], "high": [1.0]}}


def own_task(**changes):
    """Two state dimensions, one action: ends above 5, pays the second dimension of the next state."""
    known = Task(
        env_name="Line",
        state_dim=(2,),
        action_dim=1,
        action_bound=1.0,
        horizon=7,
        termination=lambda s, a, n: n[..., 0] > 5,
        base_reward=lambda s, a, n: n[..., 1],
        reward_source="formula",
        reward_reason="it is known",
    )
    return replace(known, **changes)


@pytest.fixture
def changes_by(constant_member):
    """Returns a function that builds an ensemble whose members add these changes; variances make it probabilistic."""

    def build(*changes, variances=None, **metadata):
        kind = DeterministicModel if variances is None else ProbabilisticModel
        pairs = [(change,) for change in changes] if variances is None else zip(changes, variances, strict=True)
        ensemble = DynamicsEnsemble.from_members([constant_member(kind, *pair) for pair in pairs])
        ensemble.metadata = {"data": DATA | {"initial_states": [[0.0, 0.0]]}} | metadata
        return ensemble

    return build


@pytest.fixture
def moved_by_actions(unit_normalisation):
    """Returns a function that builds an ensemble of equal members that add the action to every state dimension."""

    def build(state_dim=2, size=1):
        member = DeterministicModel(Architecture(state_dim, 1, hidden_size=()), unit_normalisation(state_dim, 1))
        with torch.no_grad():
            member.network.dynamics.weights[0][:, -1].fill_(1.0)
        return DynamicsEnsemble.from_members([member] * size)

    return build


def taken(core, batch=4, action=0.0, start=0.0):
    """Takes a step from equal states with equal actions."""
    return core.step(core.start(torch.full((batch, 2), start)), torch.full((batch, 1), action))


# --- The step, by hand ---


def test_a_step_by_hand(moved_by_actions):
    core = ModelEnv(moved_by_actions(), own_task(), state_bounds=([-10.0, -10.0], [10.0, 10.0]))

    step = core.step(core.start([[0.0, 1.0], [4.5, 2.0], [9.5, 3.0]]), [[0.5], [1.0], [9.0]])

    assert step.state.states.tolist() == [[0.5, 1.5], [5.5, 3.0], [10.0, 4.0]], "9 is an action of 1, and 10.5 too far"
    assert step.reward.tolist() == step.raw_reward.tolist() == [1.5, 3.0, 4.0]
    assert step.terminated.tolist() == [False, True, True]
    assert step.escaped.tolist() == [False, False, True]
    assert not step.halted.any() and step.uncertainty is None and step.state.members is None


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_batches_of_any_size_are_dealt_evenly(changes_by, propagation, batch):
    core = ModelEnv(changes_by(*([float(member), 0.0] for member in range(3))), own_task(), propagation=propagation)
    counts = np.zeros(3)
    for _ in range(60):
        made_by = taken(core, batch).state.states[:, 0].long()
        of_step = torch.bincount(made_by, minlength=3)
        assert of_step.max() - of_step.min() <= 1
        counts += of_step.numpy()
    assert (counts > 0).all()


def test_ts1_deals_anew_and_tsinf_keeps_the_member(changes_by):
    ensemble = changes_by(*([float(member), 0.0] for member in range(3)))
    for propagation in ("ts1", "tsinf"):
        core = ModelEnv(ensemble, own_task(), propagation=propagation, state_bounds=None)
        state, who = core.start(torch.zeros(6, 2)), []
        for _ in range(20):
            before = state.states
            state = core.step(state, torch.zeros(6, 1)).state
            who.append((state.states - before)[:, 0])
        changed = (torch.stack(who) != who[0]).any(dim=0)
        assert changed.all() if propagation == "ts1" else not changed.any()


def test_the_mean_is_over_members_and_their_rewards(random_member):
    ensemble = DynamicsEnsemble.from_members([random_member(DeterministicModel, m, reward=True) for m in range(3)])
    states, actions = torch.randn(4, 3), torch.randn(4, 2)
    core = ModelEnv(ensemble, propagation="mean", reward="learned", state_bounds=None)

    step = core.step(core.start(states), actions)

    expected = ensemble.predict(states, actions)[0].mean(dim=0)
    torch.testing.assert_close(step.state.states, expected)
    torch.testing.assert_close(step.reward, ensemble.predict_reward(states, actions, expected).mean(dim=0))


def test_a_learned_reward_is_that_of_the_member_that_predicted(random_member):
    ensemble = DynamicsEnsemble.from_members([random_member(DeterministicModel, m, reward=True) for m in range(3)])
    states, actions = torch.randn(5, 3), torch.randn(5, 2)
    core = ModelEnv(ensemble, propagation="tsinf", state_bounds=None)
    members = torch.tensor([2, 0, 0, 1, 2])

    step = core.step(ModelState(states, members), actions)

    following = ensemble.predict_members(states, actions, members)[0]
    torch.testing.assert_close(step.state.states, following)
    torch.testing.assert_close(step.reward, ensemble.predict_reward(states, actions, following, members))


def test_draws_have_the_variance_of_the_member(changes_by):
    core = ModelEnv(changes_by([0.0, 0.0], variances=[[0.04, 0.01]]), own_task())
    following = taken(core, 20_000).state.states
    assert following.std(dim=0).tolist() == pytest.approx([0.2, 0.1], rel=0.03)


def test_gradients_flow_from_the_reward_to_the_actions(random_member):
    ensemble = DynamicsEnsemble.from_members([random_member(ProbabilisticModel, m, reward=True) for m in range(3)])
    core = ModelEnv(ensemble, state_bounds=None)
    actions = torch.randn(5, 2, requires_grad=True)
    state = core.start(torch.randn(5, 3))
    core.step(core.step(state, actions).state, actions).reward.sum().backward()
    assert actions.grad.abs().sum() > 0
    assert not core.step(state, actions.detach()).reward.requires_grad


def test_chosen_members_predict_and_no_others(changes_by):
    ensemble = changes_by([1.0, 0.0], [2.0, 0.0], [3.0, 0.0])
    ensemble.elites = [2, 0]
    for members, expected in (("elites", {1.0, 3.0}), ("all", {1.0, 2.0, 3.0}), ([1], {2.0})):
        core = ModelEnv(ensemble, own_task(), members=members, state_bounds=None)
        assert set(taken(core, 30).state.states[:, 0].tolist()) == expected


def test_all_members_take_all_rows_at_once(random_member, monkeypatch):
    ensemble = DynamicsEnsemble.from_members([random_member(ProbabilisticModel, m) for m in range(3)])
    for pessimism in (None, MOReL(1.0, 0.0), MOPO(1.0)):
        core = ModelEnv(ensemble, reward=lambda s, a, n: n[:, 0], pessimism=pessimism, state_bounds=None)
        calls, forward = [], core.ensemble.dynamics.forward
        monkeypatch.setattr(
            core.ensemble.dynamics, "forward", lambda x, calls=calls, f=forward: calls.append(1) or f(x)
        )
        core.step(core.start(torch.zeros(100, 3)), torch.zeros(100, 2))
        assert len(calls) == 1, "a step predicts once, its uncertainty included"


# --- Divergence ---


def test_predictions_are_clamped_to_the_data_widened_by_half_its_width(changes_by):
    core = ModelEnv(changes_by([50.0, 3.5]), own_task())
    step = taken(core)
    assert step.state.states.tolist() == [[4.0, 3.5]] * 4, "-2 to 2, widened by 2 on either side"
    assert step.escaped.all() and step.raw_reward.tolist() == [3.5] * 4
    assert step.terminated.all(), "50 is above 5, where the episode ends"
    assert not taken(ModelEnv(changes_by([3.9, 0.0]), own_task())).escaped.any()


def test_rollouts_that_run_away_earn_no_fortunes(unit_normalisation):
    member = DeterministicModel(Architecture(2, 1, hidden_size=()), unit_normalisation(2, 1))
    with torch.no_grad():
        member.network.dynamics.weights[0].fill_(1.0)  # each step triples the states
    ensemble = DynamicsEnsemble.from_members([member])
    ensemble.metadata = {"data": DATA}
    earned = {}
    for bounds in ("data", None):
        core, earned[bounds] = ModelEnv(ensemble, own_task(), state_bounds=bounds), []
        state = core.start(torch.ones(1, 2))
        for _ in range(100):
            step = core.step(state, torch.ones(1, 1))
            state = step.state
            earned[bounds].append(step.reward.item())
    assert max(earned["data"]) == 4.0
    assert max(earned[None]) > 1e18
    assert earned[None][-1] == -np.inf, "what is not finite is worth less than anything"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_ends_the_episode_and_is_the_worst_there_is(changes_by, bad):
    for rule in (None, "Hopper-v5"):
        ensemble = changes_by([0.0, 0.0])
        known = own_task(termination=lambda s, a, n: ~n.isfinite().all(-1)) if rule else None
        reward = lambda s, a, n: n[:, 1]  # noqa: E731
        for bounds in ("data", None):
            core = ModelEnv(ensemble, known, reward=reward, state_bounds=bounds)
            with torch.no_grad():
                core.ensemble.dynamics.biases[0].fill_(bad)
            step = taken(core, start=1.0)
            assert step.terminated.all()
            if bounds is None:
                assert (step.reward == -np.inf).all()
            else:
                assert step.escaped.all() and step.reward.isfinite().all() and step.state.states.isfinite().all()
                assert step.state.states[0].tolist() == [4.0 if bad == np.inf else -4.0] * 2


# --- Pessimism ---

# Members 0 and 1 add (0, 0) and (3, 4), which are 5 apart; member 2 adds (6, 8), 10 away from member 0.
CHANGES = ([0.0, 0.0], [3.0, 4.0], [6.0, 8.0])
WIDE = ([-100.0, -100.0], [100.0, 100.0])


@pytest.mark.parametrize(("threshold", "halted"), [(9.9, True), (10.1, False)])
def test_morel_halts_above_the_threshold_and_pays_the_halt_reward_once(changes_by, threshold, halted):
    step = taken(ModelEnv(changes_by(*CHANGES), own_task(), pessimism=MOReL(threshold, -7.0), state_bounds=WIDE))
    assert step.halted.tolist() == [halted] * 4
    assert step.uncertainty.tolist() == [10.0] * 4
    assert step.raw_reward.tolist() == step.state.states[:, 1].tolist()
    assert step.reward.tolist() == ([-7.0] * 4 if halted else step.raw_reward.tolist())
    assert step.terminated.tolist() == (step.state.states[:, 0] > 5).tolist(), "a halt is no termination"


def test_a_pessimistic_step_is_predicted_by_each_environments_own_member(changes_by):
    for pessimism in (MOReL(100.0, 0.0), MOPO(1.0, kind="ensemble_std")):
        core = ModelEnv(changes_by(*CHANGES), own_task(), propagation="tsinf", pessimism=pessimism, state_bounds=WIDE)
        step = core.step(ModelState(torch.zeros(4, 2), torch.tensor([2, 0, 0, 1])), torch.zeros(4, 1))
        assert step.state.states[:, 0].tolist() == [6.0, 0.0, 0.0, 3.0]
        assert step.state.members.tolist() == [2, 0, 0, 1]


def test_mopo_takes_the_uncertainty_of_the_members_that_predict_off_the_reward(changes_by):
    ensemble = changes_by([0.0, 1.0], [0.0, 1.0], [0.0, 1.0], variances=[[9.0, 16.0], [1.0, 3.0], [0.0004, 0.0005]])
    ensemble.elites = [2, 1]
    for members, norm in (("all", 5.0), ("elites", 2.0)):
        step = taken(ModelEnv(ensemble, own_task(), pessimism=MOPO(0.5), members=members, state_bounds=WIDE))
        assert step.uncertainty.tolist() == pytest.approx([norm] * 4)
        torch.testing.assert_close(step.reward, step.raw_reward - 0.5 * norm)
        assert not step.halted.any()


@pytest.mark.parametrize("kind", ["max_pairwise", "ensemble_std", "max_aleatoric", "total_std"])
def test_the_threshold_is_measured_as_the_step_measures(random_member, draw_rows, kind):
    ensemble = DynamicsEnsemble.from_members([random_member(ProbabilisticModel, m) for m in range(5)])
    ensemble.elites = [4, 1, 2]
    rows = draw_rows(200)
    measured = ensemble.select(ensemble.elites).disagreement(*rows, kind).double().numpy()

    limits = {
        "largest": disagreement_threshold(ensemble, *rows, kind=kind),
        "quantile": disagreement_threshold(ensemble, *rows, quantile=0.9, kind=kind),
        "beta": disagreement_threshold(ensemble, *rows, beta=1.5, kind=kind),
    }

    assert limits["largest"] == measured.max()
    assert limits["quantile"] == pytest.approx(np.quantile(measured, 0.9))
    assert limits["beta"] == pytest.approx(measured.mean() + 1.5 * measured.std())
    for name, halts in (("largest", 0), ("quantile", 20)):
        core = ModelEnv(
            ensemble, reward=lambda s, a, n: n[:, 0], pessimism=MOReL(limits[name], 0.0, kind=kind), state_bounds=None
        )
        step = core.step(core.start(rows[0]), rows[1])
        assert step.halted.sum() == halts, "at the same inputs, of the same members, in the same unit"
    everyone = disagreement_threshold(ensemble, *rows, members="all", kind=kind)
    assert everyone == ensemble.disagreement(*rows, kind).max().item()


# --- Tasks and rewards ---


@pytest.fixture
def hopper(random_member):
    """Returns a function that builds untrained members of Hopper's size, with the metadata of a run."""

    def build(kind=DeterministicModel, size=2, env_name="Hopper-v5", **options):
        sizes = {"input": 14, "delta": 11, "reward": 1}
        tensors = {f"{name}_shift": torch.zeros(length) for name, length in sizes.items()}
        tensors |= {f"{name}_scale": torch.full((length,), 0.3) for name, length in sizes.items()}
        options = {"hidden_size": (8,)} | options
        members = [
            kind(
                Architecture(11, 3, **options),
                Normalisation(**tensors),
                *(random_stream(0, m, purpose) for purpose in ("initialisation", "reward")),
            )
            for m in range(size)
        ]
        ensemble = DynamicsEnsemble.from_members(members)
        start = [[1.25] + [0.0] * 10, [1.3] + [0.01] * 10]
        bounds = {"low": [0.0] + [-3.0] * 10, "high": [2.0] + [3.0] * 10}
        data = {"states": bounds, "actions": {"low": [-0.9] * 3, "high": [0.8] * 3}, "initial_states": start}
        ensemble.metadata = {"data": data, "dataset": {"env_name": env_name}}
        return ensemble

    return build


def test_the_task_is_that_of_the_data_if_none_is_given(hopper):
    assert ModelEnv(hopper()).task is task("Hopper-v5")
    assert ModelEnv(hopper(), "Hopper-v4").task is task("Hopper-v4")
    unknown = ModelEnv(hopper(env_name="Mine-v0", reward_hidden_size=(4,)))
    assert unknown.task is None
    assert "no step terminates" in repr(unknown) and "rewards learned (no formula is known)" in repr(unknown)


def test_the_source_of_rewards_is_the_tasks_and_is_told(hopper):
    learns = hopper(reward_hidden_size=(4,))
    assert ModelEnv(learns).reward_source == "formula", "the task says so, though the ensemble has learned one, too"
    assert ModelEnv(learns).reward_reason == task("Hopper-v5").reward_reason
    assert ModelEnv(learns, reward="learned").reward_source == "learned"
    prefers = replace(task("Hopper-v5"), reward_source="learned", reward_reason="because")
    assert (ModelEnv(learns, prefers).reward_source, ModelEnv(learns, prefers).reward_reason) == ("learned", "because")
    assert "rewards formula (the mean of the forward velocities" in repr(ModelEnv(learns))


def test_rewards_follow_the_formula_of_the_task_and_its_version(hopper):
    for name in ("Hopper-v4", "Hopper-v5"):
        core = ModelEnv(hopper(), name)
        states, actions = torch.randn(50, 11) * 0.1 + torch.tensor([0.7] + [0.0] * 10), torch.rand(50, 3) * 1.6 - 0.9
        step = core.step(core.start(states), actions)
        assert 0 < step.terminated.sum() < 50
        torch.testing.assert_close(step.reward, task(name).reward(states, actions, step.state.states))


def test_a_step_that_terminated_pays_no_bonus_wherever_its_state_is_moved_to(hopper):
    states, actions = torch.tensor([[1.25] + [0.0] * 10]), torch.zeros(1, 3)
    fallen = hopper()
    with torch.no_grad():
        fallen.dynamics.biases[-1][..., 0] = -4.0  # times a scale of 0.3
    for bounds in (None, ([0.8] + [-3.0] * 10, [2.0] + [3.0] * 10)):
        step = ModelEnv(fallen, "Hopper-v5", state_bounds=bounds).step(ModelState(states, None), actions)
        assert step.terminated.item() and step.reward.item() < 0.5
        assert (step.state.states[0, 0].item() == pytest.approx(0.8)) == (bounds is not None)


def test_bounds_of_actions_are_the_tasks_or_the_datas(hopper):
    assert [end.tolist() for end in ModelEnv(hopper()).action_bounds] == [[-1.0] * 3, [1.0] * 3]
    unknown = ModelEnv(hopper(env_name=None, reward_hidden_size=(4,)))
    assert [end.tolist() for end in unknown.action_bounds] == [pytest.approx([-0.9] * 3), pytest.approx([0.8] * 3)]


# --- Errors, in one line ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task": "Hopper-v7"}, "no task 'Hopper-v7': did you mean 'Hopper-v"),
        ({"task": "Ant-v5"}, "Ant-v5 has states of 105 or 27 and actions of 8 entries; this model has 11 and 3"),
        ({"reward": "learned"}, "no reward to be had: .* train one with --params learn_reward=true, or give a task"),
        ({"reward": "sparse"}, "reward is 'sparse'; expected auto, formula, learned or a function"),
        (
            {"pessimism": MOPO(1.0)},
            "MOPO goes by max_aleatoric, which deterministic members do not have; .*ensemble_std",
        ),
        ({"pessimism": MOReL(1.0, 0.0), "members": [0]}, "MOReL goes by max_pairwise, which needs two members or more"),
        ({"members": "best"}, "members is 'best'; expected 'elites', 'all' or indices"),
        ({"members": [7]}, r"members \[7\] were asked for; expected some of 0 to 1"),
        ({"propagation": "member"}, "propagation is 'member'; expected ts1, tsinf or mean"),
        ({"state_bounds": "wide"}, r"'wide' is not the range of its data; give state_bounds=\(low, high\), or None"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_in_one_line(hopper, options, expected):
    with pytest.raises(ValueError, match=expected) as raised:
        ModelEnv(hopper(), **options)
    assert "\n" not in str(raised.value)


def test_a_task_without_formula_or_learned_reward_has_none_to_give(hopper):
    with pytest.raises(ValueError, match="there is no reward to be had: this model learned none"):
        ModelEnv(hopper(env_name=None))
    with pytest.raises(ValueError, match="there is no formula of the reward; give a task that has one"):
        ModelEnv(hopper(env_name=None), reward="formula")


def test_files_of_earlier_versions_say_what_to_give(hopper):
    ensemble = hopper()
    del ensemble.metadata["data"]
    with pytest.raises(ValueError, match=r"this model\.pkl does not know the range of its data; give state_bounds"):
        ModelEnv(ensemble)
    core = ModelEnv(ensemble, state_bounds=None)
    with pytest.raises(ValueError, match=r"this model\.pkl does not know where episodes start; give initial_states"):
        VectorModelEnv(core, 2)
    VectorModelEnv(core, 2, initial_states=np.zeros((1, 11)))
    ensemble.metadata["dataset"]["env_name"] = None
    core = ModelEnv(ensemble, reward=lambda s, a, n: n[:, 0], state_bounds=None)
    with pytest.raises(ValueError, match="does not know the bounds of actions; give ModelEnv a task"):
        VectorModelEnv(core, 2, initial_states=np.zeros((1, 11)))


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (np.full((4, 3), np.nan), "actions are not finite in 4 of 4 rows"),
        ([[0.0] * 3] * 3 + [[0.0, np.inf, 0.0]], "actions are not finite in 1 of 4 rows"),
        (np.zeros((4, 2)), "actions have shape (4, 2); expected (4, 3)"),
        (np.zeros((3, 3)), "actions have shape (3, 3); expected (4, 3)"),
        (np.zeros(3), "actions have shape (3,); expected (4, 3)"),
    ],
    ids=str,
)
def test_actions_that_are_none_are_refused(hopper, actions, expected):
    core = ModelEnv(hopper())
    state = core.start(np.zeros((4, 11)))
    with pytest.raises(ValueError, match=re.escape(expected)):
        core.step(state, actions)
    with pytest.raises(ValueError, match=re.escape("states have shape (4, 3); expected (batch, 11)")):
        core.start(np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"beta": 1.0, "quantile": 0.5}, "got beta 1.0 and quantile 0.5; give one of them"),
        ({"kind": "max_aleatoric"}, "max_aleatoric needs probabilistic members"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(hopper, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        disagreement_threshold(hopper(), np.zeros((4, 11)), np.zeros((4, 3)), **arguments)


def test_a_halt_is_a_termination_or_a_truncation():
    with pytest.raises(ValueError, match="on_halt is 'end'; expected 'terminate' or 'truncate'"):
        MOReL(1.0, 0.0, on_halt="end")


# --- Gymnasium ---


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean"])
@pytest.mark.parametrize(
    "pessimism", [None, MOReL(0.6, -5.0), MOReL(0.6, -5.0, on_halt="truncate"), MOPO(0.1)], ids=str
)
@pytest.mark.filterwarnings("ignore:.*A Box observation space m|.*Not able to test alternative render modes")
def test_gymnasium_finds_nothing_wrong(hopper, propagation, pessimism):
    core = ModelEnv(hopper(ProbabilisticModel), propagation=propagation, pessimism=pessimism)
    check_env(SingleModelEnv(core))
    env = SingleModelEnv(core)
    env_reset_passive_checker(env, seed=1)
    for _ in range(20):
        _, _, terminated, truncated, _ = env_step_passive_checker(env, env.action_space.sample())
        if terminated or truncated:
            env_reset_passive_checker(env)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_what_was_returned_is_the_callers_and_changes_nothing_when_overwritten(hopper, mode):
    core = ModelEnv(hopper(ProbabilisticModel), propagation="tsinf", pessimism=MOReL(0.2, -5.0))
    traces = []
    for overwrites in (False, True):
        env, trace = VectorModelEnv(core, 3, horizon=4, autoreset_mode=mode), []
        results = env.reset(seed=0)
        for _ in range(12):
            trace.append(copy.deepcopy(results))
            arrays = [part for part in results if isinstance(part, np.ndarray)]
            arrays += [part for part in results[-1].values() if isinstance(part, np.ndarray)]
            for part in arrays if overwrites else ():
                part[:] = 1
            if mode == AutoresetMode.DISABLED and len(results) == 5:
                env.reset(options={"reset_mask": np.ones(3, dtype=bool)})
            results = env.step(np.zeros((3, 3)))
        traces.append(trace)
    for untouched, overwritten in zip(*traces, strict=True):
        assert_equal(untouched, overwritten)


def assert_equal(ours, theirs):
    """Whether two results of Gymnasium are equal, types and the masks of infos included."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_equal(ours[name], theirs[name])
    elif isinstance(ours, tuple):
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        for pair in zip(ours.tolist(), theirs.tolist(), strict=True) if ours.dtype == object else ():
            np.testing.assert_array_equal(*pair)
        assert ours.dtype == object or np.array_equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.fixture
def walkers(moved_by_actions):
    """Returns a function that makes a core of Line-v0 in which nothing is random, where episodes end soon."""

    def build(pessimism=None):
        ensemble = moved_by_actions(size=2)
        with torch.no_grad():  # the second member's changes are larger by 0.2 times the state
            ensemble.dynamics.weights[0][1, :2] = torch.eye(2) * 0.2
        ends_soon = own_task(termination=lambda s, a, n: n[..., 0] > 1.5)
        return ModelEnv(ensemble, ends_soon, propagation="mean", pessimism=pessimism, state_bounds=None)

    return build


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("pessimism", [None, MOReL(0.4, -1.0), MOReL(0.4, -1.0, on_halt="truncate")], ids=str)
def test_traces_are_those_of_gymnasiums_own_vector_environment(walkers, mode, pessimism):
    core, start = walkers(pessimism), np.zeros((1, 2))
    theirs = SyncVectorEnv([lambda: SingleModelEnv(core, initial_states=start)] * 5, autoreset_mode=mode)
    ours = VectorModelEnv(core, 5, initial_states=start, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] == mode
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space", "num_envs"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert_equal(ours.reset(seed=0), theirs.reset(seed=0))

    random, ends = np.random.default_rng(0), np.zeros(2)
    for _ in range(100):
        actions = random.uniform(-0.5, 1, size=(5, 1)).astype(np.float32)
        results = ours.step(actions)
        assert_equal(results, theirs.step(actions))
        ends += results[2].sum(), results[3].sum()
        mask = results[2] | results[3]
        if mode == AutoresetMode.DISABLED and mask.any():
            assert_equal(*(env.reset(options={"reset_mask": mask}) for env in (ours, theirs)))
    assert (ends > 5).all(), "episodes ended both ways"


@pytest.mark.parametrize("on_halt", ["terminate", "truncate"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_halt_ends_the_episode_as_the_pessimism_says(changes_by, on_halt, mode):
    core = ModelEnv(changes_by([0.0, 0.0], [0.5, 0.0]), own_task(), pessimism=MOReL(0.4, -3.0, on_halt=on_halt))
    env = VectorModelEnv(core, 2, autoreset_mode=mode)
    env.reset(seed=0)
    _, rewards, terminated, truncated, infos = env.step(np.zeros((2, 1)))
    assert rewards.tolist() == [-3.0, -3.0]
    assert (terminated.all(), truncated.any()) == ((True, False) if on_halt == "terminate" else (False, True))
    told = infos["final_info"] if mode == "SameStep" else infos
    assert told["halted"].all() and told["raw_reward"].tolist() == [0.0, 0.0]


def test_ended_environments_must_be_reset_where_nothing_resets_them(walkers):
    env = VectorModelEnv(walkers(), 2, initial_states=np.zeros((1, 2)), horizon=1, autoreset_mode="Disabled")
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset these: all"):
        env.step(np.zeros((2, 1)))
    env.reset(seed=0)
    env.step(np.zeros((2, 1)))
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"reset these: \[0, 1\]"):
        env.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=re.escape("reset_mask is int64 (3,); expected bool (2,)")):
        env.reset(options={"reset_mask": np.array([1, 0, 0])})
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"reset these: \[1\]"):
        env.step(np.zeros((2, 1)))


def play(env, seed, steps=30):
    """Returns what an environment shows when it is played with actions that depend on nothing."""
    shown, random = [env.reset(seed=seed)[0]], np.random.default_rng(0)
    for _ in range(steps):
        observations, rewards, *_ = env.step(random.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        shown += [observations, rewards]
        yield np.concatenate([np.ravel(part) for part in shown])


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_environments_that_share_an_ensemble_give_each_seed_its_bits(hopper, propagation):
    core = ModelEnv(hopper(ProbabilisticModel, size=3), propagation=propagation)

    def make():
        return VectorModelEnv(core, 4, horizon=8)

    alone = [list(play(make(), seed))[-1] for seed in (0, 1)]
    together = [list(pair)[-1] for pair in zip(*zip(play(make(), 0), play(make(), 1), strict=True), strict=True)]

    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert not np.array_equal(*alone)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    unseeded = [make().reset()[0] for _ in range(8)]
    assert torch.equal(torch.get_rng_state(), before), "the global stream is not drawn from"
    assert len({part.tobytes() for part in unseeded}) > 1, "without a seed, environments do not all do the same"


def members_met(env, episodes):
    """Returns which member each episode was dealt, where member m adds m."""
    met = []
    for _ in range(episodes):
        before = env.reset()[0]
        met.append((env.step(np.zeros(env.action_space.shape))[0] - before)[..., 0])
    return np.array(met)


def test_one_environment_is_dealt_a_member_anew_each_episode(changes_by):
    core = ModelEnv(changes_by(*([float(m), 0.0] for m in range(3))), own_task(), propagation="tsinf")
    env = SingleModelEnv(core)
    env.reset(seed=0)
    assert set(members_met(env, 40).tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize(("num_envs", "kept"), [(2, False), (3, True), (7, True)])
def test_an_environment_that_starts_again_keeps_its_member_if_there_are_enough_for_all(changes_by, num_envs, kept):
    still = own_task(termination=lambda s, a, n: n[..., 1] > 5, horizon=100)
    ensemble = changes_by(*([float(member), 0.0] for member in range(3)))
    env = VectorModelEnv(
        ModelEnv(ensemble, still, propagation="tsinf", state_bounds=None), num_envs, autoreset_mode="Disabled"
    )
    env.reset(seed=0)
    met = []
    for _ in range(30):
        before = env.reset(options={"reset_mask": np.arange(num_envs) == 0})[0]
        met.append((env.step(np.zeros((num_envs, 1)))[0] - before)[:, 0])
    assert (len({first for first, *_ in met}) == 1) == kept
    assert (np.array(met)[:, 1:] == met[0][1:]).all(), "the others go on with theirs"
    dealt_anew = members_met(env, 30)
    assert [len(set(of_one)) for of_one in dealt_anew.T.tolist()] == [3] * num_envs


def test_members_stay_where_all_environments_start_again_at_once(changes_by):
    ensemble = changes_by(*([float(member), 0.0] for member in range(3)))
    env = VectorModelEnv(ModelEnv(ensemble, own_task(), propagation="tsinf"), 3, horizon=1, autoreset_mode="SameStep")
    env.reset(seed=0)
    met = [np.stack(env.step(np.zeros((3, 1)))[-1]["final_obs"].tolist())[:, 0] for _ in range(20)]
    assert (np.array(met) == met[0]).all() and sorted(met[0]) == [0, 1, 2]


def test_a_mask_before_anything_has_started_starts_all(hopper):
    observations, _ = VectorModelEnv(ModelEnv(hopper()), 2).reset(options={"reset_mask": np.array([True, False])})
    assert observations.shape == (2, 11) and (observations[:, 0] > 1).all()


def test_starts_are_drawn_from_the_initial_states(hopper):
    core = ModelEnv(hopper())
    for env in (VectorModelEnv(core, 50), VectorModelEnv(core, 50, initial_states=np.zeros((1, 11)))):
        observations, infos = env.reset(seed=0)
        assert set(observations[:, 0].tolist()) == set(env.initial_states[:, 0].tolist())
        assert observations.dtype == np.float32 and infos == {}


# --- Stable-Baselines3 ---


@pytest.fixture(scope="module")
def sb3():
    return pytest.importorskip("stable_baselines3")


@pytest.mark.parametrize("pessimism", [None, MOReL(0.4, -1.0, on_halt="truncate")], ids=str)
def test_stable_baselines3_sees_what_its_own_vector_environment_shows(walkers, sb3, pessimism):
    from stable_baselines3.common.vec_env import DummyVecEnv

    core, start = walkers(pessimism), np.zeros((1, 2))
    theirs = DummyVecEnv([lambda: SingleModelEnv(core, initial_states=start)] * 5)
    ours = as_sb3(VectorModelEnv(core, 5, initial_states=start, autoreset_mode="SameStep"))
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    random, ends = np.random.default_rng(0), []
    for _ in range(60):
        actions = random.uniform(-0.5, 1, size=(5, 1)).astype(np.float32)
        (*results, infos), (*expected, their_infos) = ours.step(actions), theirs.step(actions)
        for part, other in zip(results, expected, strict=True):
            np.testing.assert_array_equal(part, other)
            assert part.dtype == other.dtype
        for done, info, other in zip(results[2], infos, their_infos, strict=True):
            assert info.keys() == (other.keys() if done else set())
            for name, value in info.items():
                np.testing.assert_array_equal(value, other[name])
                assert type(value) is type(other[name])
            ends += [info["TimeLimit.truncated"]] if done else []
    assert set(ends) == {False, True}


def test_stable_baselines3_trains_on_it(hopper, sb3):
    from stable_baselines3.common.vec_env import VecMonitor

    core = ModelEnv(hopper(ProbabilisticModel, size=3), pessimism=MOReL(0.9, -5.0))
    env = VecMonitor(as_sb3(VectorModelEnv(core, 16, horizon=10, autoreset_mode="SameStep")))
    model = sb3.PPO("MlpPolicy", env, n_steps=8, batch_size=32, n_epochs=1, seed=0, device="cpu")
    model.learn(256)
    assert len(model.ep_info_buffer) > 5
    assert env.get_attr("num_envs") == [16] * 16 and not any(env.env_is_wrapped(VecMonitor))


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_stable_baselines3_needs_starts_in_the_same_step(hopper, mode):
    env = VectorModelEnv(ModelEnv(hopper()), 2, autoreset_mode=mode)
    with pytest.raises(ValueError, match=f"needs .*autoreset_mode='SameStep'.*, got '{mode}'"):
        as_sb3(env)


# --- Against the simulators ---


class Simulated(DeterministicEnsemble):
    """An ensemble that is right: it keeps positions and velocities itself, in float64, and asks the simulator.

    Observations would not do: Hopper's velocities are clipped at 10, and float32 drifts.
    """

    def __init__(self, env_name):
        self.simulator = gymnasium.make(env_name).unwrapped
        self.simulator.reset(seed=1)
        state_dim, action_dim = self.simulator.observation_space.shape[0], self.simulator.action_space.shape[0]
        sizes = {"input": state_dim + action_dim, "delta": state_dim, "reward": 1}
        tensors = {f"{name}_{part}": torch.ones(size) for name, size in sizes.items() for part in ("shift", "scale")}
        super().__init__(Architecture(state_dim, action_dim, hidden_size=()), Normalisation(**tensors))
        self.__dict__["simulator"] = self.simulator

    def select(self, indices):
        return self

    def place(self, real):
        self.simulator.set_state(real.data.qpos.copy(), real.data.qvel.copy())

    def draw_members(self, states, actions, members, generator):
        observation, *_ = self.simulator.step(actions[0].double().numpy())
        return torch.as_tensor(observation, dtype=torch.float32)[None]


@pytest.mark.parametrize(
    ("name", "error"), [("Hopper-v5", 0.01), ("Hopper-v4", 0.01), ("Walker2d-v5", 0.03), ("InvertedPendulum-v5", 1e-6)]
)
@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_with_a_perfect_model_the_environment_is_the_real_one(name, error):
    pytest.importorskip("mujoco")
    real, ensemble = gymnasium.make(name), Simulated(name)
    core = ModelEnv(ensemble, name, state_bounds=None)
    assert real.action_space.high.tolist() == pytest.approx(core.action_bounds[1].tolist())
    random, errors, episodes, observation = np.random.default_rng(0), [], 0, None
    for _ in range(1000):
        if observation is None:
            observation, _ = real.reset(seed=episodes)
            ensemble.place(real.unwrapped)
            state, episodes = core.start(observation[None]), episodes + 1
        action = random.uniform(real.action_space.low, real.action_space.high).astype(np.float32)
        observation, reward, terminated, truncated, _ = real.step(action)
        step = core.step(state, action[None])
        state = step.state
        np.testing.assert_array_equal(state.states[0].numpy(), observation.astype(np.float32))
        assert step.terminated.item() == terminated
        errors.append(abs(step.reward.item() - reward))
        observation = None if terminated or truncated else observation
    assert episodes > 10 and np.mean(errors) < error


# --- From training to the environment ---


def test_a_trained_model_is_an_environment_as_it_is(workplace):
    settings = ["kind=probabilistic", "fit_epochs=1", "hidden_size=16", "ensemble_size=3", "num_elites=2"]
    (workplace / "tiny.yaml").write_text("".join(f"{line.replace('=', ': ')}\n" for line in settings))
    arguments = ["--dataset", "hopper-medium-demo", "--config", "tiny.yaml", "--holdout_ratio", "0.2", "--quiet"]
    assert learn_model.main(arguments) == 0
    ensemble = load_ensemble("model.pkl")
    data = ensemble.metadata["data"]

    assert len(data["initial_states"]) > 50 and np.shape(data["initial_states"])[1] == 11
    assert np.abs(np.array(data["initial_states"]) - data["initial_states"][0]).max() < 0.05, "as Hopper resets"
    low, high = data["states"]["low"], data["states"]["high"]
    assert low[0] < 0.7 < 1.2 < high[0] and (low[10], high[10]) == (-10, 10)
    assert (np.abs([data["actions"]["low"], data["actions"]["high"]]) <= 1).all()
    assert 0 < data["lowest_reward"] < 1
    assert set(data["disagreement"]) == {"max_pairwise", "ensemble_std", "max_aleatoric", "total_std"}
    for quantiles in data["disagreement"].values():
        assert list(quantiles.values()) == sorted(quantiles.values())

    threshold = data["disagreement"]["max_pairwise"]["0.99"]
    core = ModelEnv(ensemble, pessimism=MOReL(threshold, data["lowest_reward"]))
    assert len(core.ensemble) == 2 and core.task.env_name == "Hopper-v5" and core.reward_source == "formula"
    env = VectorModelEnv(core, 20)
    env.reset(seed=0)
    *_, infos = env.step(np.stack([env.single_action_space.sample() for _ in range(20)]))
    assert infos["uncertainty"].shape == (20,)
