"""data.robomimic: demonstrations, the order of them, the keys of their observations."""

import json

import h5py
import numpy as np
import pytest

from data.robomimic import is_robomimic
from data.sources import load_dataset
from utils import InputError


def demonstration(index, rows, images=True):
    """States whose values tell the demonstration and the row."""
    codes = 100.0 * index + np.arange(rows + 1)
    states = {"robot0_eef_pos": np.stack([codes, codes + 0.25], axis=1), "object": codes[:, None] + 0.5}
    if images:
        states["agentview_image"] = np.zeros((rows + 1, 8, 8, 3), np.uint8)
    demo = {"actions": codes[:-1, None] + 0.125, "rewards": codes[:-1], "dones": np.arange(rows) >= rows - 2}
    demo |= {f"obs/{key}": value[:-1] for key, value in states.items()}
    return demo | {f"next_obs/{key}": value[1:] for key, value in states.items()}


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes demonstrations to a file and returns its path."""

    def save(demos, env_args='{"env_name": "Lift", "type": 1}'):
        path = tmp_path / "low_dim.hdf5"
        with h5py.File(path, "w") as file:
            for name, demo in demos.items():
                for key, value in demo.items():
                    file[f"data/{name}/{key}"] = value
            file.require_group("data").attrs["env_args"] = env_args
            file["mask/train"] = np.array([b"demo_0"])
        return path

    return save


def test_demonstrations_are_episodes_in_the_order_of_their_numbers(write):
    path = write({f"demo_{index}": demonstration(index, rows=4) for index in (0, 2, 10)})
    loaded = load_dataset(str(path))
    assert loaded.env_name == "Lift"
    assert [trajectory.observations[0, 0] for trajectory in loaded.trajectories] == [0.5, 200.5, 1000.5]
    np.testing.assert_array_equal(loaded.trajectories[1].observations[:, 1:], [[200 + t, 200.25 + t] for t in range(4)])
    np.testing.assert_array_equal(loaded.trajectories[1].next_observations[-1], [204.5, 204, 204.25])
    np.testing.assert_array_equal(loaded.trajectories[1].rewards, [200, 201, 202, 203])


def test_what_was_left_out_and_done_is_told(write):
    findings = {found.name: found for found in load_dataset(str(write({"demo_0": demonstration(0, 4)}))).findings}
    assert findings["nested observations"].where == "object 0:1, robot0_eef_pos 1:3"
    assert findings["observations left out"].where == "agentview_image"
    assert findings["done inside demonstrations"].count == 1  # of two, one is the last row


def test_keys_are_chosen(write):
    path = write({"demo_0": demonstration(0, 4)})
    loaded = load_dataset(f"{path}::robot0_eef_pos,object")
    np.testing.assert_array_equal(loaded.trajectories[0].observations[1], [1, 1.25, 1.5])
    assert loaded.name == f"{path}::robot0_eef_pos,object"
    with pytest.raises(InputError, match=r"no key 'objct'.*did you mean 'object'"):
        load_dataset(f"{path}::objct")
    with pytest.raises(InputError, match="image observations/agentview_image"):
        load_dataset(f"{path}::agentview_image")


def test_without_next_observations_rows_are_paired(write):
    demos = {f"demo_{i}": {k: v for k, v in demonstration(i, 4).items() if "next" not in k} for i in (0, 1)}
    loaded = load_dataset(str(write(demos)))
    assert loaded.num_transitions == 6
    assert loaded.trajectories[0].next_observations is None


@pytest.mark.parametrize("env_args", ["no JSON", "[1]", "{}", '{"env_name": 3}', json.dumps({"env_name": None})])
def test_an_environment_that_is_not_named_is_none(write, env_args):
    assert load_dataset(str(write({"demo_0": demonstration(0, 4)}, env_args))).env_name is None


def test_demonstrations_without_observations_say_how_to_make_them(write):
    raw = {"states": np.zeros((4, 9)), "actions": np.zeros((4, 2))}
    with pytest.raises(InputError, match=r"data/demo_1 has no observations 'obs'.*dataset_states_to_obs"):
        load_dataset(str(write({"demo_0": demonstration(0, 4), "demo_1": raw})))


def test_other_files_with_a_group_called_data_are_not_robomimic(tmp_path, columns, write_hdf5):
    assert not is_robomimic(write_hdf5(tmp_path / "a.hdf5", columns([3]) | {"data/x": np.zeros(3)}))
    (tmp_path / "b").write_text("text")
    assert not is_robomimic(tmp_path / "b")
