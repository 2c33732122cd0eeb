"""data.precision: which states stay float64, and which become float32."""

from pathlib import Path

import numpy as np
import pytest

from data.columns import Stretch, Wanted, read_columns
from data.limits import Budget


def read(*stretches, episodes=False):
    named = [Stretch(f"a.pkl, path {index}", entries) for index, entries in enumerate(stretches)]
    return read_columns(named, "a.pkl", Wanted(), Budget(Path("a.pkl")), stretches_are_episodes=episodes)


def walk(offset, step, rows=300):
    """States of one dimension that starts at an offset and moves by about ``step`` per row; the second one is usual."""
    random = np.random.default_rng(0)
    return np.stack([offset + np.cumsum(random.normal(size=rows) * step), random.normal(size=rows)], axis=1)


def states_of(values, **changes):
    content = {"observations": values, "actions": np.zeros((len(values), 1)), "timeouts": np.zeros(len(values), bool)}
    return read({**content, **changes})


@pytest.mark.parametrize(("offset", "step"), [(5e5, 0.01), (52.5, 1e-5), (1e9, 50.0)])
@pytest.mark.parametrize("is_paired", [True, False])
def test_states_that_float32_does_not_resolve_stay_float64(offset, step, is_paired):
    values = walk(offset, step)
    following = {} if is_paired else {"next_observations": values[1:], "observations": values[:-1]}
    sizes = {key: np.zeros((299, 1), bool)[:, 0] for key in ("timeouts",)} | {"actions": np.zeros((299, 1))}
    columns, findings = states_of(values, **following, **({} if is_paired else sizes))
    assert columns["observations"].dtype == np.float64
    np.testing.assert_array_equal(columns["observations"], values[: len(columns["observations"])])
    assert columns["actions"].dtype == np.float32
    if not is_paired:
        assert columns["next_observations"].dtype == np.float64
    (found,) = findings
    assert (found.name, found.where) == ("fine steps", "state dimension 0")


@pytest.mark.parametrize(
    "values",
    [
        walk(0, 0.1),  # usual
        walk(1.0, 0.01),
        walk(1.0, 0.0),  # constant
        walk(1.0, 1e-12),  # constant but for a simulator's noise
        walk(5e5, 0.01).astype(np.float32),  # nothing left to keep
        np.where(np.arange(300)[:, None] % 5, 1.0 + 1e-8 * walk(0, 1), walk(0, 0.5)),  # moves, and rests with noise
    ],
)
def test_other_states_become_float32(values):
    columns, findings = states_of(values)
    assert columns["observations"].dtype == np.float32
    assert not findings


def test_one_stretch_that_needs_float64_is_enough():
    parts = [{"observations": walk(offset, 0.01), "actions": np.zeros((300, 1))} for offset in (5e5, 5e5 + 1)]
    columns, _ = read(*parts, episodes=True)
    assert columns["observations"].dtype == np.float64
    single = [{key: value[:1] for key, value in part.items()} for part in parts]  # no change to judge by
    assert read(*single, episodes=True)[0]["observations"].dtype == np.float32
