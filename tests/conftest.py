"""What several test files share: small data, small members, trainings, an empty MLflow store, commands as processes."""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import sys
from multiprocessing import forkserver
from pathlib import Path

# Networks this small gain nothing from a second thread, and on a busy machine threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dynamics_model
from data.trajectories import Transitions
from dynamics_model import KINDS, Architecture, Normalisation, random_stream
from probabilistic_model import ProbabilisticModel
from tracking import mlflow_store
from training.batches import normalise_rows
from training.build import build_ensemble
from training.loop import train_ensemble

# --- Data and members ---


@pytest.fixture(params=KINDS)
def member_class(request):
    """The members of each kind in turn."""
    return dynamics_model.member_class(request.param)


@pytest.fixture
def linear_system():
    """Returns a function that draws transitions of ``s' = s + A s + B a`` with 3 state and 2 action dimensions."""

    def draw(rows=300, noise=0.0, seed=0):
        random = np.random.default_rng(seed)
        states, actions = random.normal(size=(rows, 3)) * (1, 10, 0.1) + (0, 5, 1), random.normal(size=(rows, 2))
        weight = np.array(
            [[-0.1, 0.4, 0.001], [0.02, -0.1, 0.0], [0.5, 1.0, -0.02], [0.1, 2.0, 0.0], [0.3, 0.0, 0.005]]
        )
        change = np.hstack([states, actions]) @ weight
        change += noise * np.abs(change).mean(axis=0) * random.normal(size=change.shape)
        parts = states, actions, states + change, states[:, 0] + actions[:, 1] ** 2
        return Transitions(*(part.astype(np.float32) for part in parts))

    return draw


@pytest.fixture
def draw_rows():
    """Returns a function that draws states and actions of the size of ``random_member``, ``(*leading, 3 or 2)``."""

    def draw(*leading, seed=0):
        random = np.random.default_rng(seed)
        draws = [random.normal(size=(*leading, size)).astype(np.float32) for size in (3, 2)]
        return draws[0] * np.float32([1, 2, 0.5]) + np.float32([0.5, -3, 10]), draws[1]

    return draw


@pytest.fixture
def unit_normalisation():
    """Returns a function that builds shifts of 0 and scales of 1, or other ones where they are given."""

    def build(state_dim=2, action_dim=1, **given):
        sizes = {"input": state_dim + action_dim, "delta": state_dim, "reward": 1}
        tensors = {f"{name}_shift": torch.zeros(size) for name, size in sizes.items()}
        tensors |= {f"{name}_scale": torch.ones(size) for name, size in sizes.items()}
        return Normalisation(**tensors | {name: torch.tensor(values) for name, values in given.items()})

    return build


@pytest.fixture
def random_member(unit_normalisation):
    """Returns a function that builds an untrained member with 3 state and 2 action dimensions, far from unit scale."""

    def build(kind, member=0, seed=0, reward=False, **options):
        normalisation = unit_normalisation(
            3,
            2,
            input_shift=[0.5, -3.0, 10.0, 0.1, 0.0],
            input_scale=[1.0, 2.0, 0.5, 0.3, 1.0],
            delta_shift=[0.1, -0.2, 0.0],
            delta_scale=[0.5, 3.0, 0.01],
            reward_shift=[2.0],
            reward_scale=[4.0],
        )
        options = {"hidden_size": (8, 6), "reward_hidden_size": (5,) if reward else None} | options
        streams = (random_stream(seed, member, purpose) for purpose in ("initialisation", "reward"))
        return kind(Architecture(3, 2, **options), normalisation, *streams)

    return build


@pytest.fixture
def constant_member(unit_normalisation):
    """Returns a function that builds a member of one layer of zeros, so that its biases are its outputs.

    The member predicts the change ``change`` in normalised units whatever it is given, and, being probabilistic, the
    variance ``variance``: its bounds of the log-variance are too far apart to matter.
    """

    def build(kind, change, variance=None, **scales):
        normalisation = unit_normalisation(len(scales.get("delta_scale", change)), 1, **scales)
        member = kind(Architecture(len(normalisation.delta_scale), 1, hidden_size=()), normalisation)
        outputs = torch.tensor(change, dtype=torch.float32)
        if kind is ProbabilisticModel:
            variance = torch.ones_like(outputs) if variance is None else torch.tensor(variance)
            outputs = torch.cat([outputs, variance.log()])
        with torch.no_grad():
            member.network.dynamics.biases[0].copy_(outputs)
            if kind is ProbabilisticModel:
                member.network.max_logvar.fill_(40.0)
                member.network.min_logvar.fill_(-40.0)
        return member

    return build


@pytest.fixture
def as_tuple():
    """Returns a function that makes one form of what kinds predict: a tuple of one or two tensors."""
    return lambda prediction: prediction if isinstance(prediction, tuple) else (prediction,)


@pytest.fixture
def assert_same_weights():
    """Returns a function that checks that two models are equal to the bit, normalisation included."""

    def check(first, second):
        ours, others = first.state_dict(), second.state_dict()
        assert ours.keys() == others.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor.detach(), others[name].detach()), name

    return check


# --- Trainings ---


@pytest.fixture
def train():
    """Returns a function that trains a new ensemble to the end, and gives it and its epochs."""

    def run(config, transitions, holdout=None, **options):
        ensemble = build_ensemble(config, transitions)
        rows = normalise_rows(ensemble, transitions)
        held_out = None if holdout is None else normalise_rows(ensemble, holdout)
        return ensemble, list(train_ensemble(ensemble, config, rows, held_out, **options))

    return run


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An MLflow database with its tables, made once as that takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_store.open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workplace(empty_store, tmp_path, monkeypatch):
    """An empty current folder for a command to write to; its MLflow runs go to an empty store beside it."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- Commands as processes ---


@pytest.fixture(scope="session")
def processes():
    """Starts processes at once, as forks of one that has imported what takes seconds to import.

    They work in the current folder of the test, but with the environment of the first test that asked for one.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    slow = ["torch", "torch._dynamo", "pytest", "h5py", "matplotlib.pyplot", "pandas", "scipy.stats"]
    forkserver.set_forkserver_preload([*slow, "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"])
    forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def run_script(script, arguments, environment, printed):
    """Is what the interpreter does for ``python script arguments``, both outputs going to a file."""
    with Path(printed).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def start_script(processes, tmp_path):
    """Returns a function that starts ``python script arguments`` as a process, and gives it and where it prints.

    The process has the environment of the test, and is killed at its end.
    """
    started = []

    def start(script, *arguments):
        printed = tmp_path / f"printed-{len(started)}"
        printed.touch()
        process = processes.Process(
            target=run_script, args=(str(script), list(map(str, arguments)), dict(os.environ), printed)
        )
        process.start()
        started.append(process)
        return process, printed

    yield start
    for process in started:
        with contextlib.suppress(ValueError):  # the test has closed it
            process.kill()
            process.join()
