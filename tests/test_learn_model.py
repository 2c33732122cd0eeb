import csv
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import learn_model
from config import config_from_dict
from data.sources import load_dataset
from data.trajectories import gather_transitions, split_trajectories
from dynamics_model import load_ensemble
from learn_model import main
from tracking.mlflow_tracker import load_run
from tracking.trackers import NullTracker
from training.build import build_ensemble
from training.loop import train_ensemble
from training.scores import rank_elites

ROOT = Path(learn_model.__file__).parent
SMALL = {"ensemble_size": 3, "hidden_size": [8], "fit_epochs": 3, "batch_size": 64}
KINDS = pytest.mark.parametrize("probabilistic", [False, True], ids=["deterministic", "probabilistic"])


LENGTH, EPISODES = 40, 12


def linear_episode(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States ``(41, 3)`` and actions ``(40, 2)`` of s' = 0.9 s + B a, B = [[.1, 0], [0, .1], [.1, .1]]."""
    gain = np.array([[0.1, 0.0], [0.0, 0.1], [0.1, 0.1]])
    actions = rng.uniform(-1, 1, (LENGTH, 2))
    states = [rng.normal(size=3)]
    for action in actions:
        states.append(0.9 * states[-1] + gain @ action)
    return np.array(states), actions


@pytest.fixture
def linear_dataset(tmp_path: Path) -> Path:
    """A D4RL-format file of 12 episodes of 40 steps of a linear system."""
    rng = np.random.default_rng(0)
    episodes = [linear_episode(rng) for _ in range(EPISODES)]
    path = tmp_path / "data" / "linear.hdf5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([states[:-1] for states, _ in episodes]).astype(np.float32)
        file["next_observations"] = np.concatenate([states[1:] for states, _ in episodes]).astype(np.float32)
        file["actions"] = np.concatenate([actions for _, actions in episodes]).astype(np.float32)
        file["rewards"] = np.concatenate([actions.sum(axis=1) for _, actions in episodes]).astype(np.float32)
        file["terminals"] = np.zeros(EPISODES * LENGTH, dtype=bool)
        file["timeouts"] = np.tile(np.arange(LENGTH) == LENGTH - 1, EPISODES)
    return path


@pytest.fixture(scope="module")
def tracking_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of one SQLite store for all of these tests: to create one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def workplace(tmp_path: Path, tracking_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory for a command to write to, with the tests' tracking store."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store)
    return folder


class Recorder(NullTracker):
    """Keeps what the loop reports."""

    def __init__(self):
        self.epochs = []

    def log_epoch(self, epoch, rows):
        assert epoch == len(self.epochs)
        self.epochs.append(rows)


def arguments(dataset: Path, config: Path, *more: str) -> list[str]:
    small = ["ensemble_size=3", "hidden_size=8", "fit_epochs=3", "batch_size=64"]
    return ["--dataset", str(dataset), "--config", str(config), "--quiet", "--params", *small, *more]


def published(kind: str) -> Path:
    return ROOT / "configs" / f"hopper_{kind}.yaml"


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def only_run(folder: Path) -> Path:
    (run,) = (folder / "logs").iterdir()
    return run


def prepare(dataset: Path, **settings):
    """Returns config, untrained ensemble and normalised rows of a small run."""
    config = config_from_dict(SMALL | settings, "test")
    loaded = load_dataset(str(dataset))
    split = split_trajectories(loaded, 0, holdout_ratio=0.25)
    train = gather_transitions(loaded, split.train)
    ensemble = build_ensemble(config, train)
    return config, ensemble, ensemble.normalise(train), ensemble.normalise(gather_transitions(loaded, split.holdout))


def weights(ensemble) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in ensemble.network.parameters()]


def assert_same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


# --- The whole command ---


@pytest.mark.parametrize(("kind", "loss"), [("dnn", "mse_loss"), ("pnn", "gauss_loss")])
def test_a_run_leaves_model_csv_configuration_and_tracked_run(linear_dataset, workplace, kind, loss):
    assert main([*arguments(linear_dataset, published(kind)), "--holdout_ratio", "0.25"]) == 0

    models, metadata = pickle.loads((workplace / "model.pkl").read_bytes())
    assert [type(models), len(models), type(metadata)] == [list, 3, dict]
    assert json.loads(json.dumps(metadata)) == metadata  # plain Python types throughout
    assert metadata["kind"] == {"dnn": "deterministic", "pnn": "probabilistic"}[kind]
    assert metadata["config"]["fit_epochs"] == 3
    split = metadata["dataset"]["split"]
    assert sorted(split["train"] + split["holdout"] + split["test"]) == list(range(12))
    assert len(models[0].holdout_idx) == 39 * len(split["holdout"])  # episodes of 40 rows are 39 published ones

    run = only_run(workplace)
    rows = read(run / "metrics.csv")
    assert list(rows[0]) == ["step", "model_id", loss, "lr", "train_mse", "val_mse", "nll"]
    assert [(row["step"], row["model_id"]) for row in rows] == [(str(s), str(m)) for s in range(3) for m in range(3)]
    assert all(row["val_mse"] for row in rows)
    assert [bool(row["train_mse"]) for row in rows] == [True] * 3 + [False] * 3 + [True] * 3  # first and last epoch
    assert [bool(row["nll"]) for row in rows] == [kind == "pnn"] * 9
    assert not (run / "checkpoint").exists()

    again = workplace / "again.pkl"
    assert main(["--dataset", str(linear_dataset), "--config", str(run / "config.yaml"), "--quiet",
                 "--holdout_ratio", "0.25", "--output", str(again)]) == 0  # fmt: skip
    repeated, _ = pickle.loads(again.read_bytes())
    assert [model.__getstate__() for model in repeated] == [model.__getstate__() for model in models]

    tracked = load_run(metadata["mlflow_run_id"])
    assert_same_bits(weights(tracked), weights(load_ensemble(workplace / "model.pkl")))


def test_reported_scores_are_those_of_the_saved_weights(linear_dataset, workplace):
    assert main([*arguments(linear_dataset, published("pnn"), "fit_lr=0.05"), "--holdout_ratio", "0.25"]) == 0
    _, metadata = pickle.loads((workplace / "model.pkl").read_bytes())
    ensemble = load_ensemble(workplace / "model.pkl")
    dataset = load_dataset(str(linear_dataset))
    held_out = gather_transitions(dataset, np.array(metadata["dataset"]["split"]["holdout"]))
    mean, _ = ensemble.predict(held_out.states, held_out.actions)
    scale = ensemble.network.delta_scale.numpy()
    errors = (((mean.numpy() - held_out.next_states) / scale) ** 2).mean(axis=(1, 2))
    reported = [score["val_mse"] for score in metadata["scores"]]
    np.testing.assert_allclose(reported, errors, rtol=1e-3)
    csv_best = [
        min(
            float(row["val_mse"]) for row in read(only_run(workplace) / "metrics.csv") if row["model_id"] == str(member)
        )
        for member in range(3)
    ]
    np.testing.assert_allclose(reported, csv_best, rtol=1e-12)
    assert metadata["elites"] == sorted(range(3), key=lambda member: reported[member])


def test_without_holdout_the_final_weights_stay_and_every_member_is_elite(linear_dataset, workplace):
    assert main([*arguments(linear_dataset, published("dnn")), "--csv", "deep/metrics.csv", "--track_training"]) == 0
    models, metadata = pickle.loads((workplace / "model.pkl").read_bytes())
    assert not any(hasattr(model, "holdout_idx") for model in models)
    assert metadata["elites"] == [0, 1, 2]
    assert [score["val_mse"] for score in metadata["scores"]] == [None] * 3
    rows = read(workplace / "deep" / "metrics.csv")
    assert len(rows) == 9
    assert all(row["train_mse"] and not row["val_mse"] for row in rows)
    assert not (only_run(workplace) / "metrics.csv").exists()
    last = [float(row["train_mse"]) for row in rows[-3:]]
    np.testing.assert_allclose([score["train_mse"] for score in metadata["scores"]], last, rtol=1e-12)


@pytest.mark.parametrize(
    "more", [["fit_epochs=1"], ["batch_size=100000"]], ids=["one epoch", "fewer rows than a batch"]
)
def test_the_csv_is_complete_in_the_smallest_runs(linear_dataset, workplace, more):
    assert main([*arguments(linear_dataset, published("pnn"), *more), "--holdout_samples", "50"]) == 0
    rows = read(only_run(workplace) / "metrics.csv")
    epochs = 1 if more == ["fit_epochs=1"] else 3
    assert len(rows) == 3 * epochs
    assert all(row["gauss_loss"] and row["val_mse"] and row["nll"] for row in rows)
    assert all(row["train_mse"] for row in rows[-3:])


def test_the_reward_is_learned_beside_the_dynamics(linear_dataset, workplace):
    assert main([*arguments(linear_dataset, published("dnn"), "learn_reward=true", "fit_epochs=40", "fit_lr=0.01"),
                 "--holdout_ratio", "0.25"]) == 0  # fmt: skip
    models, _ = pickle.loads((workplace / "model.pkl").read_bytes())
    action = np.array([[0.5, 0.25], [-0.5, 0.0]], dtype=np.float32)  # rewards of the system: 0.75 and -0.5
    state = np.zeros((2, 3), dtype=np.float32)
    predicted = models[0].predict_reward(state, action, models[0].predict(state, action))
    np.testing.assert_allclose(predicted, [0.75, -0.5], atol=0.1)
    assert "reward_val_mse" in read(only_run(workplace) / "metrics.csv")[0]


def test_help_needs_no_heavy_import():
    code = "import sys, learn_model; assert not {'torch', 'mlflow', 'pandas', 'h5py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    shown = subprocess.run([sys.executable, "learn_model.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for flag in [
        "--dataset",
        "--config",
        "--params",
        "--seed",
        "--output",
        "--holdout_ratio",
        "--holdout_samples",
        "--test_ratio",
    ]:
        assert flag in shown.stdout


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
        (["--output", "../data/linear.hdf5"], ["--dataset", "overwrite"]),
        (["--output", "/dev/null"], ["device"]),
        (["--holdout_ratio", "2", "--dataset_path", "cache.pkl"], ["holdout_ratio"]),
        (["--params", "ensemble_size=100000000000"], ["GiB", "ensemble_size"]),
        (["--params", "hidden_size=10000000000"], ["GiB", "hidden_size"]),
        (["--params", "seed=2020-13-45"], ["seed"]),
        (["--params", "hidden_size=" + "[" * 3000], ["hidden_size"]),
        (["--unknown"], ["--unknown", "--help"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_mistake_ends_in_one_line_before_anything_is_written(linear_dataset, workplace, capsys, change, words):
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


def test_a_named_run_cut_off_before_its_first_file_starts_anew(linear_dataset, workplace):
    (workplace / "logs" / "mine").mkdir(parents=True)
    assert main([*arguments(linear_dataset, published("dnn")), "--run_name", "mine", "--resume"]) == 0
    assert (workplace / "logs" / "mine" / "metrics.csv").exists()


def test_a_run_name_is_never_trained_twice(linear_dataset, workplace, capsys):
    command = [*arguments(linear_dataset, published("dnn")), "--run_name", "mine"]
    assert main(command) == 0
    before = (workplace / "model.pkl").read_bytes()
    for again, words in (([], "exists already"), (["--resume"], "has finished"), (["--resume", "--seed", "7"], "seed")):
        with pytest.raises(SystemExit):
            main([*command, *again])
        assert words in capsys.readouterr().err
    assert (workplace / "model.pkl").read_bytes() == before


def test_a_diverged_run_fails_and_leaves_no_model(linear_dataset, workplace, capsys):
    settings = ["fit_lr=1e30", "scheduler=null"]
    assert main([*arguments(linear_dataset, published("dnn"), *settings), "--holdout_ratio", "0.25"]) == 1
    assert "diverged" in capsys.readouterr().err
    assert not (workplace / "model.pkl").exists()


# --- The loop ---


@KINDS
def test_a_loop_resumed_from_any_checkpoint_ends_in_the_same_bits(linear_dataset, probabilistic):
    settings = {
        "probabilistic": probabilistic,
        "bootstrap": True,
        "weight_decay": 1e-3,
        "fit_epochs": 5,
        "grad_clip": 1,
    }
    config, whole, train, holdout = prepare(linear_dataset, **settings)
    checkpoints, recorder = [], Recorder()

    def keep(state):
        file = Path(linear_dataset).with_suffix(f".{state['epochs']}")
        torch.save(state, file)
        checkpoints.append(file)

    train_ensemble(whole, config, train, holdout, recorder, save_checkpoint=keep)
    assert len(checkpoints) == 5
    for epochs, file in enumerate(checkpoints, start=1):
        _, resumed, *_ = prepare(linear_dataset, **settings)
        resumed_rows = Recorder()
        resumed_rows.epochs = recorder.epochs[:epochs]
        train_ensemble(resumed, config, train, holdout, resumed_rows, checkpoint=torch.load(file, weights_only=True))
        assert_same_bits(weights(resumed), weights(whole))
        assert resumed_rows.epochs == recorder.epochs


@KINDS
def test_a_member_learns_the_same_alone_and_among_others(linear_dataset, probabilistic):
    settings = {"probabilistic": probabilistic, "reduced_precision": 0}
    together = prepare(linear_dataset, **settings, ensemble_size=3)
    alone = prepare(linear_dataset, **settings, ensemble_size=1)
    for config, ensemble, train, holdout in (together, alone):
        train_ensemble(ensemble, config, train, holdout, NullTracker())
    for stacked, single in zip(weights(together[1]), weights(alone[1]), strict=True):
        np.testing.assert_allclose(stacked[:1], single, atol=1e-5)


@KINDS
def test_a_linear_system_is_learned(linear_dataset, probabilistic):
    settings = {"probabilistic": probabilistic, "hidden_size": [32, 32], "fit_epochs": 60, "fit_lr": 0.01}
    config, ensemble, train, holdout = prepare(linear_dataset, **settings)
    untrained = max(ensemble.network.score(holdout)["mse"])
    train_ensemble(ensemble, config, train, holdout, NullTracker())
    assert max(ensemble.network.score(holdout)["mse"]) < 0.005 < 0.5 < untrained


def test_clipping_treats_dynamics_and_reward_apart(linear_dataset):
    trained = []
    for learn_reward in (False, True):
        config, ensemble, train, holdout = prepare(linear_dataset, learn_reward=learn_reward, grad_clip=0.1)
        train_ensemble(ensemble, config, train, holdout, NullTracker())
        trained.append([parameter.detach().numpy().copy() for parameter in ensemble.network.dynamics.parameters()])
    assert_same_bits(*trained)


def test_the_last_epoch_is_scored_where_patience_ends_training(linear_dataset):
    config, ensemble, train, holdout = prepare(linear_dataset, fit_epochs=200, patience=2, fit_lr=0.3, scheduler=None)
    recorder = Recorder()
    train_ensemble(ensemble, config, train, holdout, recorder)
    assert len(recorder.epochs) < 200
    assert all(row["train_mse"] is not None for row in recorder.epochs[-1])


def test_early_stopping_ends_when_all_members_have_lost_patience(linear_dataset):
    # A rate this high spoils weights soon: the best validation error lies early.
    settings = {"fit_epochs": 200, "patience": 2, "fit_lr": 0.3, "scheduler": None}
    config, ensemble, train, holdout = prepare(linear_dataset, **settings)
    recorder = Recorder()
    train_ensemble(ensemble, config, train, holdout, recorder)
    assert 3 <= len(recorder.epochs) < 200
    history = np.array([[row["val_mse"] for row in rows] for rows in recorder.epochs])  # (epoch, member)
    best = ensemble.network.score(holdout)["mse"]
    for member, errors in enumerate(history.T):
        until = next(e for e in range(2, len(errors)) if min(errors[: e - 1]) <= min(errors[e - 1 : e + 1]))
        assert best[member] == pytest.approx(min(errors[: until + 1]), rel=1e-9)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(linear_dataset):
    trained = []
    for seed in (1, 1, 2):
        config, ensemble, train, holdout = prepare(linear_dataset, seed=seed)
        train_ensemble(ensemble, config, train, holdout, NullTracker())
        trained.append(weights(ensemble))
    assert_same_bits(trained[0], trained[1])
    assert all((one != other).any() for one, other in zip(trained[0], trained[2], strict=True))


def test_elites_are_the_members_with_the_lowest_errors():
    scores = [{"val_mse": error} for error in (0.3, 0.1, 0.2)]
    assert rank_elites(scores, None) == [1, 2, 0]
    assert rank_elites(scores, 2) == [1, 2]
    assert rank_elites([{"val_mse": None}] * 3, 2) == [0, 1, 2]


# --- Runs that are cut off ---


def test_a_run_killed_again_and_again_ends_as_the_whole_one(linear_dataset, workplace):
    settings = ["fit_epochs=30", "hidden_size=32,32", "batch_size=8"]
    command = [*arguments(linear_dataset, published("pnn"), *settings), "--holdout_ratio", "0.25"]
    assert main([*command, "--run_name", "whole", "--output", "whole.pkl"]) == 0
    whole, _ = pickle.loads(Path("whole.pkl").read_bytes())

    script = [sys.executable, str(ROOT / "learn_model.py"), *command, "--run_name", "cut", "--output", "cut.pkl"]
    metrics = Path("logs/cut/metrics.csv")
    for epochs in (1, 8, 15):
        process = subprocess.Popen([*script, "--resume"], env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 1 + 3 * epochs:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path("cut.pkl").exists()
    assert main([*command, "--run_name", "cut", "--output", "cut.pkl", "--resume"]) == 0
    resumed, _ = pickle.loads(Path("cut.pkl").read_bytes())
    assert [model.__getstate__() for model in resumed] == [model.__getstate__() for model in whole]
    assert metrics.read_bytes() == Path("logs/whole/metrics.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "a scheduler's signal"])
def test_an_interrupted_run_says_how_to_go_on(linear_dataset, workplace, number):
    command = [*arguments(linear_dataset, published("dnn"), "fit_epochs=100000"), "--run_name", "mine"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "learn_model.py"), *command], stderr=subprocess.PIPE, text=True
    )
    while not Path("logs/mine/checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume --run_name mine" in shown
    assert "Traceback" not in shown


def test_a_resumed_run_remembers_where_its_csv_is(linear_dataset, workplace, capsys):
    command = [*arguments(linear_dataset, published("dnn"), "fit_epochs=100000"), "--run_name", "mine"]
    process = subprocess.Popen([sys.executable, str(ROOT / "learn_model.py"), *command, "--csv", "m.csv"])
    while not Path("logs/mine/checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    with pytest.raises(SystemExit):
        main([*command, "--resume", "--csv", "other.csv"])
    assert "m.csv" in capsys.readouterr().err
    before = len(read(Path("m.csv")))
    process = subprocess.Popen([sys.executable, str(ROOT / "learn_model.py"), *command, "--resume"])
    while len(read(Path("m.csv"))) <= before + 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    steps = [int(row["step"]) for row in read(Path("m.csv")) if row["model_id"] == "0"]
    assert steps[:-1] == list(range(len(steps) - 1))
    assert not Path("logs/mine/metrics.csv").exists()


def test_an_interrupt_that_python_drops_ends_the_run_at_its_next_epoch(linear_dataset, workplace, monkeypatch, capsys):
    class Dropped:
        def __del__(self):  # Python prints an exception that is raised here, and goes on
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    def drop(*_, **__):
        Dropped()
        return kept(*_, **__)

    kept = learn_model.metric_rows
    monkeypatch.setattr("training.loop.metric_rows", drop)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    assert main([*arguments(linear_dataset, published("dnn")), "--run_name", "mine"]) == 130
    assert "--resume --run_name mine" in capsys.readouterr().err
    assert len(read(Path("logs/mine/metrics.csv"))) == 3  # the epoch in which it came


def test_resume_without_a_checkpoint_starts_anew(linear_dataset, workplace):
    command = [*arguments(linear_dataset, published("dnn")), "--resume"]
    assert main(command) == 0
    assert main(command) == 0  # the first has finished, so this is another run
    assert len(list((workplace / "logs").iterdir())) == 2


def test_learning_rates_in_the_csv_are_the_epochs_own(linear_dataset, workplace):
    settings = ["scheduler=exponential", "scheduler_gamma=0.5", "fit_lr=0.004"]
    assert main(arguments(linear_dataset, published("dnn"), *settings)) == 0
    rates = [float(row["lr"]) for row in read(only_run(workplace) / "metrics.csv")[::3]]
    assert rates == pytest.approx([0.004, 0.002, 0.001])
    assert not any(math.isnan(rate) for rate in rates)
