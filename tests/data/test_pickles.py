"""data.pickles: paths as published scripts and planners write them, what is refused, and what is written."""

import itertools
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from data.columns import Wanted
from data.pickles import is_pickle, open_pickle, read_pickle, to_paths
from data.sources import load_dataset
from data.trajectories import Dataset, Finding, Part
from utils import InputError

DOOR = Path(__file__).resolve().parents[3] / "shared" / "data" / "door-human-demos.pickle"
BASIC = ("observations", "actions", "rewards")
METADATA = {"dataset": "somewhere", "env_name": "Hopper-v2", "obs_mask": np.ones(3)}


def as_paths(content, lengths, keys):
    starts = np.cumsum([0, *lengths])
    return [{key: content[key][a:b] for key in keys} for a, b in itertools.pairwise(starts)]


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def load(path, content, **options):
    return load_dataset(str(write_pickle(path, content)), **options)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_planner_s_pickle_is_read(tmp_path, columns, write_hdf5, assert_same, protocol):
    content = columns([3, 2], next_observations=False)
    paths = as_paths(content, [3, 2], BASIC)
    paths[0]["terminated"] = True  # one flag for the path, as mjrl writes
    paths[1]["terminals"] = np.array([False, False])
    paths[1]["rewards"] = [-100.0, np.float64(-101.0)]  # a list, with a NumPy scalar
    loaded = load_dataset(str(write_pickle(tmp_path / "a.pkl", (paths, METADATA), protocol)))
    assert loaded.env_name == "Hopper-v2"
    assert_same(loaded.trajectories, load_dataset(str(write_hdf5(tmp_path / "a.hdf5", content))).trajectories)


WRAPPERS = {
    "a list": lambda paths: paths,
    "a tuple": tuple,
    "an array of objects": lambda paths: np.array([*paths, None], dtype=object)[:-1],
    "a pair": lambda paths: (paths, {}),
    "a pair as a list": lambda paths: [paths, {"env_name": None}],
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_paths_are_read_however_they_are_wrapped(tmp_path, columns, wrapper):
    paths = as_paths(columns([3, 2, 4]), [3, 2, 4], BASIC)
    loaded = load(tmp_path / "hopper_medium.pickle", WRAPPERS[wrapper](paths))
    assert [len(trajectory) for trajectory in loaded.trajectories] == [3, 2, 4]
    assert loaded.num_transitions == 2 + 1 + 3
    assert not any(trajectory.terminated for trajectory in loaded.trajectories)
    np.testing.assert_array_equal(loaded.trajectories[1].actions[:, 0], [100.125, 101.125])


def test_decision_transformer_s_paths_are_read(tmp_path, columns):
    content = columns([3, 2])
    paths = as_paths(content, [3, 2], (*BASIC, "next_observations", "terminals"))
    loaded = load(tmp_path / "hopper-medium-v2.pkl", paths)
    assert [trajectory.terminated for trajectory in loaded.trajectories] == [True, False]
    assert loaded.num_transitions == 5


def test_dapg_s_demonstrations_are_read_without_their_initial_states(tmp_path):
    states = np.linspace(0, 1, 12).reshape(4, 3)
    path = {"observations": states, "actions": states[:, :2], "rewards": states[:, 0]}
    path |= {"init_state_dict": {"qpos": np.zeros(30), "qvel": np.zeros(30), "door_body_pos": np.zeros(3)}}
    loaded = load(tmp_path / "door.pickle", [path, path])
    assert [len(trajectory) for trajectory in loaded.trajectories] == [4, 4]
    assert loaded.trajectories[0].observations.dtype == np.float32
    (found,) = (found for found in loaded.findings if found.name == "entries not read")
    assert found.where == "init_state_dict/qpos, init_state_dict/qvel"


@pytest.mark.skipif(not DOOR.exists(), reason="the recorded demonstrations are not here")
def test_recorded_demonstrations_are_read():
    loaded = load_dataset(str(DOOR))
    assert (len(loaded.trajectories), loaded.state_dim, loaded.action_dim) == (25, 39, 28)
    assert {len(trajectory) for trajectory in loaded.trajectories} <= set(range(223, 301))
    assert loaded.num_transitions == loaded.num_rows - 25


def test_a_dictionary_of_d4rl_s_arrays_is_read(tmp_path, columns, write_hdf5, assert_same):
    content = columns([3, 2, 4])
    loaded = load(tmp_path / "a.pkl", content)
    assert_same(loaded.trajectories, load_dataset(str(write_hdf5(tmp_path / "a.hdf5", content))).trajectories)


def test_nested_observations_and_other_flags_of_paths_are_read(tmp_path):
    states = {"goal": [[1.0], [2.0]], "position": {"y": [3.0, 4.0], "x": np.array([5.0, 6.0])}}
    path = {"observations": states, "actions": [[0.0], [0.0]], "dones": [0, 255], "truncated": np.uint8([0, 0])}
    loaded = load(tmp_path / "a.pkl", [path, path])
    np.testing.assert_array_equal(loaded.trajectories[0].observations, [[1, 5, 3], [2, 6, 4]])
    assert loaded.trajectories[0].rewards is None
    assert load_dataset(f"{tmp_path / 'a.pkl'}::position/y").state_dim == 1


def test_names_of_both_versions_of_numpy_are_read(tmp_path, columns):
    paths = as_paths(columns([3, 2]), [3, 2], (*BASIC, "next_observations", "terminals"))
    # In protocol 2, names stand as plain text.
    original = pickle.dumps((paths, {**METADATA, "score": np.float32(1)}), protocol=2)
    for module in (b"numpy.core", b"numpy._core"):
        (tmp_path / "a.pkl").write_bytes(original.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recording = read_pickle(tmp_path / "a.pkl", Wanted())
        np.testing.assert_array_equal(recording.columns["rewards"], [0, -1, -2, -100, -101])


def test_a_path_is_cut_at_its_own_flags(tmp_path, columns):
    (path,) = as_paths(columns([3, 2]), [5], (*BASIC, "terminals", "timeouts"))
    assert [len(trajectory) for trajectory in load(tmp_path / "a.pkl", ([path], METADATA)).trajectories] == [3, 2]


def test_a_pickle_is_known_by_its_name_or_its_first_byte(tmp_path):
    for name, content, expected in (("a.pkl", b"", True), ("b", b"\x80\x04N.", True), ("c.hdf5", b"\x89HDF", False)):
        (tmp_path / name).write_bytes(content)
        assert is_pickle(tmp_path / name) == expected, name


def test_strings_of_numpys_become_plain_ones(tmp_path, columns):
    metadata = {"env_name": np.str_("Hopper-v5"), "sha256": np.str_("ab12")}
    pickled = open_pickle(write_pickle(tmp_path / "a.pkl", (as_paths(columns([3]), [3], BASIC), metadata)))
    assert (pickled.env_name, pickled.sha256) == ("Hopper-v5", "ab12")
    assert type(pickled.env_name) is type(pickled.sha256) is str


# ---- what is refused -------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


GOOD_PATH = {key: np.zeros(shape, np.float32) for key, shape in zip(BASIC, [(3, 3), (3, 2), 3], strict=True)}
ERRORS = {
    "code": (Malicious(), ["posix.system", "only NumPy arrays"]),
    "code in a list": ([GOOD_PATH, Malicious()], ["posix.system"]),
    "code in a path": ([{**GOOD_PATH, "extra": {"deep": [Malicious()]}}], ["posix.system"]),
    "code in an array": ([{**GOOD_PATH, "actions": np.array([Malicious()] * 3, dtype=object)}], ["posix.system"]),
    "code in metadata": (([GOOD_PATH], {"findings": [Malicious()]}), ["posix.system"]),
    "code in a dictionary of arrays": ({**GOOD_PATH, "terminals": Malicious()}, ["posix.system"]),
    "a class": (([GOOD_PATH], {**METADATA, "where": Path("x")}), ["pathlib"]),
    "one number": (3, ["holds one int", "a list of paths"]),
    "a dictionary of others": ({"train": 3}, ["holds a dictionary of train"]),
    "paths in a dictionary": (({"a": GOOD_PATH}, METADATA), ["path 0", "no array 'observations'"]),
    "paths of arrays": (([np.zeros(3)], METADATA), ["holds a tuple of dict, list", "a list of paths"]),
    "masked states": (([GOOD_PATH], {**METADATA, "obs_mask": [1, 0, 1]}), ["obs_mask"]),
    "a mask that is none": (([GOOD_PATH], {**METADATA, "obs_mask": [1, [0, 1]]}), ["obs_mask"]),
    "an array as the environment's name": (([GOOD_PATH], {**METADATA, "env_name": np.zeros(2)}), ["expected a string"]),
    "a number as the environment's name": (([GOOD_PATH], {**METADATA, "env_name": 3}), ["env_name 3"]),
    "no path": (([], METADATA), ["empty"]),
    "no path in a list": ([], ["empty"]),
    "missing key": (([GOOD_PATH, {"observations": np.zeros((2, 3))}], METADATA), ["path 1", "no array 'actions'"]),
    "empty dictionary": (([{}], METADATA), ["path 0", "no array 'observations'"]),
    "ragged": (([{**GOOD_PATH, "actions": [[1.0], [1.0, 2.0], [1.0]]}], METADATA), ["different lengths", "'actions'"]),
    "NaN": (([GOOD_PATH, {**GOOD_PATH, "rewards": [0, np.nan, 0]}], METADATA), ["path 1", "rewards is nan in row 1"]),
    "objects": (([{**GOOD_PATH, "rewards": np.array([None] * 3)}], METADATA), ["rewards holds object"]),
    "dimensions": (
        ([GOOD_PATH, {**GOOD_PATH, "actions": np.zeros((3, 5))}], METADATA),
        ["path 1", "actions is 5 wide"],
    ),
    "no ends": ({**GOOD_PATH}, ["does not say where episodes end"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_pickles_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, words = ERRORS[case]
    path = write_pickle(tmp_path / "a.pkl", content)
    with pytest.raises(InputError) as caught:
        read_pickle(path, Wanted())
    for expected in (str(path), *words):
        assert expected in str(caught.value)
    assert len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]  # nothing was run


def test_half_a_pickle_is_refused(tmp_path):
    path = write_pickle(tmp_path / "a.pkl", ([GOOD_PATH], METADATA))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.pkl cannot be read as a pickle"):
        read_pickle(path, Wanted())


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("next_observations", [True, False])
@pytest.mark.parametrize("rewards", [True, False])
def test_a_dataset_written_as_paths_is_read_back_the_same(
    tmp_path, columns, write_hdf5, assert_same, next_observations, rewards
):
    content = columns([3, 2, 4, 1], next_observations=next_observations, simulator_states=True)
    if not rewards:
        del content["rewards"]
    original = load_dataset(str(write_hdf5(tmp_path / "a.hdf5", content)), simulator_states=True)
    again = load(tmp_path / "a.pkl", to_paths(original), simulator_states=True)
    assert_same(again.trajectories, original.trajectories)
    np.testing.assert_array_equal(again.trajectories[1].qpos, [[107], [108]])
    assert load_dataset(str(tmp_path / "a.pkl")).trajectories[1].qpos is None


FOUND = Finding("flags", 2, "dones", "episodes end there", "nothing", matters=False)


def test_what_was_found_and_joined_is_kept_in_plain_python(tmp_path, columns):
    paths = as_paths(columns([3, 2]), [3, 2], BASIC)
    trajectories = load(tmp_path / "a.pkl", paths).trajectories
    dataset = Dataset("a + b", "Hopper-v5", "ab12", trajectories, (FOUND,), (Part("a", "aa", 1), Part("b", "bb", 1)))
    pickled = open_pickle(write_pickle(tmp_path / "b.pkl", to_paths(dataset)))
    assert (pickled.dataset, pickled.env_name, pickled.sha256) == ("a + b", "Hopper-v5", "ab12")
    assert (pickled.findings, pickled.parts) == (dataset.findings, dataset.parts)
    assert pickled.read(Wanted()).findings == (FOUND,)


@pytest.mark.parametrize("findings", [3, ["a"], [{"name": "a"}], [{**FOUND.__dict__, "where": np.zeros(3)}], {"a": 1}])
def test_what_others_keep_under_the_same_name_is_not_mistaken(tmp_path, findings):
    assert open_pickle(write_pickle(tmp_path / "a.pkl", ([GOOD_PATH], {"findings": findings}))).findings == ()
