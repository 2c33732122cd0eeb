"""Small cells to run on a small dataset, and made-up results of cells whose numbers can be worked out."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from config import LearnConfig
from data.trajectories import Dataset, Trajectory
from study.cells import Cell, CellOutcome, CellRecord, Result
from utils import Origin

LENGTH, EPISODES = 30, 12


@pytest.fixture(scope="session")
def dataset():
    """Twelve trajectories of a noisy linear system with 3 state and 2 action dimensions."""
    random = np.random.default_rng(0)
    trajectories = []
    for _ in range(EPISODES):
        states, actions = [random.normal(size=3)], random.uniform(-1, 1, (LENGTH, 2))
        for action in actions:
            states.append(0.9 * states[-1] + action.sum() * np.array([0.1, 0.2, 0.3]) + 0.05 * random.normal(size=3))
        states, rewards = np.array(states, np.float32), np.zeros(LENGTH, np.float32)
        trajectories.append(Trajectory(states[:-1], actions.astype(np.float32), rewards, states[1:], terminated=False))
    return Dataset("one", None, "d1ge57", trajectories)


@pytest.fixture(scope="session")
def make_cell():
    """Returns a function that makes a small cell on the dataset ``one``, with other settings where they are given."""

    def make(arm="point", dataset="one", is_trial=False, **settings):
        small = {"ensemble_size": 2, "hidden_size": (8,), "fit_epochs": 2, "batch_size": 64, "split_seed": 0}
        return Cell(arm, dataset, LearnConfig(**small | settings), is_trial, "cpu", threads=1)

    return make


@pytest.fixture(scope="session")
def make_result():
    """Returns a function that makes up the result of a cell, with the tables that are given."""

    def make(cell, tables=None, *, failure=None, val_mse=1.0, metrics=None, commit="c0ffee"):
        outcome = CellOutcome(failure, None if failure else val_mse, metrics or {})
        origin = Origin(commit, {"python": "3.11", "torch": "2.9", "numpy": "2.1"})
        timing = {"training": 3000.0, "test": 600.0}
        return Result(CellRecord(cell.request("d1ge57"), outcome, timing, origin), tables or {})

    return make


@pytest.fixture(scope="session")
def trial_tables():
    """The tables that a trial has."""
    return {
        "training": pd.DataFrame({"step": [0, 0], "model_id": [0, 1], "val_mse": [2.0, 1.0]}),
        "members": pd.DataFrame({"model_id": [0, 1], "val_mse": [2.0, 1.0]}),
        "skill": pd.DataFrame({"horizon": [1], "starts": [10], "skill": [0.5]}),
    }


@pytest.fixture(scope="session")
def make_study(make_cell, make_result):
    """Returns a function that makes up the results of a study of two arms, the errors of ``b`` twice those of ``a``.

    Each cell has 4 test trajectories, and errors in proportion to arm, ``1 + seed`` and ``1 + trajectory``. Each has 3
    members, whose errors have no correlation and are 1, 2 and 3 times a unit. With ``policies``, six of them.
    """

    def tables(scale, seed):
        trajectory, error = np.arange(4), scale * (1 + seed) * np.array([1.0, 2.0, 3.0, 4.0])
        steps = np.array([1, 5, 10, 25, 50])
        reached = {1: 4, 5: 3, 10: 2, 25: 1, 50: 1}  # start points with that many steps left
        starts = [(p, t, k, error[t] * k) for p in ("mean", "tsinf") for k, n in reached.items() for t in range(n)]
        curve = {
            "step": [0, 1, 2] * 2,
            "model_id": [0] * 3 + [1] * 3,
            "val_mse": [4.0, 1.0, math.e, 3.0, 2.0, 1.0],
            "train_mse": 1.0,
        }
        rollouts = [
            {
                "propagation": name,
                "horizon": steps,
                "median": error[1] * steps,
                "skill": 1 / steps,
                "exploded": 0.1 * scale,
            }
            for name in ("mean", "tsinf")
        ]
        first, second = np.triu_indices(3)
        products = np.square(scale * np.array([1.0, 2.0, 3.0]))[first] * (first == second)
        uncertainty = {"measure": "total_std", "spearman": [0.5, 0.2], "auroc_worst": 0.8, "rows": ["test", "probe"]}
        return {
            "trajectories": pd.DataFrame(
                {
                    "trajectory": trajectory,
                    "rows": 3,
                    "mse": np.square(error),
                    "nll": scale,
                    "crps": error,
                    "sharpness": error,
                }
            ),
            "row_errors": pd.DataFrame({"trajectory": np.repeat(trajectory, 3), "error": np.repeat(error, 3)}),
            "member_products": pd.DataFrame({"first": first, "second": second, "product": products}),
            "starts": pd.DataFrame(starts, columns=["propagation", "trajectory", "horizon", "error"]),
            "training": pd.DataFrame(curve),
            "rollout": pd.concat(map(pd.DataFrame, rollouts), ignore_index=True),
            "uncertainty": pd.DataFrame(uncertainty),
            "calibration": pd.DataFrame({"variant": ["raw"], "dimension": ["all"], "ece": [0.1 * scale]}),
            "reliability": pd.DataFrame({"variant": "raw", "promised": [0.5, 0.9], "observed": [0.4, 0.8]}),
        }

    def values(scale, seed):
        rows = [
            {
                "policy": f"p{p}",
                "propagation": name,
                "horizon": horizon,
                "true": p,
                "predicted": p + error,
                "escaped": 0.0,
            }
            for horizon in ("truncated", "discounted")
            for name, size in (("simulator", 0.01), ("ts1", 0.1), ("tsinf", 0.2))
            for p, error in enumerate(scale * size * (1 + 0.1 * seed) * np.array([1, 1.5, 2, 1, 0.5, 1]))
        ]
        return pd.DataFrame(rows)

    def make(datasets=("x",), seeds=3, failing=(), splits=(0,), policies=False):
        results = {}
        for seed, split in itertools.product(range(seeds), splits):
            for dataset in datasets:
                for arm, scale in (("a", 1.0), ("b", 2.0)):
                    cell = make_cell(arm, dataset, seed=seed, split_seed=split, fit_lr=0.1)
                    if cell.key in failing:
                        results[cell.key] = make_result(cell, failure="diverged")
                    else:
                        made = tables(scale, seed) | ({"policy_values": values(scale, seed)} if policies else {})
                        results[cell.key] = make_result(cell, made, metrics={"r2": 0.5})
        return results

    return make
