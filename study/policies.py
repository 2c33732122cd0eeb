"""Does it matter downstream? What the models of a study say that policies are worth, and what these really earn.

``policy_table`` is what a cell keeps: values of policies, from bad to good, in the cell's model and in the simulator.
``policy_analysis.py`` analyses the tables of all cells.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from config import LearnConfig
from data.behaviour import SquashedGaussianPolicy
from data.npz import read_arrays
from data.sources import source_attributes
from data.trajectories import Dataset, Transitions
from dynamics_model import FORMAT_VERSION, DynamicsEnsemble, load_ensemble
from evaluation.policy_values import (
    STEPS,
    PolicyTruths,
    StackedPolicies,
    perturb,
    policy_values,
    simulate_policies,
)
from evaluation.report import slug
from mujoco_tasks import TASKS, StepFunction, Task
from training.batches import normalise_rows
from training.build import build_ensemble
from training.loop import train_ensemble
from utils import ROOT, InputError, atomic_write

POLICIES = ROOT / "data" / "policies"  # a folder per environment, with the snapshots of a training
PERTURBATION = 0.2  # of the copies: relative to each weight
SIMULATOR_PACKAGES = ("gymnasium", "mujoco")
STARTS = 32
_AGAIN = "delete it to have it made again"
SEED = 20_000  # of episodes and of perturbations; the seeds of a study are smaller

# The reward network, where observations do not give the reward: its dynamics are linear, and not used.
_REWARD = LearnConfig(
    ensemble_size=1, hidden_size=(), learn_reward=True, fit_epochs=30, fit_lr=3e-3, seed=SEED, reduced_precision=0
)

# --- What a cell does ---


@dataclass(frozen=True)
class PolicyBench:
    """All that the models of one dataset have in common when they evaluate policies.

    Attributes:
        policies: Snapshots of a training in the dataset's environment, then a perturbed copy of each.
        truths: What they earn in the simulator, with the dataset's process noise.
        task: Of the environment.
        reward: Pays models and simulator alike.
        state_bounds: The range of the training states, widened by half its width on either side.
    """

    policies: StackedPolicies
    truths: PolicyTruths
    task: Task
    reward: StepFunction
    state_bounds: tuple[np.ndarray, np.ndarray]


def policy_table(
    ensemble: DynamicsEnsemble, dataset: Dataset, rows: Transitions, folder: Path, *, policies: Path = POLICIES
) -> pd.DataFrame | None:
    """Evaluates policies in a trained model.

    Args:
        ensemble: The model.
        dataset: What it was trained on.
        rows: Those of the dataset that it was trained on.
        folder: Where the simulator's episodes and the reward network are kept, for the other models.
        policies: Where snapshots are, in a folder per environment.

    Returns:
        policy, propagation, horizon, true, predicted, escaped: see ``evaluation.policy_values``. None where there are
        no policies that act on the dataset's states.
    """
    bench = prepare_bench(dataset, rows, folder, policies)
    if bench is None:
        return None
    return policy_values(ensemble, bench.policies, bench.truths, bench.task, bench.reward, bench.state_bounds)


def prepare_bench(dataset: Dataset, rows: Transitions, folder: Path, policies: Path = POLICIES) -> PolicyBench | None:
    """Makes what is missing in the folder, and reads what is there; arguments are those of ``policy_table``.

    Raises:
        InputError: If there are policies, but not the packages to simulate them.
    """
    task = TASKS.get(dataset.env_name)
    snapshots = load_snapshots(dataset.env_name, policies) if task else {}
    if not snapshots or StackedPolicies(list(snapshots.values())).state_dim != dataset.state_dim:
        return None  # where the dataset hides a part of the state, policies cannot act on the rest
    if missing := [name for name in SIMULATOR_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"dataset {dataset.name!r} has policies to evaluate in {dataset.env_name}, which needs {missing[0]}: pip "
            "install 'gymnasium[mujoco]'"
        )
    random = np.random.default_rng(SEED)
    copies = {f"{name}-perturbed": perturb(each, PERTURBATION, random) for name, each in snapshots.items()}
    everyone = snapshots | copies
    stacked = StackedPolicies(list(everyone.values()))
    noise = float(source_attributes(dataset.name).get("process_noise", 0.0))
    made_from = {
        "dataset": dataset.sha256,
        "rows": digest(rows.states, rows.actions),
        "policies": {name: digest(*each.arrays.values()) for name, each in everyone.items()},
        "process_noise": noise,
        "settings": [PERTURBATION, STARTS, STEPS, SEED, _REWARD.to_dict()],
        "versions": [importlib.metadata.version(name) for name in SIMULATOR_PACKAGES],
    }
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    place = f"{slug(dataset.name)[:100]}-{key}"
    reward = shared_reward(task, rows, folder / f"{place}.pkl")
    path = folder / f"{place}.npz"
    if not os.path.lexists(path):
        truths = simulate_policies(
            list(everyone), stacked, task, reward, starts=STARTS, seed=SEED, process_noise=noise, steps=STEPS
        )
        write_truths(truths, path)
    truths = read_truths(path)
    expected = (tuple(everyone), (STARTS, dataset.state_dim), SEED, STEPS)
    if (truths.names, truths.starts.shape, truths.seed, truths.steps) != expected:
        raise InputError(f"{path} is damaged: it is of other episodes; {_AGAIN}")
    return PolicyBench(stacked, truths, task, reward, widened_range(rows))


def load_snapshots(env_name: str | None, policies: Path = POLICIES) -> dict[str, SquashedGaussianPolicy]:
    """Returns the snapshots of an environment's policies by name, in the order of their training; empty without any."""
    files = sorted((policies / snapshot_folder(env_name)).glob("*.npz")) if env_name else []
    return {file.stem: SquashedGaussianPolicy.load(file, env_name, input_dim(file)) for file in files}


def snapshot_folder(env_name: str) -> str:
    """Returns the folder of an environment's snapshots: ``hopper`` for Hopper-v5."""
    return env_name.rpartition("-")[0].lower()


def input_dim(file: Path) -> int:
    """Returns the length of the observations that a policy acts on."""
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["weight_0"].shape[1]


def digest(*arrays: np.ndarray) -> str:
    """Returns a checksum of arrays."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def widened_range(transitions: Transitions) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest states, ``(state_dim,)`` each, half the range's width beyond the data's."""
    states = np.concatenate([transitions.states, transitions.next_states])
    low, high = states.min(axis=0), states.max(axis=0)
    return low - (high - low) / 2, high + (high - low) / 2


def shared_reward(task: Task, transitions: Transitions, path: Path) -> StepFunction:
    """Returns the reward model of a dataset: the task's formula where it suffices, else a network, kept as a file.

    Raises:
        InputError: If the file is no such network.
    """
    if task.reward_source == "formula":
        return task.reward
    if not os.path.lexists(path):
        network = build_ensemble(_REWARD, transitions)
        for _ in train_ensemble(network, _REWARD, normalise_rows(network, transitions), score_every=None):
            pass
        with atomic_write(path) as file:
            pickle.dump((network.members(), {"format_version": FORMAT_VERSION, "seed": SEED}), file, protocol=4)
    try:
        network = load_ensemble(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; {_AGAIN}") from None
    expected = build_ensemble(_REWARD, transitions)
    if (network.architecture, len(network)) != (expected.architecture, len(expected)):
        raise InputError(f"{path} is damaged: it holds another network; {_AGAIN}")
    return lambda *step: network.predict_reward(*step)[0]


def write_truths(truths: PolicyTruths, path: Path) -> None:
    """Writes what policies earn in the simulator."""
    with atomic_write(path) as file:
        np.savez_compressed(file, **vars(truths))


def read_truths(path: Path) -> PolicyTruths:
    """Reads what ``write_truths`` wrote.

    Raises:
        InputError: If the file is damaged.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        arrays = read_arrays(path)
        names, seed, steps = tuple(arrays.pop("names").tolist()), int(arrays.pop("seed")), int(arrays.pop("steps"))
        truths = PolicyTruths(names=names, seed=seed, steps=steps, **arrays)
        starts, returns = truths.starts, truths.returns.shape
        if starts.ndim != 2 or returns != (2, len(names), len(starts)) or returns != truths.model_paid.shape:
            raise ValueError("its arrays do not belong together")
        if not all(np.isfinite(values).all() for values in (starts, truths.returns, truths.model_paid)):
            raise ValueError("its numbers are not finite")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # an InputError is a ValueError
        raise InputError(f"{path} is damaged ({error}); {_AGAIN}") from None
    return truths
