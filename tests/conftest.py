"""What several test files share: small transitions, small members, and members whose values tell who made them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.trajectories import Transitions
from deterministic_model import DeterministicModel
from dynamics_model import Architecture, Normalisation, random_stream
from probabilistic_model import ProbabilisticModel


@pytest.fixture(params=[DeterministicModel, ProbabilisticModel], ids=["deterministic", "probabilistic"])
def member_class(request):
    """Each of the two kinds in turn."""
    return request.param


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
