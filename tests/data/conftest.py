"""What the tests of datasets share: columns whose values say where they are from, HDF5 files of them, comparison."""

import h5py
import numpy as np
import pytest

from data.trajectories import Dataset, Trajectory

ACTION_DIM = 2


def make_columns(lengths, *, next_observations=True, simulator_states=False):
    """Returns columns of D4RL's format, by key, for episodes of these lengths.

    In row ``t`` of episode ``e`` the observation is ``100 e + t`` plus 0, 0.25 and 0.5, the next one is one more, both
    actions are ``100 e + t + 0.125`` and the reward is ``-(100 e + t)``. Even episodes end in a terminal, odd ones in a
    timeout.
    """
    codes = np.concatenate([100 * e + np.arange(length) for e, length in enumerate(lengths)]).astype(np.float32)
    ends, is_even = np.cumsum(lengths) - 1, np.arange(len(lengths)) % 2 == 0
    observations = codes[:, None] + np.float32([0, 0.25, 0.5])
    result = {
        "observations": observations,
        "actions": np.repeat(codes[:, None] + np.float32(0.125), ACTION_DIM, axis=1),
        "rewards": -codes,
        "terminals": np.isin(np.arange(len(codes)), ends[is_even]),
        "timeouts": np.isin(np.arange(len(codes)), ends[~is_even]),
    }
    if next_observations:
        result["next_observations"] = observations + 1
    if simulator_states:
        result["infos/qpos"], result["infos/qvel"] = codes[:, None] + 7.0, codes[:, None] + 8.0
    return result


@pytest.fixture
def columns():
    """Returns the function that makes columns."""
    return make_columns


@pytest.fixture
def make(columns):
    """Returns a function that makes a dataset of trajectories of these lengths; coded as ``columns``."""

    def build(lengths, *, next_observations=True):
        content = columns(lengths, next_observations=next_observations)
        ends = np.cumsum(lengths)
        trajectories = []
        for start, end in zip(ends - lengths, ends, strict=True):
            states, actions, rewards = (content[key][start:end] for key in ("observations", "actions", "rewards"))
            following = content["next_observations"][start:end] if next_observations else None
            trajectories.append(Trajectory(states, actions, rewards, following, terminated=False))
        return Dataset("made", None, "", trajectories)

    return build


@pytest.fixture
def write_hdf5():
    """Returns a function that writes columns to a file, with attributes, and returns its path."""

    def write(path, content, **attributes):
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file[key] = value
            file.attrs.update(attributes)
        return path

    return write


@pytest.fixture
def assert_same():
    """Returns a function that checks that two lists hold the same trajectories, to the bit and in the same types."""

    def check(one, other):
        for a, b in zip(one, other, strict=True):
            assert a.terminated is b.terminated
            for field in ("observations", "actions", "rewards", "next_observations"):
                x, y = getattr(a, field), getattr(b, field)
                assert (x is None) == (y is None), field
                if x is not None:
                    assert x.dtype == y.dtype == np.float32
                    np.testing.assert_array_equal(x, y)

    return check
