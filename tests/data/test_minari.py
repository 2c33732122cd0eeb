"""data.minari: ids of every form, folders and files, nested observations, episodes that do not fit, other storages.

Minari itself is not needed: the files are written as it writes them; where it is installed, its own are read, too.
"""

import json

import h5py
import numpy as np
import pytest

from data import minari
from data.sources import load_dataset
from utils import InputError


def episode(first, rows, *, terminated=False, wrap=lambda states: states, infos=None):
    """An episode of Minari's: states count up from ``first``, in three dimensions."""
    states = first + np.arange(rows + 1.0)[:, None] + [0, 0.25, 0.5]
    is_last = np.arange(rows) == rows - 1
    return {
        "observations": wrap(states),
        "actions": (states[:-1, :1] + 0.125).astype(np.float32),
        "rewards": -states[:-1, 0],
        "terminations": is_last & terminated,
        "truncations": is_last & (not terminated),
        "infos": infos or {"x_position": np.zeros(rows + 1)},
    }


def write_group(group, entries):
    for key, entry in entries.items():
        if isinstance(entry, dict):
            write_group(group.create_group(key), entry)
        elif entry is not None:
            group[key] = entry


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder for Minari's datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "minari"


@pytest.fixture
def write(root):
    """Returns a function that writes a dataset under an id, and returns its folder."""

    def save(name, *episodes, env_spec='{"id": "Hopper-v5"}', storage="hdf5"):
        data = root / name / "data"
        data.mkdir(parents=True)
        metadata = {"total_episodes": len(episodes), "data_format": storage, "env_spec": env_spec}
        (data / "metadata.json").write_text(json.dumps(metadata))
        if storage == "hdf5":
            with h5py.File(data / "main_data.hdf5", "w") as file:
                for index, entries in enumerate(episodes):
                    write_group(file.create_group(f"episode_{index}"), entries)
        else:
            write_arrow(data, episodes, storage)
        return data.parent

    return save


def write_arrow(data, episodes, storage):
    """Writes episodes as Minari's Arrow storage does: rows of steps are padded to as many as there are observations."""
    import pyarrow
    import pyarrow.dataset

    def encoded(entry, rows):
        if isinstance(entry, dict):
            return pyarrow.StructArray.from_arrays([encoded(part, rows) for part in entry.values()], list(entry))
        padded = np.pad(entry, [(0, rows - len(entry)), *[(0, 0)] * (entry.ndim - 1)])
        if entry.ndim == 1:
            return pyarrow.array(padded)
        return pyarrow.FixedSizeListArray.from_arrays(padded.reshape(-1), entry.shape[1])

    for index, entries in enumerate(episodes):
        rows = len(entries["actions"]) + 1
        columns = {"episode_id": pyarrow.array([index] * rows)}
        columns |= {key: encoded(entry, rows) for key, entry in entries.items()}
        batch = pyarrow.RecordBatch.from_pydict(columns)
        pyarrow.dataset.write_dataset(
            batch, data, format=storage, partitioning=["episode_id"], existing_data_behavior="overwrite_or_ignore"
        )
        (data / str(index) / "metadata.json").write_text("{}")


def found_in(loaded):
    return {found.name: found for found in loaded.findings}


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mujoco/hopper/medium-v0", "my-hopper-v0", "one/two-v12", "hopper-medium-v0"])
def test_ids_are_found_with_and_without_a_namespace(write, name):
    write(name, episode(0, 3, terminated=True), episode(100, 2))
    loaded = load_dataset(name, quiet=True)
    assert (loaded.name, loaded.env_name) == (name, "Hopper-v5")
    assert [trajectory.terminated for trajectory in loaded.trajectories] == [True, False]
    second = loaded.trajectories[1]
    np.testing.assert_array_equal(second.observations[:, 0], [100, 101])
    np.testing.assert_array_equal(second.next_observations[:, 2], [101.5, 102.5])
    np.testing.assert_array_equal(second.actions, [[100.125], [101.125]])
    np.testing.assert_array_equal(second.rewards, [-100, -101])
    assert second.observations.dtype == np.float32


@pytest.mark.parametrize("path", ["", "data", "data/main_data.hdf5"])
def test_its_folder_and_its_file_are_read_by_path(write, path):
    folder = write("mujoco/hopper/medium-v0", episode(0, 3))
    loaded = load_dataset(str(folder / path))
    assert (loaded.env_name, loaded.num_rows) == ("Hopper-v5", 3)
    assert loaded.sha256 == load_dataset("mujoco/hopper/medium-v0").sha256


def test_a_file_alone_is_read(write, tmp_path):
    folder = write("a-v0", episode(0, 3))
    (folder / "data" / "main_data.hdf5").rename(tmp_path / "alone.hdf5")
    assert load_dataset(str(tmp_path / "alone.hdf5")).env_name is None


def test_a_name_that_is_d4rl_s_and_minari_s_says_which_was_taken(write, tmp_path, columns, write_hdf5):
    write("hopper-medium-v0", episode(0, 3))
    loaded = load_dataset("hopper-medium-v0")
    assert loaded.num_rows == 3
    assert "minari/hopper-medium-v0 was read" in found_in(loaded)["two datasets of one name"].effect
    (tmp_path / "d4rl").mkdir()
    write_hdf5(tmp_path / "d4rl" / "hopper_medium.hdf5", columns([3, 2]))
    loaded = load_dataset("hopper-medium-v0")
    assert loaded.num_rows == 5
    assert "hopper_medium.hdf5 was read" in found_in(loaded)["two datasets of one name"].effect


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fake/hopper/expert-v0", ["minari download fake/hopper/expert-v0", "Minari has no dataset", "pip install"]),
        ("mujoco/hoper/medium-v0", ["did you mean 'mujoco/hopper/medium-v0'"]),
        ("my-hoper-v0", ["neither a known name nor a file", "did you mean 'my-hopper-v0'"]),
    ],
)
def test_unknown_ids_are_answered_in_a_line(write, name, words):
    for known in ("mujoco/hopper/medium-v0", "my-hopper-v0"):
        write(known, episode(0, 3))
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    for expected in words:
        assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


def test_without_any_datasets_nothing_is_found(root):
    assert minari.local_ids() == []
    assert minari.local_folder("my-hopper-v0") is None


# ---- episodes --------------------------------------------------------------------------------------------------------


def goal(states):
    return {"observation": states[:, :1], "achieved_goal": states[:, 1:2], "desired_goal": states[:, 2]}


def kitchen(states):
    return {"observation": states[:, :1], "achieved_goal": {"kettle": states[:, 1:2], "burner": states[:, 2:]}}


@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize(
    ("wrap", "order"),
    [
        (goal, "achieved_goal 0:1, desired_goal 1:2, observation 2:3"),
        (kitchen, "achieved_goal/burner 0:1, achieved_goal/kettle 1:2, observation 2:3"),
        (lambda s: {"_index_1": s[:, 1:], "_index_0": s[:, :1]}, "_index_0 0:1, _index_1 1:3"),
    ],
)
def test_nested_observations_are_flattened_in_a_recorded_order(write, storage, wrap, order):
    write("D4RL/pointmaze/umaze-v2", episode(0, 3, wrap=wrap), episode(100, 2, wrap=wrap), storage=storage)
    loaded = load_dataset("D4RL/pointmaze/umaze-v2")
    assert found_in(loaded)["nested observations"].where == order
    by_name = dict(part.split() for part in order.split(", "))
    last = "_index_0" if "_index_0" in by_name else "observation"
    start = int(by_name[last].split(":")[0])
    np.testing.assert_array_equal(loaded.trajectories[1].observations[:, start], [100, 101])
    np.testing.assert_array_equal(loaded.trajectories[1].next_observations[:, start], [101, 102])


def test_keys_choose_what_makes_the_state(write):
    write("kitchen-v0", episode(0, 3, wrap=kitchen))
    loaded = load_dataset("kitchen-v0::observation,achieved_goal/kettle")
    np.testing.assert_array_equal(loaded.trajectories[0].observations[1], [1, 1.25])
    assert loaded.name == "kitchen-v0::observation,achieved_goal/kettle"


def test_images_are_left_out_of_nested_observations_and_refused_alone(write):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    write("both-v0", episode(0, 3, wrap=lambda states: {"image": images, "state": states}))
    assert found_in(load_dataset("both-v0"))["observations left out"].where == "image"
    write("image-v0", episode(0, 3, wrap=lambda states: images))
    with pytest.raises(InputError, match=r"episode 0 has image observations \(shape \(4, 8, 8, 3\), uint8\)"):
        load_dataset("image-v0")


def test_discrete_actions_are_refused(write):
    write("discrete-v0", episode(0, 3) | {"actions": np.zeros(3, int)})
    with pytest.raises(InputError, match="discrete actions"):
        load_dataset("discrete-v0")


BROKEN = {
    "short": (lambda e: e | {"observations": e["observations"][:-1]}, "has 3 observations for 3 actions, expected 4"),
    "rewards": (lambda e: e | {"rewards": e["rewards"][:-1]}, "has 3 actions, 2 rewards, 3 terminations"),
    "empty": (lambda e: {key: value[:0] for key, value in e.items() if key != "infos"}, "has 0 actions"),
    "nothing": (lambda e: {}, "has no observations and no actions"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_episode_that_does_not_fit_is_left_out_and_named(write, case):
    broken, words = BROKEN[case]
    write("short/last-v0", episode(0, 3), broken(episode(100, 3)), episode(200, 2))
    loaded = load_dataset("short/last-v0")
    assert [trajectory.observations[0, 0] for trajectory in loaded.trajectories] == [0, 200]
    found = found_in(loaded)["episodes skipped"]
    assert (found.count, found.matters) == (1, True)
    assert found.where.startswith(f"episode 1 {words}")


def test_many_such_episodes_make_no_long_message(write):
    broken = [episode(0, 3) | {"rewards": np.zeros(2)} for _ in range(50)]
    write("short-v0", episode(0, 3), *broken)
    found = found_in(load_dataset("short-v0"))["episodes skipped"]
    assert found.count == 50
    assert len(str(found)) < 600
    write("none-v0", *broken)
    with pytest.raises(InputError, match="has no usable episode; episode 0 has 3 actions, 2 rewards"):
        load_dataset("none-v0")


def test_episodes_are_in_the_order_of_their_numbers(write):
    write("many-v0", *(episode(100 * index, 1) for index in range(12)))
    starts = [trajectory.observations[0, 0] for trajectory in load_dataset("many-v0").trajectories]
    assert starts == [100 * index for index in range(12)]


def test_simulator_states_are_read_without_the_last(write):
    write("maze-v0", episode(0, 3, infos={"qpos": np.arange(4.0)[:, None], "qvel": np.zeros((3, 2))}))
    (trajectory,) = load_dataset("maze-v0", simulator_states=True).trajectories
    np.testing.assert_array_equal(trajectory.qpos, [[0], [1], [2]])
    assert trajectory.qvel is None
    assert load_dataset("maze-v0").trajectories[0].qpos is None


def test_the_digest_is_that_of_earlier_versions(write):
    # Interrupted runs know their dataset by this digest: another would refuse to resume them.
    def one(codes, terminations, truncations):
        return {
            "observations": codes[:, None],
            "actions": codes[:-1, None] + 0.5,
            "rewards": -codes[:-1],
            "terminations": np.array(terminations, bool),
            "truncations": np.array(truncations, bool),
        }

    write("a-v0", one(np.arange(4.0), [0, 0, 1], [0, 0, 0]), one(np.arange(100.0, 103.0), [0, 0], [0, 1]))
    assert load_dataset("a-v0").sha256 == "288b1d3fa33119f6d064ae58c6b51e1b0a43e29eedee20a46bb64779d25a64b0"


# ---- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_every_storage_gives_the_same(write, assert_same, storage):
    episodes = [episode(0, 3, terminated=True), episode(100, 2), episode(200, 1)]
    write("a-v0", *episodes)
    write("b-v0", *episodes, storage=storage)
    first, second = load_dataset("a-v0"), load_dataset("b-v0")
    assert_same(first.trajectories, second.trajectories)
    assert first.sha256 == second.sha256


def test_damaged_and_unknown_storages_are_named(write):
    folder = write("a-v0", episode(0, 3), storage="parquet")
    for part in folder.glob("data/0/*.parquet"):
        part.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_dataset("a-v0")
    metadata = folder / "data" / "metadata.json"
    metadata.write_text(json.dumps({"total_episodes": 1, "data_format": "zarr"}))
    with pytest.raises(InputError, match="data_format 'zarr'; expected hdf5, arrow or parquet"):
        load_dataset("a-v0")


def test_links_to_other_files_are_refused(write, tmp_path):
    folder = write("a-v0", episode(0, 3))
    write("b-v0", episode(0, 3))
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        file["episode_1"] = h5py.ExternalLink(str(tmp_path / "minari/b-v0/data/main_data.hdf5"), "episode_0")
    with pytest.raises(InputError, match="'episode_1' is a link to another file"):
        load_dataset("a-v0")


@pytest.mark.parametrize("env_spec", [None, "no JSON", "[1]", "{}", '{"id": 3}', {"id": "Hopper-v5"}])
def test_an_environment_that_is_not_named_is_none(write, env_spec):
    write("a-v0", episode(0, 3), env_spec=env_spec)
    assert load_dataset("a-v0").env_name is None


def test_a_folder_of_something_else_is_refused(root):
    (root / "a-v0" / "data").mkdir(parents=True)
    (root / "a-v0" / "data" / "metadata.json").write_text("[]")
    with pytest.raises(InputError, match="is a folder or a device"):
        load_dataset(str(root / "a-v0"))


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_what_minari_itself_writes_is_read(root, storage):
    pytest.importorskip("minari")
    gymnasium = pytest.importorskip("gymnasium")
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    def box(size):
        return gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    spaces = {"observation": box(1), "achieved_goal": gymnasium.spaces.Dict({"kettle": box(1), "burner": box(1)})}
    buffers = []
    for index in range(2):
        entries = episode(100 * index, 3, wrap=kitchen)
        entries["infos"] = {}
        entries |= {key: entries[key].tolist() for key in ("rewards", "terminations", "truncations")}
        buffers.append(EpisodeBuffer(id=index, **entries))
    create_dataset_from_buffers(
        "D4RL/kitchen/mixed-v2",
        buffers,
        observation_space=gymnasium.spaces.Dict(spaces),
        action_space=gymnasium.spaces.Box(-1e9, 1e9, (1,), np.float32),
        algorithm_name="x",
        code_permalink="x",
        author="x",
        author_email="x@example.org",
        description="x",
        data_format=storage,
    )
    loaded = load_dataset("D4RL/kitchen/mixed-v2")
    np.testing.assert_array_equal(
        loaded.trajectories[1].observations, [[100.5 + t, 100.25 + t, 100 + t] for t in range(3)]
    )
    assert minari.local_ids() == ["D4RL/kitchen/mixed-v2"]
