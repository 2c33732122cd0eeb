"""data.sources: which name stands for which dataset, the answers to unknown ones, and the cache."""

import hashlib
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import d4rl_registry, sources
from data.columns import Wanted
from data.sources import load_dataset, source_attributes
from data.trajectories import Dataset
from utils import InputError


@pytest.fixture
def bundled(tmp_path, monkeypatch, columns, write_hdf5):
    """A folder with one bundled dataset, ``hopper-medium-demo``."""
    folder = tmp_path / "bundled"
    folder.mkdir()
    write_hdf5(folder / "hopper-medium-demo.hdf5", columns([3, 2]), env_name="Hopper-v5")
    monkeypatch.setattr(sources, "BUNDLED", folder)
    return folder


@pytest.fixture
def d4rl_folder(tmp_path, monkeypatch):
    """The folder where D4RL's files are looked for; empty."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    return tmp_path


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_file_is_loaded_by_its_path(tmp_path, columns, write_hdf5):
    path = write_hdf5(tmp_path / "a.hdf5", columns([3, 2, 4], simulator_states=True), env_name="Hopper-v5")
    loaded = load_dataset(str(path))
    assert (loaded.name, loaded.env_name) == (str(path), "Hopper-v5")
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (loaded.state_dim, loaded.action_dim, loaded.num_rows, loaded.num_transitions) == (3, 2, 9, 9)
    assert loaded.trajectories[0].qpos is None
    assert load_dataset(str(path), simulator_states=True).trajectories[0].qpos is not None


def test_a_pickle_is_loaded_whatever_its_name(tmp_path):
    path = tmp_path / "paths"
    paths = [{"observations": np.eye(3), "actions": np.eye(3), "rewards": np.zeros(3)}]
    path.write_bytes(pickle.dumps((paths, {"env_name": "Hopper-v2", "dataset": "of another name"})))
    loaded = load_dataset(str(path))
    assert (loaded.name, loaded.env_name, loaded.num_rows) == (str(path), "Hopper-v2", 3)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_bundled_name_is_found_from_any_folder(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.bundled_names() == ["hopper-medium-demo"]
    loaded = load_dataset("hopper-medium-demo")
    assert (loaded.name, loaded.env_name, loaded.num_rows) == ("hopper-medium-demo", "Hopper-v5", 5)


def test_a_bundled_name_comes_before_a_file_of_that_name(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hopper-medium-demo").write_text("no dataset")
    assert load_dataset("hopper-medium-demo").num_rows == 5


def test_a_d4rl_id_is_read_from_d4rl_s_folder(d4rl_folder, columns, write_hdf5):
    write_hdf5(d4rl_folder / "hopper_medium.hdf5", columns([3, 2]))
    loaded = load_dataset("hopper-medium-v0")
    assert (loaded.name, loaded.env_name, loaded.num_rows) == ("hopper-medium-v0", "hopper-medium-v0", 5)


def test_a_d4rl_file_without_timeouts_is_cut_at_the_limit_of_its_environment(d4rl_folder, columns, write_hdf5):
    content = columns([250], next_observations=False)
    del content["timeouts"]
    write_hdf5(d4rl_folder / "pen-demos-v0-bc-combined.hdf5", content)  # Adroit's pen ends episodes after 100 steps
    assert [len(t) for t in load_dataset("pen-cloned-v0").trajectories] == [100, 100, 50]


def test_a_truncated_d4rl_file_is_recognised(d4rl_folder, columns, write_hdf5):
    path = write_hdf5(d4rl_folder / "hopper_medium.hdf5", columns([300, 200]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"hopper_medium\.hdf5 is truncated"):
        load_dataset("hopper-medium-v0")


def test_offline_a_d4rl_id_says_url_folder_and_bundled_names(bundled, d4rl_folder, monkeypatch):
    url = "http://127.0.0.1:1/folder/hopper_medium.hdf5"  # nothing listens on port 1
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(d4rl_registry, "registry", lambda: {"hopper-medium-v0": d4rl_registry.Entry(url, None, None)})
    monkeypatch.setattr(d4rl_registry, "PAUSE", 0.0)
    with pytest.raises(InputError) as caught:
        load_dataset("hopper-medium-v0", quiet=True)
    for words in (url, str(d4rl_folder), "bundled datasets need no download: hopper-medium-demo"):
        assert words in str(caught.value)


def test_d4rl_is_imported_only_for_a_d4rl_id(bundled, monkeypatch):
    monkeypatch.setattr(d4rl_registry, "package_table", lambda: pytest.fail("d4rl was imported"))
    load_dataset("hopper-medium-demo")
    with pytest.raises(InputError):
        load_dataset("no-such-name")


def test_a_minari_id_is_asked_of_minari_unless_there_is_such_a_file(tmp_path, monkeypatch, columns, write_hdf5):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    with pytest.raises(InputError, match="minari download mujoco/hopper/medium-v0"):
        load_dataset("mujoco/hopper/medium-v0")
    Path("mujoco/hopper").mkdir(parents=True)
    write_hdf5(Path("mujoco/hopper/medium-v0"), columns([3, 2]))
    assert load_dataset("mujoco/hopper/medium-v0").num_rows == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hopper-medium-dmo", ["did you mean 'hopper-medium-demo'"]),
        ("halfcheetah-mediun-v2", ["did you mean 'halfcheetah-medium-v2'", "hopper-medium-demo"]),
        ("breakout-mixed-v0", ["Atari", "hopper-medium-demo"]),
        ("missing/file.hdf5", ["missing/file.hdf5", "neither a known name nor a file"]),
        (".", ["folder or a device, expected a file (or a folder with data/main_data.hdf5)"]),
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


@pytest.mark.parametrize("name", ["carla-lane-v0", "minigrid-fourrooms-v0"])
def test_an_id_that_cannot_be_learned_is_no_failed_download(bundled, name):
    with pytest.raises(InputError, match=r"can be learned$"):
        load_dataset(name)


def test_a_new_source_is_a_row_of_the_table(monkeypatch):
    def load(name, file, wanted, quiet):
        return Dataset(name, None, f"{file}, {wanted}, {quiet}", [])

    ours = sources.Source(lambda name: name.startswith("ours:"), lambda name: Path(name[5:]), load)
    monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, ours))
    expected = Dataset("ours:a::b,c", None, f"a, {Wanted(True, ('b', 'c'))}, False", [])
    assert load_dataset("ours:a::b,c", simulator_states=True) == expected


def test_keys_of_observations_follow_the_name(tmp_path, columns, write_hdf5):
    content = columns([3, 2], next_observations=False)
    content["observations/b"], content["observations/a"] = content.pop("observations"), content["actions"]
    path = write_hdf5(tmp_path / "a.hdf5", content, process_noise=0.5)
    assert [load_dataset(f"{path}{keys}").state_dim for keys in ("", "::b", "::a", "::b,a")] == [5, 3, 2, 5]
    assert load_dataset(f"{path}::b").name == f"{path}::b"
    assert source_attributes(f"{path}::b") == {"process_noise": 0.5}
    with pytest.raises(InputError, match="names no key behind '::'"):
        load_dataset(f"{path}::")
    path.rename(tmp_path / "a::b")  # a file of that very name
    assert load_dataset(str(tmp_path / "a::b")).state_dim == 5


def test_source_attributes_tell_how_a_file_was_made(tmp_path):
    with h5py.File(tmp_path / "made.hdf5", "w") as file:
        file.attrs["process_noise"] = 0.2
    (tmp_path / "other.pkl").write_bytes(b"no HDF5")
    assert source_attributes(str(tmp_path / "made.hdf5")) == {"process_noise": 0.2}
    for name in (str(tmp_path / "other.pkl"), str(tmp_path), str(tmp_path / "missing"), "mujoco/hopper/medium-v0"):
        assert source_attributes(name) == {}


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("next_observations", [True, False])
def test_a_cached_dataset_is_the_same(tmp_path, columns, write_hdf5, assert_same, next_observations):
    content = columns([3, 2, 4, 1], next_observations=next_observations, simulator_states=True)
    name = str(write_hdf5(tmp_path / "a.hdf5", content, env_name="Hopper-v5"))
    cache = tmp_path / "new" / "cache.pkl"
    original, written = load_dataset(name), load_dataset(name, cache)
    reused = load_dataset(name, cache, simulator_states=True)
    assert_same(original.trajectories, written.trajectories)
    assert_same(original.trajectories, reused.trajectories)
    for field in ("name", "env_name", "sha256"):
        assert getattr(original, field) == getattr(written, field) == getattr(reused, field)
    np.testing.assert_array_equal(reused.trajectories[1].qpos, [[107], [108]])


def test_a_cache_is_read_and_not_the_source(tmp_path, columns, write_hdf5, assert_same):
    source, cache = write_hdf5(tmp_path / "a.hdf5", columns([3, 2])), tmp_path / "cache.pkl"
    original = load_dataset(str(source), cache)
    source.unlink()
    assert_same(original.trajectories, load_dataset(str(source), cache).trajectories)


def test_a_cache_is_what_planners_read(tmp_path, columns, write_hdf5):
    source = write_hdf5(tmp_path / "a.hdf5", columns([3, 2]), env_name="Hopper-v5")
    load_dataset(str(source), tmp_path / "cache.pkl")
    with (tmp_path / "cache.pkl").open("rb") as file:
        paths, metadata = pickle.load(file)
    assert [len(path["observations"]) for path in paths] == [3, 2]
    np.testing.assert_array_equal(paths[1]["timeouts"], [False, True])
    np.testing.assert_array_equal(metadata.pop("obs_mask"), [1, 1, 1])
    assert metadata.pop("sha256") == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata == {"dataset": str(source), "env_name": "Hopper-v5", "rows": 5, "trajectories": 2}


def test_a_cache_of_something_else_is_refused(tmp_path, columns, write_hdf5):
    cache = tmp_path / "cache.pkl"
    first = write_hdf5(tmp_path / "first.hdf5", columns([3, 2]))
    second = write_hdf5(tmp_path / "second.hdf5", columns([3, 3]))
    load_dataset(str(first), cache)
    with pytest.raises(InputError, match=f"holds dataset {str(first)!r}, asked for was {str(second)!r}.*dataset_path"):
        load_dataset(str(second), cache)
    second.replace(first)
    with pytest.raises(InputError, match=f"was made of another {str(first)!r}.*--dataset_path"):
        load_dataset(str(first), cache)


@pytest.mark.parametrize("sha256", ["not hexadecimal", int("1" * 63)])
def test_a_cache_with_a_digest_that_is_none_is_refused(tmp_path, columns, write_hdf5, sha256):
    source = str(write_hdf5(tmp_path / "a.hdf5", columns([3, 2])))
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(([], {"dataset": source, "sha256": sha256})))
    with pytest.raises(InputError, match="expected 64 hexadecimal digits"):
        load_dataset(source, tmp_path / "cache.pkl")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, columns, write_hdf5):
    source = write_hdf5(tmp_path / "a.hdf5", columns([3, 2]))
    with pytest.raises(InputError, match="folder or a device, expected a file"):
        load_dataset(str(source), tmp_path)
    with pytest.raises(InputError, match=r"cannot be written.*give another"):
        load_dataset(str(source), source / "cache.pkl")
