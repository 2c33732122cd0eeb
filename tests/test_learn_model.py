"""learn_model: what a run leaves behind, what a user can get wrong, and runs that are cut off.

The runs that most tests look at are made once.
"""

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

import learn_model
from config import load_config
from data.sources import load_dataset
from data.trajectories import gather_transitions
from dynamics_model import load_ensemble
from learn_model import main
from tracking.checkpoints import CheckpointFiles
from tracking.mlflow_tracker import load_run
from tracking.run_folder import RunFolder, RunRecord
from training import fastest_products
from training.products import Products

ROOT = Path(learn_model.__file__).parent
LENGTH, EPISODES = 40, 12
HOLDOUT = ["--holdout_ratio", "0.25"]


def linear_episode(rng):
    """States ``(41, 3)`` and actions ``(40, 2)`` of s' = 0.9 s + B a, B = [[.1, 0], [0, .1], [.1, .1]]."""
    gain = np.array([[0.1, 0.0], [0.0, 0.1], [0.1, 0.1]])
    actions = rng.uniform(-1, 1, (LENGTH, 2))
    states = [rng.normal(size=3)]
    for action in actions:
        states.append(0.9 * states[-1] + gain @ action)
    return np.array(states), actions


@pytest.fixture(scope="module")
def linear_dataset(tmp_path_factory):
    """A D4RL-format file of 12 episodes of 40 steps of a linear system."""
    rng = np.random.default_rng(0)
    episodes = [linear_episode(rng) for _ in range(EPISODES)]
    path = tmp_path_factory.mktemp("data") / "linear.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([states[:-1] for states, _ in episodes]).astype(np.float32)
        file["next_observations"] = np.concatenate([states[1:] for states, _ in episodes]).astype(np.float32)
        file["actions"] = np.concatenate([actions for _, actions in episodes]).astype(np.float32)
        file["rewards"] = np.concatenate([actions.sum(axis=1) for _, actions in episodes]).astype(np.float32)
        file["terminals"] = np.zeros(EPISODES * LENGTH, dtype=bool)
        file["timeouts"] = np.tile(np.arange(LENGTH) == LENGTH - 1, EPISODES)
    return path


def published(kind):
    return ROOT / "configs" / f"hopper_{kind}.yaml"


def arguments(dataset, config, *more):
    small = ["ensemble_size=3", "hidden_size=8", "fit_epochs=3", "batch_size=64"]
    return ["--dataset", str(dataset), "--config", str(config), "--quiet", "--params", *small, *more]


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def load(path):
    """Members and metadata."""
    return pickle.loads(Path(path).read_bytes())


def states_of(models):
    return [model.__getstate__() for model in models]


def weights(ensemble):
    return [parameter.detach().numpy().copy() for parameter in ensemble.parameters()]


def assert_same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


# --- What a run leaves behind ---


@pytest.fixture(scope="module")
def runs(processes, linear_dataset, empty_store, tmp_path_factory):
    """A folder with three runs, each called as its model is; meanwhile the processes of later tests get ready.

    ``dnn`` learns a linear system and its reward. ``pnn`` ends with best weights of several epochs. ``final`` holds
    nothing out, has its CSV elsewhere and fewer rows than a minibatch.
    """
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")

        def run(name, kind, params, *flags):
            command = [*arguments(linear_dataset, published(kind), *params), *flags]
            assert main([*command, "--run_name", name, "--output", f"{name}.pkl"]) == 0

        run("dnn", "dnn", ["learn_reward=true", "fit_epochs=52", "fit_lr=0.01"], *HOLDOUT)
        run("pnn", "pnn", ["fit_lr=0.05"], *HOLDOUT)
        rates = ["scheduler=exponential", "scheduler_gamma=0.5", "fit_lr=0.004"]
        run("final", "dnn", ["batch_size=100000", *rates], "--csv", "deep/metrics.csv", "--track_training")
    return folder


@pytest.fixture
def at_runs(runs, monkeypatch):
    """The same folder, entered."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs}/mlflow.db")
    return runs


@pytest.mark.parametrize(("name", "kind"), [("dnn", "deterministic"), ("pnn", "probabilistic")])
def test_a_run_leaves_a_model_that_says_where_it_comes_from(at_runs, name, kind):
    models, metadata = load(f"{name}.pkl")

    assert [type(models), len(models), type(metadata)] == [list, 3, dict]
    assert json.loads(json.dumps(metadata)) == metadata  # plain Python types throughout
    assert metadata["kind"] == kind
    assert metadata["config"]["fit_epochs"] == {"dnn": 52, "pnn": 3}[name]
    assert metadata["run_name"] == name
    split = metadata["dataset"]["split"]
    assert sorted(split["train"] + split["holdout"] + split["test"]) == list(range(12))
    assert len(models[0].holdout_idx) == 39 * len(split["holdout"])  # episodes of 40 rows are 39 published ones


@pytest.mark.parametrize(
    ("name", "loss", "of_reward"),
    [("dnn", "mse_loss", ["reward_train_mse", "reward_val_mse"]), ("pnn", "gauss_loss", [])],
)
def test_a_run_leaves_a_csv_with_every_epoch_and_member(at_runs, name, loss, of_reward):
    epochs = {"dnn": 52, "pnn": 3}[name]
    rows = read(Path("logs", name, "metrics.csv"))

    assert list(rows[0]) == ["step", "model_id", loss, "lr", "train_mse", "val_mse", "nll", *of_reward]
    assert [(row["step"], row["model_id"]) for row in rows] == [
        (str(step), str(member)) for step in range(epochs) for member in range(3)
    ]
    assert all(row[loss] and row["val_mse"] for row in rows)
    scored = [int(row["step"]) for row in rows if row["train_mse"] and row["model_id"] == "0"]
    assert scored == {"dnn": [0, 49, 51], "pnn": [0, 2]}[name], "the first, every 50th and the last epoch"
    assert [bool(row["nll"]) for row in rows] == [name == "pnn"] * len(rows)
    assert not Path("logs", name, "checkpoint").exists()


def test_a_run_is_tracked_with_its_model(at_runs):
    tracked = load_run(load("dnn.pkl")[1]["mlflow_run_id"])
    assert_same_bits(weights(tracked), weights(load_ensemble("dnn.pkl")))


@pytest.mark.parametrize("name", ["dnn", "pnn"])
def test_the_configuration_it_leaves_trains_the_same_model(at_runs, name, linear_dataset):
    """Resuming finds a run that asked for the same, but has finished: this is another one."""
    again = ["--dataset", str(linear_dataset), "--config", f"logs/{name}/config.yaml", "--quiet", "--resume"]
    before = set(Path("logs").iterdir())

    assert main([*again, *HOLDOUT, "--output", "again.pkl"]) == 0

    assert states_of(load("again.pkl")[0]) == states_of(load(f"{name}.pkl")[0])
    (made,) = set(Path("logs").iterdir()) - before
    assert (made / "metrics.csv").read_bytes() == Path("logs", name, "metrics.csv").read_bytes()


def test_reported_scores_are_those_of_the_saved_weights(at_runs, linear_dataset):
    _, metadata = load("pnn.pkl")
    ensemble = load_ensemble("pnn.pkl")
    held_out = gather_transitions(load_dataset(str(linear_dataset)), np.array(metadata["dataset"]["split"]["holdout"]))

    mean, _ = ensemble.predict(held_out.states, held_out.actions)
    errors = (((mean.numpy() - held_out.next_states) / ensemble.delta_scale.numpy()) ** 2).mean(axis=(1, 2))

    reported = [score["val_mse"] for score in metadata["scores"]]
    np.testing.assert_allclose(reported, errors, rtol=1e-3)
    rows = read(Path("logs/pnn/metrics.csv"))
    of_members = [[float(row["val_mse"]) for row in rows if row["model_id"] == str(member)] for member in range(3)]
    np.testing.assert_allclose(reported, [min(errors) for errors in of_members], rtol=1e-12)
    assert metadata["elites"] == sorted(range(3), key=lambda member: reported[member])


def test_the_reward_is_learned_beside_the_dynamics(at_runs):
    models, _ = load("dnn.pkl")
    action = np.array([[0.5, 0.25], [-0.5, 0.0]], dtype=np.float32)  # rewards of the system: 0.75 and -0.5
    state = np.zeros((2, 3), dtype=np.float32)
    predicted = models[0].predict_reward(state, action, models[0].predict(state, action))
    np.testing.assert_allclose(predicted, [0.75, -0.5], atol=0.1)


def test_without_holdout_the_final_weights_stay_and_every_member_is_elite(at_runs):
    models, metadata = load("final.pkl")
    assert not any(hasattr(model, "holdout_idx") for model in models)
    assert metadata["elites"] == [0, 1, 2]
    assert [score["val_mse"] for score in metadata["scores"]] == [None] * 3
    rows = read(Path("deep/metrics.csv"))
    assert len(rows) == 9
    assert all(row["train_mse"] and not row["val_mse"] for row in rows)
    assert not Path("logs/final/metrics.csv").exists()
    last = [float(row["train_mse"]) for row in rows[-3:]]
    np.testing.assert_allclose([score["train_mse"] for score in metadata["scores"]], last, rtol=1e-12)


def test_learning_rates_in_the_csv_are_the_epochs_own(at_runs):
    rates = [float(row["lr"]) for row in read(Path("deep/metrics.csv"))[::3]]
    assert rates == pytest.approx([0.004, 0.002, 0.001])


# --- What the data say ---


def write_part(path, source, episodes, **changes):
    """Writes some episodes of a file to another; changes replace arrays or, being None, leave them out."""
    rows = np.concatenate([np.arange(LENGTH) + LENGTH * episode for episode in episodes])
    with h5py.File(source) as file, h5py.File(path, "w") as part:
        for key in {*file, *changes}:
            values = changes.get(key, file[key][:][rows] if key in file else None)
            if values is not None:
                part[key] = values
    return path


@pytest.fixture
def recordings(linear_dataset, workplace):
    """Two files of which the second has two copies from the first, one to hold out, and one long recording."""
    write_part("a.hdf5", linear_dataset, [0, 1, 2, 3])
    write_part("b.hdf5", linear_dataset, [4, 5, 0, 1])
    write_part("held.hdf5", linear_dataset, [6, 7, 4])
    long = np.cumsum(np.random.default_rng(0).normal(size=(400, 3)), axis=0).astype(np.float32)
    zeros = {"terminals": np.zeros(400, bool), "rewards": None, "timeouts": None}
    following = np.vstack([long[1:], long[-1:]])
    actions = np.random.default_rng(1).normal(size=(400, 2)).astype(np.float32)
    write_part(
        "long.hdf5", linear_dataset, [0], observations=long, actions=actions, next_observations=following, **zeros
    )
    return workplace


def test_several_datasets_are_learned_from_and_what_was_found_is_told_and_kept(recordings, capsys):
    command = [*arguments("a.hdf5", published("dnn")), "--holdout_dataset", "held.hdf5", "--test_ratio", "0.3"]
    command[2:2] = ["b.hdf5"]
    assert main([*command, "--run_name", "both"]) == 0

    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in told] == ["copies of trajectories", "copies in the holdout dataset"]
    assert "2 (trajectories 6 (of 0), 7 (of 1))" in told[0] and told[0].startswith("warning: ")

    models, metadata = load("model.pkl")
    kept = metadata["dataset"]
    assert json.loads(json.dumps(metadata)) == metadata
    assert (kept["name"], kept["rows"], kept["trajectories"]) == ("a.hdf5 + b.hdf5", 8 * LENGTH, 8)
    assert [(part["name"], part["num_trajectories"]) for part in kept["parts"]] == [("a.hdf5", 4), ("b.hdf5", 4)]
    sides = [{index % 6 for index in kept["split"][side]} for side in ("train", "test")]
    assert not sides[0] & sides[1] and kept["split"]["holdout"] == []
    assert len(kept["fingerprints"]["train"]) == len(kept["split"]["train"])
    assert kept["holdout_dataset"]["name"] == "held.hdf5"
    assert all(score["val_mse"] for score in metadata["scores"])
    assert not hasattr(models[0], "holdout_idx"), "nothing of the training datasets was held out"

    record = json.loads(Path("logs/both/run.json").read_text())
    assert record["findings"] == kept["findings"]
    assert record["findings"][0]["count"] == 2
    assert "| **copies of trajectories** | 2 |" in Path("logs/both/audit.md").read_text()
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(metadata["mlflow_run_id"])
    assert run.data.tags["audit"].startswith("copies of trajectories: 2, ")
    assert run.data.params["holdout_dataset"] == "held.hdf5"
    assert "audit.md" in [artifact.path for artifact in client.list_artifacts(metadata["mlflow_run_id"])]


def test_one_recording_is_held_out_in_blocks_and_the_run_says_so(recordings, capsys):
    command = arguments("long.hdf5", published("dnn"))
    command.remove("--quiet")
    assert main([*command, *HOLDOUT, "--run_name", "auto"]) == 0
    told = capsys.readouterr().err
    assert "warning: recordings divided in blocks" in told
    models, metadata = load("model.pkl")
    pieces, split = metadata["dataset"]["pieces"], metadata["dataset"]["split"]
    assert f"training rows of {len(split['train'])} pieces, {len(split['holdout'])} held out" in told
    held_out = np.concatenate([np.arange(pieces[index][1], pieces[index][2] - 1) for index in split["holdout"]])
    np.testing.assert_array_equal(models[0].holdout_idx, held_out)

    assert main([*command, *HOLDOUT, "--run_name", "asked", "--holdout_blocks", "4"]) == 0
    assert load("model.pkl")[1]["dataset"]["pieces"] != pieces
    with pytest.raises(SystemExit):  # another division is another run
        main([*command, *HOLDOUT, "--run_name", "asked", "--holdout_blocks", "5", "--resume"])
    assert "holdout_blocks 4, now 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--dataset", "a.hdf5", "a.hdf5"], "dataset 'a.hdf5' is given twice"),
        (
            ["--holdout_dataset", "held.hdf5", "--holdout_ratio", "0.2"],
            "leave --holdout_ratio and --holdout_samples out",
        ),
        (["--holdout_dataset", "held.hdf5", "--output", "held.hdf5"], "is the file of --holdout_dataset"),
        (["--holdout_dataset", "b.hdf5", "--dataset", "b.hdf5"], "nothing but copies of trajectories of"),
        (["--holdout_blocks", "5"], "add --holdout_ratio 0.2"),
        (["--holdout_blocks", "1", "--holdout_ratio", "0.2"], "holdout_blocks is 1"),
        (
            ["--dataset", "long.hdf5", "--params", "learn_reward=true"],
            "learn_reward is true, but long.hdf5 has no rewards",
        ),
        (["--holdout_dataset", "long.hdf5", "--params", "learn_reward=true"], "but long.hdf5 has no rewards"),
    ],
)
def test_a_division_that_cannot_be_is_refused_in_one_line(recordings, capsys, change, words):
    before = {path.name for path in recordings.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        main([*arguments("a.hdf5", published("dnn")), *change])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert {path.name for path in recordings.iterdir()} == before


def test_help_needs_no_heavy_import():
    code = (
        "import sys, learn_model\n"
        "try:\n    learn_model.main(['--help'])\n"
        "finally:\n    assert not {'torch', 'mlflow', 'pandas', 'h5py'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    flags = "dataset config params seed output holdout_ratio holdout_samples test_ratio track_training csv run_name "
    flags += "resume dataset_path device cpu quiet holdout_blocks holdout_dataset"
    for flag in flags.split():
        assert f"--{flag}" in shown.stdout


# --- What a user can get wrong ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--dataset", "hopper-medium-dmeo"], ["hopper-medium-dmeo", "hopper-medium-demo"]),
        (["--config", "configs/hoper_dnn.yaml"], ["hoper_dnn.yaml", "does not exist"]),
        (["--params", "fit_epoch=3"], ["fit_epoch", "fit_epochs"]),
        (["--params", "fit_epochs"], ["key=value"]),
        (["--params", "hidden_size=a,b"], ["hidden_size", "whole number"]),
        (["--params", "patience=3"], ["patience", "--holdout_ratio"]),
        (["--params", "kind=posthoc"], ["posthoc", "held-out rows", "--holdout_ratio"]),
        (["--params", "huber_width=0.1", "kind=probabilistic"], ["huber_width is 0.1; expected null"]),
        (["--params", "kind=determinstic"], ["determinstic", "deterministic, probabilistic", "did you mean"]),
        (
            ["--params", "beta_nll=0.5", "--dataset", "gone"],
            ["beta_nll is 0.5; expected 0 for a deterministic ensemble"],
        ),
        (["--holdout_ratio", "1.5"], ["1.5"]),
        (["--holdout_ratio", "-0.1"], ["-0.1"]),
        (["--holdout_ratio", "abc"], ["abc"]),
        (["--holdout_ratio", "0.5", "--holdout_samples", "10"], ["holdout_samples"]),
        (["--holdout_samples", "100000"], ["100000"]),
        (["--output", "."], ["folder"]),
        (["--output", "/proc/model.pkl"], ["/proc"]),
        (["--csv", "/proc/metrics.csv"], ["/proc"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--device", "gpu"], ["gpu", "auto"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--run_name", "a/../b"], ["run_name"]),
        (["--run_name", ".."], ["run_name"]),
        (["--device", "cpu", "--cpu"], ["--cpu", "not allowed"]),
        (["--csv", "same", "--output", "same"], ["--csv", "--output", "overwrite"]),
        (["--dataset_path", "same", "--output", "./same"], ["--dataset_path", "--output", "overwrite"]),
        (["--output", "THE DATASET"], ["--dataset", "overwrite"]),
        (["--output", "/dev/null"], ["device"]),
        (["--holdout_ratio", "2", "--dataset_path", "cache.pkl"], ["holdout_ratio"]),
        (["--params", "ensemble_size=100000000000"], ["ensemble_size", "at most"]),
        (["--params", "ensemble_size=10000", "hidden_size=60000,60000"], ["GiB", "ensemble_size"]),
        (["--params", "hidden_size=10000000000"], ["hidden_size", "at most"]),
        (["--params", "seed=2020-13-45"], ["seed"]),
        (["--params", "hidden_size=" + "[" * 1000], ["hidden_size"]),
        (["--unknown"], ["--unknown", "--help"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value[0].startswith("--") else "",
)
def test_a_mistake_ends_in_one_line_before_anything_is_written(linear_dataset, workplace, capsys, change, words):
    change = [str(linear_dataset) if word == "THE DATASET" else word for word in change]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments(linear_dataset, published("dnn")), *change])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("error: ")
    for word in words:
        assert word in shown
    assert list(workplace.iterdir()) == []


def test_a_bundled_dataset_is_never_written_over(workplace, capsys):
    bundled = ROOT / "data" / "bundled" / "hopper-medium-demo.hdf5"
    before = bundled.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        main([*arguments("hopper-medium-demo", published("dnn")), "--output", str(bundled)])
    assert "overwrite" in capsys.readouterr().err
    assert bundled.stat().st_mtime_ns == before


def test_a_run_name_is_trained_once_also_where_it_was_cut_off_before_its_first_file(linear_dataset, workplace, capsys):
    (workplace / "logs" / "mine").mkdir(parents=True)
    command = [*arguments(linear_dataset, published("pnn"), "fit_epochs=1"), "--holdout_samples", "50"]
    command += ["--run_name", "mine"]
    assert main([*command, "--resume"]) == 0
    rows = read(workplace / "logs" / "mine" / "metrics.csv")
    assert len(rows) == 3
    assert all(row["gauss_loss"] and row["train_mse"] and row["val_mse"] and row["nll"] for row in rows)

    before = (workplace / "model.pkl").read_bytes()
    for again, words in (([], "exists already"), (["--resume"], "has finished"), (["--resume", "--seed", "7"], "seed")):
        with pytest.raises(SystemExit):
            main([*command, *again])
        assert words in capsys.readouterr().err
    assert (workplace / "model.pkl").read_bytes() == before


def test_a_diverged_run_fails_and_leaves_no_model(linear_dataset, workplace, capsys):
    settings = ["fit_lr=1e9", "scheduler=null"]
    assert main([*arguments(linear_dataset, published("dnn"), *settings), *HOLDOUT]) == 1
    assert "diverged" in capsys.readouterr().err
    assert not (workplace / "model.pkl").exists()


# --- Runs that are cut off ---


@pytest.fixture
def cut_off_after(monkeypatch):
    """Returns a function that lets the next training be interrupted once it has saved so many checkpoints."""

    def cut(epochs):
        save = CheckpointFiles.save
        saved = []

        def save_and_stop(files, state):
            save(files, state)
            saved.append(state["epochs"])
            if len(saved) == epochs:
                monkeypatch.setattr(CheckpointFiles, "save", save)
                raise KeyboardInterrupt

        monkeypatch.setattr(CheckpointFiles, "save", save_and_stop)

    return cut


def test_a_resumed_run_multiplies_as_it_began(linear_dataset, workplace, cut_off_after, monkeypatch):
    """Whatever would be fastest now; and the run's configuration trains the same again."""
    ways = iter(["torch/apart/2", "torch/together/1"])
    monkeypatch.setattr(fastest_products, "possible_products", lambda members: [Products.parse(next(ways))])
    command = [*arguments(linear_dataset, published("dnn"), "fit_epochs=6"), "--run_name", "cut"]
    cut_off_after(3)
    assert main(command) == 130

    assert main([*command, "--resume"]) == 0

    assert json.loads((workplace / "logs/cut/run.json").read_text())["products"] == "torch/apart/2"
    assert load_config(workplace / "logs/cut/config.yaml").products == "torch/apart/2"
    assert load("model.pkl")[1]["config"]["products"] == "torch/apart/2"


def astray(path, member):
    """Gives a member moments with which its next step leads to weights without bounds; they are finite themselves."""
    state = torch.load(path, weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"][member] = 1e38
    torch.save(state, path)


@pytest.mark.parametrize("holdout", [[], HOLDOUT], ids=["latest", "best"])
@pytest.mark.parametrize("products", ["torch/together/2", "torch/apart/2"])
def test_a_member_that_goes_astray_leaves_the_others_as_they_are(
    linear_dataset, workplace, capsys, cut_off_after, holdout, products
):
    command = [*arguments(linear_dataset, published("pnn"), f"products={products}", "fit_epochs=6"), *holdout]
    assert main([*command, "--run_name", "whole", "--output", "whole.pkl"]) == 0
    cut_off_after(3)
    assert main([*command, "--run_name", "astray"]) == 130
    (before,) = (torch.load(workplace / "logs/astray/checkpoint", weights_only=True),)
    astray(workplace / "logs/astray/checkpoint", member=1)
    capsys.readouterr()

    assert main([command[0], *command[1:], "--resume", "--run_name", "astray"]) == 3

    assert "warning: member 1 failed" in capsys.readouterr().err
    (models, metadata), (whole, _) = load("model.pkl"), load("whole.pkl")
    for member in (0, 2):
        for own, other in zip(models[member].parameters(), whole[member].parameters(), strict=True):
            assert torch.equal(own, other)
    kept = before["best"]["weights"]
    for own, good in zip(models[1].network.parameters(), kept, strict=True):
        assert torch.equal(own[0], good[1]), "its last good weights"
    assert metadata["failed"] == [1] and 1 not in metadata["elites"] and len(metadata["elites"]) == 2
    assert metadata["scores"][1] == {"train_mse": None, "val_mse": None, "nll": None}
    assert 1 not in load_ensemble("model.pkl").elites
    rows = read(workplace / "logs/astray/metrics.csv")
    assert [row["gauss_loss"] for row in rows if row["model_id"] == "1"][3:] == ["nan"] * 3
    assert all(row["gauss_loss"] != "nan" for row in rows if row["model_id"] != "1")
    assert json.loads((workplace / "logs/astray/run.json").read_text())["finished"]["failed"] == [1]


def test_the_table_names_members_that_failed_and_that_are_stray(workplace):
    scores = [{"train_mse": error, "val_mse": None, "nll": None} for error in (1.0, None, 1.0, 30.0)]
    run = RunFolder(workplace, RunRecord(None, None))
    lines = learn_model.results_table(scores, [0, 2, 3], Path("model.pkl"), run).splitlines()
    assert lines[2].split() == ["1", "failed"]
    assert "member 3 is stray: its error is 30 times the median's (more than 5 times is stray)" in lines


def test_an_unreadable_checkpoint_falls_back_to_the_one_before_and_ends_in_the_same_bits(
    linear_dataset, workplace, capsys, cut_off_after
):
    command = [*arguments(linear_dataset, published("pnn"), "fit_epochs=6"), *HOLDOUT]
    assert main([*command, "--run_name", "whole", "--output", "whole.pkl"]) == 0
    cut_off_after(4)
    assert main([*command, "--run_name", "cut"]) == 130
    path = workplace / "logs/cut/checkpoint"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()

    assert main([*command, "--resume", "--run_name", "cut"]) == 0

    (line,) = capsys.readouterr().err.splitlines()
    assert "logs/cut/checkpoint cannot be read" in line and "going on from the one before it, after epoch 3" in line
    assert states_equal(load("model.pkl")[0], load("whole.pkl")[0])
    assert (workplace / "logs/cut/metrics.csv").read_text() == (workplace / "logs/whole/metrics.csv").read_text()
    client = MlflowClient()
    for run in ("cut", "whole"):
        run_id = json.loads((workplace / f"logs/{run}/run.json").read_text())["mlflow_run_id"]
        history = client.get_metric_history(run_id, "gauss_loss/mean")
        assert [metric.step for metric in history] == [*range(6)], "every epoch once"


def states_equal(models, others):
    pairs = zip(models, others, strict=True)
    return all(torch.equal(a, b) for m, o in pairs for a, b in zip(m.parameters(), o.parameters(), strict=True))


def wait_until(holds, process, printed):
    """Waits until something holds, as long as a process runs."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process.is_alive(), f"it ended before it could be cut off:\n{printed.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_killed_again_and_again_ends_as_the_whole_one(linear_dataset, workplace, start_script):
    settings = ["fit_epochs=20", "hidden_size=16,16", "batch_size=8"]
    command = [*arguments(linear_dataset, published("pnn"), *settings), *HOLDOUT]
    assert main([*command, "--run_name", "whole", "--output", "whole.pkl"]) == 0

    cut = [*command, "--run_name", "cut", "--output", "cut.pkl", "--resume"]
    metrics = Path("logs/cut/metrics.csv")
    for epochs in (1, 8):
        process, printed = start_script(ROOT / "learn_model.py", *cut)
        wait_until(
            lambda epochs=epochs: metrics.exists() and metrics.read_bytes().count(b"\n") > 3 * epochs, process, printed
        )
        process.kill()
        process.join()
        assert not Path("cut.pkl").exists()
    assert main(cut) == 0

    assert states_of(load("cut.pkl")[0]) == states_of(load("whole.pkl")[0])
    assert metrics.read_bytes() == Path("logs/whole/metrics.csv").read_bytes()


def test_an_interrupted_run_says_how_to_go_on_and_remembers_where_its_csv_is(
    linear_dataset, workplace, start_script, capsys
):
    """First by Ctrl-C, then by the signal that schedulers send."""
    command = [*arguments(linear_dataset, published("dnn"), "fit_epochs=100000"), "--run_name", "mine"]
    checkpoint, steps = Path("logs/mine/checkpoint"), []
    for number, flags in ((signal.SIGINT, ["--csv", "m.csv"]), (signal.SIGTERM, ["--resume"])):
        began = time.time_ns()
        process, printed = start_script(ROOT / "learn_model.py", *command, *flags)
        wait_until(lambda began=began: checkpoint.exists() and checkpoint.stat().st_mtime_ns > began, process, printed)
        os.kill(process.pid, number)
        process.join(60)

        assert process.exitcode == 130
        assert "--resume --run_name mine" in printed.read_text()
        assert "Traceback" not in printed.read_text()
        before, steps = len(steps), [int(row["step"]) for row in read(Path("m.csv")) if row["model_id"] == "0"]
        assert len(steps) > before
        assert steps == list(range(len(steps)))
        assert not Path("logs/mine/metrics.csv").exists()

    with pytest.raises(SystemExit):
        main([*command, "--resume", "--csv", "other.csv"])
    assert "m.csv" in capsys.readouterr().err


def test_an_interrupt_that_python_drops_ends_the_run_at_its_next_epoch(linear_dataset, workplace, monkeypatch, capsys):
    """It then goes on, though an older version, which knew nothing of kinds, had begun it."""

    class Dropped:
        def __del__(self):  # Python prints an exception that is raised here, and goes on
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    from training.scores import metric_rows

    def drop(*arguments):
        Dropped()
        return metric_rows(*arguments)

    command = [*arguments(linear_dataset, published("dnn")), "--run_name", "mine"]
    with monkeypatch.context() as patch:
        patch.setattr("training.scores.metric_rows", drop)
        patch.setattr("sys.unraisablehook", lambda _: None)
        assert main(command) == 130
    assert "--resume --run_name mine" in capsys.readouterr().err
    metrics, record = Path("logs/mine/metrics.csv"), Path("logs/mine/run.json")
    assert len(read(metrics)) == 3  # the epoch in which it came

    plain = json.loads(record.read_text())
    assert plain["request"]["config"].pop("kind") is None
    record.write_text(json.dumps(plain))
    assert main([*command, "--resume"]) == 0
    assert [row["step"] for row in read(metrics)[::3]] == ["0", "1", "2"]
