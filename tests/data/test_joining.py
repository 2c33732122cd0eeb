"""data.joining: several datasets as one, which trajectory is whose, and what must be the same in all."""

import hashlib

import numpy as np
import pytest

from data.sources import load_dataset, load_datasets
from data.trajectories import Part, gather_transitions
from utils import InputError


@pytest.fixture
def write(tmp_path, columns, write_hdf5):
    """Returns a function that writes a dataset of episodes of these lengths, with changes; None takes a key away."""

    def save(name, lengths, env_name=None, **changes):
        content = {**columns(lengths, simulator_states=True), **changes}
        attributes = {} if env_name is None else {"env_name": env_name}
        content = {key: value for key, value in content.items() if value is not None}
        return str(write_hdf5(tmp_path / f"{name}.hdf5", content, **attributes))

    return save


def test_trajectories_follow_each_other_and_their_parts_are_known(write, assert_same):
    first, second = write("a", [3, 2], "Hopper-v5"), write("b", [4, 1, 2], "Hopper-v5")
    joined = load_datasets([first, second])
    alone = [load_dataset(name) for name in (first, second)]
    assert_same(joined.trajectories, [*alone[0].trajectories, *alone[1].trajectories])
    assert joined.parts == (Part(first, alone[0].sha256, 2), Part(second, alone[1].sha256, 3))
    assert (joined.name, joined.env_name) == (f"{first} + {second}", "Hopper-v5")
    assert joined.sha256 == hashlib.sha256((alone[0].sha256 + alone[1].sha256).encode()).hexdigest()
    assert joined.sha256 != load_datasets([second, first]).sha256


def test_one_alone_is_what_it_was(write):
    name = write("a", [3, 2])
    alone = load_datasets([name])
    assert (alone.name, alone.parts) == (name, ())
    assert alone.sha256 == load_dataset(name).sha256


def test_next_observations_are_made_where_only_some_have_them(write):
    paired, full = write("a", [3, 1, 2], next_observations=None), write("b", [2])
    joined = load_datasets([paired, full])
    assert [part.num_trajectories for part in joined.parts] == [2, 1]  # one row alone is no transition
    transitions = gather_transitions(joined, np.arange(3))
    expected = [gather_transitions(load_dataset(name), indices) for name, indices in ((paired, [0, 1, 2]), (full, [0]))]
    for field in ("states", "actions", "next_states", "rewards"):
        np.testing.assert_array_equal(
            getattr(transitions, field), np.concatenate([getattr(part, field) for part in expected])
        )
    assert joined.trajectories[0].next_observations.base is joined.trajectories[0].observations.base


def test_rewards_that_only_some_have_are_left_out_and_that_is_told(write):
    first, second = write("a", [3]), write("b", [2], rewards=None)
    joined = load_datasets([first, second])
    assert all(trajectory.rewards is None for trajectory in joined.trajectories)
    assert gather_transitions(joined, np.arange(2)).rewards is None
    (found,) = (found for found in joined.findings if found.name == "rewards left out")
    assert (found.where, found.matters) == (second, True)


def test_simulator_states_that_only_some_have_are_left_out(write):
    first, second = write("a", [3]), write("b", [2], **{"infos/qpos": None})
    joined = load_datasets([first, second], simulator_states=True)
    assert all(trajectory.qpos is None and trajectory.qvel is not None for trajectory in joined.trajectories)


def test_findings_say_whose_they_are(write):
    first, second = write("a", [3]), write("b", [2], dones=np.array([0, 1]))
    (found,) = load_datasets([first, second]).findings
    assert found.where.startswith(f"{second}: dones")


def test_float64_of_one_is_that_of_all(write):
    states = 5e5 + 0.01 * np.arange(9.0).reshape(3, 3)
    wide = write("a", [3], observations=states, next_observations=states + 0.03)
    assert {load_dataset(wide).trajectories[0].observations.dtype} == {np.dtype(np.float64)}
    transitions = gather_transitions(load_datasets([write("b", [2]), wide]), np.arange(2))
    assert transitions.states.dtype == np.float64
    np.testing.assert_array_equal(transitions.states[2:], states)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Hopper-v5", "Hopper-v5", "Hopper-v5"),
        ("hopper-medium-v2", "hopper-expert-v2", "hopper-medium-v2"),
        ("hopper-medium-v2", "walker2d-medium-v2", None),
        ("Hopper-v5", None, None),
        (None, None, None),
    ],
)
def test_the_environment_is_named_where_it_is_one(write, first, second, expected):
    assert load_datasets([write("a", [3], first), write("b", [2], second)]).env_name == expected


@pytest.mark.parametrize(
    "changes",
    [{"actions": np.zeros((2, 5))}, {"observations": np.zeros((2, 4)), "next_observations": np.zeros((2, 4))}],
)
def test_other_dimensions_are_refused(write, changes):
    first, second = write("a", [3]), write("b", [2], **changes)
    with pytest.raises(InputError, match=r"b\.hdf5 has . state and . action dimensions, but .*a\.hdf5 has 3 and 2"):
        load_datasets([first, second])


def test_a_cache_keeps_what_was_joined(write, tmp_path, assert_same):
    names = [write("a", [3, 2]), write("b", [2], dones=np.array([0, 1]))]
    cache = tmp_path / "cache.pkl"
    written, reused = load_datasets(names, cache), load_datasets(names, cache)
    assert_same(written.trajectories, reused.trajectories)
    for field in ("name", "sha256", "parts", "findings"):
        assert getattr(written, field) == getattr(reused, field)
    with pytest.raises(InputError, match="holds dataset"):
        load_datasets(names[:1], cache)
    write("b", [2, 2])
    with pytest.raises(InputError, match=r"was made of another '.*b\.hdf5'"):
        load_datasets(names, cache)
