"""Numbers of any size and data of any shape: finite results, or one line; never a silent not-a-number."""

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import evaluate_model
import evaluation.figures
import learn_model
import reporting.learning_curves
from dynamics_model import KINDS, load_models
from tracking.csv_tracker import read_rows

EPISODES, LENGTH = 6, 8


def walk(episodes=EPISODES, length=LENGTH, states=3, actions=2, scale=1.0, offset=0.0, dtype=np.float32):
    """Episodes of states that walk at random, pushed by the actions: D4RL's arrays.

    Args:
        episodes: Their number.
        length: Rows of each.
        states: Dimensions of states.
        actions: Dimensions of actions.
        scale: Of the states; one number, or one per dimension.
        offset: Of the states; likewise.
        dtype: Of all numbers.
    """
    draw = np.random.default_rng(0)
    pushes = draw.normal(size=(episodes, length, actions))
    steps = draw.normal(size=(episodes, length + 1, states))
    steps[:, 1:] += pushes[..., :1]
    values = steps.cumsum(axis=1) * scale + offset
    rows = episodes * length
    return {
        "observations": values[:, :-1].reshape(rows, states).astype(dtype),
        "next_observations": values[:, 1:].reshape(rows, states).astype(dtype),
        "actions": pushes.reshape(rows, actions).astype(dtype),
        "rewards": draw.normal(size=rows).astype(dtype),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % length == length - 1,
    }


def changed(change, **options):
    """The same, the states and next states changed in place."""
    content = walk(**options)
    for name in ("observations", "next_observations"):
        change(content[name])
    return content


def set_equal(states):
    states[:, 1], states[:, 2] = states[:, 0], 1.5


def set_constant(states):
    states[:] = states[0]


def set_leaping(states):
    states[:, 0] = 0.0
    states[-2 * LENGTH :, 0] = 1e12


MANY = 10.0 ** np.linspace(-12, 12, 5)
LEARNED = {
    "scales of 1e-12": walk(scale=1e-12),
    "scales of 1e12": walk(scale=1e12),
    "scales from 1e-12 to 1e12": walk(states=5, scale=MANY),
    "offsets from 1e-12 to 1e12": walk(states=5, scale=MANY, offset=10 * MANY[::-1], dtype=np.float64),
    "one dimension twice, and one constant": changed(set_equal, states=4),
    "actions that are constant": walk() | {"actions": np.full((EPISODES * LENGTH, 2), 1e12, np.float32)},
    "a dimension that leaps at the end": changed(set_leaping),
    "one trajectory": walk(episodes=1, length=200),
    "one dimension": walk(states=1, actions=1),
    "400 dimensions": walk(states=400, actions=40),
    "one member": walk(),
    "more members than rows": walk(episodes=20, length=1),
}
MEMBERS = {"one member": 1, "more members than rows": 9}
REFUSED = {
    "offsets that float32 cannot hold": (walk(offset=1e9), "nothing to learn"),
    "doubles that float32 takes for 0": (walk(scale=1e-300, dtype=np.float64), "nothing to learn"),
    "doubles beyond float32": (walk(scale=1e300, dtype=np.float64), "within float32"),
    "nothing but constants": (changed(set_constant), "nothing to learn"),
    "three rows": (walk(episodes=3, length=1), "learn"),
    "one row": (walk(episodes=1, length=1), "leaves none to train on"),
}
PICTURES = ("scales from 1e-12 to 1e12",)  # whose pictures are drawn, which takes longest
# Where errors, or what members disagree about, are the same in every row.
FLAT = ("a dimension that leaps at the end", "offsets from 1e-12 to 1e12", "one member")

# What cannot be measured is missing in a report's tables, and a dash on its page: of whatever data these columns, ...
UNMEASURED = {"spread", "standard_error", "crps_recalibrated", "auroc_told"}
# ... those of a distribution without density, and correlations with what is the same in every row.
OF_DENSITIES, CORRELATIONS = {"nll", "nll_raw", "scale"}, {"spearman", "pearson"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, empty_store):
    """A folder for all cases, with an MLflow store and a small configuration."""
    folder = tmp_path_factory.mktemp("numbers")
    shutil.copy(empty_store, folder / "mlflow.db")
    (folder / "c.yaml").write_text("{fit_epochs: 2, hidden_size: [8], batch_size: 16, products: torch/together/1}")
    return folder


@pytest.fixture
def learn(place, monkeypatch):
    """Returns a function that learns from arrays, and gives the exit code."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    shutil.rmtree("logs", ignore_errors=True)
    for name in ("d.hdf5", "model.pkl"):
        (place / name).unlink(missing_ok=True)

    def run(content, kind, members=2):
        with h5py.File("d.hdf5", "w") as file:
            for key, value in content.items():
                file[key] = value
        params = [f"kind={kind}", f"ensemble_size={members}", "learn_reward=true"]
        flags = ["--holdout_ratio", "0.3", "--test_ratio", "0.3", "--run_name", "a", "--cpu", "--quiet"]
        return learn_model.main(["--dataset", "d.hdf5", "--config", "c.yaml", "--params", *params, *flags])

    return run


def evaluate(folder):
    flags = ["--cpu", "--quiet", "--max_starts", "4", "--horizons", "1", "5", "--output", str(folder)]
    return evaluate_model.main(["--model", "model.pkl", "--dataset", "d.hdf5", *flags])


def without_pictures(patch):
    """Leaves out the drawing, which takes most of the time and is tested with some of the data."""
    patch.setattr(reporting.learning_curves, "png", lambda *given, **options: b"")
    patch.setattr(evaluation.figures, "draw_figures", lambda tables: defaultdict(bytes))


def unmeasured(name, table, is_flat):
    """Which numbers of a report's table are not finite, though they can be measured."""
    values = table.drop(columns=list(UNMEASURED & set(table)))
    if is_flat:
        values = values.drop(columns=list(CORRELATIONS & set(values)))
    wrong = ~np.isfinite(values.select_dtypes("number"))
    kinds = table.get("variant", table.get("prediction"))
    if kinds is not None:
        wrong.loc[kinds == "isotonic", list(OF_DENSITIES & set(wrong))] = False
    return [f"{name}: {column}" for column in wrong.columns[wrong.any()]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEARNED)
def test_results_are_finite(learn, tmp_path, monkeypatch, capsys, name, kind):
    if name not in PICTURES or kind != "probabilistic":
        without_pictures(monkeypatch)
    assert learn(LEARNED[name], kind, MEMBERS.get(name, 2)) == 0
    rows = read_rows(Path("logs/a/metrics.csv"))
    numbers = [value for row in rows for value in row.values()]
    assert rows and all(value is None or math.isfinite(value) for value in numbers)
    assert all(row["val_mse"] is not None for row in rows)
    members, metadata = load_models("model.pkl")
    for member in members:
        assert all(value.isfinite().all() for value in member.state_dict().values())
    json.dumps(metadata["scores"], allow_nan=False)

    assert evaluate(tmp_path / "report") == 0
    tables = {path.name: pd.read_csv(path) for path in (tmp_path / "report").glob("*.csv")}
    assert len(tables) > 10
    is_flat = name in FLAT
    assert [fault for key, table in tables.items() for fault in unmeasured(key, table, is_flat)] == []
    headline = json.loads((tmp_path / "report" / "metrics.json").read_text())["metrics"]
    assert headline and all(math.isfinite(value) for value in headline.values())
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused(learn, capsys, name, kind):
    content, message = REFUSED[name]
    with pytest.raises(SystemExit) as caught:
        learn(content, kind)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in lines[:-1])
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not Path("logs").exists() and not Path("model.pkl").exists()
