"""Several datasets as one: whose trajectories follow each other, and which of them is whose."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from data import d4rl_registry
from data.trajectories import Dataset, Finding, Part, Trajectory
from utils import InputError


def joint_name(names: Sequence[str]) -> str:
    """Returns the name of datasets that were joined."""
    return " + ".join(names)


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Joins datasets of the same states and actions; one alone stays as it is.

    Where only some have next observations, rewards or simulator states, next observations are made for the others from
    the rows that follow, and rewards and simulator states are left out for all.

    Raises:
        InputError: If states or actions are not the same in all of them.
    """
    first, *others = datasets
    if not others:
        return first
    for other in others:
        if (other.state_dim, other.action_dim) != (first.state_dim, first.action_dim):
            raise InputError(
                f"{other.name} has {other.state_dim} state and {other.action_dim} action dimensions, but {first.name} "
                f"has {first.state_dim} and {first.action_dim}; only datasets of the same environment can be joined"
            )
    has = {
        field: [getattr(dataset.trajectories[0], field) is not None for dataset in datasets]
        for field in ("next_observations", "rewards", "qpos", "qvel")
    }
    dropped = dict.fromkeys(field for field in ("rewards", "qpos", "qvel") if any(has[field]) and not all(has[field]))
    joined, parts, findings = [], [], []
    for dataset in datasets:
        trajectories = dataset.trajectories
        if any(has["next_observations"]):
            trajectories = [trajectory for whole in trajectories if (trajectory := _with_following(whole))]
        joined += [dataclasses.replace(trajectory, **dropped) for trajectory in trajectories]
        parts.append(Part(dataset.name, dataset.sha256, len(trajectories)))
        findings += [dataclasses.replace(f, where=f"{dataset.name}: {f.where}") for f in dataset.findings]
    if "rewards" in dropped:
        without = [dataset.name for dataset in datasets if dataset.trajectories[0].rewards is None]
        findings.append(_no_common_rewards(without))
    name = joint_name([dataset.name for dataset in datasets])
    sha256 = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return Dataset(name, _common_env(datasets), sha256, joined, tuple(findings), tuple(parts))


def _with_following(trajectory: Trajectory) -> Trajectory | None:
    """Returns a trajectory with next observations, as views of its rows; None where it has no transition."""
    if trajectory.next_observations is not None:
        return trajectory
    if len(trajectory) == 1:
        return None
    fields = ("observations", "actions", "rewards", "qpos", "qvel")
    rows = {field: column[:-1] for field in fields if (column := getattr(trajectory, field)) is not None}
    return dataclasses.replace(trajectory, **rows, next_observations=trajectory.observations[1:])


def _no_common_rewards(names: list[str]) -> Finding:
    return Finding(
        name="rewards left out",
        count=len(names),
        where=", ".join(names),
        effect="these datasets have no rewards, so those of the others are not used",
        advice="to learn rewards, give datasets that all have them",
        matters=True,
    )


def _common_env(datasets: Sequence[Dataset]) -> str | None:
    """Returns the environment of all datasets; ids of D4RL that stand for the same one count as one."""
    first = datasets[0].env_name
    names = {d4rl_registry.gymnasium_id(d.env_name) or d.env_name if d.env_name else None for d in datasets}
    return first if len(names) == 1 else None
