import contextlib
import io
import json
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
from config import LearnConfig
from data.sources import load_dataset
from data.trajectories import gather_transitions
from evaluate_model import main
from evaluation import figures, oracle, selection
from reporting.style import png
from training.build import build_ensemble

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
def trained(tmp_path_factory, empty_store):
    """A folder with datasets ``near``, ``far`` and others, an MLflow store, and models that know ``near``.

    One model is trained, with a test set and a holdout. The deterministic one is not: its predictions are bad, which is
    no concern of the command. The others say of the same members that less of the data was kept apart.
    """
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "near.hdf5", seed=0)
    write_dataset(folder / "far.hdf5", seed=1, width=30.0)
    write_dataset(folder / "single.hdf5", seed=2, episodes=1)
    write_dataset(folder / "wide.hdf5", seed=2, state_dim=4)
    (folder / "config.yaml").write_text("{probabilistic: true, ensemble_size: 3, hidden_size: [16], fit_epochs: 5}")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        command = ["--dataset", str(folder / "near.hdf5"), "--config", "config.yaml", "--output", "pnn-tested.pkl"]
        command += ["--run_name", "pnn-tested", "--quiet", "--cpu", "--params", "batch_size=32"]
        assert learn_model.main([*command, "--holdout_ratio", "0.2", "--test_ratio", "0.3"]) == 0
    split = load(folder / "pnn-tested.pkl")[1]["dataset"]["split"]
    save_untrained(folder, "dnn-tested", str(folder / "near.hdf5"), split)
    for kind in ("dnn", "pnn"):
        relabel(folder, f"{kind}-tested", f"{kind}-held", test=[])
        relabel(folder, f"{kind}-tested", f"{kind}-all", test=[], holdout=[], train=list(range(EPISODES)))
    return folder


def save_untrained(folder, name, dataset, split):
    """Writes a model of deterministic members that were not trained, as if trained on a split of a dataset."""
    data, (_, metadata) = load_dataset(dataset, quiet=True), load(folder / "pnn-tested.pkl")
    config = LearnConfig(probabilistic=False, ensemble_size=3, hidden_size=(16,))
    ensemble = build_ensemble(config, gather_transitions(data, np.array(split["train"])))
    known = {"name": dataset, "sha256": data.sha256, "env_name": data.env_name, "split": split}
    metadata |= {"kind": ensemble.kind, "run_name": name, "dataset": metadata["dataset"] | known}
    (folder / f"{name}.pkl").write_bytes(pickle.dumps((ensemble.members(), metadata)))


def relabel(folder, model, name, dataset=None, **split):
    """Writes a model again under another name, as if trained on another split, or on a dataset of another name."""
    members, metadata = load(folder / f"{model}.pkl")
    metadata["run_name"] = name
    metadata["dataset"]["split"] |= split
    metadata["dataset"]["name"] = dataset or metadata["dataset"]["name"]
    (folder / f"{name}.pkl").write_bytes(pickle.dumps((members, metadata)))


def load(path):
    with path.open("rb") as file:
        return pickle.load(file)


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """The folder of a report on two models and two datasets, and what the command printed; figures are small."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("reported"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
        patch.setattr(figures, "png", lambda figure, dpi: png(figure, dpi=20))
        flags = [str(trained / "pnn-all.pkl"), "--ood_dataset", str(trained / "far.hdf5")]
        assert main(["--model", str(trained / "pnn-tested.pkl"), *flags, *near(trained), *FAST]) == 0
        return Path("reports").resolve() / "pnn-tested-on-near", printed.getvalue()


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """An empty current directory; datasets and models are in ``trained``. Figures are small, which is faster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    monkeypatch.setattr(figures, "png", lambda figure, dpi: png(figure, dpi=20))
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves figures empty, which is faster still."""
    monkeypatch.setattr(figures, "png", lambda figure, dpi: b"")


def near(trained):
    return ["--dataset", str(trained / "near.hdf5")]


def evaluate(trained, model, dataset, *flags):
    """Runs the command; names stand for files in ``trained``."""
    command = ["--model", str(trained / f"{model}.pkl"), "--dataset", str(trained / f"{dataset}.hdf5")]
    return main([*command, *FAST, *flags])


def report_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# --- What is written ---


def test_a_report_holds_every_table_and_figure(reported):
    folder, printed = reported
    content = report_of(folder)
    assert sorted(content["files"]) == sorted(path.name for path in folder.iterdir())
    assert (content["part"], content["kind"]) == ("test", "probabilistic")
    tables = {"one_step", "rollout", "ood", "cross_dataset", "trajectories", "bounds"}
    assert {f"{name}.csv" for name in tables} <= set(content["files"])
    page = (folder / "report.html").read_text()
    for name in content["files"]:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert page.count('<img alt="') == sum(name.endswith(".png") for name in content["files"])
    assert not re.search(r'<script|<link|@import|(src|href)="(?!data:)', page)  # nothing to load
    nrmse = pd.read_csv(folder / "one_step.csv").query("predictor == 'ensemble' and dimension == 'all'").rmse.item()
    assert content["metrics"]["nrmse"] == nrmse < content["metrics"]["nrmse_no_change"]
    assert f"nRMSE {nrmse:.3f}" in printed
    assert "test trajectories, which neither trained the model nor selected anything" in printed
    matrix = pd.read_csv(folder / "cross_dataset.csv").set_index(["model", "dataset"]).rmse
    assert matrix.notna().tolist() == [True, True, False, True]  # the second model has seen all of its own dataset


def test_only_unseen_rows_are_evaluated(trained, reported):
    _, metadata = load(trained / "pnn-tested.pkl")
    table = pd.read_csv(reported[0] / "trajectories.csv")
    assert table.trajectory.tolist() == metadata["dataset"]["split"]["test"]


def test_the_evaluation_joins_the_run_of_the_model(trained, reported):
    from mlflow.tracking import MlflowClient

    _, metadata = load(trained / "pnn-tested.pkl")
    client = MlflowClient(f"sqlite:///{trained}/mlflow.db")
    logged = client.get_run(metadata["mlflow_run_id"]).data.metrics
    content = report_of(reported[0])
    for name, value in content["metrics"].items():
        assert logged[f"eval/near/{name}"] == pytest.approx(value)
    kept = client.list_artifacts(metadata["mlflow_run_id"], "evaluation/near")
    assert {Path(artifact.path).name for artifact in kept} >= set(content["files"])


def test_the_same_seed_gives_the_same_report(trained, reported, workplace, undrawn):
    for seed in ("0", "3"):
        assert evaluate(trained, "pnn-tested", "near", "--output", seed, "--quiet", "--seed", seed) == 0
    for path in (workplace / "0").glob("*.csv"):
        assert path.read_bytes() == (reported[0] / path.name).read_bytes()
    assert (workplace / "3" / "starts.csv").read_bytes() != (reported[0] / "starts.csv").read_bytes()


def test_an_earlier_report_is_replaced_whole(trained, reported, workplace, undrawn):
    folder = shutil.copytree(reported[0], workplace / "here")
    (folder / "mine.txt").write_text("not the report's")
    assert evaluate(trained, "dnn-tested", "near", "--output", "here", "--quiet") == 0
    assert {path.name for path in folder.iterdir()} == {*report_of(folder)["files"], "mine.txt"}
    assert not {"bounds.csv", "ood.csv", "cross_dataset.png"} & set(report_of(folder)["files"])


@pytest.mark.parametrize(
    ("model", "flags", "part", "label"),
    [
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


def test_another_dataset_is_unseen_as_a_whole(trained, workplace, undrawn):
    assert evaluate(trained, "dnn-all", "far", "--output", "here", "--quiet") == 0
    content = report_of(workplace / "here")
    assert (content["part"], content["trajectories"], content["rows"]) == ("unseen", EPISODES, EPISODES * LENGTH)
    assert len(content["notes"]) == 1


def test_a_training_dataset_that_is_gone_is_said_and_made_up_for(trained, workplace, undrawn):
    away = workplace / "near.hdf5"
    relabel(trained, "dnn-all", "dnn-away", dataset=str(away))
    assert evaluate(trained, "dnn-away", "far", "--quiet", "--output", "missing") == 0
    shutil.copy(trained / "far.hdf5", away)  # the same name, other data
    assert evaluate(trained, "dnn-away", "far", "--quiet", "--output", "changed") == 0
    for folder in (workplace / "missing", workplace / "changed"):
        assert "is not here in the version that was trained on" in report_of(folder)["notes"][1]
        calibration = pd.read_csv(folder / "calibration.csv").query("variant == 'raw' and dimension == 'all'")
        assert calibration.mean_z2.item() == pytest.approx(1.0, abs=0.5)  # cross-fitted on the evaluated data


def test_too_many_rows_are_drawn_from(trained, workplace, undrawn, monkeypatch):
    monkeypatch.setattr(selection, "MAX_ROWS", 3 * LENGTH)
    assert evaluate(trained, "pnn-all", "far", "--output", "here", "--quiet") == 0
    content = report_of(workplace / "here")
    assert content["trajectories"] == 3
    assert "3 of 10 trajectories were drawn at random" in content["notes"][1]


def test_a_store_that_is_not_there_costs_one_warning(trained, workplace, undrawn, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/none.db")
    assert evaluate(trained, "pnn-tested", "near", "--quiet") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the evaluation is not in MLflow")
    assert not (workplace / "none.db").exists()


# --- What the data say ---


def rewrite(source, path, order, **left_out):
    """Writes the rows of a dataset in another order to another file, without some of its arrays."""
    with h5py.File(source) as file, h5py.File(path, "w") as other:
        for key in set(file) - set(left_out):
            other[key] = file[key][:][order]
    return str(path)


def test_copies_of_what_the_model_knows_are_left_out_or_counted_and_that_is_said(trained, workplace, undrawn, capsys):
    split = load(trained / "pnn-tested.pkl")[1]["dataset"]["split"]
    known = sorted(split["train"] + split["holdout"])
    rows = np.arange(EPISODES * LENGTH)
    again = rewrite(trained / "near.hdf5", workplace / "again.hdf5", rows, rewards=None)  # the same in another file
    command = ["--model", str(trained / "pnn-tested.pkl"), *FAST, "--dataset"]
    assert main([*command, again, "--output", "new"]) == 0
    content = report_of(workplace / "new")
    assert (content["part"], content["trajectories"]) == ("unseen", len(split["test"]))
    said = f"{len(known)} of {EPISODES} trajectories equal some that trained the model or selected its weights and were"
    assert said in content["notes"][1]
    assert said in (workplace / "new" / "report.html").read_text()
    assert said in capsys.readouterr().out
    assert main([*command, again, "--output", "all", "--keep_copies"]) == 0
    assert report_of(workplace / "all")["trajectories"] == EPISODES
    assert "are counted all the same" in capsys.readouterr().out

    copies = np.concatenate([np.arange(LENGTH) + index * LENGTH for index in known])
    with pytest.raises(SystemExit):
        main([*command, rewrite(again, workplace / "copies.hdf5", copies)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "every trajectory of" in line and "--keep_copies" in line


def test_rows_that_do_not_follow_end_rollouts_and_the_report_says_so(trained, workplace, undrawn, capsys):
    rows = np.delete(np.arange(EPISODES * LENGTH), np.arange(EPISODES) * LENGTH + 3)
    gaps = rewrite(trained / "far.hdf5", workplace / "gaps.hdf5", rows, timeouts=None)
    assert main(["--model", str(trained / "pnn-tested.pkl"), "--dataset", gaps, *FAST, "--output", "here"]) == 0
    content = report_of(workplace / "here")
    found = {finding["name"]: finding["count"] for finding in content["findings"]}
    assert found["rows that do not follow"] == 2 * EPISODES - 1
    assert content["trajectories"] == 2 * EPISODES
    assert f"warning: rows that do not follow: {2 * EPISODES - 1} (behind rows 2, 28, 31" in capsys.readouterr().err
    assert "rows that do not follow" in (workplace / "here" / "report.html").read_text()


def test_of_rows_in_no_order_longer_rollouts_are_refused(trained, workplace, undrawn, capsys):
    order = np.random.default_rng(0).permutation(EPISODES * LENGTH)
    shuffled = rewrite(trained / "far.hdf5", workplace / "shuffled.hdf5", order, timeouts=None)
    command = ["--model", str(trained / "pnn-tested.pkl"), "--dataset", shuffled, "--max_starts", "30", "--cpu"]
    assert main([*command, "--horizons", "1", "5", "--output", "here"]) == 0
    assert "Its rows do not follow one another: rollouts of more than one step are refused." in capsys.readouterr().out
    assert pd.read_csv(workplace / "here" / "rollout.csv").horizon.unique().tolist() == [1]
    with pytest.raises(SystemExit):
        main([*command, "--horizons", "5"])
    assert "the rows of" in (last := capsys.readouterr().err.splitlines()[-1]) and "do not follow one another" in last


def test_several_datasets_are_evaluated_together(trained, workplace, undrawn):
    names = [str(trained / f"{name}.hdf5") for name in ("far", "single")]
    command = ["--model", str(trained / "pnn-tested.pkl"), "--dataset", *names, *FAST, "--quiet"]
    assert main(command) == 0
    content = report_of(workplace / "reports" / "pnn-tested-on-far-single")
    assert (content["part"], content["trajectories"]) == ("unseen", EPISODES + 1)


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
        (
            "pnn-tested",
            "near",
            ["--horizons", "31", "40"],
            "--horizons begins at 31 steps, .* more than 30 transitions",
        ),
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


def test_one_trajectory_gives_deterministic_members_no_variance(trained, workplace, undrawn, capsys):
    relabel(trained, "dnn-all", "dnn-gone", dataset="gone.hdf5")
    relabel(trained, "pnn-all", "pnn-gone", dataset="gone.hdf5")
    with pytest.raises(SystemExit) as exit_info:
        evaluate(trained, "dnn-gone", "single", "--quiet")
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "one trajectory is not enough to estimate the residuals of deterministic members" in line
    assert not list(workplace.iterdir())
    assert evaluate(trained, "pnn-gone", "single") == 0  # members that predict distributions have no need of it


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


def test_the_oracle_joins_the_report(trained, workplace, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(oracle, "ROWS", 60)
    monkeypatch.setattr(oracle, "DRAWS", 30)
    dataset = "hopper-medium-noisy-demo"
    save_untrained(trained, "hopper", dataset, {"train": [2, 3, 4], "holdout": [], "test": [0, 1]})
    command = ["--model", str(trained / "hopper.pkl"), "--dataset", dataset, "--oracle", "--output", "here"]
    assert main([*command, *FAST, "--quiet"]) == 0
    files = report_of(workplace / "here")["files"]
    assert {"oracle.csv", "oracle.png", "oracle_noise.csv", "oracle_noise.png"} <= set(files)
    assert "Against the simulator" in (workplace / "here" / "report.html").read_text()
