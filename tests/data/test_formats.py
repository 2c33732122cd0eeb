"""data.formats: how each format is recognised, and what all of them become."""

import pickle
import zipfile

import h5py
import numpy as np
import pytest

from data import formats
from data.columns import Recording, Wanted
from data.formats import FORMATS, Format, find_format, to_trajectories
from utils import InputError


@pytest.fixture
def files(tmp_path, columns, write_hdf5):
    """One small dataset per format, by the format's name."""
    content = columns([3, 2])
    paths = {format.name: tmp_path / f"{index}.data" for index, format in enumerate(FORMATS)}
    write_hdf5(paths["D4RL's HDF5"], content)
    paths["pickle of paths"].write_bytes(pickle.dumps([content]))
    with paths[".npz"].open("wb") as file:
        np.savez(file, **content)
    with h5py.File(paths["robomimic"], "w") as file:
        file["data/demo_0/actions"], file["data/demo_0/obs/state"] = content["actions"], content["observations"]
    with h5py.File(paths["Minari"], "w") as file:
        file["episode_0/actions"], file["episode_0/observations"] = content["actions"][1:], content["observations"]
    return paths


def test_every_format_is_recognised_by_its_content_alone(files):
    for name, path in files.items():
        assert find_format(path).name == name
        columns = find_format(path).read(path, Wanted()).columns
        assert columns["observations"].shape[1] == 3


def test_a_minari_folder_is_recognised(files, tmp_path):
    (tmp_path / "folder" / "data").mkdir(parents=True)
    files["Minari"].rename(tmp_path / "folder" / "data" / "main_data.hdf5")
    assert find_format(tmp_path / "folder").name == "Minari"


@pytest.mark.parametrize("content", [b"PK\x03\x04 half a zip", bytes(999), b"text", b"\x89PNG"])
def test_other_files_are_told_what_can_be_read(tmp_path, content):
    (tmp_path / "a.hdf5").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.hdf5 has none of the formats that can be read: Minari, .*\.npz"):
        find_format(tmp_path / "a.hdf5")


def test_an_empty_file_is_incomplete(tmp_path):
    (tmp_path / "a.hdf5").touch()
    with pytest.raises(InputError, match=r"truncated \(incomplete\): it has 0 bytes"):
        find_format(tmp_path / "a.hdf5")


def test_a_new_format_is_a_row_of_the_table(tmp_path, monkeypatch, columns):
    (tmp_path / "a.csv").write_text("3")
    recording = Recording(columns([3]), ())
    ours = Format("CSV", lambda path: path.suffix == ".csv", lambda path, wanted: recording)
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, ours))
    assert find_format(tmp_path / "a.csv").read(tmp_path / "a.csv", Wanted()) is recording


# ---- trajectories ----------------------------------------------------------------------------------------------------


def recording_of(content):
    return Recording(content, ())


def test_a_recording_is_cut_into_views_of_its_arrays(columns):
    content = columns([3, 2, 4])
    trajectories, findings = to_trajectories(recording_of(content), "a")
    assert [len(trajectory) for trajectory in trajectories] == [3, 2, 4]
    assert [trajectory.terminated for trajectory in trajectories] == [True, False, True]
    assert np.shares_memory(trajectories[1].observations, content["observations"])
    assert findings == ()


def test_without_timeouts_and_next_observations_a_finding_says_what_ends_episodes(columns):
    content = columns([3, 2, 4, 1], next_observations=False)
    del content["timeouts"]
    trajectories, (found,) = to_trajectories(recording_of(content), "a")
    assert [len(trajectory) for trajectory in trajectories] == [3, 6, 1]
    assert (found.name, found.matters) == ("episode ends from terminals only", True)


def test_a_limit_ends_episodes_where_no_timeouts_do(columns):
    content = columns([30, 250, 130], next_observations=False)
    with_timeouts, _ = to_trajectories(recording_of(content), "a", limit=100)
    assert [len(trajectory) for trajectory in with_timeouts] == [30, 250, 130]
    del content["timeouts"]
    trajectories, findings = to_trajectories(recording_of(content), "a", limit=100)
    assert max(len(trajectory) for trajectory in trajectories) <= 250
    assert "episode ends from terminals only" not in [found.name for found in findings]


def test_trajectories_of_length_one_have_no_transition(columns):
    with pytest.raises(InputError, match=r"no transition.*length 1"):
        to_trajectories(recording_of(columns([1, 1, 1], next_observations=False)), "a")
    trajectories, _ = to_trajectories(recording_of(columns([1, 1, 1])), "a")
    assert [trajectory.num_transitions for trajectory in trajectories] == [1, 1, 1]


def test_half_a_zip_is_no_npz(tmp_path, columns):
    np.savez(tmp_path / "a.npz", **columns([300]))
    content = (tmp_path / "a.npz").read_bytes()
    assert zipfile.is_zipfile(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(content[:-100])
    with pytest.raises(InputError, match="none of the formats"):
        find_format(tmp_path / "a.npz")
