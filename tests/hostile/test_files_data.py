"""Datasets of strangers: read as before, or refused in one line, before they take memory, time or other files."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict

import h5py
import numpy as np
import pytest

from data.sources import load_dataset, source_attributes
from utils import ROOT

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


@pytest.fixture
def loaded(answered):
    """Returns a function that loads a dataset with all that can be asked of it, or sees it refused in a line."""

    def load(name):
        answered(source_attributes, str(name))
        return answered(load_dataset, str(name), simulator_states=True, quiet=True)

    return load


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


# --- Pickles ---

PATH = {key: value for key, value in columns().items() if key != "timeouts"}


def laughing(levels=10, wide=10):
    """Lists in lists that stand for 10 to the power of so many numbers."""
    made = [1.0] * wide
    for _ in range(levels):
        made = [made] * wide
    return made


def endless():
    made = []
    made.append(made)
    return made


def endless_dictionary():
    made = dict(PATH)
    made["observations"] = made
    return made


def wide_dictionaries(levels=12):
    made = {"x": np.zeros((ROWS, 1), np.float32)}
    for _ in range(levels):
        made = {f"k{index}": made for index in range(10)}
    return made


def deep_dictionaries(depth=5000):
    made = b"".join([b"}X\x01\x00\x00\x00a" for _ in range(depth)]) + b"N" + b"s" * depth
    return b"\x80\x02" + made + b"."


CONTENTS = {
    "laughs as observations": lambda: [{**PATH, "observations": laughing()}],
    "laughs as actions": lambda: [{**PATH, "actions": laughing(3, 400)}],
    "laughs as a mask": lambda: ([PATH], {"obs_mask": laughing()}),
    "laughs as a name": lambda: ([PATH], {"env_name": laughing()}),
    "laughs as a sha256": lambda: ([PATH], {"sha256": laughing(), "dataset": laughing(), "findings": laughing()}),
    "laughs as a flag": lambda: [{**PATH, "terminals": laughing()}],
    "laughs as an unknown flag": lambda: [{**PATH, "dones": laughing(), "my_done": laughing()}],
    "laughs of empty lists": lambda: [{**PATH, "observations": laughing(3, 300)[:0] or [[[[]] * 300] * 300] * 300}],
    "laughs of arrays": lambda: [{**PATH, "observations": [[np.zeros(2 * 10**5)] * 1000] * 1000}],
    "laughs of text": lambda: [{**PATH, "observations": ["x" * 2 * 10**5] + ["y"] * 10**5}],
    "a list in itself": lambda: [{**PATH, "observations": endless()}],
    "a list in itself as a mask": lambda: ([PATH], {"obs_mask": endless()}),
    "a list in itself as a name": lambda: ([PATH], {"env_name": endless()}),
    "a list in itself alone": endless,
    "a dictionary in itself": endless_dictionary,
    "a dictionary in itself as observations": lambda: [{**PATH, "observations": endless_dictionary()}],
    "dictionaries in ten places": lambda: [{**PATH, "observations": wide_dictionaries()}],
    "one path many times": lambda: (
        [{**PATH, "observations": np.zeros((10**5, 3)), "actions": np.zeros((10**5, 3))}] * 9999
    ),
    "complex keys": lambda: ([PATH], {complex(index, -index): 1 for index in range(20_000)}),
    "keys of tuples": lambda: ([PATH], {(index, -index): 1 for index in range(20_000)}),
    "many sets": lambda: [{**PATH, "x": [set() for _ in range(20_000)]}],
    "a huge number": lambda: [{**PATH, "observations": 10**10**5}],
    "a huge number as a name": lambda: ([PATH], {"env_name": 10**10**5, "dataset": 10**10**5}),
    "a huge number in rewards": lambda: [{**PATH, "rewards": [10**400] * ROWS}],
    "a huge number among floats": lambda: [{**PATH, "rewards": [1.5] * (ROWS - 1) + [10**400]}],
    "a long name": lambda: ([PATH], {"env_name": "\x1b\ud800" * 2 * 10**5}),
    "a record type": lambda: [{**PATH, "x": np.zeros(3, COMPOUND)}],
    "a raw type": lambda: [{**PATH, "x": np.zeros(3, "V16")}],
    "numbers as actions": lambda: [{**PATH, "actions": 3}],
    "text as observations": lambda: [{**PATH, "observations": "abc"}],
    "bytes as observations": lambda: [{**PATH, "observations": b"abc"}],
    "a set as observations": lambda: [{**PATH, "observations": {1, 2}}],
    "nothing as observations": lambda: [{**PATH, "observations": None}],
    "times as observations": lambda: [{**PATH, "observations": np.zeros((ROWS, 3), "M8[s]")}],
    "objects as observations": lambda: [{**PATH, "observations": np.array([[None] * 3] * ROWS)}],
    "objects in themselves": lambda: [{**PATH, "observations": np.array([endless(), 1, 2], object)}],
    "numbers as keys": lambda: [{**PATH, 3: 1, None: 2, (1, 2): 3, b"x": 4, 1.5: 5}],
    "no dimension": lambda: [{**PATH, "observations": np.zeros((ROWS, 0), np.float32)}],
    "a dimension of nothing": lambda: [{**PATH, "observations": np.float32(3)}],
    "many axes": lambda: [{**PATH, "observations": np.zeros((1,) * 32, np.float32)}],
    "no rows": lambda: [{key: value[:0] for key, value in PATH.items()}],
    "paths of nothing": lambda: [{}] * 10**5,
    "paths of numbers": lambda: [1, 2, 3],
    "an array of numbers": lambda: np.zeros(3),
    "nothing": lambda: None,
    "a number of NumPy": lambda: np.float32(3),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_pickles_of_any_content_are_refused_or_read(tmp_path, loaded, case):
    content = CONTENTS[case]()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=4))
    del content
    dataset = loaded(tmp_path / "a.pkl")
    if dataset is not None:
        assert dataset.env_name is None or dataset.env_name.isprintable()


def call(module, name, arguments):
    """The steps of a pickle that call something."""
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def numbers_of_one_hash(before, between, after=b"", count=60_000):
    """The steps that put numbers of one hash into a container, after which dictionaries would compare for minutes."""
    numbers = (b"\x8a\x0a" + (index * (2**61 - 1)).to_bytes(10, "little") for index in range(count))
    return before + between.join(numbers) + between + after


INT = b"J" + struct.pack("<i", 2**31 - 1)
SHORT = b"K\x00"
BIG = b"\x8a\x05" + (10**10).to_bytes(5, "little")
ARRAY = call("numpy._core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\x00\x85C\x01b\x87")
FLOAT = call("numpy", "dtype", b"X\x02\x00\x00\x00f4\x89\x88\x87")
TYPE_STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
STEPS = {
    "bytearray of ten thousand million": call("builtins", "bytearray", BIG + b"\x85"),
    "bytearray of a list": call("builtins", "bytearray", b"]" + INT + b"a\x85"),
    "bytearray with a length": b"\x96" + struct.pack("<Q", 10**10),
    "bytes with a length": b"\x8e" + struct.pack("<Q", 10**10),
    "bytes with a length beyond all": b"\x8e" + b"\xff" * 8,
    "text with a length": b"\x8d" + struct.pack("<Q", 10**10),
    "a frame with a length": b"\x95" + struct.pack("<Q", 10**10),
    "a number with a length": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a number of negative length": b"\x8b" + struct.pack("<i", -1),
    "digits": b"I" + b"9" * 2 * 10**5 + b"\n",
    "long digits": b"L" + b"9" * 2 * 10**5 + b"L\n",
    "far memory": b"Nr" + struct.pack("<I", 2**32 - 1),
    "far memory as text": b"Np99999999999999999999\n",
    "no memory": b"j" + struct.pack("<I", 7),
    "negative memory": b"Np-1\n",
    "ndarray of a size": call("numpy", "ndarray", BIG + b"\x85\x85"),
    "ndarray of objects": call("numpy", "ndarray", BIG + b"X\x01\x00\x00\x00O\x86"),
    "reconstruct of a size": call(
        "numpy._core.multiarray", "_reconstruct", b"cnumpy\nndarray\n" + BIG + b"\x85C\x01b\x87"
    ),
    "reconstruct of something": call("numpy._core.multiarray", "_reconstruct", b"cbuiltins\nset\nK\x00\x85C\x01b\x87"),
    "array of other size": ARRAY + b"(K\x01" + BIG + b"\x85" + FLOAT + b"\x89C\x04abcdtb",
    "array of negative size": ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + FLOAT + b"\x89C\x04abcdtb",
    "array of no type": ARRAY + b"(K\x01K\x01\x85N\x89C\x04abcdtb",
    "array of text": ARRAY + b"(K\x01K\x01\x85" + FLOAT + b"\x89X\x04\x00\x00\x00abcdtb",
    "array of short state": ARRAY + b"(K\x01tb",
    "array of no state": ARRAY + b"Nb",
    "array of a dictionary": ARRAY + b"}b",
    "array built twice": ARRAY + (b"(K\x01K\x01\x85" + FLOAT + b"\x89C\x04abcdtb") * 2,
    "objects as floats": ARRAY + b"(K\x01K\x01\x85" + FLOAT + b"\x89](Netb",
    "type of objects, forged": call("numpy", "dtype", b"X\x02\x00\x00\x00f4\x89\x88\x87")
    + TYPE_STATE.replace(b"K\x00tb", b"K\x3ftb"),
    "type with a size, forged": FLOAT + TYPE_STATE.replace(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff", INT + INT),
    "type with fields, forged": FLOAT + TYPE_STATE.replace(b"NNN", b"N(X\x01\x00\x00\x00at}"),
    "type of no order": FLOAT + TYPE_STATE.replace(b"<", b"x"),
    "type of no state": FLOAT + b"Nb",
    "type of a short state": FLOAT + b"(K\x03tb",
    "type of a name": call("numpy", "dtype", b"X\x05\x00\x00\x00posix\x85"),
    "type of a list": call("numpy", "dtype", b"](X\x01\x00\x00\x00aX\x02\x00\x00\x00f4\x86e\x85"),
    "type of nothing": call("numpy", "dtype", b"N\x85"),
    "type of two thousand million": call("numpy", "dtype", b"X\x0b\x00\x00\x00U2000000000\x85"),
    "types at all": b"cnumpy\ndtype\n",
    "number of objects": call(
        "numpy._core.multiarray", "scalar", call("numpy", "dtype", b"X\x02\x00\x00\x00O8\x85") + b"C\x08abcdefgh\x86"
    ),
    "number of other size": call("numpy._core.multiarray", "scalar", FLOAT + b"C\x02ab\x86"),
    "number of no type": call("numpy._core.multiarray", "scalar", b"NN\x86"),
    "number alone": call("numpy._core.multiarray", "scalar", b")"),
    "buffer of objects": call(
        "numpy._core.numeric",
        "_frombuffer",
        b"(C\x08abcdefgh" + call("numpy", "dtype", b"X\x02\x00\x00\x00O8\x85") + b"K\x01\x85X\x01\x00\x00\x00Ct",
    ),
    "buffer of other shape": call(
        "numpy._core.numeric", "_frombuffer", b"(C\x04abcd" + FLOAT + BIG + b"\x85X\x01\x00\x00\x00Ct"
    ),
    "buffer of a number": call(
        "numpy._core.numeric", "_frombuffer", b"(K\x01" + FLOAT + b"K\x01\x85X\x01\x00\x00\x00Ct"
    ),
    "an encoder of others": call("_codecs", "encode", b"X\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86"),
    "an encoder of idna": call("_codecs", "encode", b"X\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86"),
    "a set of a number": call("builtins", "set", b"K\x01\x85"),
    "a set of lists": call("builtins", "set", b"]]a\x85"),
    "a set as a step": b"\x8f(]\x90",
    "a frozen set of lists": b"(]\x91",
    "ordered lists": call("collections", "OrderedDict", b"]K\x01a\x85"),
    "ordered with a state": call("collections", "OrderedDict", b")") + b"}X\x01\x00\x00\x00aNsb",
    "a list as a key": b"}]Ns",
    "a deep tuple as a key": b"}N" + b"\x85" * 2 * 10**5 + b"Ns",
    "a deep tuple in a set": b"\x8f(N" + b"\x85" * 2 * 10**5 + b"\x90",
    "deep lists": b"]" * 2 * 10**5 + b"a" * (2 * 10**5 - 1),
    "items for a number": b"K\x01(NNu",
    "items for an array": ARRAY + b"(K\x00K\x01u",
    "half an item": b"}(Nu",
    "append to a number": b"K\x01Na",
    "append to bytes": call("builtins", "bytearray", b")") + b"K\x01a",
    "call of a number": b"K\x01)R",
    "call of an array": ARRAY + b")R",
    "call with a number": b"cbuiltins\nset\nK\x01R",
    "an object": b"cnumpy\nndarray\n)\x81",
    "an object with names": b"cnumpy\nndarray\n)}\x92",
    "an instance": b"(inumpy\nndarray\n",
    "an old object": b"(cnumpy\nndarray\no",
    "a class of the system": b"cposix\nsystem\n",
    "a nested name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dtype\x93",
    "a persistent name": b"Px\n",
    "a persistent thing": b"NQ",
    "an extension": b"\x82\x01",
    "a buffer": b"\x97",
    "a frozen buffer": b"C\x01a\x98",
    "an unknown step": b"\xfe",
    "no stack": b"0",
    "no mark": b"t",
    "a mark alone": b"(",
    "a protocol of the future": b"\x80\x63N",
    "nothing": b"",
    "text that is none": b"X\x02\x00\x00\x00\xff\xfe",
    "a surrogate": b"X\x03\x00\x00\x00\xed\xa0\x80",
    "a string": b"S'a\n",
    "a float that is none": b"Fabc\n",
    "keys of one hash": numbers_of_one_hash(b"}(", b"K\x01", b"u"),
    "keys of one hash one by one": numbers_of_one_hash(b"}", b"K\x01s"),
    "keys of one hash at once": numbers_of_one_hash(b"(", b"K\x01", b"d"),
    "a set of one hash": numbers_of_one_hash(b"\x8f(", b"", b"\x90"),
    "a frozen set of one hash": numbers_of_one_hash(b"(", b"", b"\x91"),
    "a called set of one hash": call("builtins", "set", numbers_of_one_hash(b"](", b"", b"e") + b"\x85"),
    "ordered keys of one hash": call(
        "collections", "OrderedDict", numbers_of_one_hash(b"](", b"K\x01\x86", b"e") + b"\x85"
    ),
    "many memories": b"\x94" * 10,
    "deep dictionaries": deep_dictionaries()[2:-1],
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_of_pickles_are_refused_before_they_build(tmp_path, refused, case):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + STEPS[case] + b".")
    refused(load_dataset, str(tmp_path / "a.pkl"))


def amplified(make):
    """A pickle that makes the same megabyte a few thousand times, in different memory."""
    text = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"q\x000"
    return b"\x80\x04" + text + b"](" + make * 3000 + b"e."


AMPLIFIED = {
    "bytes": call("_codecs", "encode", b"h\x00X\x06\x00\x00\x00latin1\x86"),
    "bytearrays": call("builtins", "bytearray", b"h\x00X\x07\x00\x00\x00latin-1\x86"),
    "arrays": ARRAY
    + b"(K\x01J\x00\x00\x10\x00\x85"
    + call("numpy", "dtype", b"X\x02\x00\x00\x00i1\x85")
    + b"\x89h\x00tb",
}


@pytest.mark.parametrize("case", AMPLIFIED)
def test_what_is_made_again_and_again_is_counted(tmp_path, refused, case):
    (tmp_path / "a.pkl").write_bytes(amplified(AMPLIFIED[case]))
    assert "out of proportion" in refused(load_dataset, str(tmp_path / "a.pkl"))


RIGHT = {
    "texts as keys of dictionaries": [{**PATH, "infos": {"a": [1, 2], "b": {"c": np.arange(3)}}}],
    "sets and tuples": [{**PATH, "x": {1, 2, "a"}, "y": frozenset({(1, 2)}), "z": ((1, 2), (2, 3))}],
    "ordered": [OrderedDict(PATH)],
    "lists": [{key: value.tolist() for key, value in PATH.items()}],
    "lists of arrays": [{key: list(value) for key, value in PATH.items()}],
    "types of NumPy": [
        {
            **PATH,
            **{
                f"x{kind}": np.zeros(3, kind)
                for kind in ("?", "i1", ">f8", "U3", "S4", "O", "M8[s]", "m8", "c16", "f2")
            },
        }
    ],
    "orders of memory": [
        {
            **PATH,
            "x": np.zeros((2, 3)).T,
            "y": np.zeros((2, 3, 4)).transpose(1, 0, 2),
            "z": np.asfortranarray(np.ones((3, 3))),
        }
    ],
    "numbers of NumPy": [
        {**PATH, "x": np.float64(1), "y": np.str_("a"), "z": np.bool_(True), "w": np.datetime64("2020-01-01")}
    ],
    "bytes": [{**PATH, "x": b"abc", "y": bytearray(b"abc"), "z": bytearray()}],
    "complex": [{**PATH, "x": 1j, "y": [1j, 2]}],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("case", RIGHT)
def test_what_was_right_is_still_read(tmp_path, case, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(RIGHT[case], protocol))
    dataset = load_dataset(str(tmp_path / "a.pkl"))
    np.testing.assert_array_equal(dataset.trajectories[0].observations, PATH["observations"])


# --- .npz ---


def npy(shape, dtype="<f4", content=b"", header=None):
    """An array as NumPy writes it, with any header."""
    text = header or f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    text = text.encode() + b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def write_zip(path, entries, level=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", level) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


def arrays(**changed):
    """The entries of an archive of D4RL's arrays."""
    entries = {}
    for key, value in columns().items():
        stream = io.BytesIO()
        np.save(stream, value)
        entries[key] = stream.getvalue()
    return entries | changed


NPZ = {
    "zeros": {"observations": npy((10**8, 3), content=bytes(12 * 10**7))},
    "a shape without content": {"observations": npy((10**12, 3))},
    "a negative shape": {"observations": npy((-1, 3))},
    "a shape beyond all": {"observations": npy((2**70, 3))},
    "a shape of text": {"observations": npy("abc")},
    "a shape of floats": {"observations": npy((1.5, 3))},
    "no shape": {"observations": npy(())},
    "objects": {"observations": npy((24, 3), "|O", pickle.dumps(3))},
    "records": {"observations": npy((24,), [("a", "<f4"), ("b", "<f4")], bytes(192))},
    "a type that is none": {"observations": npy((24, 3), "<q9")},
    "a deep header": {"observations": npy((), header="(" * 300 + ")" * 300)},
    "a long header": {"observations": npy((), header="{" + " " * 20000 + "}")},
    "a header of code": {"observations": npy((), header="__import__('os').system('touch pwned')")},
    "a header of arithmetic": {
        "observations": npy((), header="{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9, 3)}")
    },
    "an empty array": {"observations": b""},
    "half an array": {"observations": npy((24, 3), content=bytes(100))},
    "an old magic": {"observations": b"\x93NUMPY\x09\x00" + bytes(100)},
    "text": {"observations": b"hello"},
    "objects as flags": {"terminals": npy((24,), "|O", pickle.dumps([None] * 24))},
    "an environment of numbers": {"env_name": npy((24, 3), content=bytes(288))},
    "an environment of many names": {"env_name": npy((24,), "<U3", bytes(288))},
    "an environment of surrogates": {"env_name": npy((), "<U2", b"\x00\xd8\x00\x00\x1b\x00\x00\x00")},
    "an environment of no code points": {"env_name": npy((), "<U1", b"\xff\xff\xff\xff")},
    "an environment in a folder": {"env_name/x": npy((), "<U1", b"a\0\0\0")},
    "nested names": {"a/" * 500 + "b": npy((3,), content=bytes(12))},
    "names of folders above": {"../../x": npy((3,), content=bytes(12)), "/etc/x": npy((3,), content=bytes(12))},
}


@pytest.mark.parametrize("case", NPZ)
def test_archives_of_any_content_are_refused_or_read(tmp_path, loaded, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    entries = arrays(**NPZ[case])
    dataset = loaded(write_zip(tmp_path / "a.npz", entries))
    assert os.listdir(tmp_path) == ["a.npz"]  # noqa: PTH208
    if case.startswith(("an environment", "nested", "names")) and case != "an environment of no code points":
        assert dataset.num_rows == ROWS
        assert dataset.env_name is None or dataset.env_name.isprintable()
    else:
        assert dataset is None


def test_archives_whose_sizes_lie_are_refused(tmp_path, refused):
    path = write_zip(tmp_path / "a.npz", arrays(observations=npy((10**9, 3), content=bytes(1000))))
    content = bytearray(path.read_bytes())
    size = struct.pack("<I", len(npy((10**9, 3), content=bytes(1000))))
    path.write_bytes(content.replace(size, struct.pack("<I", 2**32 - 2)))
    refused(load_dataset, str(path))


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


# --- What needs a process of its own ---


def test_a_hash_bomb_and_a_virtual_dataset_of_itself_in_a_process_with_little_memory(tmp_path, write):
    path = write("observations")
    with h5py.File(path, "a") as file:
        virtual_of_itself(file, "observations", tmp_path)
    bomb = tmp_path / "bomb.pkl"
    bomb.write_bytes(b"\x80\x04" + numbers_of_one_hash(b"}(", b"K\x01", b"u.", 200_000))
    code = (
        "import resource, sys; from data.sources import load_dataset; from utils import InputError\n"
        "for name in sys.argv[1:]:\n"
        "    try: load_dataset(name)\n"
        "    except InputError as error: print('refused', error)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(bomb)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("refused") == 2, done.stderr
