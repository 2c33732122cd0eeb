"""data.formats: what each format is read as, and what is refused in which words."""

import itertools
import os
import pickle
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.formats import is_pickle, open_pickle, read_hdf5, read_minari, read_pickle, to_paths
from data.trajectories import Dataset
from utils import InputError


def read_columns(path, **options):
    """The trajectories of an HDF5 file, without simulator states."""
    return read_hdf5(path, False, **options)[0]


def lengths_of(trajectories):
    return [len(trajectory) for trajectory in trajectories]


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


def test_hdf5_is_cut_into_episodes(tmp_path, columns, write_hdf5):
    content = columns([3, 2, 4], simulator_states=True)
    trajectories, env_name = read_hdf5(write_hdf5(tmp_path / "a.hdf5", content, env_name="Hopper-v5"), False)
    assert env_name == "Hopper-v5"
    assert lengths_of(trajectories) == [3, 2, 4]
    assert [t.terminated for t in trajectories] == [True, False, True]
    second = trajectories[1]
    np.testing.assert_array_equal(second.observations, [[100, 100.25, 100.5], [101, 101.25, 101.5]])
    np.testing.assert_array_equal(second.next_observations[:, 0], [101, 102])
    np.testing.assert_array_equal(second.actions, [[100.125, 100.125], [101.125, 101.125]])
    np.testing.assert_array_equal(second.rewards, [-100, -101])
    assert second.qpos is None


def test_simulator_states_are_read_when_asked_for(tmp_path, columns, write_hdf5):
    path = write_hdf5(tmp_path / "a.hdf5", columns([3, 2], simulator_states=True))
    trajectories, env_name = read_hdf5(path, True)
    assert env_name is None
    np.testing.assert_array_equal(trajectories[1].qpos, [[107], [108]])
    np.testing.assert_array_equal(trajectories[1].qvel, [[108], [109]])
    without, _ = read_hdf5(write_hdf5(tmp_path / "b.hdf5", columns([3, 2])), True)
    assert without[0].qpos is None


def test_arrays_are_float32_views_of_one_array(tmp_path, columns, write_hdf5):
    content = {key: value.astype(np.float64) for key, value in columns([3, 2]).items()}
    content["rewards"], content["terminals"] = content["rewards"][:, None], content["terminals"][:, None]
    first, second = read_columns(write_hdf5(tmp_path / "a.hdf5", content))
    assert first.terminated is True
    assert second.rewards.shape == (2,)
    for array in (first.observations, first.actions, first.rewards, first.next_observations):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
    assert first.observations.base is second.observations.base is not None


def test_the_end_of_the_file_ends_an_unfinished_episode(tmp_path, columns, write_hdf5):
    content = {key: value[:-1] for key, value in columns([3, 2, 4]).items()}
    trajectories = read_columns(write_hdf5(tmp_path / "a.hdf5", content))
    assert lengths_of(trajectories) == [3, 2, 3]
    assert trajectories[-1].terminated is False


def test_without_timeouts_episodes_end_at_terminals_and_a_note_says_so(tmp_path, columns, write_hdf5, capsys):
    content = columns([3, 2, 4, 1], next_observations=False)
    del content["timeouts"]
    assert lengths_of(read_columns(write_hdf5(tmp_path / "a.hdf5", content))) == [3, 6, 1]
    assert "neither timeouts nor next_observations" in capsys.readouterr().err


def test_without_timeouts_episodes_are_cut_at_the_limit(tmp_path, columns, write_hdf5, capsys):
    content = columns([30, 250, 130], next_observations=False)
    del content["timeouts"]
    content["terminals"][-1] = False
    # One terminal, after row 30. Steps are counted anew from there, and from the reset that the data show after 250.
    trajectories = read_columns(write_hdf5(tmp_path / "a.hdf5", content), limit=100)
    assert lengths_of(trajectories) == [30, 100, 100, 50, 100, 30]
    assert [t.terminated for t in trajectories] == [True, False, False, False, False, False]
    assert capsys.readouterr().err == ""


def test_timeouts_win_over_the_limit(tmp_path, columns, write_hdf5):
    path = write_hdf5(tmp_path / "a.hdf5", columns([30, 250, 130]))
    assert lengths_of(read_columns(path, limit=100)) == [30, 250, 130]


GOOD = {
    "observations": np.zeros((5, 3), np.float32),
    "actions": np.zeros((5, 2), np.float32),
    "rewards": np.zeros(5, np.float32),
    "terminals": np.array([0, 0, 1, 0, 0], bool),
    "timeouts": np.array([0, 0, 0, 0, 1], bool),
    "next_observations": np.ones((5, 3), np.float32),
}


def changed(**changes):
    """Good columns of 5 rows with some replaced; None takes one away."""
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not None}


def with_value(key, row, value, dtype=np.float32):
    array = GOOD[key].astype(dtype)
    array[row] = value
    return {key: array}


EMPTY = {key: value[:0] for key, value in GOOD.items()}
HDF5_ERRORS = {
    "missing key": (changed(actions=None), ["no array 'actions'", "observations"]),
    "missing terminals": (changed(terminals=None, dones=np.zeros(5)), ["no array 'terminals'", "dones"]),
    "nearly right key": (changed(observations=None, observation=np.zeros((5, 3))), ["did you mean 'observation'"]),
    "rank of observations": (changed(observations=np.zeros(5)), ["observations", "(5,)", "(rows, features)"]),
    "rank of actions": (changed(actions=np.zeros(5)), ["actions", "(5,)", "(rows, features)"]),
    "rank of rewards": (changed(rewards=np.zeros((5, 2))), ["rewards", "(5, 2)", "(rows,)"]),
    "scalar rewards": (changed(rewards=np.float32(1)), ["rewards", "()", "(rows,)"]),
    "no features": (changed(actions=np.zeros((5, 0))), ["actions", "(5, 0)"]),
    "length": (changed(rewards=np.zeros(4)), ["rewards has 4 rows", "observations has 5"]),
    "length of next": (changed(next_observations=np.zeros((6, 3))), ["next_observations has 6 rows"]),
    "width of next": (changed(next_observations=np.zeros((5, 4))), ["next_observations has shape (5, 4)", "(5, 3)"]),
    "NaN": (changed(**with_value("observations", (3, 1), np.nan)), ["observations is nan in row 3"]),
    "infinity": (changed(**with_value("rewards", 4, -np.inf)), ["rewards is -inf in row 4"]),
    "too large": (changed(**with_value("actions", (2, 0), 1e300, np.float64)), ["actions is 1e+300 in row 2"]),
    "flag": (changed(**with_value("terminals", 1, 2)), ["terminals is 2.0 in row 1", "0 or 1"]),
    "NaN flag": (changed(**with_value("timeouts", 1, np.nan)), ["timeouts is nan in row 1", "0 or 1"]),
    "empty": (EMPTY, ["empty", "0 rows"]),
    "strings": (changed(observations=np.full((5, 3), b"x")), ["observations holds", "expected floating-point"]),
    "objects": (changed(rewards=np.array([b"x"] * 5, dtype=h5py.string_dtype())), ["rewards holds object"]),
    "integers": (changed(observations=np.zeros((5, 3), int)), ["observations holds int64", "floating-point"]),
    "bytes as states": (changed(observations=np.zeros((5, 3), np.uint8)), ["image observations", "uint8"]),
    "images": (changed(observations=np.zeros((5, 8, 8, 3), np.float32)), ["image observations", "(5, 8, 8, 3)"]),
    "discrete actions": (changed(actions=np.zeros(5, int)), ["discrete actions", "int64"]),
    "a group": (
        changed(observations=None) | {"observations/achieved_goal": np.zeros((5, 3))},
        ["no array 'observations'"],
    ),
}


@pytest.mark.parametrize("case", HDF5_ERRORS)
def test_bad_arrays_are_named(tmp_path, write_hdf5, case):
    content, words = HDF5_ERRORS[case]
    path = write_hdf5(tmp_path / "a.hdf5", content)
    with pytest.raises(InputError) as caught:
        read_columns(path)
    for expected in (str(path), *words):
        assert expected in str(caught.value)


def test_trajectories_of_length_one_have_no_transition(tmp_path, columns, write_hdf5):
    path = write_hdf5(tmp_path / "a.hdf5", columns([1, 1, 1], next_observations=False))
    with pytest.raises(InputError, match=r"no transition.*length 1"):
        read_columns(path)
    trajectories = read_columns(write_hdf5(tmp_path / "b.hdf5", columns([1, 1, 1])))
    assert [t.num_transitions for t in trajectories] == [1, 1, 1]


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_recognised(tmp_path, columns, write_hdf5, keep):
    path = write_hdf5(tmp_path / "a.hdf5", columns([500, 500]))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"a\.hdf5 is truncated \(incomplete\).*delete it and fetch it again"):
        read_columns(path)


def test_damage_inside_a_file_is_recognised(tmp_path, columns):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in columns([500, 500]).items():
            file.create_dataset(key, data=value, compression="gzip")
        start = file["observations"].id.get_chunk_info(0).byte_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 50] = bytes(50)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        read_columns(path)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "truncated"), (b"PK\x03\x04 a zip", "not an HDF5 file"), (bytes(999), "not an HDF5")]
)
def test_another_kind_of_file_is_recognised(tmp_path, content, words):
    (tmp_path / "a.hdf5").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_columns(tmp_path / "a.hdf5")


# ---- pickles ---------------------------------------------------------------------------------------------------------


BASIC = ("observations", "actions", "rewards")
METADATA = {"dataset": "somewhere", "env_name": "Hopper-v2", "obs_mask": np.ones(3)}


def as_paths(content, lengths, keys):
    starts = np.cumsum([0, *lengths])
    return [{key: content[key][a:b] for key in keys} for a, b in itertools.pairwise(starts)]


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_planner_s_pickle_is_read(tmp_path, columns, write_hdf5, assert_same, protocol):
    content = columns([3, 2], next_observations=False)
    paths = as_paths(content, [3, 2], BASIC)
    paths[0]["terminated"] = True  # one flag for the path, as mjrl writes
    paths[1]["terminals"] = np.array([False, False])
    paths[1]["rewards"] = [-100.0, np.float64(-101.0)]  # a list, with a NumPy scalar
    trajectories, env_name = read_pickle(write_pickle(tmp_path / "a.pkl", (paths, METADATA), protocol), False)
    assert env_name == "Hopper-v2"
    assert_same(trajectories, read_columns(write_hdf5(tmp_path / "a.hdf5", content)))


def test_names_of_both_versions_of_numpy_are_read(tmp_path, columns, write_hdf5, assert_same):
    content = columns([3, 2])
    paths = as_paths(content, [3, 2], (*BASIC, "next_observations", "terminals"))
    # In protocol 2, names stand as plain text.
    original = pickle.dumps((paths, {**METADATA, "score": np.float32(1)}), protocol=2)
    for module in (b"numpy.core", b"numpy._core"):
        (tmp_path / "a.pkl").write_bytes(original.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trajectories, _ = read_pickle(tmp_path / "a.pkl", False)
        assert_same(trajectories, read_columns(write_hdf5(tmp_path / "a.hdf5", content)))


def test_a_path_is_cut_at_its_own_flags(tmp_path, columns):
    (path,) = as_paths(columns([3, 2]), [5], (*BASIC, "terminals", "timeouts"))
    trajectories, _ = read_pickle(write_pickle(tmp_path / "a.pkl", ([path], METADATA)), False)
    assert lengths_of(trajectories) == [3, 2]


@pytest.mark.parametrize("next_observations", [True, False])
def test_a_dataset_written_as_paths_is_read_back_the_same(
    tmp_path, columns, write_hdf5, assert_same, next_observations
):
    content = columns([3, 2, 4, 1], next_observations=next_observations, simulator_states=True)
    original, _ = read_hdf5(write_hdf5(tmp_path / "a.hdf5", content), True)
    pickled = open_pickle(write_pickle(tmp_path / "a.pkl", to_paths(Dataset("a", "Hopper-v5", "ab12", original))))
    assert (pickled.dataset, pickled.env_name, pickled.sha256) == ("a", "Hopper-v5", "ab12")
    assert_same(pickled.trajectories(simulator_states=False), original)
    assert pickled.trajectories(simulator_states=False)[1].qpos is None
    np.testing.assert_array_equal(pickled.trajectories(simulator_states=True)[1].qpos, [[107], [108]])


def test_a_pickle_is_known_by_its_name_or_its_first_byte(tmp_path):
    for name, content, expected in (("a.pkl", b"", True), ("b", b"\x80\x04N.", True), ("c.hdf5", b"\x89HDF", False)):
        (tmp_path / name).write_bytes(content)
        assert is_pickle(tmp_path / name) == expected, name


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


GOOD_PATH = {key: GOOD[key][:3] for key in BASIC}
PICKLE_ERRORS = {
    "code": (Malicious(), ["posix.system", "only NumPy arrays"]),
    "a class": (([GOOD_PATH], {**METADATA, "where": Path("x")}), ["pathlib"]),
    "no metadata": ([GOOD_PATH], ["(list of paths, metadata)"]),
    "paths in a dictionary": (({"a": GOOD_PATH}, METADATA), ["(list of paths, metadata)"]),
    "paths of arrays": (([np.zeros(3)], METADATA), ["each path a dictionary"]),
    "masked states": (([GOOD_PATH], {**METADATA, "obs_mask": [1, 0, 1]}), ["obs_mask"]),
    "an array as the environment's name": (([GOOD_PATH], {**METADATA, "env_name": np.zeros(2)}), ["expected a string"]),
    "a number as the environment's name": (([GOOD_PATH], {**METADATA, "env_name": 3}), ["env_name 3"]),
    "no path": (([], METADATA), ["empty"]),
    "missing key": (([GOOD_PATH, {"observations": np.zeros((2, 3))}], METADATA), ["path 1", "no array 'actions'"]),
    "empty dictionary": (([{}], METADATA), ["path 0", "no array 'observations'"]),
    "ragged": (([{**GOOD_PATH, "actions": [[1.0], [1.0, 2.0], [1.0]]}], METADATA), ["path 0", "different lengths"]),
    "NaN": (([GOOD_PATH, {**GOOD_PATH, "rewards": [0, np.nan, 0]}], METADATA), ["path 1", "rewards is nan in row 1"]),
    "objects": (([{**GOOD_PATH, "rewards": np.array([None] * 3)}], METADATA), ["rewards holds object"]),
    "dimensions": (([GOOD_PATH, {**GOOD_PATH, "actions": np.zeros((3, 5))}], METADATA), ["mixes", "(3, 5, False)"]),
    "some next": (
        ([GOOD_PATH, {**GOOD_PATH, "next_observations": np.zeros((3, 3))}], METADATA),
        ["mixes", "next_observations"],
    ),
}


@pytest.mark.parametrize("case", PICKLE_ERRORS)
def test_bad_pickles_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, words = PICKLE_ERRORS[case]
    path = write_pickle(tmp_path / "a.pkl", content)
    with pytest.raises(InputError) as caught:
        read_pickle(path, False)
    for expected in (str(path), *words):
        assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]  # nothing was run


def test_half_a_pickle_is_refused(tmp_path):
    path = write_pickle(tmp_path / "a.pkl", ([GOOD_PATH], METADATA))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.pkl cannot be read as a pickle"):
        read_pickle(path, False)


def test_strings_of_numpys_become_plain_ones(tmp_path):
    metadata = {"env_name": np.str_("Hopper-v5"), "sha256": np.str_("ab12")}
    pickled = open_pickle(write_pickle(tmp_path / "a.pkl", ([GOOD_PATH], metadata)))
    assert (pickled.env_name, pickled.sha256) == ("Hopper-v5", "ab12")
    assert type(pickled.env_name) is type(pickled.sha256) is str


# ---- Minari ----------------------------------------------------------------------------------------------------------

FAKE_MINARI = """
from types import SimpleNamespace
import numpy as np

def load_dataset(name):
    if name != "fake/hopper/medium-v0":
        raise FileNotFoundError(name)
    return SimpleNamespace(env_spec=SimpleNamespace(id="Hopper-v5"), iterate_episodes=lambda: iter([
        episode(np.arange(4.0), [0, 0, 1], [0, 0, 0]), episode(np.arange(100.0, 103.0), [0, 0], [0, 1])]))

def episode(codes, terminations, truncations):
    return SimpleNamespace(observations=codes[:, None], actions=codes[:-1, None] + 0.5, rewards=-codes[:-1],
                           terminations=np.array(terminations, bool), truncations=np.array(truncations, bool))
"""


@pytest.fixture
def fake_minari(tmp_path, monkeypatch):
    (tmp_path / "minari.py").write_text(FAKE_MINARI)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "minari", raising=False)
    yield
    sys.modules.pop("minari", None)


def test_a_minari_dataset_is_read(fake_minari):
    trajectories, env_name, digest = read_minari("fake/hopper/medium-v0")
    assert env_name == "Hopper-v5"
    # Interrupted runs know their dataset by this digest: another would refuse to resume them.
    assert digest == "288b1d3fa33119f6d064ae58c6b51e1b0a43e29eedee20a46bb64779d25a64b0"
    assert [t.terminated for t in trajectories] == [True, False]
    np.testing.assert_array_equal(trajectories[1].observations, [[100], [101]])
    np.testing.assert_array_equal(trajectories[1].next_observations, [[101], [102]])
    np.testing.assert_array_equal(trajectories[1].actions, [[100.5], [101.5]])


def test_a_minari_dataset_that_is_not_here_says_how_to_get_it(fake_minari):
    with pytest.raises(InputError, match="minari download fake/hopper/expert-v0"):
        read_minari("fake/hopper/expert-v0")


def test_without_minari_its_ids_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(InputError, match=r"'fake/hopper/medium-v0' is no file.*pip install 'minari\[hdf5\]'"):
        read_minari("fake/hopper/medium-v0")
