"""What the tests of evaluation share: data whose truth is known, and ensembles whose predictions are."""

import numpy as np
import pytest

from data.trajectories import Dataset, Trajectory
from dynamics_model import DynamicsEnsemble
from probabilistic_model import ProbabilisticModel

SHA256 = "0" * 64


@pytest.fixture
def noisy_dataset():
    """Returns a function that draws trajectories whose states change by Gaussian noise, whatever is done."""

    def draw(trajectories=12, length=300, deviation=(0.5, 20.0), seed=0):
        random = np.random.default_rng(seed)
        made = []
        for _ in range(trajectories):
            change = random.normal(size=(length, 2)) * deviation
            states = random.normal(size=(length, 2))
            actions, rewards = random.normal(size=(length, 1)), np.zeros(length)
            parts = (part.astype(np.float32) for part in (states, actions, rewards, states + change))
            made.append(Trajectory(*parts, terminated=False))
        return Dataset("noise", None, SHA256, made)

    return draw


@pytest.fixture
def walks():
    """Returns a function that makes trajectories of two dimensions which go up by ``change`` at every step."""

    def make(*lengths, start=0.0, change=(1.0, 10.0)):
        made = []
        for length in lengths:
            states = (start + np.outer(np.arange(length + 1), change)).astype(np.float32)
            zeros = np.zeros(length, np.float32)
            made.append(Trajectory(states[:-1], zeros[:, None], zeros, states[1:], terminated=False))
        return Dataset("walks", None, SHA256, made)

    return make


@pytest.fixture
def constant_ensemble(constant_member):
    """Returns a function that builds members, each of which always predicts one of ``changes``, in units of (1, 10).

    Probabilistic members predict the variances given, in squares of these units.
    """

    def build(kind, changes, variance=None):
        options = {} if variance is None else {"variance": list(np.broadcast_to(variance, 2).astype(float))}
        scale = {"delta_scale": [1.0, 10.0]}
        return DynamicsEnsemble.from_members(
            [constant_member(kind, [change, change], **options, **scale) for change in changes]
        )

    return build


@pytest.fixture
def knowing_ensemble(constant_ensemble):
    """Returns a function that builds members who expect no change: of ``noisy_dataset`` they know all there is."""

    def build(kind=ProbabilisticModel, members=2, variance=(0.25, 4.0)):
        return constant_ensemble(kind, [0.0] * members, variance if kind is ProbabilisticModel else None)

    return build


@pytest.fixture
def overall():
    """Returns a function that looks up the line of a table with these values, for all dimensions together."""

    def find(table, **chosen):
        for column, value in {"dimension": "all", **chosen}.items():
            table = table[table[column] == value]
        (row,) = table.to_dict("records")
        return row

    return find
