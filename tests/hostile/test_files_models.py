"""Models of strangers: members and metadata are what they say, or one line says what is not; nothing else is made."""

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dynamics_model
from deterministic_model import DeterministicModel
from dynamics_model import load_ensemble, load_models
from evaluation.model_metadata import check_metadata
from evaluation.selection import Model
from model_export import export_model, import_model

ROOT = Path(dynamics_model.__file__).parent
METADATA = {
    "format_version": 1,
    "kind": "deterministic",
    "config": {"seed": 0},
    "dataset": {"name": "a", "env_name": None, "sha256": None, "split": {"train": [0], "holdout": [], "test": []}},
    "scores": [{"val_mse": None}] * 2,
    "elites": [0, 1],
    "seed": 0,
    "run_name": "a-s0-20260101-000000",
}


@pytest.fixture
def write(tmp_path, random_member):
    """Returns a function that writes a model of two members whose state and metadata were changed: its path."""

    def make(change=lambda state: None, metadata=METADATA, members=2):
        states = []
        for index in range(members):
            state = random_member(DeterministicModel, index).__getstate__()
            change(state)
            states.append(state)
        made = [_Pickled(state) for state in states]
        path = tmp_path / "model.pkl"
        content = pickle.dumps((made, metadata), protocol=4)
        own = b"\x8c" + bytes([len(__name__)]) + __name__.encode()
        named = b"\x8c\x13deterministic_model"
        assert own in content or not members
        # Frames have a length, which the other name changes: protocol 4 without frames is read, too.
        content = b"\x80\x04" + content[11:] if content[2:3] == b"\x95" else content
        path.write_bytes(content.replace(own, named).replace(b"\x8c\x08_Pickled", b"\x8c\x12DeterministicModel"))
        return path

    return make


class _Pickled:
    """Stands for a member of any state, until its name is changed in the pickle."""

    def __init__(self, state):
        self.state = state

    def __getstate__(self):
        return self.state


def set_weights(value):
    def change(state):
        packed = state["tensors"]["dynamics.weights.0"]
        packed["bytes"] = np.full(packed["shape"], value, "<f4").tobytes()

    return change


def pack(values, dtype="<f4"):
    values = np.asarray(values, dtype)
    return {"bytes": values.tobytes(), "dtype": dtype, "shape": list(values.shape)}


STATES = {
    "weights of nan": set_weights(np.nan),
    "weights of infinity": set_weights(np.inf),
    "a scale of nan": lambda state: state["tensors"].update(delta_scale=pack([np.nan] * 3)),
    "a scale of infinity": lambda state: state["tensors"].update(input_scale=pack([np.inf] * 5)),
    "a missing tensor": lambda state: state["tensors"].pop("dynamics.biases.0"),
    "one tensor more": lambda state: state["tensors"].update(more=pack([1.0])),
    "tensors of a list": lambda state: state.update(tensors=[1]),
    "tensors of a number": lambda state: state.update(tensors=3),
    "a tensor of a number": lambda state: state["tensors"].update(delta_scale=3),
    "a tensor of text": lambda state: state["tensors"]["delta_scale"].update(bytes="abc"),
    "a tensor of objects": lambda state: state["tensors"]["delta_scale"].update(dtype="|O"),
    "a tensor of doubles": lambda state: state["tensors"].update(delta_scale=pack([1.0] * 3, "<f8")),
    "a tensor of code": lambda state: state["tensors"]["delta_scale"].update(dtype="posix"),
    "a tensor of records": lambda state: state["tensors"]["delta_scale"].update(dtype=[("a", "<f4")]),
    "a shape of less than none": lambda state: state["tensors"]["delta_scale"].update(shape=[-2, 2]),
    "a shape of text": lambda state: state["tensors"]["delta_scale"].update(shape="abc"),
    "a shape beyond all": lambda state: state["tensors"]["delta_scale"].update(shape=[2**62]),
    "a shape of nothing": lambda state: state["tensors"]["dynamics.weights.0"].update(bytes=b"", shape=[1, 0, 10**9]),
    "wide layers": lambda state: state["architecture"].update(hidden_size=(10**9,) * 3),
    "layers beyond all": lambda state: state["architecture"].update(hidden_size=(2**62,)),
    "layers of text": lambda state: state["architecture"].update(hidden_size="abc"),
    "layers of floats": lambda state: state["architecture"].update(hidden_size=(1.5,)),
    "layers of less than none": lambda state: state["architecture"].update(hidden_size=(-1,)),
    "many layers": lambda state: state["architecture"].update(hidden_size=(1,) * 5000),
    "many states": lambda state: state["architecture"].update(state_dim=10**12),
    "states of text": lambda state: state["architecture"].update(state_dim="abc"),
    "fewer states": lambda state: state["architecture"].update(state_dim=2),
    "another activation": lambda state: state["architecture"].update(activation_fn="__class__"),
    "an activation of a list": lambda state: state["architecture"].update(activation_fn=[]),
    "a reward of its own": lambda state: state["architecture"].update(reward_hidden_size=(10**9,)),
    "one setting more": lambda state: state["architecture"].update(more=1),
    "an architecture of text": lambda state: state.update(architecture="abc"),
    "another version": lambda state: state.update(format_version=2),
    "a version of a list": lambda state: state.update(format_version=[[1] * 1000] * 1000),
    "no version": lambda state: state.pop("format_version"),
    "rows of text": lambda state: state.update(holdout_idx="abc"),
    "rows of objects": lambda state: state.update(holdout_idx=pack([1], "<i8") | {"dtype": "|O"}),
}


@pytest.mark.parametrize("case", STATES)
def test_members_that_do_not_fit_are_refused(write, refused, case):
    path = write(STATES[case])
    for load in (load_models, load_ensemble):
        assert str(path) in refused(load, path, error=ValueError)


def test_members_that_were_normalised_differently_are_refused(tmp_path, refused, random_member):
    """Fuzzing found it: one byte of the shifts of one member."""
    path, members = tmp_path / "model.pkl", [random_member(DeterministicModel, index) for index in range(2)]
    members[1].network.delta_shift[0] += 1
    path.write_bytes(pickle.dumps((members, METADATA), protocol=4))
    assert len(load_models(path)[0]) == 2  # each for itself is as it should be
    assert "was normalised differently" in refused(load_ensemble, path, error=ValueError)
    line = refused(Model.load, path, "cpu")
    assert "was normalised differently" in line and str(path) in line


def test_members_as_they_should_be_are_read(write):
    assert len(load_ensemble(write())) == 2


def laughing(levels=9):
    made = [1] * 10
    for _ in range(levels):
        made = [made] * 10
    return made


def endless():
    made = []
    made.append(made)
    return made


BAD = {
    "run_name": [
        "../x",
        "/etc/x",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        "\x1b[31m",
        "a\nb",
        "x" * 300,
        3,
        ["a"],
        "\ud800",
    ],
    "elites": [[2], [-1], [0, 0], [], "abc", [1.5], [True], 3, None, {"a": 1}, laughing(), endless()],
    "scores": [3, [1], [{}], [{"a": "b"}] * 2, [{}] * 3, laughing(), endless()],
    "kind": ["probabilistic", 3, None, ["deterministic"], "x" * 10**6],
    "config": [3, [1], "abc", laughing(), {"a": endless()}],
    "mlflow_run_id": ["../x", 3, "a b", "x" * 100],
    "git_commit": [3, ["a"], "x" * 10**6],
    "versions": [3, {"a": 3}, ["a"]],
    "data": [3, "abc", laughing(), 2**200],
    "dataset": [3, "abc", [1], None, laughing()],
}
DATASET = {
    "name": [3, None, ["a"], "x" * 10**5],
    "env_name": [3, ["a"], "x" * 10**5],
    "sha256": [3, ["a"], "x" * 10**5],
    "split": [
        3,
        [1],
        {"train": 3},
        {"train": [-1]},
        {"train": [0, 0]},
        {"train": ["a"]},
        {"other": [1]},
        {"train": [2**60]},
    ],
    "rows": ["a", -1, 1.5, 2**60],
    "findings": [3, [1], [{}], [{"name": 1}], ["a"]],
    "fingerprints": [3, ["a"], {"train": 3}, {"train": [3]}],
    "parts": [3, [1], [{}], [{"name": "a"}], [{"name": "a", "sha256": "b", "num_trajectories": -1}]],
    "pieces": [3, [1], [[1, 2]], [[0, 5, 3]], [[-1, 0, 3]], [["a", "b", "c"]]],
}
FORGED = [(key, None, value) for key, values in BAD.items() for value in values]
FORGED += [("dataset", key, value) for key, values in DATASET.items() for value in values]


@pytest.mark.parametrize("case", range(len(FORGED)), ids=lambda case: "-".join(map(str, FORGED[case][:2])))
def test_metadata_that_cannot_be_are_refused(write, refused, case):
    key, inner, value = FORGED[case]
    forged = METADATA | {key: value if inner is None else METADATA[key] | {inner: value}}
    path = write(metadata=forged)
    refused(Model.load, path, "cpu")
    if key == "run_name" and value and value not in (".", "..", "\ud800"):
        refused(load_models, path, error=ValueError)


SEEDS = [-1, 2**64, "a", None, 1.5, [1], 10**400]


@pytest.mark.parametrize("seed", SEEDS, ids=str if sys.version_info < (3, 11) else lambda seed: type(seed).__name__)
def test_seeds_that_are_none_are_refused(write, refused, seed):
    refused(load_models, write(metadata=METADATA | {"seed": seed}), error=ValueError)


def test_metadata_as_they_should_be_are_read(write):
    model = Model.load(write(), "cpu")
    assert model.name == METADATA["run_name"]
    check_metadata({}, "nothing", "deterministic", 2)


def one_hash(count=60_000):
    numbers = (b"\x8a\x0a" + (index * (2**61 - 1)).to_bytes(10, "little") for index in range(count))
    return b"}(" + b"K\x01".join(numbers) + b"K\x01u"


STEPS = {
    "keys of one hash": one_hash(),
    "keys of numbers": b"}K\x01K\x01s",
    "keys of tuples": b"})Ns",
    "a set": b"\x8f",
    "a frozen set": b"(\x91",
    "a call": b"cdeterministic_model\nDeterministicModel\n)R",
    "a member without a state": b"]cdeterministic_model\nDeterministicModel\n)\x81a}\x86",
    "a state of a class": b"cdeterministic_model\nDeterministicModel\n}b",
    "a state of a list": b"]}X\x07\x00\x00\x00tensors}sb",
    "a state of nothing": b"cdeterministic_model\nDeterministicModel\n)\x81Nb",
    "bytes with a length": b"\x8e" + struct.pack("<Q", 10**11),
    "a bytearray with a length": b"\x96" + struct.pack("<Q", 10**11),
    "far memory": b"Nr" + struct.pack("<I", 2**32 - 1),
    "a frame with a length": b"\x95" + struct.pack("<Q", 10**11),
    "deep lists": b"]" * 10**5 + b"a" * (10**5 - 1),
    "digits": b"I" + b"9" * 10**5 + b"\n",
    "a class": b"cdeterministic_model\nDeterministicEnsemble\n",
    "a system": b"cposix\nsystem\n",
    "nothing": b"N",
    "a protocol of the future": b"\x80\x63N",
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_no_model_has_are_refused(tmp_path, refused, case):
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04" + STEPS[case] + b".")
    refused(load_models, tmp_path / "model.pkl", error=ValueError)


def test_bytes_that_many_tensors_share_are_refused(write, refused):
    path = write()
    models = pickle.loads(path.read_bytes())[0]
    state = models[0].__getstate__()
    large = np.zeros(2**18, "<f4").tobytes()
    state["tensors"] |= {f"x{index}": {"bytes": large, "dtype": "<f4", "shape": [2**18]} for index in range(3000)}
    path = write(lambda own: own.update(state), members=1)
    assert path.stat().st_size < 10**7
    refused(load_models, path, error=ValueError)


def test_pipes_and_devices_are_refused(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        refused(load_models, path, error=ValueError)


@pytest.mark.parametrize(
    "load",
    ["import dynamics_model; dynamics_model.load_ensemble(path)", "import pickle; pickle.load(open(path, 'rb'))"],
)
def test_another_file_of_the_name_of_a_kind_is_not_run(write, tmp_path, load):
    path = write()
    for name in ("deterministic_model", "probabilistic_model"):
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w').close()\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); path = {str(path)!r}\n"
    trusted = "import dynamics_model; dynamics_model.member_class('probabilistic')\n" if "pickle.load" in load else ""
    command = [sys.executable, "-c", code + trusted + load]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "pwned").exists()


# --- Exported models ---


EXPORTS = {
    "no JSON": "{",
    "deep JSON": "[" * 10**5,
    "a list": "[]",
    "a number": "3",
    "an empty object": "{}",
    "a long number": '{"format_version": ' + "9" * 5000 + "}",
    "another kind": '{"format_version": 1, "kind": "os.system", "metadata": {"seed": 0}, "architecture": {}}',
    "no architecture": '{"format_version": 1, "kind": "deterministic", "metadata": {"seed": 0}, "architecture": {}}',
    "wide layers": '{"format_version": 1, "kind": "deterministic", "metadata": {"seed": 0}, "architecture": '
    '{"state_dim": 3, "action_dim": 2, "hidden_size": [1000000000, 1000000000]}}',
    "a seed of text": '{"format_version": 1, "kind": "deterministic", "metadata": {"seed": "a"}, "architecture": {}}',
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_that_do_not_fit_are_refused(tmp_path, write, refused, case):
    pytest.importorskip("safetensors")
    export_model(*load_models(write()), tmp_path / "export")
    (tmp_path / "export" / "model.json").write_text(EXPORTS[case])
    refused(import_model, tmp_path / "export", error=ValueError)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
PUBLISHED = {
    "laughs": LAUGHS + "probabilistic: false\nensemble_size: 1\n",
    "laughs as a size": LAUGHS + "probabilistic: false\nensemble_size: *i\n",
    "many members": "probabilistic: false\nensemble_size: 1000000000\n",
    "members of text": "probabilistic: false\nensemble_size: abc\n",
    "code": "!!python/object/apply:os.system ['touch pwned']\n",
    "deep": "[" * 3000 + "]" * 3000,
    "a list": "- 1\n",
    "nothing": "",
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_folders_that_do_not_fit_are_refused(tmp_path, refused, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metadata.yaml").write_text(PUBLISHED[case])
    refused(import_model, tmp_path, error=ValueError)
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.yaml"]


def test_torch_is_not_asked_for_memory_on_any_other_device(write):
    assert all(tensor.device == torch.device("cpu") for tensor in load_models(write())[0][0].state_dict().values())
