import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from data.sources import load_dataset
from data.trajectories import gather_transitions
from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble
from evaluation import oracle
from evaluation.calibration import residual_variances
from evaluation.oracle import RecordedStates, Simulator, evaluate_oracle, make_probes, off_data_actions, prepare_oracle
from evaluation.predictions import Scale
from probabilistic_model import ProbabilisticModel
from utils import InputError

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gymnasium", "mujoco"))), reason="needs gymnasium[mujoco]"
)


@pytest.fixture(scope="module")
def hopper():
    """The first trajectories of the demo dataset."""
    data = load_dataset("hopper-medium-demo", simulator_states=True)
    return dataclasses.replace(data, trajectories=data.trajectories[:3])


@pytest.fixture(scope="module")
def noisy_hopper():
    """The first trajectories of the demo dataset with process noise of 0.2."""
    data = load_dataset("hopper-medium-noisy-demo", simulator_states=True)
    return dataclasses.replace(data, trajectories=data.trajectories[:3])


@pytest.fixture
def few(monkeypatch):
    """Few rows and draws, which is faster."""
    monkeypatch.setattr(oracle, "PROBE_ROWS", 40)
    monkeypatch.setattr(oracle, "POLICY_ROWS", 60)
    monkeypatch.setattr(oracle, "ROWS", 60)
    monkeypatch.setattr(oracle, "DRAWS", 30)


@pytest.fixture
def ensemble(unit_normalisation):
    """Two members of Hopper's size who always expect no change, with a variance of 4 in every dimension."""
    members = []
    for _ in range(2):
        member = ProbabilisticModel(Architecture(11, 3, hidden_size=()), unit_normalisation(11, 3))
        with torch.no_grad():
            member.network.dynamics.biases[0][..., 11:] = np.log(4.0)
            member.network.max_logvar.fill_(40.0)
            member.network.min_logvar.fill_(-40.0)
        members.append(member)
    return DynamicsEnsemble.from_members(members)


SCALE = Scale(np.arange(11), np.ones(11))
EVERY = np.arange(3)


def altered(data, **changes):
    """The dataset with some arrays of its trajectories changed."""
    made = [
        dataclasses.replace(t, **{name: change(getattr(t, name)) for name, change in changes.items()})
        for t in data.trajectories
    ]
    return dataclasses.replace(data, trajectories=made)


def test_the_simulator_reproduces_the_record(hopper, few):
    prepared = prepare_oracle(hopper, EVERY, SCALE, 0.0, seed=0)
    recorded = prepared.recorded
    assert len(recorded.states) == 60
    simulated = prepared.simulator.step(recorded, recorded.actions)
    np.testing.assert_allclose(simulated, recorded.next_states, atol=1e-5)
    assert prepared.drawn is None


def test_rows_fit_together_with_and_without_next_observations(hopper, few):
    paired = altered(hopper, next_observations=lambda _: None)
    for data in (hopper, paired):
        rows = RecordedStates.spread_over(data, EVERY, 60)
        np.testing.assert_array_equal(rows.states[:, :5], rows.qpos[:, 1:].astype(np.float32))  # Hopper hides x
        difference = rows.next_states - rows.states
        assert 0 < np.abs(difference).max() < 15


def test_a_record_of_another_physics_is_refused(hopper, few):
    with pytest.raises(InputError, match="does not reproduce its transitions: they differ by"):
        prepare_oracle(altered(hopper, actions=lambda a: -a), EVERY, SCALE, 0.0, seed=0)


def test_a_record_of_another_environment_is_refused(hopper, few):
    with pytest.raises(InputError, match=r"\(6, 6, 3, 11\), expected \(9, 9, 6, 17\)"):
        prepare_oracle(dataclasses.replace(hopper, env_name="HalfCheetah-v5"), EVERY, SCALE, 0.0, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_name": None}, "does not name"),
        ({"env_name": "hopper-medium-v2"}, "cannot make the environment 'hopper-medium-v2'"),
        ({"env_name": "Pendulum-v1"}, "needs a MuJoCo environment"),
    ],
)
def test_what_has_no_simulator_is_refused(hopper, few, changes, message):
    with pytest.raises(InputError, match=message):
        prepare_oracle(dataclasses.replace(hopper, **changes), EVERY, SCALE, 0.0, seed=0)


def test_a_dataset_without_simulator_states_is_refused(hopper):
    with pytest.raises(InputError, match="infos/qpos"):
        RecordedStates.spread_over(altered(hopper, qpos=lambda _: None), EVERY, 60)


def test_noisy_records_are_checked_against_noisy_steps(noisy_hopper, few):
    prepared = prepare_oracle(noisy_hopper, EVERY, SCALE, 0.2, seed=0)
    assert prepared.drawn.shape == (30, 60, 11)
    with pytest.raises(InputError, match="lie within the extremes of 30 noisy steps, expected 94%"):
        prepare_oracle(noisy_hopper, EVERY, Scale(np.arange(11), np.full(11, 1e-3)), 0.01, seed=0)


def test_actions_off_the_data_are_possible_and_differ(hopper):
    simulator, random = Simulator("Hopper-v5"), np.random.default_rng(0)
    recorded = hopper.trajectories[0].actions
    kinds = off_data_actions(recorded, simulator, random)
    np.testing.assert_array_equal(kinds["mirrored"], -recorded)
    assert all((np.abs(actions) <= 1).all() and actions.dtype == np.float32 for actions in kinds.values())
    moved = (kinds["perturbed"] - recorded)[np.abs(recorded) < 0.2]  # where clipping does not matter much
    assert moved.std() == pytest.approx(oracle.PERTURBATION, rel=0.15)
    assert kinds["random"].std() == pytest.approx(1 / np.sqrt(3), rel=0.1)


def test_predictions_are_compared_with_the_true_next_state(hopper, few, ensemble):
    prepared = prepare_oracle(hopper, EVERY, SCALE, 0.0, seed=0)
    tables = evaluate_oracle(ensemble, prepared, gather_transitions(hopper, EVERY), seed=0)
    assert set(tables) == {"oracle"}
    table = tables["oracle"].set_index("actions")
    assert table.index.tolist() == ["recorded", "perturbed", "mirrored", "random"]
    recorded = prepared.recorded
    change = recorded.next_states.astype(np.float64) - recorded.states
    assert table.rmse["recorded"] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-4)
    np.testing.assert_allclose(table.rmse, table.no_change)  # the members expect no change
    assert table.mean_z2["recorded"] == pytest.approx(np.mean(change**2) / 4, rel=1e-4)
    np.testing.assert_allclose(table.predicted_std, 2.0, rtol=1e-5)
    mirrored = prepared.simulator.step(recorded, -recorded.actions) - recorded.states
    assert table.rmse["mirrored"] == pytest.approx(np.sqrt(np.mean(mirrored**2)), rel=1e-4)
    assert table.auroc_total_std["recorded"] == 0.5


def test_the_true_noise_is_sampled(noisy_hopper, few, ensemble):
    prepared = prepare_oracle(noisy_hopper, EVERY, SCALE, 0.2, seed=0)
    table = evaluate_oracle(ensemble, prepared, gather_transitions(noisy_hopper, EVERY), seed=0)["oracle_noise"]
    np.testing.assert_allclose(table.true, np.sqrt(prepared.drawn.var(axis=0, ddof=1).mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(table.predicted, 2.0, rtol=1e-5)
    assert table.spearman.isna().all()  # a constant prediction cannot follow anything
    # Noise on the motors moves velocities (the last six dimensions) more than positions within one step.
    assert table.true[5:].min() > table.true[:5].max()


def test_members_that_predict_points_answer_with_their_residuals(noisy_hopper, few, unit_normalisation):
    members = [DeterministicModel(Architecture(11, 3, hidden_size=()), unit_normalisation(11, 3)) for _ in range(2)]
    ensemble, rows = DynamicsEnsemble.from_members(members), gather_transitions(noisy_hopper, EVERY)
    tables = evaluate_oracle(ensemble, prepare_oracle(noisy_hopper, EVERY, SCALE, 0.2, seed=0), rows, seed=0)
    residuals = residual_variances(ensemble, rows)[0, 0]
    np.testing.assert_allclose(tables["oracle_noise"].predicted, np.sqrt(residuals))
    np.testing.assert_allclose(tables["oracle"].predicted_std, np.sqrt(residuals.mean()))
    assert "mean_max_aleatoric" not in tables["oracle"]  # points have no such measure


# --- Probes ---


def fall(observation, random):
    """A policy after which Hopper soon falls."""
    return np.array([1.0, -1.0, 0.5])


def stand(observation, random):
    """A policy that draws its actions."""
    return 0.01 * random.normal(size=3)


def test_probes_start_from_recorded_states_and_end_where_the_simulator_does(hopper, few):
    probes = make_probes(hopper, EVERY, seed=0)
    assert list(probes) == ["random_actions", "perturbed_actions"]
    recorded = RecordedStates.spread_over(hopper, EVERY, 40)
    simulator = Simulator("Hopper-v5")
    for rows in probes.values():
        assert (len(rows), set(rows.steps_left), len(set(rows.trajectory))) == (40, {1}, 40)
        np.testing.assert_array_equal(rows.states, recorded.states)
        np.testing.assert_allclose(rows.next_states, simulator.step(recorded, rows.actions), atol=1e-5)
    off = [np.abs(rows.actions - recorded.actions).mean() for rows in probes.values()]
    assert off[0] > off[1] > 0.1


def test_other_policies_are_run_in_the_simulator(hopper, few):
    rows = make_probes(hopper, EVERY, seed=0, policies=[fall, stand])["other_policies"]
    assert len(rows) == 60
    np.testing.assert_array_equal(rows.actions[:30], np.tile(np.float32([1.0, -1.0, 0.5]), (30, 1)))
    assert rows.actions[30:].std() == pytest.approx(0.01, rel=0.3)
    follows = rows.steps_left[:-1] > 1
    np.testing.assert_array_equal(rows.next_states[:-1][follows], rows.states[1:][follows])
    np.testing.assert_array_equal(rows.step[1:][~follows], 0)
    np.testing.assert_array_equal(np.diff(rows.trajectory) == 1, ~follows)
    again = make_probes(hopper, EVERY, seed=0, policies=[fall, stand])["other_policies"]
    np.testing.assert_array_equal(rows.next_states, again.next_states)
    assert rows.trajectory[29] >= 1  # it has fallen, and started anew


def test_probes_of_noisy_data_are_noisy(hopper, few):
    still, noisy = (make_probes(hopper, EVERY, 0, policies=[fall], process_noise=noise) for noise in (0.0, 0.2))
    np.testing.assert_array_equal(still["other_policies"].actions, noisy["other_policies"].actions)
    assert np.abs(still["other_policies"].next_states[0] - noisy["other_policies"].next_states[0]).max() > 1e-3
    np.testing.assert_array_equal(still["random_actions"].actions, noisy["random_actions"].actions)
    assert np.abs(still["random_actions"].next_states - noisy["random_actions"].next_states).max() > 1e-2


def test_probes_of_data_without_velocities_have_none(hopper, few):
    def positions(states):
        return states[:, :5]

    hidden = altered(hopper, observations=positions, next_observations=positions)
    probes = make_probes(hidden, EVERY, seed=0, policies=[fall])
    whole = make_probes(hopper, EVERY, seed=0, policies=[fall])
    for name, rows in probes.items():
        np.testing.assert_array_equal(rows.states, whole[name].states[:, :5])
        np.testing.assert_array_equal(rows.next_states, whole[name].next_states[:, :5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_name": None}, "does not name"),
        ({"env_name": "HalfCheetah-v5"}, r"those of HalfCheetah-v5 are \(9, 9, 6, 17\)"),
    ],
)
def test_probes_without_their_simulator_are_refused(hopper, few, changes, message):
    with pytest.raises(InputError, match=message):
        make_probes(dataclasses.replace(hopper, **changes), EVERY, seed=0)
