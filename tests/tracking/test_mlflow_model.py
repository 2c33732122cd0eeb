"""The ensemble as an MLflow model: what it predicts, and that MLflow alone loads it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deterministic_model import DeterministicModel
from dynamics_model import DynamicsEnsemble
from probabilistic_model import ProbabilisticModel
from tracking.mlflow_model import EnsemblePredictor, save_mlflow_model


@pytest.mark.parametrize("kind", [DeterministicModel, ProbabilisticModel])
def test_prediction_is_the_mixture_of_the_members(kind, constant_member):
    # Two members of one state dimension predict changes of 1 and 3, the probabilistic ones with variances 2 and 6.
    members = [constant_member(kind, [change], [variance]) for change, variance in ((1.0, 2.0), (3.0, 6.0))]
    rows = {"states": np.float32([[10], [20], [30]]), "actions": np.zeros((3, 1), np.float32)}

    predicted = EnsemblePredictor(DynamicsEnsemble.from_members(members)).predict(rows)

    assert {name: (values.dtype, values.shape) for name, values in predicted.items()} == {
        "mean": (np.float32, (3, 1)),
        "std": (np.float32, (3, 1)),
    }
    np.testing.assert_allclose(predicted["mean"][:, 0], [12, 22, 32])
    # The means spread by 1; the members' own variances average 4.
    np.testing.assert_allclose(predicted["std"], 1.0 if kind is DeterministicModel else np.sqrt(4 + 1), rtol=1e-5)


LOAD_ALONE = """
import json, sys
import mlflow, numpy as np
inputs, *folders = sys.argv[1:]
rows = dict(np.load(inputs))
for folder in folders:
    model = mlflow.pyfunc.load_model(folder)
    predicted = {name: values.tolist() for name, values in model.predict(rows).items()}
    try:
        model.predict({"states": rows["states"][:, :2], "actions": rows["actions"]})
    except mlflow.exceptions.MlflowException as error:
        predicted["refused"] = str(error)
    code = sys.modules["dynamics_model"].__file__
    print(json.dumps(predicted | {"schema": model.metadata.signature.to_dict(), "code": code}))
"""


def test_mlflow_alone_loads_the_model_and_knows_its_inputs(random_member, draw_rows, store, tmp_path):
    states, actions = draw_rows(7)
    np.savez(tmp_path / "rows.npz", states=states, actions=actions)
    ensembles = {}
    for kind in (DeterministicModel, ProbabilisticModel):
        members = [random_member(kind, member) for member in range(3)]
        path, folder = tmp_path / f"{kind.__name__}.pkl", tmp_path / f"{kind.__name__}"
        path.write_bytes(pickle.dumps((members, {"format_version": 1, "seed": 0})))
        save_mlflow_model(path, folder, run_id="0" * 32, model_id="m-1")
        path.unlink()
        ensembles[folder] = DynamicsEnsemble.from_members(members)

    # -I: neither the current folder nor PYTHONPATH
    command = [sys.executable, "-I", "-W", "ignore", "-c", LOAD_ALONE, str(tmp_path / "rows.npz"), *map(str, ensembles)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for line, (folder, ensemble) in zip(done.stdout.splitlines(), ensembles.items(), strict=True):
        told = json.loads(line)
        for name, expected in EnsemblePredictor(ensemble).predict({"states": states, "actions": actions}).items():
            np.testing.assert_allclose(told[name], expected, rtol=1e-5, atol=1e-5)
        shapes = {}
        for side in ("inputs", "outputs"):
            for spec in json.loads(told["schema"][side]):
                assert spec["tensor-spec"]["dtype"] == "float32"
                shapes[spec["name"]] = spec["tensor-spec"]["shape"]
        assert shapes == {"states": [-1, 3], "actions": [-1, 2], "mean": [-1, 3], "std": [-1, 3]}
        assert "(7, 2)" in told["refused"] and "(-1, 3)" in told["refused"]
        assert Path(told["code"]).parent.parent.parent == tmp_path, "the model brings its code along"
        assert (folder / "data" / f"{folder.name}.pkl").is_file()
