"""Models without pickles: back to the bit, from the thesis's published folders, and safe whatever a folder holds."""

import itertools
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("safetensors", reason="needs the extra export")
from safetensors.torch import load_file, save_file

import learn_model
import model_export
from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble, load_ensemble, load_models
from model_export import export_model, import_model
from probabilistic_model import ProbabilisticModel

ROOT = Path(model_export.__file__).parent
METADATA = {
    "format_version": 1,
    "kind": "probabilistic",
    "seed": 3,
    "elites": [1, 0],
    "scores": [{"val_mse": 0.1, "nll": None}, {"val_mse": 1 / 3, "nll": 2.5e-300}],
    "config": {"hidden_size": [8, 6], "scheduler": None, "learn_reward": True},
    "dataset": {"name": "höpper", "split": {"train": [0, 2], "holdout": [1], "test": []}},
}


@pytest.fixture
def two_members(random_member):
    """Returns a function that makes two members of a kind, with held-out rows if they are given."""

    def build(kind, holdout_idx=None, **options):
        ensemble = DynamicsEnsemble.from_members([random_member(kind, member, **options) for member in range(2)])
        ensemble.holdout_idx = holdout_idx
        return ensemble.members()

    return build


# --- There and back ---


@pytest.mark.parametrize("options", [{}, {"reward": True, "layer_norm": True, "activation_fn": "gelu"}], ids=str)
@pytest.mark.parametrize("holdout_idx", [None, np.array([1, 4, 7])], ids=["all trained", "held out"])
def test_model_comes_back_to_the_bit(member_class, two_members, options, holdout_idx, tmp_path):
    models = two_members(member_class, holdout_idx, **options)

    export_model(models, METADATA, tmp_path / "exported")
    imported, metadata = import_model(tmp_path / "exported")

    assert metadata == METADATA
    assert [type(model) for model in imported] == [member_class] * 2
    # What is pickled of a member is all that it has.
    assert [model.__getstate__() for model in imported] == [model.__getstate__() for model in models]
    assert not any(model.training or next(model.parameters()).requires_grad for model in imported)
    assert {path.name for path in tmp_path.rglob("*")} == {"exported", "model.json", "model.safetensors"}
    assert len({path.stat().st_mode for path in (tmp_path / "exported").iterdir()}) == 1, (
        "who may read one may read both"
    )


def test_dimensions_that_never_change_are_exported_too(unit_normalisation, constant_member, tmp_path):
    model = constant_member(ProbabilisticModel, [0.5], variance=[0.1], delta_scale=[0.0, 2.0], delta_shift=[0.25, 1.0])
    export_model([model], METADATA, tmp_path / "exported")
    ((imported,), _) = import_model(tmp_path / "exported")
    assert imported.__getstate__() == model.__getstate__()


def test_exported_files_are_what_their_description_says(two_members, tmp_path):
    models = two_members(ProbabilisticModel, np.array([1, 4]))
    export_model(models, METADATA, tmp_path / "exported")

    tensors, description = (
        load_file(tmp_path / "exported" / "model.safetensors"),
        json.loads((tmp_path / "exported" / "model.json").read_text(encoding="utf-8")),
    )

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "dynamics.weights.0": (2, 5, 8),
        "dynamics.biases.0": (2, 1, 8),
        "dynamics.weights.1": (2, 8, 6),
        "dynamics.biases.1": (2, 1, 6),
        "dynamics.weights.2": (2, 6, 6),
        "dynamics.biases.2": (2, 1, 6),
        "max_logvar": (2, 1, 3),
        "min_logvar": (2, 1, 3),
        "input_shift": (5,),
        "input_scale": (5,),
        "delta_shift": (3,),
        "delta_scale": (3,),
        "reward_shift": (1,),
        "reward_scale": (1,),
        "holdout_idx": (2,),
    }
    assert torch.equal(tensors["dynamics.weights.1"][1], models[1].network.dynamics.weights[1][0])
    assert (description["format_version"], description["kind"]) == (1, "probabilistic")
    assert description["architecture"]["hidden_size"] == [8, 6]


def test_command_converts_both_ways(two_members, tmp_path, draw_rows):
    pickled, folder, back = tmp_path / "model.pkl", tmp_path / "new" / "exported", tmp_path / "back" / "model.pkl"
    pickled.write_bytes(pickle.dumps((two_members(DeterministicModel), METADATA)))

    assert model_export.main([str(pickled), str(folder)]) == 0
    assert model_export.main([str(folder), str(back)]) == 0

    (models, metadata), (same_models, same_metadata) = load_models(pickled), load_models(back)
    assert [model.__getstate__() for model in same_models] == [model.__getstate__() for model in models]
    assert same_metadata == metadata
    rows = draw_rows(5)
    assert torch.equal(load_ensemble(back).sample(*rows), load_ensemble(pickled).sample(*rows))


def test_what_training_writes_comes_back_whole(workplace):
    tiny = ["--params", "fit_epochs=1", "ensemble_size=2", "hidden_size=4", "batch_size=4096", "learn_reward=true"]
    command = ["--dataset", "hopper-medium-demo", "--config", str(ROOT / "configs" / "hopper_pnn.yaml"), "--quiet"]
    assert learn_model.main([*command, "--holdout_ratio", "0.2", "--test_ratio", "0.1", *tiny]) == 0

    export_model(*load_models("model.pkl"), "exported")

    (models, metadata), (same_models, same_metadata) = load_models("model.pkl"), import_model("exported")
    assert [model.__getstate__() for model in same_models] == [model.__getstate__() for model in models]
    assert same_metadata == metadata


def test_nothing_is_overwritten(two_members, tmp_path, capsys):
    pickled, folder = tmp_path / "model.pkl", tmp_path / "exported"
    pickled.write_bytes(pickle.dumps((two_members(DeterministicModel), METADATA)))
    before = pickled.read_bytes()
    folder.mkdir()

    assert model_export.main([str(pickled), str(folder)]) == 2
    folder.rmdir()
    assert model_export.main([str(pickled), str(folder)]) == 0
    assert model_export.main([str(folder), str(pickled)]) == 2

    assert capsys.readouterr().err.splitlines() == [
        f"error: {str(path)!r} exists already; give another path, or remove it" for path in (folder, pickled)
    ]
    assert pickled.read_bytes() == before


def test_members_and_metadata_that_no_folder_can_hold_are_refused(random_member, tmp_path):
    models = [random_member(DeterministicModel), random_member(DeterministicModel, hidden_size=(5,))]
    with pytest.raises(ValueError, match="member 1 differs from member 0"):
        export_model(models, METADATA, tmp_path / "exported")
    with pytest.raises(ValueError, match=r"metadata cannot be written as JSON: .*bytes"):
        export_model(models[:1], METADATA | {"states": b"1234"}, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


# --- Folders that the thesis published ---

STATE_DIM, ACTION_DIM, HIDDEN = 3, 2, (8, 7, 6, 5)


class PublishedNetwork(nn.Module):
    """What the thesis's networks compute, written anew from their description.

    Its variance is not that of its code, which scales the log-variance as it does the mean.
    """

    def __init__(self, heads, activation, seed):
        super().__init__()
        torch.manual_seed(seed)
        sizes = [STATE_DIM + ACTION_DIM, *HIDDEN, heads * STATE_DIM]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.activation = activation
        if heads == 2:
            self.inputs_mu = nn.Parameter(torch.zeros(STATE_DIM + ACTION_DIM))  # unused there, too
            self.max_logvar = nn.Parameter(torch.rand(1, STATE_DIM))
            self.min_logvar = nn.Parameter(-3 * torch.rand(1, STATE_DIM) - 1)
        random = np.random.default_rng(7)
        s, a = random.normal(3, 2, (50, STATE_DIM)), random.normal(size=(50, ACTION_DIM))
        delta = random.normal(0.1, [0.5, 1.0, 4.0], (50, STATE_DIM))
        delta[:, 1] = 0.0  # a dimension that never changes
        self.scaling = {}
        for name, values in (("s", s), ("a", a), ("out", delta)):
            shift = values.mean(axis=0)
            self.scaling[f"{name}_shift"] = torch.from_numpy(shift).float()
            self.scaling[f"{name}_scale"] = torch.from_numpy(np.abs(values - shift).mean(axis=0)).float()
        self.scaling["mask"] = self.scaling["out_scale"] >= 1e-8

    @torch.no_grad()
    def forward(self, s, a):
        scaling = self.scaling
        hidden = torch.cat(
            [
                (s - scaling["s_shift"]) / (scaling["s_scale"] + 1e-8),
                (a - scaling["a_shift"]) / (scaling["a_scale"] + 1e-8),
            ],
            dim=-1,
        )
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        outputs = self.layers[-1](hidden)
        change = outputs[:, :STATE_DIM] * (scaling["out_scale"] + 1e-8) + scaling["out_shift"]
        mean = s + change * scaling["mask"]
        if outputs.shape[1] == STATE_DIM:
            return mean, None
        logvar = self.max_logvar - functional.softplus(self.max_logvar - outputs[:, STATE_DIM:])
        logvar = self.min_logvar + functional.softplus(logvar - self.min_logvar)
        return mean, logvar.exp() * (scaling["out_scale"] + 1e-8) ** 2


@pytest.fixture
def publish(tmp_path):
    """Returns a function that writes a folder as the thesis published them, of two members, and gives it and them."""

    def write(probabilistic, form="pt", **settings):
        config = {"dataset": "hopper-medium-v0", "ensemble_size": 2, "probabilistic": probabilistic, "base_seed": 123}
        config |= {"hidden_size": list(HIDDEN), "cpu": False, "fit_lr": 0.0005, "holdout_samples": 1000} | settings
        activation = functional.silu if config.get("activation_fn") == "swish" else torch.relu
        networks = [PublishedNetwork(2 if probabilistic else 1, activation, seed) for seed in range(2)]
        folder = tmp_path / "published"
        for index, network in enumerate(networks):
            (folder / f"model_{index}").mkdir(parents=True)
            parts = {"state_dict": network.state_dict(), "normalization": network.scaling}
            if probabilistic:
                parts["extra_params"] = {name: network.state_dict()[name] for name in ("max_logvar", "min_logvar")}
            for name, tensors in parts.items():
                path = folder / f"model_{index}" / f"{name}.{form}"
                torch.save(tensors, path) if form == "pt" else save_file(tensors, path)
        # JSON is YAML, too.
        (folder / ("metadata.json" if form == "safetensors" else "metadata.yaml")).write_text(json.dumps(config))
        return folder, networks

    return write


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("probabilistic", "activation_fn"), [(False, "relu"), (False, "swish"), (True, "swish"), (True, "something")]
)
def test_published_ensemble_predicts_what_the_thesis_did(publish, form, probabilistic, activation_fn):
    folder, networks = publish(probabilistic, form, activation_fn=activation_fn)
    random = np.random.default_rng(0)
    s = torch.from_numpy(random.normal(3, 4, (100, STATE_DIM)).astype(np.float32))
    a = torch.from_numpy(random.normal(size=(100, ACTION_DIM)).astype(np.float32))

    models, metadata = import_model(folder)
    mean, variance = DynamicsEnsemble.from_members(models, metadata["seed"]).predict(s, a)

    assert [type(model) for model in models] == [ProbabilisticModel if probabilistic else DeterministicModel] * 2
    for member, network in enumerate(networks):
        expected_mean, expected_variance = network(s, a)
        torch.testing.assert_close(mean[member], expected_mean, rtol=1e-5, atol=1e-5)
        assert torch.equal(mean[member][:, 1], s[:, 1]), "what never changed does not change"
        if probabilistic:
            torch.testing.assert_close(variance[member][:, ::2], expected_variance[:, ::2], rtol=1e-4, atol=0)
    assert (metadata["elites"], metadata["seed"], metadata["config"]["fit_lr"]) == ([0, 1], 123, 0.0005)
    assert not hasattr(models[0], "holdout_idx")


def test_published_ensemble_becomes_a_model_pkl_and_a_folder_of_ours(publish, tmp_path):
    folder, _ = publish(True, activation_fn="swish")
    models, metadata = import_model(folder)

    assert model_export.main([str(folder), str(tmp_path / "model.pkl")]) == 0
    export_model(models, metadata, tmp_path / "exported")

    for loaded, same_metadata in (load_models(tmp_path / "model.pkl"), import_model(tmp_path / "exported")):
        assert [model.__getstate__() for model in loaded] == [model.__getstate__() for model in models]
        assert same_metadata == metadata


# --- Whatever a folder holds ---


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["state_dict.pt", "normalization.pt", "extra_params.pt"])
def test_published_folder_that_holds_code_is_refused_before_it_runs(publish, name, tmp_path):
    folder, _ = publish(True)
    torch.save(Touch(tmp_path / "canary"), folder / "model_1" / name)
    with pytest.raises(ValueError, match="holds no model that can be read"):
        import_model(folder)
    assert not (tmp_path / "canary").exists()


def test_published_settings_that_hold_code_are_refused(publish, tmp_path):
    folder, _ = publish(True)
    (folder / "metadata.yaml").write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/canary']")
    with pytest.raises(ValueError, match="holds no model that can be read"):
        import_model(folder)
    assert not (tmp_path / "canary").exists()


def test_old_pytorch_is_not_trusted_with_its_own_format(publish, monkeypatch):
    folder, _ = publish(False)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ValueError, match=r"PyTorch 2\.5\.1\+cpu does not read state_dict\.pt safely; use 2\.6"):
        import_model(folder)


def change_json(**changes):
    def change(folder):
        path = folder / "model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(function):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def cut_off(name, share):
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


DAMAGES = {
    "newer": (change_json(format_version=99), "format version 99, expected 1"),
    "kind": (change_json(kind="os"), "KeyError: 'os'"),
    "architecture": (change_json(architecture={"hidden_size": "x"}), "TypeError"),
    "other widths": (
        change_json(architecture={"state_dim": 3, "action_dim": 2, "hidden_size": [9, 6]}),
        "size mismatch for dynamics.weights.0",
    ),
    "seed": (change_json(metadata={"seed": "x"}), "ValueError|TypeError"),
    "metadata": (change_json(metadata=None), "TypeError"),
    "JSON cut off": (cut_off("model.json", 0.5), "JSONDecodeError"),
    "JSON missing": (lambda folder: (folder / "model.json").unlink(), "metadata.yaml"),
    "weights cut off": (cut_off("model.safetensors", 0.9), "SafetensorError"),
    "weights empty": (cut_off("model.safetensors", 0), "SafetensorError"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "weights pickled": (
        lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(folder / "canary"))),
        "SafetensorError",
    ),
    "tensor missing": (change_tensors(lambda tensors: tensors.pop("delta_scale")), "delta_scale"),
    "tensor too many": (change_tensors(lambda tensors: tensors.update(more=torch.ones(1))), "more"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "metadata.yaml"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(two_members, damage, tmp_path, capsys):
    folder = tmp_path / "exported"
    export_model(two_members(DeterministicModel), METADATA, folder)
    change, reason = DAMAGES[damage]
    change(folder)

    assert model_export.main([str(folder), str(tmp_path / "model.pkl")]) == 2

    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {str(folder)!r} holds no model that can be read (")
    assert re.search(reason, told), told
    assert told.endswith("expected model.json and model.safetensors, or metadata.yaml and model_0, model_1, ...")
    assert not (tmp_path / "model.pkl").exists() and not (folder / "canary").exists()


def test_missing_source_is_said_to_be_missing(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_model(tmp_path / "nowhere")
    assert model_export.main([str(tmp_path / "nowhere.pkl"), str(tmp_path / "exported")]) == 2
    assert "nowhere.pkl" in capsys.readouterr().err


def test_missing_library_is_named(two_members, monkeypatch, tmp_path, capsys):
    pickled = tmp_path / "model.pkl"
    pickled.write_bytes(pickle.dumps((two_members(DeterministicModel), METADATA)))
    monkeypatch.setitem(model_export.sys.modules, "safetensors.torch", None)
    assert model_export.main([str(pickled), str(tmp_path / "exported")]) == 2
    assert capsys.readouterr().err == "error: this needs safetensors, which is not installed: pip install safetensors\n"
