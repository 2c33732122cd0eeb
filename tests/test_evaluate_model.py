import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import evaluate_model
import learn_model
from evaluate_model import Model, choose_part, main, slug
from evaluation import figures
from utils import InputError

ROOT = Path(evaluate_model.__file__).parent
LENGTH, EPISODES = 30, 10
FAST = ["--horizons", "5", "1", "100", "--max_starts", "30", "--cpu"]


def write_dataset(path, seed, width=1.0, episodes=EPISODES, state_dim=3):
    """A D4RL-format file of a linear system with a little noise, 2 action dimensions."""
    random = np.random.default_rng(seed)
    states = [random.normal(size=(episodes, state_dim)) * width]
    actions = random.uniform(-width, width, (LENGTH, episodes, 2))
    for action in actions:
        push = action.sum(axis=1, keepdims=True) * np.linspace(0.1, 0.3, state_dim)
        states.append(0.9 * states[-1] + push + 0.01 * random.normal(size=push.shape))
    states = np.stack(states, axis=1)  # (episodes, LENGTH + 1, state_dim)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["observations"] = states[:, :-1].reshape(-1, state_dim).astype(np.float32)
        file["next_observations"] = states[:, 1:].reshape(-1, state_dim).astype(np.float32)
        file["actions"] = actions.swapaxes(0, 1).reshape(-1, 2).astype(np.float32)
        file["rewards"] = np.zeros(episodes * LENGTH, np.float32)
        file["terminals"] = np.zeros(episodes * LENGTH, bool)
        file["timeouts"] = np.tile(np.arange(LENGTH) == LENGTH - 1, episodes)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with datasets ``near``, ``far`` and ``other``, and models trained on ``near`` in several ways."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "near.hdf5", seed=0)
    write_dataset(folder / "far.hdf5", seed=1, width=30.0)
    write_dataset(folder / "single.hdf5", seed=2, episodes=1)
    write_dataset(folder / "wide.hdf5", seed=2, state_dim=4)
    (folder / "config.yaml").write_text("{ensemble_size: 3, hidden_size: [16], fit_epochs: 5, batch_size: 32}")
    parts = {"tested": ["--holdout_ratio", "0.2", "--test_ratio", "0.3"], "held": ["--holdout_ratio", "0.2"], "all": []}
    kept = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI",)}
    here = Path.cwd()
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    for kind in ("dnn", "pnn"):
        for part, flags in parts.items():
            name = f"{kind}-{part}"
            command = ["--dataset", str(folder / "near.hdf5"), "--config", "config.yaml", "--output", f"{name}.pkl"]
            options = ["--run_name", name, "--quiet", "--cpu", "--params", f"probabilistic={kind == 'pnn'}"]
            assert learn_model.main([*command, *flags, *options]) == 0
    os.chdir(here)
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """An empty current directory; datasets and models are in ``trained``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves figures empty, which is faster."""
    monkeypatch.setattr(figures, "_png", lambda figure: b"")


def evaluate(trained, model, dataset, *flags):
    """Runs the command; names stand for files in ``trained``."""
    command = ["--model", str(trained / f"{model}.pkl"), "--dataset", str(trained / f"{dataset}.hdf5")]
    return main([*command, *FAST, *flags])


def report_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# --- What is written ---


@pytest.mark.parametrize("kind", ["dnn", "pnn"])
def test_a_report_holds_every_table_and_figure(trained, workplace, kind, capsys):
    far = str(trained / "far.hdf5")
    models = [str(trained / f"{kind}-tested.pkl"), str(trained / f"{kind}-all.pkl")]
    dataset = str(trained / "near.hdf5")
    assert main(["--model", *models, "--dataset", dataset, "--ood_dataset", far, *FAST]) == 0
    folder = workplace / "reports" / f"{kind}-tested-on-near"
    content = report_of(folder)
    assert sorted(content["files"]) == sorted(path.name for path in folder.iterdir())
    assert (content["part"], content["kind"][0]) == ("test", kind[0])
    assert {"one_step.csv", "rollout.csv", "ood.csv", "cross_dataset.csv", "trajectories.csv"} <= set(content["files"])
    assert ("bounds.csv" in content["files"]) == (kind == "pnn")
    page = (folder / "report.html").read_text()
    for name in content["files"]:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert page.count('<img alt="') == sum(name.endswith(".png") for name in content["files"])
    assert not re.search(r'<script|<link|@import|(src|href)="(?!data:)', page)  # nothing to load
    nrmse = pd.read_csv(folder / "one_step.csv").query("predictor == 'ensemble' and dimension == 'all'").rmse.item()
    assert content["metrics"]["nrmse"] == nrmse < content["metrics"]["nrmse_no_change"]
    printed = capsys.readouterr()
    assert f"nRMSE {nrmse:.3f}" in printed.out
    assert "test trajectories, which neither trained the model nor selected anything" in printed.out
    matrix = pd.read_csv(folder / "cross_dataset.csv").set_index(["model", "dataset"]).rmse
    assert matrix.notna().tolist() == [True, True, False, True]  # the second model has seen all of its own dataset


def test_only_unseen_rows_are_evaluated(trained, workplace, undrawn):
    assert evaluate(trained, "pnn-tested", "near") == 0
    with (trained / "pnn-tested.pkl").open("rb") as file:
        _, metadata = pickle.load(file)
    table = pd.read_csv(workplace / "reports" / "pnn-tested-on-near" / "trajectories.csv")
    assert table.trajectory.tolist() == metadata["dataset"]["split"]["test"]


@pytest.mark.parametrize(
    ("model", "flags", "part", "label"),
    [
        ("pnn-tested", ["--split", "holdout"], "holdout", "these scores flatter the model"),
        ("pnn-held", [], "holdout", "the selection holdout"),
        ("dnn-all", ["--split", "train"], "train", "not how well it predicts"),
    ],
)
def test_reports_on_what_the_model_knows_say_so(trained, workplace, undrawn, model, flags, part, label):
    assert evaluate(trained, model, "near", *flags, "--output", "here", "--quiet") == 0
    content = report_of(workplace / "here")
    assert content["part"] == part
    assert label in content["notes"][0]
    assert label in (workplace / "here" / "report.html").read_text()


@pytest.mark.parametrize("kind", ["dnn", "pnn"])
def test_another_dataset_is_unseen_as_a_whole(trained, workplace, undrawn, kind):
    assert evaluate(trained, f"{kind}-all", "far", "--output", "here", "--quiet") == 0
    content = report_of(workplace / "here")
    assert (content["part"], content["trajectories"], content["rows"]) == ("unseen", EPISODES, EPISODES * LENGTH)
    assert len(content["notes"]) == 1


def test_a_training_dataset_that_is_gone_is_said_and_made_up_for(trained, workplace, undrawn):
    away = workplace / "near.hdf5"
    with (trained / "dnn-all.pkl").open("rb") as file:
        members, metadata = pickle.load(file)
    metadata["dataset"]["name"] = str(away)
    (workplace / "model.pkl").write_bytes(pickle.dumps((members, metadata)))
    command = ["--model", "model.pkl", "--dataset", str(trained / "far.hdf5"), *FAST, "--quiet", "--output"]
    assert main([*command, "missing"]) == 0
    shutil.copy(trained / "far.hdf5", away)  # the same name, other data
    assert main([*command, "changed"]) == 0
    for folder in (workplace / "missing", workplace / "changed"):
        assert "is not here in the version that was trained on" in report_of(folder)["notes"][1]
        calibration = pd.read_csv(folder / "calibration.csv").query("variant == 'raw' and dimension == 'all'")
        assert calibration.mean_z2.item() == pytest.approx(1.0, abs=0.5)  # cross-fitted on the evaluated data


def test_too_many_rows_are_drawn_from(trained, workplace, undrawn, monkeypatch):
    monkeypatch.setattr(evaluate_model, "MAX_ROWS", 3 * LENGTH)
    assert evaluate(trained, "pnn-all", "far", "--output", "here", "--quiet") == 0
    content = report_of(workplace / "here")
    assert content["trajectories"] == 3
    assert "3 of 10 trajectories were drawn at random" in content["notes"][1]


def test_the_same_seed_gives_the_same_report(trained, workplace, undrawn):
    for output in ("first", "second"):
        assert evaluate(trained, "pnn-tested", "near", "--output", output, "--quiet", "--seed", "3") == 0
    for path in (workplace / "first").glob("*.csv"):
        assert path.read_bytes() == (workplace / "second" / path.name).read_bytes()


def test_an_earlier_report_is_replaced_whole(trained, workplace, undrawn):
    assert evaluate(trained, "pnn-tested", "near", "--output", "here", "--quiet") == 0
    assert (workplace / "here" / "bounds.csv").exists()
    (workplace / "here" / "mine.txt").write_text("not the report's")
    assert evaluate(trained, "dnn-tested", "near", "--output", "here", "--quiet") == 0
    assert not (workplace / "here" / "bounds.csv").exists()
    assert (workplace / "here" / "mine.txt").exists()


def test_the_evaluation_joins_the_run_of_the_model(trained, workplace, undrawn):
    from mlflow.tracking import MlflowClient

    assert evaluate(trained, "pnn-tested", "near", "--quiet") == 0
    with (trained / "pnn-tested.pkl").open("rb") as file:
        _, metadata = pickle.load(file)
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    logged = client.get_run(metadata["mlflow_run_id"]).data.metrics
    content = report_of(workplace / "reports" / "pnn-tested-on-near")
    for name, value in content["metrics"].items():
        assert logged[f"eval/near/{name}"] == pytest.approx(value)
    kept = client.list_artifacts(metadata["mlflow_run_id"], "evaluation/near")
    assert {Path(artifact.path).name for artifact in kept} >= set(content["files"])


def test_a_store_that_is_not_there_costs_one_warning(trained, workplace, undrawn, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/none.db")
    assert evaluate(trained, "pnn-tested", "near", "--quiet") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the evaluation is not in MLflow")
    assert not (workplace / "none.db").exists()


# --- What is refused ---


@pytest.mark.parametrize(
    ("model", "dataset", "flags", "message"),
    [
        ("missing", "near", [], "does not exist; train one"),
        ("near", "near", [], "is not a model"),
        ("pnn-tested", "missing", [], "neither a known name nor a file"),
        ("pnn-tested", "wide", [], "4 state and 2 action dimensions"),
        ("pnn-all", "near", [], "was trained on all of"),
        ("pnn-all", "near", ["--split", "test"], "no such part of .*, only train"),
        ("pnn-tested", "far", ["--split", "test"], "is unseen: leave --split out"),
        ("pnn-all", "far", ["--ood_dataset", "near"], "was trained on all of"),
        ("pnn-tested", "near", ["--ood_dataset", "near"], "is given twice"),
        ("pnn-tested", "near", ["--horizons", "0"], "--horizons got 0"),
        ("pnn-tested", "near", ["--max_starts", "0"], "--max_starts is 0"),
        ("pnn-tested", "near", ["--seed", "-1"], "--seed is -1"),
        ("pnn-tested", "near", ["--oracle"], "does not name"),
        ("pnn-tested", "near", ["--device", "tpu"], "device 'tpu' is unknown"),
        ("pnn-tested", "near", ["--output", "taken"], "holds other files than a report"),
        ("pnn-tested", "near", ["--output", "taken/file"], "is a file"),
        ("pnn-tested", "near", ["--output", "taken/file/below"], "cannot be made"),
        ("pnn-tested", "near", ["--spilt", "test"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    trained, workplace, tmp_path, model, dataset, flags, message, capsys
):
    (workplace / "taken").mkdir()
    (workplace / "taken" / "file").write_text("mine")
    model = trained / (f"{model}.hdf5" if model == "near" else f"{model}.pkl")
    flags = [str(trained / "near.hdf5") if flag == "near" else flag for flag in flags]
    command = ["--model", str(model), "--dataset", str(trained / f"{dataset}.hdf5"), *flags]
    with pytest.raises(SystemExit) as exit_info:
        main(command)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert [path.name for path in workplace.rglob("*")] == ["taken", "file"]


def test_a_model_is_given_once(trained, workplace, capsys):
    path = str(trained / "pnn-tested.pkl")
    with pytest.raises(SystemExit):
        main(["--model", path, path, "--dataset", str(trained / "near.hdf5")])
    assert "two of the models are of the run 'pnn-tested'" in capsys.readouterr().err


def test_a_single_trajectory_is_reported_as_far_as_it_goes(trained, workplace):
    assert evaluate(trained, "pnn-all", "single", "--output", "here", "--quiet") == 0
    content = report_of(workplace / "here")
    assert "nothing can be recalibrated" in content["notes"][1]
    assert "crps_recalibrated" not in content["metrics"]


def test_one_trajectory_gives_deterministic_members_no_variance(trained, workplace, capsys):
    with (trained / "dnn-all.pkl").open("rb") as file:
        members, metadata = pickle.load(file)
    metadata["dataset"]["name"] = "gone.hdf5"
    (workplace / "model.pkl").write_bytes(pickle.dumps((members, metadata)))
    with pytest.raises(SystemExit):
        main(["--model", "model.pkl", "--dataset", str(trained / "single.hdf5"), *FAST])
    assert "one trajectory is not enough" in " ".join(capsys.readouterr().err.split())


def test_the_cleanest_part_is_chosen():
    def model(**parts):
        split = {"train": [0], "holdout": [], "test": []} | parts
        return Model("m", None, {"dataset": {"split": split}})

    assert choose_part(model(holdout=[1], test=[2]), "d", None) == ("test", [2])
    assert choose_part(model(holdout=[1]), "d", None) == ("holdout", [1])
    assert choose_part(model(holdout=[1], test=[2]), "d", "train") == ("train", [0])
    with pytest.raises(InputError, match="--test_ratio"):
        choose_part(model(), "d", None)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("hopper-medium-demo", "hopper-medium-demo"),
        ("/data/some where/file.v2.hdf5", "file.v2"),
        ("mujoco/hopper/medium-v0", "medium-v0"),
        ("a b", "a-b"),
    ],
)
def test_slugs(name, short):
    assert slug(name) == short


def test_help_is_quick_and_explains_every_flag():
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "evaluate_model.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "torch" not in done.stderr
    assert "pandas" not in done.stderr
    assert time.monotonic() - start < 5  # under a second where nothing else runs
    flags = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    assert {"--model", "--dataset", "--ood_dataset", "--horizons", "--oracle", "--output", "--split", "--cpu"} <= flags


def test_the_oracle_joins_the_report(trained, workplace):
    pytest.importorskip("mujoco")
    options = ["--params", "ensemble_size=2", "hidden_size=8", "fit_epochs=1", "probabilistic=false"]
    dataset = ["--dataset", "hopper-medium-noisy-demo"]
    command = [*dataset, "--config", str(trained / "config.yaml"), "--test_ratio", "0.02"]
    assert learn_model.main([*command, "--output", "model.pkl", "--quiet", "--cpu", *options]) == 0
    assert main(["--model", "model.pkl", *dataset, "--oracle", "--output", "here", *FAST, "--quiet"]) == 0
    files = report_of(workplace / "here")["files"]
    assert {"oracle.csv", "oracle.png", "oracle_noise.csv", "oracle_noise.png"} <= set(files)
    assert "Against the simulator" in (workplace / "here" / "report.html").read_text()
