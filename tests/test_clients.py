"""``model.pkl`` in the hands of existing clients, which have the three model modules and nothing else of this project.

The scripts in ``tests/clients`` use it as published planners do. They run as fresh processes in a folder of their own
with copies of the three modules, once with this interpreter and, where the environment variable ``CLIENT_PYTHON`` names
another one, with that: files must load with NumPy 1.26 as with NumPy 2, say, and in other versions of Python.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from config import LearnConfig
from data.trajectories import Transitions
from dynamics_model import KINDS, DynamicsEnsemble, load_models
from training.build import build_ensemble

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = Path(__file__).resolve().parent / "clients"
MODULES = ("dynamics_model", "deterministic_model", "probabilistic_model")
PYTHONS = [
    pytest.param(sys.executable, id="this Python"),
    pytest.param(
        os.environ.get("CLIENT_PYTHON"),
        id="CLIENT_PYTHON",
        marks=pytest.mark.skipif("CLIENT_PYTHON" not in os.environ, reason="CLIENT_PYTHON names no interpreter"),
    ),
]


class Case(NamedTuple):
    """A model that clients are given."""

    kind: str
    ensemble_size: int
    held_out: bool


CASES = [Case(kind, size, held) for kind in KINDS for size in (1, 20) for held in (0, 1)]


@pytest.fixture(scope="module")
def paths():
    """Six trajectories of 60 states of 4 dimensions, the last of which never changes."""
    random = np.random.default_rng(0)
    dynamics = np.array([[0.9, 0.2, 0, 0], [-0.2, 0.9, 0, 0], [0.1, 0, 0.5, 0], [0, 0, 0, 1]])
    trajectories = []
    for _ in range(6):
        actions, states = random.uniform(-1, 1, (60, 2)), [np.append(random.normal(size=3), 2.0)]
        for action in actions[:-1]:
            states.append(dynamics @ states[-1] + np.array([action[0], 0.1, action[1], 0]))
        observations = np.array(states, dtype=np.float32)
        trajectories.append({"observations": observations, "actions": actions.astype(np.float32)})
    return trajectories


@pytest.fixture(scope="module")
def rows(paths):
    """The rows that clients make of it: states, actions, next states."""
    return tuple(
        np.concatenate([path[name][part] for path in paths])
        for name, part in (("observations", slice(-1)), ("actions", slice(-1)), ("observations", slice(1, None)))
    )


@pytest.fixture(scope="module")
def folder(paths, rows, tmp_path_factory):
    """A client's folder: its scripts, the three modules, a dataset, and a model of each case."""
    folder = tmp_path_factory.mktemp("client")
    for script in CLIENTS.glob("*.py"):
        shutil.copy(script, folder)
    for module in MODULES:
        shutil.copy(ROOT / f"{module}.py", folder)
    dataset = (paths, {"dataset": "rotation", "env_name": "Rotation-v0", "obs_mask": np.ones(4)})
    (folder / "dataset.pkl").write_bytes(pickle.dumps(dataset))
    transitions = Transitions(*rows, np.zeros(len(rows[0]), np.float32))
    for index, case in enumerate(CASES):
        settings = {"kind": case.kind, "ensemble_size": case.ensemble_size}
        ensemble = build_ensemble(LearnConfig(hidden_size=(8, 8), seed=index, **settings), transitions)
        if case.held_out:
            ensemble.holdout_idx = np.arange(59, 118)  # the second trajectory
        metadata = {"format_version": 1, "kind": case.kind, "seed": index, "elites": [0]}
        (folder / f"model-{index}.pkl").write_bytes(pickle.dumps((ensemble.members(), metadata)))
    return folder


class Foreign:
    """A class of another project, which clients do not have."""


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def newer_members(models, metadata):
    """Pickles members as a later version of the format would."""
    member_class = type(models[0])
    state = member_class.__getstate__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member_class, "__getstate__", lambda self: state(self) | {"format_version": 2})
        return pickle.dumps((models, metadata))


REASONS = {
    "another project": "names .*Foreign, which no model holds",
    "PyTorch": r"names torch.*, which no model holds",
    "newer members": "format version 2, expected 1",
    "newer file": "format version 7, expected 1",
    "truncated": "truncated|ran out",
    "empty": "Ran out of input",
    "hostile": "names posix.system, which no model holds",
}


@pytest.fixture(scope="module")
def strangers(folder):
    """Files that are no models, for each of the reasons above."""
    models, metadata = load_models(folder / "model-0.pkl")
    content = (folder / "model-0.pkl").read_bytes()
    contents = [
        pickle.dumps(([Foreign()], {})),
        pickle.dumps(torch.nn.Linear(2, 2)),
        newer_members(models, metadata),
        pickle.dumps((models, metadata | {"format_version": 7})),
        content[: len(content) // 2],
        b"",
        pickle.dumps((models, {"seed": Touch(folder / "canary")})),
    ]
    files = [folder / f"{name}.pkl" for name in REASONS]
    for path, written in zip(files, contents, strict=True):
        path.write_bytes(written)
    return files


class Client:
    """A script that runs in the client's folder as a process of its own, beside others."""

    def __init__(self, python, folder, script, *arguments):
        # -E and -s: no PYTHONPATH, no packages of the user's. What is imported first is the script's folder.
        command = [python, "-E", "-s", str(folder / script), *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def told(self):
        """Waits for its end, and gives what it printed, a JSON value per line."""
        printed, complaints = self.process.communicate()
        assert self.process.returncode == 0, complaints
        return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module", params=PYTHONS)
def clients(request, folder, strangers):
    """The three clients with one interpreter, started at once."""
    models = [folder / "dataset.pkl", *models_of(folder)]
    started = {
        "icem_planner": Client(request.param, folder, "icem_planner.py", *models),
        "morel": Client(request.param, folder, "morel.py", *models),
        "strangers": Client(request.param, folder, "strangers.py", *strangers),
    }
    yield started
    for client in started.values():
        client.process.kill()
        client.process.wait()


def models_of(folder):
    return [folder / f"model-{index}.pkl" for index in range(len(CASES))]


def members_by_loss(models, rows):
    """Returns the members' mean squared errors on the held-out rows, and their order."""
    states, actions, next_states = (part[models[0].holdout_idx] for part in rows)
    losses = [
        float(((model.predict(states, actions).astype(np.float64) - next_states) ** 2).mean()) for model in models
    ]
    return losses, np.argsort(losses).tolist()


def test_planner_finds_elites_threshold_and_plans_in_batches_that_shrink(clients, folder, rows, paths):
    for case, path, answer in zip(CASES, models_of(folder), clients["icem_planner"].told(), strict=True):
        models, _ = load_models(path)
        assert answer["types"] == ["list", "dict"]
        assert answer["holdout_idx"] == case.held_out
        states, actions, _ = rows
        elites = list(range(min(4, case.ensemble_size)))
        if case.held_out and case.ensemble_size > 4:
            losses, order = members_by_loss(models, rows)
            elites = order[:4]
            np.testing.assert_allclose(answer["losses"], losses, rtol=1e-5)
            states, actions = (np.delete(part, models[0].holdout_idx, axis=0) for part in (states, actions))
        else:
            assert answer["losses"] is None
        assert answer["elites"] == elites
        ensemble = DynamicsEnsemble.from_members([models[index] for index in elites])
        if len(ensemble) > 1:
            spread = ensemble.disagreement(states, actions, "max_pairwise").numpy()
            assert answer["threshold"] == pytest.approx(float(spread.mean() + spread.std()), rel=1e-4)
        candidates = np.random.default_rng(0).normal(size=(60, 12, 2)).astype(np.float32)[:, 0]
        start = np.repeat(paths[0]["observations"][:1], 60, axis=0)
        np.testing.assert_allclose(
            answer["first_mean"], ensemble.predict(start, candidates)[0].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5
        )
        for sizes in (answer["shared"], answer["separate"]):
            assert sizes == sorted(sizes, reverse=True)
            assert len(sizes) == 12 or sizes[-1] == 0
            assert sizes[-1] < 60 or case.ensemble_size == 1


def test_policy_optimiser_freezes_differentiates_and_rolls_out_members(clients, folder, rows, paths):
    weight = torch.linspace(-1, 1, 8).reshape(4, 2) / 10
    for case, path, answer in zip(CASES, models_of(folder), clients["morel"].told(), strict=True):
        models, metadata = load_models(path)
        elites, selects = list(range(min(4, case.ensemble_size))), case.held_out and case.ensemble_size > 4
        if selects:
            elites = members_by_loss(models, rows)[1][:4]
        assert answer["elites"] == elites
        training = [np.delete(part, models[0].holdout_idx, axis=0) if selects else part for part in rows]
        states, actions, next_states = training
        assert answer["rows"] == len(states)
        ensemble = DynamicsEnsemble.from_members([models[index] for index in elites])
        mean, _ = ensemble.predict(states, actions)
        errors = (mean - torch.from_numpy(next_states)).square().mean(dim=(1, 2))
        np.testing.assert_allclose(answer["loss"], errors, rtol=1e-4)

        # Rows are independent: the gradient of a sum over rows has each row's own derivatives.
        inputs = torch.from_numpy(states[:256]).requires_grad_(True)
        mean, _ = ensemble.predict(inputs, actions[:256])
        squares = [
            [torch.autograd.grad(mean[member, :, dim].sum(), inputs, retain_graph=True)[0] ** 2 for dim in range(4)]
            for member in range(len(ensemble))
        ]
        variance = torch.stack([torch.stack(own).sum(dim=-1).mean(dim=1) for own in squares]).mean(dim=0)
        np.testing.assert_allclose(answer["scale"], 1 / (variance + 1e-8).sqrt(), rtol=1e-4)

        state = torch.from_numpy(np.array([path["observations"][0] for path in paths]))
        for _ in range(4):
            state = torch.from_numpy(models[elites[0]].predict(state, torch.clamp(state @ weight, -1, 1)))
        np.testing.assert_allclose(answer["rollout"], state, rtol=1e-4, atol=1e-4)
        assert (answer["threshold"] > 0) == (case.ensemble_size > 1)
        assert answer["frozen"]
        assert answer["metadata"] == {name: str(value) for name, value in metadata.items()}
        assert answer["env_name"] == "Rotation-v0"


def test_strangers_files_are_refused_in_one_line(clients, strangers, folder):
    for (error, message), path, reason in zip(clients["strangers"].told(), strangers, REASONS.values(), strict=True):
        assert (error, message.count("\n")) == ("ValueError", 0)
        assert message.startswith(f"{str(path)!r} is not a model that learn_model.py wrote (")
        assert re.search(reason, message), message
        assert message.endswith("; expected a model.pkl")
    assert not (folder / "canary").exists()
