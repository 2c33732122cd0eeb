"""data.columns: what is picked from a file's entries, joined and checked, whatever format they are from."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from data.columns import Stretch, Wanted, read_columns
from data.limits import Budget
from utils import InputError

GOOD = {
    "observations": np.zeros((5, 3), np.float32),
    "actions": np.zeros((5, 2), np.float32),
    "rewards": np.zeros(5, np.float32),
    "terminals": np.array([0, 0, 1, 0, 0], bool),
    "timeouts": np.array([0, 0, 0, 0, 1], bool),
    "next_observations": np.ones((5, 3), np.float32),
}


def read(*stretches, episodes=False, **wanted):
    named = [Stretch(f"a.pkl, path {index}", entries) for index, entries in enumerate(stretches)]
    return read_columns(named, "a.pkl", Wanted(**wanted), Budget(Path("a.pkl")), stretches_are_episodes=episodes)


def changed(**changes):
    """Good columns of 5 rows with some replaced; None takes one away."""
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not None}


def with_value(key, row, value, dtype=np.float32):
    array = GOOD[key].astype(dtype)
    array[row] = value
    return {key: array}


EMPTY = {key: value[:0] for key, value in GOOD.items()}
NO_FLAGS = {"terminals": None, "timeouts": None}
ERRORS = {
    "missing key": (changed(actions=None), ["no array 'actions'", "observations"]),
    "nearly right key": (changed(observations=None, observation=np.zeros((5, 3))), ["did you mean 'observation'"]),
    "many keys": (changed(actions=None, **{f"extra_{i}": 0 for i in range(1000)}), ["and 993 more"]),
    "numbers as keys": ({0: np.zeros(5)}, ["no array 'observations'", "it has: 0"]),
    "no ends": (changed(**NO_FLAGS, next_observations=None), ["does not say where episodes end", "timeouts"]),
    "rank of observations": (changed(observations=np.zeros(5)), ["observations", "(5,)", "(rows, features)"]),
    "rank of actions": (changed(actions=np.zeros(5)), ["actions", "(5,)", "(rows, features)"]),
    "rank of rewards": (changed(rewards=np.zeros((5, 2))), ["rewards", "(5, 2)", "(rows,)"]),
    "scalar rewards": (changed(rewards=np.float32(1)), ["rewards", "()", "(rows,)"]),
    "no features": (changed(actions=np.zeros((5, 0))), ["actions", "(5, 0)"]),
    "length": (changed(rewards=np.zeros(4)), ["rewards has 4 rows", "observations has 5"]),
    "length of next": (changed(next_observations=np.zeros((6, 3))), ["next_observations has 6 rows"]),
    "width of next": (changed(next_observations=np.zeros((5, 4))), ["next_observations has shape (5, 4)", "(5, 3)"]),
    "NaN": (changed(**with_value("observations", (3, 1), np.nan)), ["observations is nan in row 3"]),
    "NaN in float64": (changed(**with_value("observations", (3, 1), np.nan, np.float64)), ["observations is nan"]),
    "infinity": (changed(**with_value("rewards", 4, -np.inf)), ["rewards is -inf in row 4"]),
    "too large": (changed(**with_value("actions", (2, 0), 1e300, np.float64)), ["actions is 1e+300 in row 2"]),
    "too large a state": (changed(**with_value("observations", (2, 0), 1e300, np.float64)), ["observations is 1e+300"]),
    "flag": (changed(**with_value("terminals", 1, 2)), ["terminals is 2.0 in row 1", "0 or 1"]),
    "NaN flag": (changed(**with_value("timeouts", 1, np.nan)), ["timeouts is nan in row 1", "0 or 1"]),
    "empty": (EMPTY, ["empty", "0 rows"]),
    "strings": (changed(observations=np.full((5, 3), b"x")), ["observations holds", "expected floating-point"]),
    "objects": (changed(rewards=np.array([b"x"] * 5, dtype=object)), ["rewards holds object"]),
    "integers": (changed(observations=np.zeros((5, 3), int)), ["observations holds int64", "floating-point"]),
    "bytes as states": (changed(observations=np.zeros((5, 3), np.uint8)), ["image observations", "uint8"]),
    "images": (changed(observations=np.zeros((5, 8, 8, 3), np.float32)), ["image observations", "(5, 8, 8, 3)"]),
    "by episode": (changed(observations=np.zeros((2, 5, 3))), ["(2, 5, 3)", "(episodes, steps, features)", "timeouts"]),
    "discrete actions": (changed(actions=np.zeros(5, int)), ["discrete actions", "int64"]),
    "a group as actions": (changed(actions={"arm": np.zeros((5, 2))}), ["actions is a group of arm"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arrays_are_named(case):
    content, words = ERRORS[case]
    with pytest.raises(InputError) as caught:
        read(content)
    for expected in ("a.pkl", *words):
        assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


def test_bad_arrays_in_a_file_are_named_as_those_in_memory(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in changed(**with_value("actions", (2, 0), 1e300, np.float64)).items():
            file[key] = value
        with pytest.raises(InputError, match=r"actions is 1e\+300 in row 2"):
            read(file)


def test_the_stretch_and_its_row_are_named():
    with pytest.raises(InputError, match=r"a\.pkl, path 1: rewards is nan in row 1,"):
        read(changed(), changed(rewards=np.array([0, np.nan, 0, 0, 0])), episodes=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": np.zeros((5, 7))}, "path 1: actions is 7 wide, but 2 wide in a.pkl, path 0"),
        ({"next_observations": None}, "path 1: next_observations is missing, but 3 wide in a.pkl, path 0"),
        ({"rewards": None}, "path 1: rewards is missing"),
        ({"observations": {"a": np.zeros((5, 3))}, "next_observations": {"a": np.zeros((5, 3))}}, "a 3 wide, but 3"),
    ],
)
def test_stretches_of_different_kinds_are_refused(change, words):
    with pytest.raises(InputError) as caught:
        read(changed(), changed(**change), episodes=True)
    assert words in str(caught.value)


def test_stretches_are_joined_in_order():
    first = changed(observations=np.full((5, 3), 1.0), rewards=np.arange(5))
    second = {key: value[:2] for key, value in changed(observations=np.full((5, 3), 2.0)).items()}
    columns, _ = read(first, second, episodes=True)
    np.testing.assert_array_equal(columns["observations"][:, 0], [1] * 5 + [2] * 2)
    np.testing.assert_array_equal(columns["rewards"], [0, 1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(columns["terminals"], [0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(columns["timeouts"], [0, 0, 0, 0, 1, 0, 1])  # a stretch is an episode
    assert {column.dtype for column in columns.values()} == {np.dtype(np.float32), np.dtype(bool)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4", ">f8"])
def test_floats_of_all_sizes_become_float32(dtype):
    values = np.linspace(-1, 1, 15).reshape(5, 3)
    columns, _ = read(changed(observations=values.astype(dtype), rewards=np.arange(5)[:, None], next_observations=None))
    assert columns["observations"].dtype == columns["rewards"].dtype == np.float32
    np.testing.assert_allclose(columns["observations"], values, atol=1e-3)
    np.testing.assert_array_equal(columns["rewards"], np.arange(5))  # (N, 1)


def test_an_array_of_the_right_type_is_not_copied():
    content = changed()
    assert np.shares_memory(read(content)[0]["observations"], content["observations"])


def test_rewards_may_be_missing():
    assert "rewards" not in read(changed(rewards=None))[0]


def test_without_flags_next_observations_tell_where_episodes_end():
    columns, _ = read(changed(**NO_FLAGS))
    assert not columns["terminals"].any()
    assert "timeouts" not in columns


@pytest.mark.parametrize(
    "content", [{"infos/qpos": GOOD["actions"]}, {"infos": {"qpos": GOOD["actions"]}}, {"qpos": GOOD["actions"]}]
)
def test_simulator_states_are_read_when_asked_for(content):
    assert "qpos" not in read(changed(**content))[0]
    columns, _ = read(changed(**content), simulator_states=True)
    np.testing.assert_array_equal(columns["qpos"], GOOD["actions"])
    assert "qvel" not in columns


def test_infos_may_be_an_array():
    assert "qpos" not in read(changed(infos=np.zeros((5, 2))), simulator_states=True)[0]


def test_simulator_states_under_other_names_are_reported():
    _, findings = read(changed(init_state_dict={"qpos": np.zeros(9), "door": 1}, env_infos={"success": np.zeros(5)}))
    (found,) = findings
    assert (found.name, found.where) == ("entries not read", "init_state_dict/qpos")
