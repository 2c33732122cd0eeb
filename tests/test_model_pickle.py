"""model.pkl: plain and complete, served to planners that have the model modules alone, and safe to load."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dynamics_model
from deterministic_model import DeterministicModel
from dynamics_model import KINDS, DynamicsEnsemble, load_ensemble, load_models
from probabilistic_model import ProbabilisticModel

ROOT = Path(dynamics_model.__file__).parent
MODULES = ("dynamics_model", "deterministic_model", "probabilistic_model")

# --- Pickled members ---


def plain_parts(value):
    """Every value inside nested plain containers, containers included."""
    yield value
    for part in (*value.keys(), *value.values()) if type(value) is dict else value if type(value) is list else ():
        yield from plain_parts(part)
    if type(value) is tuple:
        for part in value:
            yield from plain_parts(part)


def test_state_is_plain_python_all_the_way_down(member_class, random_member):
    member = random_member(member_class, reward=True)
    member.holdout_idx = np.array([3, 5])

    types = {type(part) for part in plain_parts(member.__getstate__())}

    assert types <= {dict, list, tuple, str, bytes, int, float, bool, type(None)}
    assert {dict, bytes, int} <= types


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_comes_back_to_the_bit(member_class, random_member, protocol, draw_rows, as_tuple, assert_same_weights):
    member = random_member(member_class, reward=True, layer_norm=True, activation_fn="tanh")
    states, actions = draw_rows(7)

    loaded = pickle.loads(pickle.dumps(member, protocol))

    assert type(loaded) is member_class
    assert_same_weights(member, loaded)
    assert loaded.network.architecture == member.network.architecture
    for before, after in zip(as_tuple(member(states, actions)), as_tuple(loaded(states, actions)), strict=True):
        assert torch.equal(before, after)


def test_loaded_member_is_for_use_and_can_be_trained_further(member_class, random_member, draw_rows, as_tuple):
    member = random_member(member_class).to("cpu").train()
    loaded = pickle.loads(pickle.dumps(member))

    assert loaded.device == "cpu" and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.requires_grad_(True)
    sum(part.sum() for part in as_tuple(loaded(*draw_rows(2)))).backward()
    assert loaded.network.dynamics.weights[0].grad is not None


def test_members_of_one_file_share_nothing(member_class, random_member):
    ensemble = DynamicsEnsemble.from_members([random_member(member_class, member) for member in range(2)])
    ensemble.holdout_idx = np.arange(3)
    first, second = pickle.loads(pickle.dumps(ensemble.members()))
    untouched = {name: tensor.clone() for name, tensor in second.state_dict().items()}

    for tensor in first.state_dict().values():
        tensor.fill_(7.0)
    first.holdout_idx[:] = 9

    assert all(torch.equal(tensor, untouched[name]) for name, tensor in second.state_dict().items())
    assert second.holdout_idx.tolist() == [0, 1, 2]


def test_held_out_rows_are_absent_where_nothing_was_held_out(member_class, random_member):
    member = random_member(member_class)
    assert not hasattr(member, "holdout_idx")
    assert not hasattr(pickle.loads(pickle.dumps(member)), "holdout_idx")
    (from_ensemble,) = DynamicsEnsemble.from_members([member]).members()
    assert not hasattr(from_ensemble, "holdout_idx")


def test_held_out_rows_stay_with_every_member(member_class, random_member):
    members = [random_member(member_class, member) for member in range(3)]
    ensemble = DynamicsEnsemble.from_members(members)
    ensemble.holdout_idx = np.array([2, 5, 11])

    for member in pickle.loads(pickle.dumps(ensemble.members())):
        assert member.holdout_idx.tolist() == [2, 5, 11]
        assert member.holdout_idx.dtype == np.int64 and member.holdout_idx.ndim == 1
    assert DynamicsEnsemble.from_members(ensemble.members()).holdout_idx.tolist() == [2, 5, 11]
    first, second, _ = ensemble.members()
    first.holdout_idx[:] = 0
    assert second.holdout_idx.tolist() == ensemble.holdout_idx.tolist() == [2, 5, 11], "each has a copy of its own"


# --- model.pkl ---

METADATA = {
    "format_version": 1,
    "kind": "deterministic",
    "seed": 3,
    "elites": [0, 1],
    "scores": [{"val_mse": None}] * 2,
}


@pytest.fixture
def write_model(random_member, tmp_path):
    """Returns a function that writes a file as training does, two members with reward and held-out rows: its path."""

    def write(kind):
        members = [random_member(kind, member, reward=True) for member in range(2)]
        ensemble = DynamicsEnsemble.from_members(members)
        ensemble.holdout_idx = np.array([1, 4])
        path = tmp_path / f"{kind.__name__}.pkl"
        path.write_bytes(pickle.dumps((ensemble.members(), METADATA)))
        return path

    return write


@pytest.fixture
def model_file(write_model, member_class):
    """Such a file of each kind in turn."""
    return write_model(member_class)


FRESH_PROCESS = """
import json, pickle, sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import numpy as np
folder, inputs, *models_and_outputs = sys.argv[1:]
sys.path.insert(0, folder)
rows, told = np.load(inputs), []
for model, outputs in zip(models_and_outputs[::2], models_and_outputs[1::2]):
    with open(model, "rb") as file:
        models, metadata = pickle.load(file)
    told.append([type(models).__name__, type(metadata).__name__, metadata])
    results = {}
    for index, member in enumerate(models):
        for n in (1, 7, 1000):
            s, a, sp = rows["states"][:n], rows["actions"][:n], rows["next_states"][:n]
            member.nn.eval()
            prediction = member.nn(s, a)
            for part, values in enumerate(prediction if isinstance(prediction, tuple) else (prediction,)):
                results[f"{index}/{n}/forward{part}"] = values.detach().cpu().numpy()
            results[f"{index}/{n}/predict"] = member.predict(s, a)
            results[f"{index}/{n}/predict_batched"] = member.predict_batched(s, a, batch_size=64)
            results[f"{index}/{n}/loss"] = member.compute_loss_batched(s, a, sp)
            results[f"{index}/{n}/reward"] = member.predict_reward(s, a, sp)
        assert member.to("cpu") is member and member.device == "cpu"
        assert len(list(member.nn.parameters())) > 0 and len(member.nn.state_dict()) > 0
        results[f"{index}/holdout_idx"] = member.holdout_idx
    import dynamics_model
    ensemble = dynamics_model.load_ensemble(model)
    results["ensemble"] = ensemble.predict(rows["states"], rows["actions"])[0].detach().numpy()
    np.savez(outputs, **results)
project = [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(folder)]
print(json.dumps({"files": told, "modules": project, "read the processor's data": "/proc/cpuinfo" in opened}))
"""


def test_files_serve_a_fresh_process_that_has_only_the_three_modules(write_model, tmp_path, draw_rows, as_tuple):
    folder = tmp_path / "downstream"
    folder.mkdir()
    for module in MODULES:
        shutil.copy(ROOT / f"{module}.py", folder)
    states, actions = draw_rows(1000)
    np.savez(tmp_path / "inputs.npz", states=states, actions=actions, next_states=states + 1)
    files = {write_model(kind): tmp_path / f"{kind.__name__}.npz" for kind in map(dynamics_model.member_class, KINDS)}

    arguments = [folder, tmp_path / "inputs.npz", *(path for pair in files.items() for path in pair)]
    # -I: neither this folder nor PYTHONPATH
    command = [sys.executable, "-I", "-c", FRESH_PROCESS, *map(str, arguments)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert process.returncode == 0, process.stderr
    printed = json.loads(process.stdout)
    assert printed["files"] == [["list", "dict", METADATA]] * len(KINDS)
    assert set(printed["modules"]) == set(MODULES)
    assert not printed["read the processor's data"], "what speeds training up is none of a planner's business"
    for model, outputs in files.items():
        there, (here, _) = np.load(outputs), load_models(model)
        assert there["ensemble"].shape == (2, 1000, 3)
        for index, member in enumerate(here):
            assert there[f"{index}/holdout_idx"].tolist() == [1, 4]
            for n in (1, 7, 1000):
                s, a, sp = states[:n], actions[:n], states[:n] + 1
                expected = {f"forward{part}": values.numpy() for part, values in enumerate(as_tuple(member(s, a)))}
                expected |= {"predict": member.predict(s, a), "predict_batched": member.predict_batched(s, a, 64)}
                expected |= {"loss": member.compute_loss_batched(s, a, sp), "reward": member.predict_reward(s, a, sp)}
                for name, values in expected.items():
                    got = there[f"{index}/{n}/{name}"]
                    assert got.shape == np.shape(values)
                    np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_model_modules_import_pytorch_numpy_and_each_other_only():
    for module in MODULES:
        nodes = list(ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), "no relative imports"
        others = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
        assert others <= {"torch", "numpy", *MODULES}, module
        assert "torch" in others


def test_loading_gives_members_and_metadata_as_pickle_does(model_file, member_class, assert_same_weights):
    models, metadata = load_models(model_file)
    with model_file.open("rb") as file:
        by_pickle, same_metadata = pickle.load(file)

    assert (type(models), type(metadata)) == (list, dict)
    assert [type(model) for model in models] == [member_class] * 2
    assert metadata == same_metadata == METADATA
    for ours, theirs in zip(models, by_pickle, strict=True):
        assert_same_weights(ours, theirs)


def test_loaded_ensemble_holds_the_members_of_the_file(model_file, assert_same_weights):
    ensemble = load_ensemble(model_file, device="cpu")
    models, _ = load_models(str(model_file))

    assert len(ensemble) == 2 and ensemble.device == "cpu"
    assert ensemble.holdout_idx.tolist() == [1, 4]
    for member, stored in zip(ensemble.members(), models, strict=True):
        assert_same_weights(member, stored)
    assert load_ensemble(model_file, device="meta").device == "meta"


def test_loaded_ensemble_keeps_metadata_and_elites_and_can_be_of_elites_alone(model_file, assert_same_weights):
    members, metadata = load_models(model_file)
    metadata["elites"] = [1]
    model_file.write_bytes(pickle.dumps((members, metadata)))

    everyone, elites = load_ensemble(model_file), load_ensemble(model_file, elites=True)

    assert everyone.metadata == elites.metadata == metadata
    assert (everyone.elites, elites.elites) == ([1], [0])
    assert_same_weights(everyone.members()[1], members[1])
    [elite] = elites.members()
    assert_same_weights(elite, members[1])
    assert not any(parameter.requires_grad for parameter in elites.parameters())


def test_loaded_ensemble_samples_by_the_seed_of_its_run(random_member, tmp_path, draw_rows):
    members, path = [random_member(ProbabilisticModel, member) for member in range(2)], tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps((members, METADATA)))

    loaded, fresh = load_ensemble(path), DynamicsEnsemble.from_members(members, seed=METADATA["seed"])

    assert torch.equal(loaded.sample(*draw_rows(5)), fresh.sample(*draw_rows(5)))


def test_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        load_ensemble(tmp_path / "nowhere.pkl")


class Call:
    """Pickles as a call of a function, as a hostile file would."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_storage(canary):
    """A call of PyTorch's own unpickler on a hostile pickle, which ``weights_only=False`` would run."""
    stream = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), stream)
    return Call(torch.storage._load_from_bytes, stream.getvalue())


HOSTILE = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w')"),
    "exec": lambda canary: Call(exec, f"open({str(canary)!r}, 'w')"),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "torch_storage": torch_storage,
}


@pytest.mark.parametrize("place", ["alone", "beside members", "in metadata", "in a member"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_file_is_refused_before_anything_runs(attack, place, random_member, tmp_path, monkeypatch):
    path, canary = tmp_path / "model.pkl", tmp_path / "canary"
    member, hostile = random_member(DeterministicModel), HOSTILE[attack](canary)
    if place == "in a member":
        state = DeterministicModel.__getstate__
        monkeypatch.setattr(DeterministicModel, "__getstate__", lambda self: state(self) | {"holdout_idx": hostile})
    contents = {
        "alone": hostile,
        "beside members": ([member, hostile], METADATA),
        "in metadata": ([member], METADATA | {"git_commit": hostile}),
        "in a member": ([member], METADATA),
    }
    path.write_bytes(pickle.dumps(contents[place]))

    for load in (load_models, load_ensemble):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(path)
    assert not canary.exists()


@pytest.mark.parametrize("attack", HOSTILE)
def test_attack_of_the_test_above_is_real(attack, tmp_path):
    pickle.loads(pickle.dumps(HOSTILE[attack](tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dynamics_model", "DynamicsModel"),
        ("dynamics_model", "os.system"),
        ("dynamics_model", "load_ensemble"),
        ("deterministic_model", "DynamicsEnsemble"),
        ("deterministic_model", "DeterministicEnsemble"),
        ("deterministic_model", "DeterministicModel.__init__"),
        ("builtins", "getattr"),
        ("functools", "partial"),
        ("numpy", "load"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("learn_model", "main"),
    ],
)
def test_no_name_but_the_member_classes_is_admitted(module, name, tmp_path):
    path = tmp_path / "model.pkl"
    named = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    path.write_bytes(b"\x80\x04" + named + b"\x93.")  # STACK_GLOBAL: nothing but the name is in the file
    with pytest.raises(ValueError, match=f"it names {re.escape(module)}.{re.escape(name)}, which no model holds"):
        load_models(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_file_that_is_cut_off_is_refused(model_file, share):
    content = model_file.read_bytes()
    model_file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is not a model that learn_model.py wrote .*; expected a model\.pkl"):
        load_ensemble(model_file)


@pytest.mark.parametrize(
    "content", [b"not a pickle", b"\x89HDF\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(50), b"."]
)
def test_file_that_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a model\.pkl"):
        load_ensemble(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    "content", [5, [], {}, (), ([], METADATA), ([1, 2], METADATA), (None, METADATA), (["a.hdf5"], {})]
)
def test_pickle_that_holds_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(tmp_path / "model.pkl")


@pytest.mark.parametrize("metadata", [None, 5, "metadata"])
def test_members_with_metadata_of_another_type_are_refused(model_file, metadata):
    members, _ = load_models(model_file)
    model_file.write_bytes(pickle.dumps((members, metadata)))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_models(model_file)


def change_state(monkeypatch, member_class, change):
    """Makes members pickle a state that ``change`` has altered."""
    state = member_class.__getstate__

    def altered(self):
        plain = state(self)
        change(plain)
        return plain

    monkeypatch.setattr(member_class, "__getstate__", altered)


def test_other_format_version_is_refused_with_both_numbers(member_class, random_member, tmp_path, monkeypatch):
    change_state(monkeypatch, member_class, lambda state: state.update(format_version=2))
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(member_class)], METADATA)))

    with pytest.raises(ValueError, match="format version 2, expected 1; load it with the release that wrote it"):
        load_ensemble(path)
    with pytest.raises(ValueError, match="format version 2, expected 1"):
        pickle.loads(path.read_bytes())


def test_member_of_the_previous_version_which_kept_settings_of_its_loss_is_the_same(
    member_class, random_member, tmp_path, monkeypatch, assert_same_weights
):
    member, path = random_member(member_class, layer_norm=True), tmp_path / "model.pkl"
    with monkeypatch.context() as before:
        old = {"beta_nll": 0.5, "beta_nll_decay": 0.8}
        change_state(before, member_class, lambda state: state["architecture"].update(old))
        path.write_bytes(pickle.dumps(([member], METADATA)))

    ((loaded,), _), ((by_pickle,), _) = load_models(path), pickle.loads(path.read_bytes())

    for model in (loaded, by_pickle):
        assert_same_weights(model, member)
        assert model.network.architecture == member.network.architecture
        assert model.__getstate__() == member.__getstate__()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["tensors"].pop("delta_scale"),
        lambda state: state["tensors"].pop("dynamics.weights.0"),
        lambda state: state["tensors"]["dynamics.weights.0"].update(shape=[1, 5, 9]),
        lambda state: state["tensors"]["dynamics.weights.0"].update(bytes=b"1234"),
        lambda state: state["tensors"]["dynamics.weights.0"].update(dtype="|O"),
        lambda state: state["architecture"].update(hidden_size=(9,)),
        lambda state: state["architecture"].update(activation_fn="sine"),
        lambda state: state["architecture"].update(unheard_of=1),
        lambda state: state.pop("architecture"),
    ],
)
def test_damaged_member_is_refused(damage, random_member, tmp_path, monkeypatch):
    change_state(monkeypatch, DeterministicModel, damage)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(DeterministicModel)], METADATA)))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(path)


@pytest.mark.parametrize(
    "metadata", [{}, {"seed": "x"}, {"seed": -1}, {"seed": None}, {"seed": 0, "format_version": 99}], ids=str
)
def test_metadata_that_cannot_be_used_is_refused(random_member, tmp_path, metadata):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(([random_member(DeterministicModel)], {"format_version": 1} | metadata)))
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(path)


def test_member_without_a_state_is_refused(tmp_path):
    path = tmp_path / "model.pkl"
    # NEWOBJ without BUILD: an instance whose __setstate__ is never called, in a list, with {"seed": 0}
    named = b"\x8c\x13deterministic_model\x8c\x12DeterministicModel\x93"
    path.write_bytes(b"\x80\x04]" + named + b")\x81a}\x8c\x04seedK\x00s\x86.")
    with pytest.raises(ValueError, match=r"is not a model that learn_model\.py wrote"):
        load_ensemble(path)
