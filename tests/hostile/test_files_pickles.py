"""Pickles and archives of strangers: read as before, or refused in one line, before they build what they ask for."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from data.behaviour import SquashedGaussianPolicy
from data.sources import load_dataset
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
    "a record type": lambda: [{**PATH, "x": np.zeros(3, [("x", "f4")])}],
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


# --- Policies ---

POLICIES = {
    "zeros": {"weight_0": npy((10**8, 3), content=bytes(12 * 10**7))},
    "a shape without content": {"weight_0": npy((10**12, 3))},
    "objects": {"weight_0": npy((4, 3), "|O", pickle.dumps(3))},
    "not a number": {"weight_0": npy((4, 3), content=np.full((4, 3), np.nan, "<f4").tobytes())},
    "text": {"weight_0": npy((4, 3), "<U1", bytes(48))},
    "another shape": {"weight_0": npy((4, 5), content=bytes(80))},
    "nothing": {"weight_0": b""},
    "a name of numbers": {"env_name": npy((10**3,), content=bytes(4000))},
    "an environment above": {"env_name": npy((), "<U2", "..".encode("utf-32-le"))},
    "a return of text": {"evaluation_return": npy((), "<U1", b"a\0\0\0")},
}


@pytest.mark.parametrize("case", POLICIES)
def test_policies_that_cannot_act_are_refused(tmp_path, refused, case):
    layers = {"weight_0": (4, 3), "bias_0": (4,), "mean_weight": (2, 4), "mean_bias": (2,)}
    layers |= {"log_std_weight": (2, 4), "log_std_bias": (2,), "low": (2,), "high": (2,)}
    policy = SquashedGaussianPolicy({name: np.zeros(shape, np.float16) for name, shape in layers.items()}, "made")
    policy.save(tmp_path / "good.npz", "Hopper-v5")
    assert SquashedGaussianPolicy.load(tmp_path / "good.npz", "Hopper-v5", 3).depth == 1
    with zipfile.ZipFile(tmp_path / "good.npz") as archive:
        entries = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    path = write_zip(tmp_path / "a.npz", entries | POLICIES[case])
    refused(SquashedGaussianPolicy.load, path, "Hopper-v5", 3)


# --- What needs a process of its own ---


def test_a_hash_bomb_in_a_process_of_its_own(tmp_path):
    bomb = tmp_path / "bomb.pkl"
    bomb.write_bytes(b"\x80\x04" + numbers_of_one_hash(b"}(", b"K\x01", b"u.", 200_000))
    code = "import sys; from data.sources import load_dataset; load_dataset(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(bomb)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "keys that are no texts" in done.stderr.splitlines()[-1]
