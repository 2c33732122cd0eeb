"""What cells keep of policies, with real episodes of Hopper."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.sources import load_dataset
from data.trajectories import Dataset, gather_transitions
from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble, random_stream
from mujoco_tasks import task
from study import policies
from study.policies import policy_table, shared_reward, widened_range
from training.batches import measure_normalisation
from utils import ROOT, InputError

pytest.importorskip("gymnasium")


@pytest.fixture(scope="module")
def hopper():
    return load_dataset("hopper-medium-demo", quiet=True)


@pytest.fixture(scope="module")
def rows(hopper):
    return gather_transitions(hopper, np.arange(20))


@pytest.fixture(scope="module")
def ensemble(rows):
    architecture, normalisation = Architecture(11, 3, hidden_size=(4,)), measure_normalisation(rows)
    streams = (random_stream(0, member, "initialisation") for member in range(2))
    return DynamicsEnsemble.from_members([DeterministicModel(architecture, normalisation, each) for each in streams])


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    """A folder of snapshots, all the same one, and a study in which episodes are few and short."""
    for name in ("0000001", "0000002"):
        file = tmp_path / "policies" / "hopper" / f"{name}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((ROOT / "data" / "policies" / "hopper-medium.npz").read_bytes())
    monkeypatch.setattr(policies, "STARTS", 2)
    monkeypatch.setattr(policies, "STEPS", 5)
    return tmp_path / "policies"


def test_cell_keeps_values_of_snapshots_and_of_their_perturbed_copies(ensemble, hopper, rows, snapshots, tmp_path):
    table = policy_table(ensemble, hopper, rows, tmp_path / "kept", policies=snapshots)
    assert list(table) == ["policy", "propagation", "horizon", "true", "predicted", "escaped"]
    assert set(table.policy) == {"0000001", "0000002", "0000001-perturbed", "0000002-perturbed"}
    assert len(table) == 4 * 3 * 2  # policies, propagations, horizons
    true = table.query("propagation == 'ts1' and horizon == 'truncated'").set_index("policy").true
    assert true["0000001"] == true["0000002"] != true["0000001-perturbed"] != true["0000002-perturbed"]
    assert np.isfinite(table.predicted).all()


def test_episodes_of_the_simulator_are_played_once(ensemble, hopper, rows, snapshots, tmp_path, monkeypatch):
    first = policy_table(ensemble, hopper, rows, tmp_path / "kept", policies=snapshots)
    [kept] = (tmp_path / "kept").iterdir()
    assert kept.name.startswith("hopper-medium-demo-")
    monkeypatch.setattr(policies, "simulate_policies", None)
    again = policy_table(ensemble, hopper, rows, tmp_path / "kept", policies=snapshots)
    pd.testing.assert_frame_equal(first, again)


def test_other_rows_or_other_policies_get_a_file_of_their_own(ensemble, hopper, rows, snapshots, tmp_path):
    fewer = gather_transitions(hopper, np.arange(5))
    policy_table(ensemble, hopper, rows, tmp_path / "kept", policies=snapshots)
    policy_table(ensemble, hopper, fewer, tmp_path / "kept", policies=snapshots)
    (snapshots / "hopper" / "0000002.npz").unlink()
    policy_table(ensemble, hopper, rows, tmp_path / "kept", policies=snapshots)
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_there_is_no_table_where_there_are_no_policies_or_the_state_is_hidden(
    ensemble, hopper, rows, snapshots, tmp_path, dataset
):
    assert policy_table(ensemble, dataset, rows, tmp_path, policies=snapshots) is None  # of no environment
    assert policy_table(ensemble, hopper, rows, tmp_path, policies=tmp_path / "none") is None
    hidden = [
        dataclasses.replace(each, observations=each.observations[:, :5], next_observations=None)
        for each in hopper.trajectories[:3]
    ]
    half = Dataset("half", "Hopper-v5", "d1ge57", hidden)
    assert policy_table(ensemble, half, rows, tmp_path, policies=snapshots) is None


def test_missing_simulator_is_said(ensemble, hopper, rows, snapshots, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "SIMULATOR_PACKAGES", ("gymnasium", "muhoho"))
    with pytest.raises(InputError, match="needs muhoho: pip install"):
        policy_table(ensemble, hopper, rows, tmp_path, policies=snapshots)


def test_bounds_are_the_range_of_the_data_widened_by_half_its_width(linear_system):
    transitions = linear_system(rows=50)
    low, high = widened_range(transitions)
    states = np.concatenate([transitions.states, transitions.next_states])
    assert high - low == pytest.approx(2 * np.ptp(states, axis=0), rel=1e-6)
    assert (high + low) / 2 == pytest.approx((states.max(axis=0) + states.min(axis=0)) / 2, rel=1e-4, abs=1e-5)


def test_reward_is_the_formula_where_that_suffices(linear_system, tmp_path):
    hopper = task("Hopper-v5")
    assert shared_reward(hopper, linear_system(), tmp_path / "reward.pkl") == hopper.reward
    assert not (tmp_path / "reward.pkl").exists()


def test_else_a_reward_network_is_trained_once(linear_system, tmp_path):
    transitions, path = linear_system(rows=2000), tmp_path / "reward.pkl"
    cheetah = task("HalfCheetah-v5")
    reward = shared_reward(cheetah, transitions, path)
    unseen = linear_system(rows=200, seed=1)
    predicted = reward(unseen.states, unseen.actions, unseen.next_states).numpy()
    assert np.abs(predicted - unseen.rewards).mean() < 0.3 * np.abs(unseen.rewards - unseen.rewards.mean()).mean()
    written = path.stat().st_mtime_ns
    again = shared_reward(cheetah, transitions, path)(unseen.states, unseen.actions, unseen.next_states).numpy()
    assert np.array_equal(predicted, again)
    assert path.stat().st_mtime_ns == written


def test_snapshots_lie_where_collect_dataset_is_documented_to_put_them():
    assert policies.snapshot_folder("HalfCheetah-v5") == "halfcheetah"
    assert Path("data/policies") == policies.POLICIES.relative_to(ROOT)
