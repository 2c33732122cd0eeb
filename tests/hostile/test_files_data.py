"""Datasets of strangers: read as before, or refused in one line, before they take memory, time or other files."""

import json
import os
import pickle
import zlib

import h5py
import numpy as np
import pytest

from data.sources import load_dataset, source_attributes

ROWS = 24


def columns(rows=ROWS, states=3, actions=2):
    """D4RL's arrays of four episodes."""
    random = np.random.default_rng(0)
    content = {
        "observations": (np.arange(rows)[:, None] + np.linspace(0, 0.5, states)).astype(np.float32),
        "actions": random.normal(size=(rows, actions)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 6 == 5,
    }
    return content | {"next_observations": content["observations"] + 1}


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes D4RL's arrays as HDF5, some of them left out, and opens it to add others."""

    def make(*left_out):
        path = tmp_path / "a.hdf5"
        with h5py.File(path, "w") as file:
            for key, value in columns().items():
                if key not in left_out:
                    file[key] = value
        return path

    return make


FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


# --- HDF5: arrays that are not in the file, or are of types that hold no numbers ---


def outside(file, key, folder):
    """Writes another file and returns its path, and the shape and type of the array of that name."""
    path = folder / "private.hdf5"
    with h5py.File(path, "w") as other:
        for name, value in columns().items():
            other[name] = value
    return path, columns()[key].shape, columns()[key].dtype


def external_link(file, key, folder):
    file[key] = h5py.ExternalLink(str(outside(file, key, folder)[0]), key)


def external_link_to_itself(file, key, folder):
    file[key] = h5py.ExternalLink(file.filename, key)


def external_link_behind_soft_links(file, key, folder):
    file["elsewhere"] = h5py.ExternalLink(str(outside(file, key, folder)[0]), "/")
    file["alias"] = h5py.SoftLink("/elsewhere")
    file[key] = h5py.SoftLink(f"/alias/{key}")


def external_link_to_a_device(file, key, folder):
    file[key] = h5py.ExternalLink("/dev/zero", key)


def raw_storage(file, key, folder):
    path, shape, dtype = outside(file, key, folder)
    file.create_dataset(key, shape, dtype, external=[(str(path), 0, h5py.h5f.UNLIMITED)])


def raw_storage_of_a_device(file, key, folder):
    file.create_dataset(key, columns()[key].shape, columns()[key].dtype, external=[("/dev/zero", 0, 10**9)])


def virtual(file, key, folder):
    path, shape, dtype = outside(file, key, folder)
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource(str(path), key, shape)
    file.create_virtual_dataset(key, layout)


def virtual_of_itself(file, key, folder):
    shape, dtype = columns()[key].shape, columns()[key].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource(".", key, shape)
    file.create_virtual_dataset(key, layout)


def virtual_of_each_other(file, key, folder):
    shape, dtype = columns()[key].shape, columns()[key].dtype
    for name, other in ((key, "partner"), ("partner", key)):
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(".", other, shape)
        file.create_virtual_dataset(name, layout)


def virtual_of_nothing(file, key, folder):
    file.create_virtual_dataset(key, h5py.VirtualLayout(columns()[key].shape, columns()[key].dtype))


OUTSIDE = [
    external_link,
    external_link_to_itself,
    external_link_behind_soft_links,
    external_link_to_a_device,
    raw_storage,
    raw_storage_of_a_device,
    virtual,
    virtual_of_itself,
    virtual_of_each_other,
    virtual_of_nothing,
]


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("way", OUTSIDE)
def test_data_outside_the_file_are_refused_by_name(tmp_path, write, refused, way, key):
    path = write(key)
    with h5py.File(path, "a") as file:
        way(file, key, tmp_path)
    message = refused(load_dataset, str(path))
    assert repr(key) in message or "'/elsewhere'" in message
    assert "only what is in the file itself is read" in message


COMPOUND = np.dtype([("x", "f4"), ("y", "f4")])
TYPES = {
    "time": h5py.h5t.UNIX_D32LE,
    "reference": h5py.h5t.STD_REF_OBJ,
    "region": h5py.h5t.STD_REF_DSETREG,
    "compound": h5py.h5t.py_create(COMPOUND),
    "opaque": h5py.h5t.py_create(np.dtype("V16")),
    "text": h5py.h5t.py_create(np.dtype("S5")),
    "texts of any length": h5py.h5t.py_create(h5py.string_dtype(), logical=True),
    "arrays of any length": h5py.h5t.py_create(h5py.vlen_dtype(np.float32), logical=True),
    "arrays": h5py.h5t.py_create(np.dtype(("f4", (3,)))),
    "complex": h5py.h5t.py_create(np.dtype("c8")),
    "bit field": h5py.h5t.STD_B32LE,
    "whole numbers": h5py.h5t.STD_I64LE,
    "enumeration": h5py.h5t.py_create(h5py.enum_dtype({"A": 0, "B": 1}), logical=True),
}


@pytest.mark.parametrize("key", ["observations", "actions", "next_observations"])
@pytest.mark.parametrize("kind", TYPES)
def test_types_that_are_no_numbers_are_refused(write, refused, kind, key):
    path = write(key)
    with h5py.File(path, "a") as file:
        space = h5py.h5s.create_simple(columns()[key].shape)
        h5py.h5d.create(file.id, key.encode(), TYPES[kind], space)
    assert key in refused(load_dataset, str(path))


@pytest.mark.parametrize("key", ["rewards", "terminals", "timeouts", "done", "episode_ids", "unused"])
@pytest.mark.parametrize("kind", TYPES)
def test_types_of_other_entries_are_refused_or_do_no_harm(write, loaded, kind, key):
    path = write(key)
    with h5py.File(path, "a") as file:
        h5py.h5d.create(file.id, key.encode(), TYPES[kind], h5py.h5s.create_simple((ROWS,)))
    dataset = loaded(path)
    assert key in FIELDS or dataset.num_rows == ROWS


@pytest.mark.parametrize("key", [*FIELDS, "done", "infos/qpos", "unused"])
def test_empty_dataspaces_are_said_as_such(write, loaded, refused, key):
    path = write(key)
    with h5py.File(path, "a") as file:
        file[key] = h5py.Empty("f4")
    if key in FIELDS or key == "infos/qpos":
        assert "is empty: it has a type, but no dataspace" in refused(load_dataset, str(path), simulator_states=True)
    else:
        assert loaded(path).num_rows == ROWS


# --- HDF5: small files that stand for much ---


def declared(file, key, rows, **options):
    width = columns()[key].shape[1:]
    file.create_dataset(key, (rows, *width), columns()[key].dtype, **options)


HUGE = {
    "declared": {},
    "in pieces": {"chunks": True},
    "compressed": {"chunks": True, "compression": "gzip"},
    "filled": {"chunks": True, "fillvalue": 1},
}


@pytest.mark.parametrize("rows", [10**9, 10**12, 2**60])
@pytest.mark.parametrize("way", HUGE)
def test_arrays_without_storage_are_refused(tmp_path, refused, way, rows):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key in FIELDS:
            options = dict(HUGE[way])
            if "chunks" in options:
                options["chunks"] = (1000, *columns()[key].shape[1:])
            declared(file, key, rows, **options)
    assert "out of proportion" in refused(load_dataset, str(tmp_path / "a.hdf5"))


def test_zeros_that_were_compressed_are_refused(tmp_path, refused):
    rows = 30_000_000
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        piece = np.zeros((1_000_000, 8), np.float32)
        observations = file.create_dataset("observations", (rows, 8), "f4", chunks=(100_000, 8), compression="gzip")
        observations[: len(piece)] = piece
        packed = zlib.compress(bytes(100_000 * 8 * 4), 9)
        for start in range(0, rows, 100_000):
            observations.id.write_direct_chunk((start, 0), packed)
        file.create_dataset("actions", (rows, 1), "f4")
        file.create_dataset("timeouts", (rows,), bool)
    assert (tmp_path / "a.hdf5").stat().st_size < 5_000_000
    assert "out of proportion" in refused(load_dataset, str(tmp_path / "a.hdf5"))


def test_one_piece_that_is_much_larger_than_its_array_is_refused(tmp_path, refused):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in columns().items():
            chunks = (200_000_000, *value.shape[1:])
            made = file.create_dataset(key, value.shape, value.dtype, chunks=chunks, maxshape=(None, *value.shape[1:]))
            assert made.chunks == chunks
    assert "out of proportion" in refused(load_dataset, str(tmp_path / "a.hdf5"))


def test_one_array_under_many_names_is_counted_as_often(tmp_path, refused):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        first = file.create_group("data/demo_0")
        first["actions"] = np.zeros((100_000, 5), np.float32)
        first.create_group("obs")["x"] = np.zeros((100_000, 5), np.float32)
        for index in range(1, 500):
            file[f"data/demo_{index}"] = first
    assert "out of proportion" in refused(load_dataset, str(tmp_path / "a.hdf5"))


@pytest.mark.parametrize("place", ["observations", "episode_0/observations", "data/demo_0/obs", "infos", "metadata"])
@pytest.mark.parametrize("shape", ["in itself", "in ten places", "in ten places, empty"])
def test_groups_in_groups_end(tmp_path, write, loaded, place, shape):
    path = write("observations", "next_observations") if place == "observations" else write()
    with h5py.File(path, "a") as file:
        group = file.create_group(place)
        if shape == "in itself":
            group["again"] = group
        for depth in range(12 if shape != "in itself" else 0):
            inner = file.create_group(f"level{depth}")
            for index in range(10):
                group[f"g{index}"] = inner
            group = inner
        if shape == "in ten places":
            group["x"] = np.zeros((ROWS, 1), np.float32)
        for name in ("episode_0/actions", "data/demo_0/actions"):
            if place.split("/")[0] == name.split("/")[0]:
                file[name] = np.zeros((ROWS, 1), np.float32)
    dataset = loaded(path)
    assert dataset is None or place in ("infos", "metadata")


# --- HDF5: damaged names ---

DAMAGED = {
    "a heap of names": (b"HEAP", b"HEAR"),
    "a tree of names": (b"TREE", b"TREF"),
    "a node of names": (b"SNOD", b"SNOE"),
    "a name out of order": (b"rewards\0", b"zewards\0"),
    "a needed name out of order": (b"observations\0", b"zbservations\0"),
    "a name of another length": (b"terminals\0", b"term\0nals\0"),
    "a name that is empty": (b"actions\0", b"\0ctions\0"),
    "a name that is no text": (b"timeouts\0", b"\xffimeouts\0"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_names_are_refused_or_do_no_harm(write, loaded, case):
    """Fuzzing found it: h5py makes KeyErrors and others of names that lead nowhere."""
    path, (before, after) = write(), DAMAGED[case]
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after))
    loaded(path)


# --- HDF5: names and attributes ---

NAMES = {
    "a surrogate": b"\xed\xa0\x80",
    "no UTF-8": b"\xff\xfe",
    "controls": b"\x1b]0;owned\x07",
    "lines": b"a\nb\rc",
    "250 characters": b"x" * 250,
    "5000 digits": b"episode_" + b"9" * 5000,
    "digits of others": "episode_\u0663".encode(),
    "leading zeros": b"episode_007",
    "a demonstration": b"demo_" + b"9" * 5000,
    "a formula": b"=1+1",
    "mathematics": b"$\\frac{$^{",
    "markup": b"<script>|`",
    "dots": b"..",
    "quotes": b"'\"`",
    "right to left": "\u202eabc".encode(),
}


@pytest.mark.parametrize("where", ["top", "observations", "data", "flag", "attribute", "env_name"])
@pytest.mark.parametrize("name", NAMES)
def test_names_in_files_do_no_harm(write, loaded, where, name):
    raw = NAMES[name]
    path = write("observations", "next_observations") if where == "observations" else write()
    with h5py.File(path, "a") as file:
        if where in ("attribute", "env_name"):
            key = b"env_name" if where == "env_name" else raw
            kind, space = h5py.h5t.C_S1.copy(), h5py.h5s.create(h5py.h5s.SCALAR)
            kind.set_size(len(raw))
            h5py.h5a.create(file.id, key, kind, space).write(np.array(raw, f"S{len(raw)}"))
        else:
            group = (
                file.require_group("data" if where == "data" else "observations")
                if where in ("data", "observations")
                else file
            )
            key = raw + (b"_done" if where == "flag" else b"")
            made = h5py.h5d.create(group.id, key, h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((ROWS,)))
            del made
    dataset = loaded(path)
    if dataset is not None:
        assert dataset.env_name is None or (dataset.env_name.isprintable() and len(dataset.env_name) <= 200)
        assert all(str(finding).isprintable() for finding in dataset.findings)


ATTRIBUTES = {
    "time": h5py.h5t.UNIX_D32LE,
    "reference": h5py.h5t.STD_REF_OBJ,
    "compound": h5py.h5t.py_create(COMPOUND),
    "opaque": h5py.h5t.py_create(np.dtype("V16")),
    "number": h5py.h5t.IEEE_F64LE,
}


@pytest.mark.parametrize("key", ["env_name", "env_args", "env_spec", "process_noise", "mean_return", "other"])
@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_of_any_type_do_no_harm(write, loaded, kind, key):
    path = write()
    with h5py.File(path, "a") as file:
        h5py.h5a.create(file.id, key.encode(), ATTRIBUTES[kind], h5py.h5s.create(h5py.h5s.SCALAR))
    assert loaded(path).num_rows == ROWS


@pytest.mark.parametrize("value", ["much", np.nan, np.inf, b"x", ""])
def test_noise_that_is_no_number_is_said(write, refused, value):
    path = write()
    with h5py.File(path, "a") as file:
        file.attrs["process_noise"] = value
    assert "process_noise" in refused(source_attributes, str(path))


# --- Minari ---

METADATA = {"total_episodes": 1, "data_format": "hdf5"}
DEEP = "[" * 100_000
MINARI = {
    "deep metadata": DEEP,
    "deep objects": '{"a":' * 100_000,
    "no metadata": "3",
    "a list": "[]",
    "a long number": '{"total_episodes": ' + "9" * 5000 + "}",
    "a deep specification": json.dumps(METADATA | {"env_spec": DEEP}),
    "a specification of a list": json.dumps(METADATA | {"env_spec": "[]"}),
    "a specification of numbers": json.dumps(METADATA | {"env_spec": 3}),
    "an environment of controls": json.dumps(METADATA | {"env_spec": json.dumps({"id": "\x1b[31m\ud800" * 1000})}),
    "an environment of a list": json.dumps(METADATA | {"env_spec": json.dumps({"id": [1]})}),
    "another format": json.dumps(METADATA | {"data_format": "../../x"}),
    "a format of a list": json.dumps(METADATA | {"data_format": [1]}),
    "a format of controls": json.dumps(METADATA | {"data_format": "\x1b[31m"}),
}


@pytest.mark.parametrize("case", MINARI)
def test_metadata_of_minari_do_no_harm(tmp_path, loaded, case):
    folder = tmp_path / "a-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(MINARI[case], encoding="utf-8", errors="surrogatepass")
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        file["episode_0/observations"] = np.zeros((ROWS + 1, 3), np.float32)
        file["episode_0/actions"] = np.zeros((ROWS, 2), np.float32)
    dataset = loaded(tmp_path / "a-v0")
    if dataset is not None:
        assert dataset.env_name is None or (dataset.env_name.isprintable() and len(dataset.env_name) <= 200)


EPISODES = {
    "actions of a group": {"actions/x": np.zeros((ROWS, 2), np.float32)},
    "actions of nothing": {"actions": h5py.Empty("f4")},
    "actions of a number": {"actions": np.float32(3)},
    "observations of nothing": {"observations": h5py.Empty("f4")},
    "observations of a number": {"observations": np.float32(3)},
    "observations of text": {"observations": b"abc"},
    "rewards of a group": {"rewards/x": np.zeros(3)},
    "rewards of nothing": {"rewards": h5py.Empty("f4")},
    "rewards of text": {"rewards": np.array([b"a"] * ROWS)},
    "terminations of text": {"terminations": np.array([b"a"] * ROWS)},
    "truncations of numbers": {"truncations": np.full(ROWS, 7)},
    "simulator states of a group": {"infos/qpos/x": np.zeros(3)},
    "simulator states of nothing": {"infos/qpos": h5py.Empty("f4")},
    "simulator states of text": {"infos/qpos": np.array([b"a"] * (ROWS + 1))},
    "information of an array": {"infos": np.zeros(3)},
    "no rows": {"actions": np.zeros((0, 2), np.float32), "observations": np.zeros((1, 3), np.float32)},
}


@pytest.mark.parametrize("case", EPISODES)
def test_episodes_of_minari_are_refused_or_read(tmp_path, loaded, case):
    content = {"observations": np.zeros((ROWS + 1, 3), np.float32), "actions": np.zeros((ROWS, 2), np.float32)}
    changed = EPISODES[case]
    content = {key: value for key, value in content.items() if not any(name.startswith(key) for name in changed)}
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        for key, value in (content | changed).items():
            file[f"episode_0/{key}"] = value
    loaded(tmp_path / "main_data.hdf5")


ROBOMIMIC = {
    "marks of a group": {"dones/x": np.zeros(3)},
    "marks of nothing": {"dones": h5py.Empty("i1")},
    "marks of a number": {"dones": 1},
    "marks of text": {"dones": np.array([b"a"] * ROWS)},
    "observations of an array": {"obs": np.zeros((ROWS, 3), np.float32)},
    "observations of nothing": {"obs": h5py.Empty("f4")},
    "observations of text": {"obs/x": np.array([b"a"] * ROWS)},
    "actions of a group": {"actions/x": np.zeros((ROWS, 2), np.float32)},
}


@pytest.mark.parametrize("case", ROBOMIMIC)
def test_demonstrations_of_robomimic_are_refused_or_read(tmp_path, loaded, case):
    content = {"obs/x": np.zeros((ROWS, 3), np.float32), "actions": np.zeros((ROWS, 2), np.float32)}
    changed = ROBOMIMIC[case]
    tops = {name.split("/")[0] for name in changed}
    content = {key: value for key, value in content.items() if key.split("/")[0] not in tops}
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in (content | changed).items():
            file[f"data/demo_0/{key}"] = value
        file["data"].attrs["env_args"] = DEEP
    dataset = loaded(tmp_path / "a.hdf5")
    assert dataset is None or dataset.num_rows == ROWS


# --- Names that users and caches give ---


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "x/" * 3000,
        "a\0b",
        "x" * 300 + "-v0",
        "a::" + "b" * 10**5,
        "::",
        "/dev/zero",
        "\ud800",
        "\x1b[31m",
        "..",
        "/",
        ".",
    ],
)
def test_names_that_can_be_no_dataset_are_refused(refused, name):
    refused(load_dataset, name)


def test_pipes_and_loops_are_refused(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.hdf5")
    (tmp_path / "loop.hdf5").symlink_to(tmp_path / "loop.hdf5")
    refused(load_dataset, str(tmp_path / "pipe.hdf5"))
    refused(load_dataset, str(tmp_path / "loop.hdf5"))


CACHES = {
    "another name": {"dataset": "b"},
    "a name of a list": {"dataset": ["a"]},
    "a name of an array": {"dataset": np.zeros(3)},
    "a digest of text": {"sha256": "../../x"},
    "a digest of a number": {"sha256": 3},
    "parts of other names": {"parts": [{"name": "b", "sha256": "0" * 64, "num_trajectories": 4}]},
    "parts of other digests": {"parts": [{"name": "a", "sha256": "zz", "num_trajectories": 4}]},
    "parts of too many": {"parts": [{"name": "a", "sha256": "0" * 64, "num_trajectories": 10**9}]},
    "parts of fewer than none": {"parts": [{"name": "a", "sha256": "0" * 64, "num_trajectories": -4}]},
    "two parts": {"parts": [{"name": "a", "sha256": "0" * 64, "num_trajectories": 1}] * 2},
}


@pytest.mark.parametrize("case", CACHES)
def test_caches_of_something_else_are_refused(tmp_path, refused, write, case):
    name, cache = str(write()), tmp_path / "cache.pkl"
    load_dataset(name, cache)
    paths, metadata = pickle.loads(cache.read_bytes())
    forged = json.loads(json.dumps(CACHES[case], default=np.ndarray.tolist).replace('"a"', json.dumps(name)))
    cache.write_bytes(pickle.dumps((paths, {**metadata, **forged})))
    refused(load_dataset, name, cache)
