"""Robomimic's HDF5 files: demonstrations ``data/demo_N`` with actions and a group of observations each.

Every float vector in ``obs`` is part of the state unless keys are chosen; images are left out. An episode is a
demonstration. ``dones`` mark success as well as the end, by a setting of the program that wrote the file: they end
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.columns import Recording, Stretch, Wanted, read_columns
from data.hdf5 import Array, Group, is_hdf5, open_hdf5, text_attribute
from data.trajectories import Finding
from utils import InputError

KEYS = {"actions": "actions", "rewards": "rewards", "obs": "observations", "next_obs": "next_observations"}


def is_robomimic(path: Path) -> bool:
    """Whether a file is HDF5 with demonstrations in it."""
    if not is_hdf5(path):
        return False
    with open_hdf5(path) as file:
        data = file.get("data")
        return isinstance(data, Group) and any(name.startswith("demo_") for name in data)


def read_robomimic(path: Path, wanted: Wanted) -> Recording:
    """Reads every demonstration of a file.

    Raises:
        InputError: If it cannot be read or learned from.
    """
    with open_hdf5(path) as file:
        data = file["data"]
        demos = {name: data[name] for name in sorted(data, key=_number) if name.startswith("demo_")}
        for name, demo in demos.items():
            if not isinstance(demo, Group) or "obs" not in demo:
                raise InputError(
                    f"{path}: data/{name:.80} has no observations 'obs'; make them from its simulator states with "
                    "robomimic's dataset_states_to_obs.py"
                )
        stretches = [
            Stretch(f"{path}, data/{name:.80}", {ours: demo[theirs] for theirs, ours in KEYS.items() if theirs in demo})
            for name, demo in demos.items()
        ]
        columns, findings = read_columns(stretches, str(path), wanted, file.budget, stretches_are_episodes=True)
        findings += _done_findings(demos)
        env_name = _env_name(data)
    return Recording(columns, tuple(findings), env_name)


def _number(name: str) -> tuple[int, str]:
    digits = name.removeprefix("demo_")
    return (int(digits), "") if re.fullmatch("[0-9]{1,18}", digits) else (-1, name)


def _done_findings(demos: Mapping[str, Group]) -> list[Finding]:
    """Counts the steps before the last of each demonstration that are marked as done."""
    marks = [demo.get("dones") for demo in demos.values()]
    marks = [each for each in marks if isinstance(each, Array) and each.shape and each.dtype.kind in "fiub"]
    count = sum(int(np.count_nonzero(each[:-1])) for each in marks)
    if not count:
        return []
    found = Finding(
        name="done inside demonstrations",
        count=count,
        where="dones",
        effect="these steps mark success, and the demonstration goes on: it stays whole",
        advice="nothing to do",
        matters=False,
    )
    return [found]


def _env_name(data: Group) -> str | None:
    try:
        name = json.loads(text_attribute(data, "env_args") or "null")["env_name"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None
