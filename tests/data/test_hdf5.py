"""data.hdf5: D4RL's layout, what is wrong with a file, files that are being written, and entries of other files."""

import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from data.columns import Wanted
from data.hdf5 import is_hdf5, open_hdf5, read_d4rl, to_columns, write_hdf5
from data.sources import load_dataset
from utils import InputError


def read(path):
    return read_d4rl(path, Wanted())


# ---- D4RL's layout ---------------------------------------------------------------------------------------------------


def test_arrays_are_read_by_key(tmp_path, columns, write_hdf5):
    content = columns([3, 2, 4], simulator_states=True)
    recording = read_d4rl(write_hdf5(tmp_path / "a.hdf5", content, env_name="Hopper-v5"), Wanted(simulator_states=True))
    assert recording.env_name == "Hopper-v5"
    assert not recording.findings
    for key, column in content.items():
        read_back = recording.columns[key.removeprefix("infos/")]
        np.testing.assert_array_equal(read_back, column)
        assert read_back.dtype == (bool if key in ("terminals", "timeouts") else np.float32)
        assert read_back.flags.c_contiguous


def test_what_d4rl_stores_beside_the_arrays_does_no_harm(tmp_path, columns, write_hdf5):
    content = columns([3, 2]) | {"metadata/algorithm": b"sac", "metadata/policy/fc0/weight": np.zeros((2, 2))}
    content |= {"infos": np.zeros((5, 2)), "metadata/seed": 3}
    recording = read_d4rl(write_hdf5(tmp_path / "a.hdf5", content, env_name=b"Hopper-v5"), Wanted(True))
    assert recording.env_name == "Hopper-v5"
    assert set(recording.columns) == set(columns([3, 2]))
    assert not recording.findings


def test_nested_observations_and_other_flags_are_read(tmp_path, columns, write_hdf5):
    content = columns([3, 2], next_observations=False)
    content["observations/b"], content["observations/a"] = content.pop("observations"), np.zeros(5, np.float32)
    content["episode_terminals"] = 255 * content.pop("timeouts").astype(np.uint8)[:, None]
    recording = read(write_hdf5(tmp_path / "a.hdf5", content))
    np.testing.assert_array_equal(recording.columns["observations"][1], [0, 1, 1.25, 1.5])
    assert [found.name for found in recording.findings] == ["flags", "nested observations"]


@pytest.mark.parametrize("next_observations", [True, False])
def test_what_is_written_is_read_back_the_same(tmp_path, columns, write_hdf5, assert_same, next_observations):
    content = columns([3, 2, 4, 1], next_observations=next_observations, simulator_states=True)
    content["timeouts"][-3:] = False  # the last episode is cut off by the file's end
    original = load_dataset(str(write_hdf5(tmp_path / "a.hdf5", content)), simulator_states=True)
    write_hdf5_of_ours(tmp_path / "b.hdf5", original)
    again = load_dataset(str(tmp_path / "b.hdf5"), simulator_states=True)
    assert_same(again.trajectories, original.trajectories)
    np.testing.assert_array_equal(again.trajectories[1].qpos, [[107], [108]])
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert (file["terminals"][...] | file["timeouts"][...])[-1]


def write_hdf5_of_ours(path, dataset):
    write_hdf5(path, to_columns(dataset), {"made": "here"})


def test_a_dataset_without_rewards_is_written_without(tmp_path, columns, write_hdf5):
    content = columns([3, 2])
    del content["rewards"]
    dataset = load_dataset(str(write_hdf5(tmp_path / "a.hdf5", content)))
    assert dataset.trajectories[0].rewards is None
    assert "rewards" not in to_columns(dataset)


# ---- what is wrong with a file ---------------------------------------------------------------------------------------


def error_of(path):
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "delete" not in message
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_recognised(tmp_path, columns, write_hdf5, keep):
    path = write_hdf5(tmp_path / "a.hdf5", columns([500, 500]))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    message = error_of(path)
    assert "truncated (incomplete)" in message
    assert "checksum" in message
    assert "fetch it again under another name" in message


@pytest.mark.parametrize("part", ["data", "header"])
def test_damage_inside_a_file_is_recognised(tmp_path, columns, part):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in columns([500, 500]).items():
            file.create_dataset(key, data=value, compression="gzip")
        chunk = file["observations"].id.get_chunk_info(0).byte_offset
        start = chunk if part == "data" else h5py.h5o.get_info(file["observations"].id).addr
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 50] = bytes(50)
    path.write_bytes(damaged)
    assert "damaged" in error_of(path)


def test_hdf5_is_known_by_its_signature_behind_a_user_block_too(tmp_path, columns, write_hdf5):
    for name, block in (("a", 0), ("b", 512), ("c", 2048)):
        with h5py.File(tmp_path / name, "w", userblock_size=block) as file:
            file["x"] = 1
        assert is_hdf5(tmp_path / name)
    for content in (b"", b"PK\x03\x04", bytes(5000)):
        (tmp_path / "d").write_bytes(content)
        assert not is_hdf5(tmp_path / "d")


# ---- files that are being written, and file systems without locks ----------------------------------------------------

OPEN = """
import sys, time, h5py, numpy as np
file = h5py.File({path!r}, {mode!r}, libver={libver!r})
{then}
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def writer():
    """Returns a function that lets another process open a file, and returns that process."""
    started = []

    def start(path, mode="a", libver="earliest", then=""):
        code = OPEN.format(path=str(path), mode=mode, libver=libver, then=then)
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "open\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_file_that_a_writer_holds_is_neither_damaged_nor_read(tmp_path, columns, write_hdf5, writer):
    path = write_hdf5(tmp_path / "a.hdf5", columns([3, 2]))
    process = writer(path)
    assert is_hdf5(path)
    with pytest.raises(InputError, match=r"is being written: .* has locked it; wait") as caught:
        load_dataset(str(path))
    assert "delete" not in str(caught.value)
    if os.path.exists("/proc/locks"):  # noqa: PTH110 - a question of the system, not of a path
        assert f"process {process.pid} (" in str(caught.value)
    process.kill()
    process.wait()
    assert load_dataset(str(path)).num_rows == 5


def test_a_file_whose_writer_was_killed_says_how_to_clear_its_mark(tmp_path, writer):
    path = tmp_path / "a.hdf5"
    process = writer(path, "w", "latest", "file['x'] = np.zeros(3); file.flush()")
    assert "has locked it" in error_of(path)
    process.kill()
    process.wait()
    message = error_of(path)
    assert "marked as open for writing" in message
    assert "h5clear -s COPY" in message


def test_a_writer_that_lets_others_read_is_read_along(tmp_path, columns, write_hdf5, writer):
    content = tmp_path / "content.npz"
    np.savez(content, **columns([3, 2]))
    then = f"[file.create_dataset(k, data=v) for k, v in np.load({str(content)!r}).items()]; file.swmr_mode = True"
    writer(tmp_path / "a.hdf5", "w", "latest", then)
    assert load_dataset(str(tmp_path / "a.hdf5")).num_rows == 5


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="no C compiler for a fake flock")
@pytest.mark.parametrize("reason", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_on_a_file_system_without_locks_files_are_read_without(tmp_path, columns, write_hdf5, reason):
    path = write_hdf5(tmp_path / "a.hdf5", columns([3, 2]))
    code = f"#include <errno.h>\nint flock(int file, int operation) {{ errno = {reason}; return -1; }}\n"
    (tmp_path / "nolock.c").write_text(code)
    library = tmp_path / "nolock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nolock.c"], check=True)
    script = f"from data.sources import load_dataset; print(load_dataset({str(path)!r}).num_rows)"
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "5\n", done.stderr


# ---- entries of other files ------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path, columns, write_hdf5):
    """A file that others link to."""
    return write_hdf5(tmp_path / "secret.hdf5", columns([3, 2]))


def link_externally(file, key, secret):
    file[key] = h5py.ExternalLink(str(secret), key)


def link_softly_to_an_external_link(file, key, secret):
    file["elsewhere"] = h5py.ExternalLink(str(secret), key)
    file[key] = h5py.SoftLink("/elsewhere")


def link_into_an_external_group(file, key, secret):
    file["elsewhere"] = h5py.ExternalLink(str(secret), "/")
    file[key] = h5py.SoftLink(f"/elsewhere/{key}")


def store_externally(file, key, secret):
    column = h5py.File(secret)[key]
    file.create_dataset(key, column.shape, column.dtype, external=[(str(secret), 0, column.nbytes)])


def make_virtual(file, key, secret):
    column = h5py.File(secret)[key]
    layout = h5py.VirtualLayout(column.shape, column.dtype)
    layout[...] = h5py.VirtualSource(str(secret), key, column.shape)
    file.create_virtual_dataset(key, layout)


WAYS = [
    link_externally,
    link_softly_to_an_external_link,
    link_into_an_external_group,
    store_externally,
    make_virtual,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["observations", "rewards", "timeouts"])
def test_what_stands_in_another_file_is_refused_by_name(tmp_path, columns, write_hdf5, secret, way, key):
    content = columns([3, 2])
    del content[key]
    path = write_hdf5(tmp_path / "a.hdf5", content)
    with h5py.File(path, "a") as file:
        way(file, key, secret)
    with pytest.raises(InputError, match=r"a\.hdf5: .*(another file|other files).*only what is in the file itself"):
        load_dataset(str(path))


def test_simulator_states_of_another_file_are_refused_too(tmp_path, columns, write_hdf5, secret):
    path = write_hdf5(tmp_path / "a.hdf5", columns([3, 2]))
    with h5py.File(path, "a") as file:
        file["infos"] = h5py.ExternalLink(str(secret), "/")
    with pytest.raises(InputError, match="'infos/qpos' is a link to another file"):
        load_dataset(str(path), simulator_states=True)


def test_links_inside_the_file_are_followed(tmp_path, columns, write_hdf5):
    content = columns([3, 2])
    content["raw/states"] = content.pop("observations")
    path = write_hdf5(tmp_path / "a.hdf5", content)
    with h5py.File(path, "a") as file:
        file["observations"] = h5py.SoftLink("/raw/alias")
        file["raw/alias"] = h5py.SoftLink("states")
        file["hard"] = file["actions"]
    assert load_dataset(str(path)).state_dim == 3


def test_links_and_groups_that_never_end_are_refused(tmp_path, columns, write_hdf5):
    content = columns([3, 2], next_observations=False)
    del content["observations"]
    path = write_hdf5(tmp_path / "a.hdf5", content)
    with h5py.File(path, "a") as file:
        file["observations"] = h5py.SoftLink("/observations")
    with pytest.raises(InputError, match="a link that leads to too many others"):
        load_dataset(str(path))
    with h5py.File(path, "a") as file:
        del file["observations"]
        group = file.create_group("observations")
        group["again"] = group
    with pytest.raises(InputError, match="nested deeper"):
        load_dataset(str(path))


def test_a_link_to_nothing_is_a_missing_array(tmp_path, columns, write_hdf5):
    content = columns([3, 2])
    del content["observations"]
    path = write_hdf5(tmp_path / "a.hdf5", content)
    with h5py.File(path, "a") as file:
        file["observations"] = h5py.SoftLink("/nowhere")
    with pytest.raises(InputError, match="no array 'observations'"):
        load_dataset(str(path))


def test_attributes_are_text(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.attrs["noise"] = 0.5
    with open_hdf5(tmp_path / "a.hdf5") as file:
        assert dict(file.attributes) == {"noise": 0.5}
