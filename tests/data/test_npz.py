"""data.npz: OGBench's files, people's own logs, and archives that are something else."""

import io
import os
import zipfile

import numpy as np
import pytest

from data.columns import Wanted
from data.npz import is_npz, read_npz
from data.sources import load_dataset
from utils import InputError


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes arrays to ``a.npz`` and returns its path."""

    def save(compressed=False, **arrays):
        (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
        return tmp_path / "a.npz"

    return save


@pytest.mark.parametrize("compressed", [True, False])
def test_own_logs_are_read_as_hdf5_is(write, columns, write_hdf5, tmp_path, assert_same, compressed):
    content = columns([3, 2, 4], simulator_states=True)
    path = write(compressed, **content, env_name="Hopper-v5")
    loaded = load_dataset(str(path), simulator_states=True)
    assert_same(loaded.trajectories, load_dataset(str(write_hdf5(tmp_path / "a.hdf5", content))).trajectories)
    assert loaded.env_name == "Hopper-v5"
    np.testing.assert_array_equal(loaded.trajectories[1].qpos, [[107], [108]])


def test_ogbench_s_layout_is_read(write):
    # Two trajectories of three transitions: s0 to s3, whose last action belongs to no transition.
    states = np.concatenate([np.arange(4.0), np.arange(10.0, 14.0)]).astype(np.float32)[:, None]
    arrays = {"observations": states, "actions": states + 0.5, "qpos": states + 7, "qvel": states + 8}
    path = write(**arrays, terminals=np.tile([0.0, 0, 0, 1], 2).astype(np.float32))
    loaded = load_dataset(str(path), simulator_states=True)
    assert [len(trajectory) for trajectory in loaded.trajectories] == [4, 4]
    assert loaded.num_transitions == 6
    assert loaded.trajectories[0].rewards is None
    np.testing.assert_array_equal(loaded.trajectories[1].qpos[:, 0], [17, 18, 19, 20])


@pytest.mark.parametrize(
    "flags", [{"terminals": [0, 0, 1, 0, 0]}, {"dones": [0, 0, 1, 0, 0]}, {"truncated": [0, 0, 1, 0, 0]}]
)
def test_flags_of_own_logs_cut(write, columns, flags):
    content = columns([3, 2], next_observations=False)
    del content["terminals"], content["timeouts"]
    loaded = load_dataset(str(write(**content, **{name: np.array(values) for name, values in flags.items()})))
    assert [len(trajectory) for trajectory in loaded.trajectories] == [3, 2]


def test_names_with_slashes_are_nested(write, columns):
    content = columns([3, 2], next_observations=False)
    content["observations/b"], content["observations/a"] = content.pop("observations"), np.full(5, 7, np.float32)
    path = write(**content)
    np.testing.assert_array_equal(load_dataset(str(path)).trajectories[0].observations[1], [7, 1, 1.25, 1.5])
    assert load_dataset(f"{path}::a").state_dim == 1


def test_images_are_refused_before_they_are_read(write, columns, monkeypatch):
    path = write(**{**columns([3, 2], next_observations=False), "observations": np.zeros((5, 8, 8, 3), np.uint8)})
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("an array was read"))
    with pytest.raises(InputError, match="image observations"):
        read_npz(path, Wanted())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch npz-was-run",)


@pytest.mark.parametrize("key", ["observations", "terminals", "rewards", "infos/qpos", "env_name"])
def test_python_objects_are_never_unpickled(write, columns, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    path = write(**{**columns([3, 2]), key: np.array([Malicious()] * 5, dtype=object)})
    try:
        loaded = load_dataset(str(path), simulator_states=True)
    except InputError as error:
        assert "object" in str(error)
    else:
        assert (key, loaded.env_name) == ("env_name", None)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def archive_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_npy", ".npy"), content)
    return buffer.getvalue()


def npy(shape, content):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive_of(document="text"), "no array 'observations'.*it has: none"),
        (archive_of(observations_npy="no array"), "cannot be read as .npz"),
        (archive_of(observations_npy=b"\x93NUMPY\x09\x00"), "cannot be read as .npz"),
        (
            archive_of(observations_npy=npy((10**12, 3), b"0" * 12), actions_npy=npy((3, 1), b"0" * 12)),
            "is shorter than",
        ),
    ],
)
def test_other_archives_are_refused(tmp_path, content, words):
    (tmp_path / "a.npz").write_bytes(content)
    assert is_npz(tmp_path / "a.npz")
    with pytest.raises(InputError, match=words) as caught:
        read_npz(tmp_path / "a.npz", Wanted())
    assert "delete" not in str(caught.value)


def test_damage_is_recognised(write, columns):
    path = write(True, **columns([300, 200]))
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as .npz.*fetch it again under another name"):
        load_dataset(str(path))
