"""Every file that a command reads, with some of its bytes changed: read, or refused in an error that says so."""

import io
import json
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import LearnConfig, load_config
from data.sources import load_dataset, source_attributes
from deterministic_model import DeterministicModel
from dynamics_model import Architecture, DynamicsEnsemble, Normalisation, load_ensemble
from evaluation.selection import Model
from model_export import export_model, import_model
from utils import InputError


def columns(rows=24):
    states = (np.arange(rows)[:, None] + np.linspace(0, 0.5, 3)).astype(np.float32)
    return {
        "observations": states,
        "actions": np.full((rows, 2), 0.5, np.float32),
        "rewards": np.ones(rows, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 6 == 5,
    }


def hdf5(compression=None):
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for key, value in columns().items():
            file.create_dataset(key, data=value, compression=compression)
        file.attrs["env_name"], file.attrs["process_noise"] = "Hopper-v5", 0.5
    return stream.getvalue()


def npz():
    stream = io.BytesIO()
    np.savez_compressed(stream, **columns())
    return stream.getvalue()


def paths():
    path = columns()
    return pickle.dumps(([path, path], {"env_name": "Hopper-v5", "obs_mask": np.ones(3)}), protocol=4)


DATASETS = {
    "a.hdf5": hdf5(),
    "b.hdf5": hdf5("gzip"),
    "a.npz": npz(),
    "a.pkl": paths(),
    "b.pkl": pickle.dumps([{key: value.tolist() for key, value in columns().items()}], protocol=2),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets(tmp_path, mutate, name):
    (tmp_path / name).write_bytes(mutate(DATASETS[name]))
    for read in (load_dataset, source_attributes):
        try:
            read(str(tmp_path / name))
        except InputError as error:
            assert str(error)


@pytest.fixture(scope="module")
def model_bytes():
    """A model of two members."""
    scales = [torch.zeros(5), torch.ones(5), torch.zeros(3), torch.ones(3), torch.zeros(1), torch.ones(1)]
    members = [DeterministicModel(Architecture(3, 2, (4,)), Normalisation(*scales)) for _ in range(2)]
    metadata = {
        "format_version": 1,
        "seed": 0,
        "elites": [0, 1],
        "run_name": "a",
        "dataset": {"name": "a", "sha256": None},
    }
    return pickle.dumps((DynamicsEnsemble.from_members(members).members(), metadata), protocol=4)


def test_models(tmp_path, mutate, model_bytes):
    (tmp_path / "model.pkl").write_bytes(mutate(model_bytes))
    for read, error in ((load_ensemble, ValueError), (lambda path: Model.load(path, "cpu"), InputError)):
        try:
            read(tmp_path / "model.pkl")
        except error as caught:
            assert str(caught)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_exported_models(tmp_path, mutate, model_bytes, name):
    pytest.importorskip("safetensors")
    models, metadata = pickle.loads(model_bytes)
    export_model(models, metadata, tmp_path / "export")
    file = tmp_path / "export" / name
    file.write_bytes(mutate(file.read_bytes()))
    try:
        import_model(tmp_path / "export")
    except ValueError as error:
        assert str(error)
    shutil.rmtree(tmp_path / "export")


def test_configurations(tmp_path, mutate):
    (tmp_path / "c.yaml").write_bytes(mutate(LearnConfig().to_yaml().encode()))
    try:
        load_config(tmp_path / "c.yaml")
    except InputError as error:
        assert str(error)


def test_metadata_of_minari(tmp_path, mutate):
    folder = tmp_path / "a-v0" / "data"
    folder.mkdir(parents=True)
    content = {"total_episodes": 1, "data_format": "hdf5", "env_spec": json.dumps({"id": "Hopper-v5"})}
    (folder / "metadata.json").write_bytes(mutate(json.dumps(content).encode()))
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        file["episode_0/observations"], file["episode_0/actions"] = np.zeros((25, 3), "f4"), np.zeros((24, 2), "f4")
    try:
        load_dataset(str(tmp_path / "a-v0"))
    except InputError as error:
        assert str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FEW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FEW
@given(key=st.sampled_from([*columns(), "infos", "dones", "x"]), value=VALUES)
def test_paths_of_any_values(tmp_path, key, value):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{**columns(), key: value}]))
    try:
        load_dataset(str(tmp_path / "a.pkl"))
    except InputError as error:
        assert str(error)


@FEW
@given(key=st.sampled_from(list(LearnConfig().to_dict())), value=st.text(max_size=30))
def test_settings_of_any_text(tmp_path, key, value):
    (tmp_path / "c.yaml").write_text("")
    try:
        load_config(tmp_path / "c.yaml", [f"{key}={value}"])
    except InputError as error:
        assert str(error)
