import hashlib
import itertools
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import d4rl_registry, sources
from data.sources import load_dataset
from data.trajectories import Dataset, Trajectory, gather_transitions, holdout_rows, split_trajectories
from utils import InputError

STATE_DIM, ACTION_DIM = 3, 2


def columns(lengths, *, next_observations=True, simulator_states=False):
    """Columns of D4RL's format whose values say where they are from.

    In row ``t`` of episode ``e`` the observation is ``100 e + t`` plus 0, 0.25 and 0.5, the next one is one more, both
    actions are ``100 e + t + 0.125`` and the reward is ``-(100 e + t)``. Even episodes end in a terminal, odd ones in a
    timeout.
    """
    codes = np.concatenate([100 * e + np.arange(length) for e, length in enumerate(lengths)]).astype(np.float32)
    ends, is_even = np.cumsum(lengths) - 1, np.arange(len(lengths)) % 2 == 0
    observations = codes[:, None] + np.float32([0, 0.25, 0.5])
    result = {
        "observations": observations,
        "actions": np.repeat(codes[:, None] + np.float32(0.125), ACTION_DIM, axis=1),
        "rewards": -codes,
        "terminals": np.isin(np.arange(len(codes)), ends[is_even]),
        "timeouts": np.isin(np.arange(len(codes)), ends[~is_even]),
    }
    if next_observations:
        result["next_observations"] = observations + 1
    if simulator_states:
        result["infos/qpos"], result["infos/qvel"] = codes[:, None] + 7.0, codes[:, None] + 8.0
    return result


def write_hdf5(path, content, **attributes):
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            file[key] = value
        file.attrs.update(attributes)
    return str(path)


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def make(lengths, **options):
    """A dataset in memory, without a file; coded as ``columns``."""
    trajectories = []
    for episode, length in enumerate(lengths):
        values = columns([length], **options)
        states = values["observations"] + 100 * episode
        following = values["next_observations"] + 100 * episode if "next_observations" in values else None
        trajectories.append(Trajectory(states, values["actions"], values["rewards"], following, terminated=False))
    return Dataset("made", None, "", trajectories)


def assert_same(one, other):
    """Both hold the same trajectories to the bit, and in the same types."""
    assert len(one.trajectories) == len(other.trajectories)
    for a, b in zip(one.trajectories, other.trajectories, strict=True):
        assert a.terminated is b.terminated
        for field in ("observations", "actions", "rewards", "next_observations"):
            x, y = getattr(a, field), getattr(b, field)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype == np.float32
                np.testing.assert_array_equal(x, y)


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


def test_hdf5_is_cut_into_episodes(tmp_path):
    content = columns([3, 2, 4], simulator_states=True)
    loaded = load_dataset(write_hdf5(tmp_path / "a.hdf5", content, env_name="Hopper-v5"))
    assert [len(t) for t in loaded.trajectories] == [3, 2, 4]
    assert [t.terminated for t in loaded.trajectories] == [True, False, True]
    assert (loaded.state_dim, loaded.action_dim, loaded.num_rows, loaded.num_transitions) == (3, 2, 9, 9)
    assert loaded.env_name == "Hopper-v5"
    assert loaded.sha256 == hashlib.sha256((tmp_path / "a.hdf5").read_bytes()).hexdigest()
    second = loaded.trajectories[1]
    np.testing.assert_array_equal(second.observations, [[100, 100.25, 100.5], [101, 101.25, 101.5]])
    np.testing.assert_array_equal(second.next_observations[:, 0], [101, 102])
    np.testing.assert_array_equal(second.actions, [[100.125, 100.125], [101.125, 101.125]])
    np.testing.assert_array_equal(second.rewards, [-100, -101])
    assert second.qpos is None


def test_simulator_states_are_read_when_asked_for(tmp_path):
    name = write_hdf5(tmp_path / "a.hdf5", columns([3, 2], simulator_states=True))
    loaded = load_dataset(name, simulator_states=True)
    np.testing.assert_array_equal(loaded.trajectories[1].qpos, [[107], [108]])
    np.testing.assert_array_equal(loaded.trajectories[1].qvel, [[108], [109]])
    without = load_dataset(write_hdf5(tmp_path / "b.hdf5", columns([3, 2])), simulator_states=True)
    assert without.trajectories[0].qpos is None


def test_arrays_are_float32_views_of_one_array(tmp_path):
    content = {key: value.astype(np.float64) for key, value in columns([3, 2]).items()}
    content["rewards"], content["terminals"] = content["rewards"][:, None], content["terminals"][:, None]
    loaded = load_dataset(write_hdf5(tmp_path / "a.hdf5", content))
    first, second = loaded.trajectories
    assert first.terminated is True
    assert second.rewards.shape == (2,)
    for array in (first.observations, first.actions, first.rewards, first.next_observations):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
    assert first.observations.base is second.observations.base is not None


def test_the_end_of_the_file_ends_an_unfinished_episode(tmp_path):
    content = {key: value[:-1] for key, value in columns([3, 2, 4]).items()}
    loaded = load_dataset(write_hdf5(tmp_path / "a.hdf5", content))
    assert [len(t) for t in loaded.trajectories] == [3, 2, 3]
    assert loaded.trajectories[-1].terminated is False


def test_without_timeouts_episodes_end_at_terminals_and_a_note_says_so(tmp_path, capsys):
    content = columns([3, 2, 4, 1], next_observations=False)
    del content["timeouts"]
    loaded = load_dataset(write_hdf5(tmp_path / "a.hdf5", content))
    assert [len(t) for t in loaded.trajectories] == [3, 6, 1]
    assert "neither timeouts nor next_observations" in capsys.readouterr().err


def test_without_timeouts_a_d4rl_id_is_cut_at_the_episode_limit(tmp_path, monkeypatch, capsys):
    content = columns([30, 250, 130], next_observations=False)
    del content["timeouts"]
    content["terminals"][-1] = False
    # Terminals: after row 30. Adroit's pen ends episodes after 100 steps, counted anew from the terminal.
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_hdf5(tmp_path / "pen-v0_demos_clipped.hdf5", content)
    loaded = load_dataset("pen-human-v0")
    assert [len(t) for t in loaded.trajectories] == [30, 100, 100, 100, 80]  # 250 + 130 = 100 + 100 + 100 + 80
    assert [t.terminated for t in loaded.trajectories] == [True, False, False, False, False]
    assert capsys.readouterr().err == ""


def test_timeouts_win_over_the_episode_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))  # pen's limit is 100; human demonstrations are longer
    write_hdf5(tmp_path / "pen-v0_demos_clipped.hdf5", columns([30, 250, 130]))
    assert [len(t) for t in load_dataset("pen-human-v0").trajectories] == [30, 250, 130]


def changed(**changes):
    """Good columns of 5 rows with some replaced; None takes one away."""
    content = {**columns([3, 2]), **changes}
    return {key: value for key, value in content.items() if value is not None}


def with_value(key, row, value, dtype=np.float32):
    array = columns([3, 2])[key].astype(dtype)
    array[row] = value
    return {key: array}


EMPTY = {key: value[:0] for key, value in columns([3, 2]).items()}
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
}


@pytest.mark.parametrize("case", HDF5_ERRORS)
def test_bad_arrays_are_named(tmp_path, case):
    content, words = HDF5_ERRORS[case]
    name = write_hdf5(tmp_path / "a.hdf5", content)
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    for expected in (name, *words):
        assert expected in str(caught.value)


def test_trajectories_of_length_one_have_no_transition(tmp_path):
    name = write_hdf5(tmp_path / "a.hdf5", columns([1, 1, 1], next_observations=False))
    with pytest.raises(InputError, match=r"no transition.*length 1"):
        load_dataset(name)
    assert load_dataset(write_hdf5(tmp_path / "b.hdf5", columns([1, 1, 1]))).num_transitions == 3


def test_a_group_instead_of_an_array_is_a_missing_key(tmp_path):
    content = changed(observations=None) | {"observations/achieved_goal": np.zeros((5, 3))}
    with pytest.raises(InputError, match="no array 'observations'"):
        load_dataset(write_hdf5(tmp_path / "a.hdf5", content))


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_recognised(tmp_path, keep):
    path = Path(write_hdf5(tmp_path / "a.hdf5", columns([500, 500])))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"a\.hdf5 is truncated \(incomplete\).*delete it and fetch it again"):
        load_dataset(str(path))


def test_damage_inside_a_file_is_recognised(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in columns([500, 500]).items():
            file.create_dataset(key, data=value, compression="gzip")
        start = file["observations"].id.get_chunk_info(0).byte_offset
    damaged = bytearray((tmp_path / "a.hdf5").read_bytes())
    damaged[start : start + 50] = bytes(50)
    (tmp_path / "a.hdf5").write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        load_dataset(str(tmp_path / "a.hdf5"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "truncated"), (b"PK\x03\x04 a zip", "not an HDF5 file"), (bytes(999), "not an HDF5")]
)
def test_another_kind_of_file_is_recognised(tmp_path, content, words):
    (tmp_path / "a.hdf5").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_dataset(str(tmp_path / "a.hdf5"))


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A data folder with one bundled dataset, ``hopper-medium-demo``."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_hdf5(folder / "hopper-medium-demo.hdf5", columns([3, 2]), env_name="Hopper-v5")
    monkeypatch.setattr(sources, "BUNDLED", folder)
    return folder


def test_a_bundled_name_is_found_from_any_folder(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.bundled_names() == ["hopper-medium-demo"]
    loaded = load_dataset("hopper-medium-demo")
    assert (loaded.name, loaded.env_name, loaded.num_rows) == ("hopper-medium-demo", "Hopper-v5", 5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hopper-medium-dmo", ["did you mean 'hopper-medium-demo'"]),
        ("halfcheetah-mediun-v2", ["did you mean 'halfcheetah-medium-v2'", "hopper-medium-demo"]),
        ("breakout-mixed-v0", ["Atari", "hopper-medium-demo"]),
        ("missing/file.hdf5", ["missing/file.hdf5", "neither a known name nor a file"]),
        (".", ["folder or a device, expected a file"]),
        ("/dev/null", ["folder or a device, expected a file"]),
        ("carla-lane-v0", ["image observations"]),
        ("minigrid-fourrooms-v0", ["discrete actions"]),
    ],
)
def test_unknown_names_are_answered_with_known_ones(bundled, name, words):
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    for expected in words:
        assert expected in str(caught.value)


def test_a_d4rl_id_is_read_from_d4rl_s_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_hdf5(tmp_path / "hopper_medium.hdf5", columns([3, 2]))
    loaded = load_dataset("hopper-medium-v0")
    assert (loaded.name, loaded.env_name, loaded.num_rows) == ("hopper-medium-v0", "hopper-medium-v0", 5)


def test_a_truncated_d4rl_file_is_recognised(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = Path(write_hdf5(tmp_path / "hopper_medium.hdf5", columns([300, 200])))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"hopper_medium\.hdf5 is truncated"):
        load_dataset("hopper-medium-v0")


def test_offline_a_d4rl_id_says_url_folder_and_bundled_names(bundled, tmp_path, monkeypatch):
    url = "http://127.0.0.1:1/folder/hopper_medium.hdf5"  # nothing listens on port 1
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(d4rl_registry, "registry", lambda: {"hopper-medium-v0": d4rl_registry.Entry(url, None, None)})
    monkeypatch.setattr(d4rl_registry, "PAUSE", 0.0)
    with pytest.raises(InputError) as caught:
        load_dataset("hopper-medium-v0", quiet=True)
    for words in (url, str(tmp_path / "cache"), "hopper-medium-demo"):
        assert words in str(caught.value)


def test_d4rl_is_imported_only_for_a_d4rl_id(bundled, monkeypatch):
    monkeypatch.setattr(d4rl_registry, "package_table", lambda: pytest.fail("d4rl was imported"))
    load_dataset("hopper-medium-demo")
    with pytest.raises(InputError):
        load_dataset("no-such-name")


# ---- pickles ---------------------------------------------------------------------------------------------------------


def as_paths(content, lengths, keys):
    starts = np.cumsum([0, *lengths])
    return [{key: content[key][a:b] for key in keys} for a, b in itertools.pairwise(starts)]


BASIC = ("observations", "actions", "rewards")
METADATA = {"dataset": "somewhere", "env_name": "Hopper-v2", "obs_mask": np.ones(3)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_planner_s_pickle_is_read(tmp_path, protocol):
    content = columns([3, 2], next_observations=False)
    paths = as_paths(content, [3, 2], BASIC)
    paths[0]["terminated"] = True  # one flag for the path, as mjrl writes
    paths[1]["terminals"] = np.array([False, False])
    paths[1]["rewards"] = [-100.0, np.float64(-101.0)]  # a list, with a NumPy scalar
    loaded = load_dataset(write_pickle(tmp_path / "a.pkl", (paths, METADATA), protocol))
    assert loaded.env_name == "Hopper-v2"
    assert loaded.sha256 == hashlib.sha256((tmp_path / "a.pkl").read_bytes()).hexdigest()
    assert_same(loaded, load_dataset(write_hdf5(tmp_path / "a.hdf5", content)))


def test_names_of_both_versions_of_numpy_are_read(tmp_path):
    content = columns([3, 2])
    paths = as_paths(content, [3, 2], (*BASIC, "next_observations", "terminals"))
    original = pickle.dumps(
        (paths, {**METADATA, "score": np.float32(1)}), protocol=2
    )  # names stand there as plain text
    for module in (b"numpy.core", b"numpy._core"):
        (tmp_path / "a.pkl").write_bytes(original.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_dataset(str(tmp_path / "a.pkl"))
        assert_same(loaded, load_dataset(write_hdf5(tmp_path / "a.hdf5", content)))


def test_a_path_is_cut_at_its_own_flags(tmp_path):
    (path,) = as_paths(columns([3, 2]), [5], (*BASIC, "terminals", "timeouts"))
    loaded = load_dataset(write_pickle(tmp_path / "a.pkl", ([path], METADATA)))
    assert [len(t) for t in loaded.trajectories] == [3, 2]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


GOOD_PATH = as_paths(columns([3]), [3], BASIC)[0]
PICKLE_ERRORS = {
    "code": (Malicious(), ["posix.system", "only NumPy arrays"]),
    "a class": (([GOOD_PATH], {**METADATA, "where": Path("x")}), ["pathlib"]),
    "no metadata": ([GOOD_PATH], ["(list of paths, metadata)"]),
    "paths in a dictionary": (({"a": GOOD_PATH}, METADATA), ["(list of paths, metadata)"]),
    "paths of arrays": (([np.zeros(3)], METADATA), ["each path a dictionary"]),
    "masked states": (([GOOD_PATH], {**METADATA, "obs_mask": [1, 0, 1]}), ["obs_mask"]),
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
    name = write_pickle(tmp_path / "a.pkl", content)
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    for expected in (name, *words):
        assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]  # nothing was run


def test_half_a_pickle_is_refused(tmp_path):
    path = Path(write_pickle(tmp_path / "a.pkl", ([GOOD_PATH], METADATA)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.pkl cannot be read as a pickle"):
        load_dataset(str(path))


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("next_observations", [True, False])
def test_a_cached_dataset_is_the_same(tmp_path, next_observations):
    content = columns([3, 2, 4, 1], next_observations=next_observations, simulator_states=True)
    name, cache = write_hdf5(tmp_path / "a.hdf5", content, env_name="Hopper-v5"), tmp_path / "new" / "cache.pkl"
    original, written = load_dataset(name), load_dataset(name, cache)
    reused = load_dataset(name, cache, simulator_states=True)
    assert_same(original, written)
    assert_same(original, reused)
    for field in ("name", "env_name", "sha256"):
        assert getattr(original, field) == getattr(written, field) == getattr(reused, field)
    np.testing.assert_array_equal(reused.trajectories[1].qpos, [[107], [108]])


def test_a_cache_is_read_and_not_the_source(tmp_path):
    name, cache = write_hdf5(tmp_path / "a.hdf5", columns([3, 2])), tmp_path / "cache.pkl"
    original = load_dataset(name, cache)
    Path(name).unlink()
    assert_same(original, load_dataset(name, cache))


def test_a_cache_is_what_planners_read(tmp_path):
    load_dataset(write_hdf5(tmp_path / "a.hdf5", columns([3, 2]), env_name="Hopper-v5"), tmp_path / "cache.pkl")
    with (tmp_path / "cache.pkl").open("rb") as file:
        paths, metadata = pickle.load(file)
    assert [len(path["observations"]) for path in paths] == [3, 2]
    np.testing.assert_array_equal(paths[1]["timeouts"], [False, True])
    np.testing.assert_array_equal(metadata.pop("obs_mask"), [1, 1, 1])
    assert metadata.pop("sha256") == hashlib.sha256((tmp_path / "a.hdf5").read_bytes()).hexdigest()
    assert metadata == {"dataset": str(tmp_path / "a.hdf5"), "env_name": "Hopper-v5", "rows": 5, "trajectories": 2}


def test_a_cache_of_something_else_is_refused(tmp_path):
    cache = tmp_path / "cache.pkl"
    first = write_hdf5(tmp_path / "first.hdf5", columns([3, 2]))
    second = write_hdf5(tmp_path / "second.hdf5", columns([3, 3]))
    load_dataset(first, cache)
    with pytest.raises(InputError, match=f"holds dataset {first!r}, asked for was {second!r}.*--dataset_path"):
        load_dataset(second, cache)
    Path(second).replace(first)
    with pytest.raises(InputError, match=f"was made of another {first!r}.*--dataset_path"):
        load_dataset(first, cache)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    name = write_hdf5(tmp_path / "a.hdf5", columns([3, 2]))
    with pytest.raises(InputError, match="folder or a device, expected a file"):
        load_dataset(name, tmp_path)
    with pytest.raises(InputError, match=r"cannot be written.*give another"):
        load_dataset(name, Path(name) / "cache.pkl")


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
    loaded = load_dataset("fake/hopper/medium-v0")
    assert (loaded.env_name, loaded.num_rows, len(loaded.sha256)) == ("Hopper-v5", 5, 64)
    assert [t.terminated for t in loaded.trajectories] == [True, False]
    np.testing.assert_array_equal(loaded.trajectories[1].observations, [[100], [101]])
    np.testing.assert_array_equal(loaded.trajectories[1].next_observations, [[101], [102]])
    np.testing.assert_array_equal(loaded.trajectories[1].actions, [[100.5], [101.5]])


def test_a_minari_dataset_that_is_not_here_says_how_to_get_it(fake_minari):
    with pytest.raises(InputError, match="minari download fake/hopper/expert-v0"):
        load_dataset("fake/hopper/expert-v0")


# ---- splits and transitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"holdout_ratio": 0.2},
        {"holdout_samples": 40},
        {"test_ratio": 0.1},
        {"holdout_ratio": 0.3, "test_ratio": 0.3},
    ],
)
def test_a_split_is_disjoint_complete_and_sorted(options):
    made = make([5, 17, 1, 30, 8, 9, 2, 11, 25, 14], next_observations=False)
    for seed in range(20):
        split = split_trajectories(made, seed, **options)
        np.testing.assert_array_equal(np.sort(np.concatenate([split.train, split.holdout, split.test])), np.arange(10))
        for part in (split.train, split.holdout, split.test):
            assert part.dtype == np.int64
            np.testing.assert_array_equal(part, np.sort(part))
        assert (len(split.holdout) > 0) == ("holdout_ratio" in options or "holdout_samples" in options)
        assert (len(split.test) > 0) == ("test_ratio" in options)


def test_a_split_is_as_documented():
    # default_rng(3).permutation(5) is the order; the holdout is taken from its back, the test set from its front.
    order = np.random.default_rng(3).permutation(5).tolist()
    split = split_trajectories(make([10] * 5), 3, holdout_ratio=0.4, test_ratio=0.2)
    assert split.test.tolist() == order[:1]
    assert split.holdout.tolist() == sorted(order[3:])
    assert split.train.tolist() == sorted(order[1:3])
    others = [split_trajectories(make([10] * 5), seed, holdout_ratio=0.4).holdout.tolist() for seed in range(10)]
    assert len(set(map(tuple, others))) > 1


def test_test_and_holdout_do_not_depend_on_each_other():
    made = make([5, 17, 12, 30, 8, 9, 2, 11, 25, 14])
    splits = [split_trajectories(made, 0, holdout_ratio=h, test_ratio=t) for h, t in ((0, 0.2), (0.3, 0.2), (0.3, 0))]
    np.testing.assert_array_equal(splits[0].test, splits[1].test)
    np.testing.assert_array_equal(splits[1].holdout, splits[2].holdout)


def test_the_ratio_counts_transitions_not_trajectories():
    made = make([10] * 9 + [110])  # 200 transitions, of which 0.2 is 40, in four small trajectories
    # By how many small ones come before the large one, from the back of the order: 20 is nearer to 40 than 20 + 110.
    nearest = [110, 10, 20, 30, 40, 40, 40, 40, 40, 40]
    before = [np.random.default_rng(seed).permutation(10)[::-1].tolist().index(9) for seed in range(20)]
    assert len(set(before)) > 4
    for seed in range(20):
        holdout = split_trajectories(made, seed, holdout_ratio=0.2).holdout
        assert len(gather_transitions(made, holdout)) == nearest[before[seed]]


def test_a_small_ratio_holds_out_one_trajectory_and_a_large_one_leaves_one():
    assert len(split_trajectories(make([10] * 5), 0, holdout_ratio=0.001).holdout) == 1
    assert len(split_trajectories(make([10] * 5), 0, holdout_ratio=0.999).train) == 1


def test_a_trajectory_without_transitions_is_never_alone_on_a_side():
    made = make([1, 1, 1, 1, 10, 10], next_observations=False)
    for seed in range(50):
        split = split_trajectories(made, seed, holdout_ratio=0.1)
        assert len(gather_transitions(made, split.holdout)) == len(gather_transitions(made, split.train)) == 9


@pytest.mark.parametrize(("samples", "trajectories"), [(1, 1), (10, 1), (11, 2), (20, 2), (40, 4)])
def test_holdout_samples_is_reached_by_whole_trajectories(samples, trajectories):
    split = split_trajectories(make([10] * 5), 0, holdout_samples=samples)
    assert len(split.holdout) == trajectories


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([10] * 5, {"holdout_ratio": 1.0}, "holdout_ratio is 1.0"),
        ([10] * 5, {"holdout_ratio": -0.1}, "holdout_ratio is -0.1"),
        ([10] * 5, {"holdout_ratio": float("nan")}, "holdout_ratio is nan"),
        ([10] * 5, {"test_ratio": 1.5}, "test_ratio is 1.5"),
        ([10] * 5, {"holdout_ratio": 0.2, "holdout_samples": 5}, "give one of them"),
        ([10] * 5, {"holdout_samples": 0}, "holdout_samples is 0"),
        ([10] * 5, {"holdout_samples": 50}, "fewer than the dataset's 50"),
        ([10] * 5, {"holdout_samples": 41}, "leaves none to train on"),
        ([10] * 4, {"holdout_ratio": 0.5, "test_ratio": 0.5}, "leaves none to train on"),
        ([10], {"holdout_ratio": 0.2}, "of 1 trajectories leaves none"),
        ([10], {"test_ratio": 0.2}, "of 1 trajectories leaves none"),
    ],
)
def test_splits_that_cannot_be_are_refused(lengths, options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        split_trajectories(make(lengths), 0, **options)


def test_with_next_observations_every_row_is_a_transition():
    transitions = gather_transitions(make([3, 1, 2]), np.array([2, 0]))
    assert len(transitions) == 5
    np.testing.assert_array_equal(transitions.states[:, 0], [200, 201, 0, 1, 2])
    np.testing.assert_array_equal(transitions.next_states[:, 0], [201, 202, 1, 2, 3])  # 202 and 3: the last rows' own
    np.testing.assert_array_equal(transitions.actions[:, 0], [0.125, 1.125, 0.125, 1.125, 2.125])
    np.testing.assert_array_equal(transitions.rewards, [0, -1, 0, -1, -2])


def test_without_next_observations_rows_are_paired_inside_an_episode(tmp_path):
    loaded = load_dataset(write_hdf5(tmp_path / "a.hdf5", columns([3, 1, 2, 4], next_observations=False)))
    transitions = gather_transitions(loaded, np.arange(4))
    assert len(transitions) == loaded.num_transitions == 6
    np.testing.assert_array_equal(transitions.states[:, 0], [0, 1, 200, 300, 301, 302])
    np.testing.assert_array_equal(transitions.next_states[:, 0], [1, 2, 201, 301, 302, 303])
    np.testing.assert_array_equal(transitions.actions[:, 1], [0.125, 1.125, 200.125, 300.125, 301.125, 302.125])
    np.testing.assert_array_equal(transitions.rewards, [0, -1, -200, -300, -301, -302])


def test_no_trajectories_make_no_transitions():
    transitions = gather_transitions(make([3, 2]), np.array([], np.int64))
    assert (transitions.states.shape, transitions.actions.shape, transitions.rewards.shape) == ((0, 3), (0, 2), (0,))
    assert transitions.next_states.dtype == np.float32


@pytest.mark.parametrize("next_observations", [True, False])
def test_holdout_rows_index_the_published_concatenation(next_observations):
    made = make([3, 1, 2, 4], next_observations=next_observations)
    # observations[:-1] has 2, 0, 1 and 3 rows: trajectory 0 is rows 0-1, 2 is row 2 and 3 is rows 3-5.
    assert holdout_rows(made, np.array([0, 1])).tolist() == [0, 1]
    assert holdout_rows(made, np.array([2, 3])).tolist() == [2, 3, 4, 5]
    assert holdout_rows(made, np.array([], np.int64)).tolist() == []
    published = np.concatenate([t.observations[:-1] for t in made.trajectories])
    np.testing.assert_array_equal(published[holdout_rows(made, np.array([3])), 0], [300, 301, 302])


def test_source_attributes_tell_how_a_file_was_made(tmp_path):
    with h5py.File(tmp_path / "made.hdf5", "w") as file:
        file.attrs["process_noise"] = 0.2
    (tmp_path / "other.pkl").write_bytes(b"no HDF5")
    assert sources.source_attributes(str(tmp_path / "made.hdf5")) == {"process_noise": 0.2}
    assert (
        sources.source_attributes(str(tmp_path / "other.pkl"))
        == sources.source_attributes(str(tmp_path / "missing"))
        == {}
    )


@pytest.mark.parametrize("env_name", [np.zeros(2), 3])
def test_an_environment_name_that_is_no_string_is_refused(tmp_path, env_name):
    path = tmp_path / "paths.pkl"
    paths = [{"observations": np.eye(3), "actions": np.eye(3), "rewards": np.zeros(3), "terminals": np.zeros(3, bool)}]
    path.write_bytes(pickle.dumps((paths, METADATA | {"env_name": env_name})))
    with pytest.raises(InputError, match="expected a string"):
        load_dataset(str(path))


def test_an_environment_name_of_numpys_becomes_a_plain_string(tmp_path):
    path = tmp_path / "paths.pkl"
    paths = [{"observations": np.eye(3), "actions": np.eye(3), "rewards": np.zeros(3), "terminals": np.zeros(3, bool)}]
    path.write_bytes(pickle.dumps((paths, METADATA | {"env_name": np.str_("Hopper-v5")})))
    assert type(load_dataset(str(path)).env_name) is str
