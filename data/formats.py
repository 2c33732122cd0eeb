"""Formats of datasets. ``FORMATS`` lists them: how each is recognised, and the reader of its module.

A new format takes a module with these two functions and a row in that table. Readers return validated columns
(``columns.py``); ``episodes.py`` cuts them into trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.columns import Recording, Wanted
from data.episodes import EpisodeRules, cut_episodes
from data.hdf5 import is_hdf5, read_d4rl
from data.minari import is_minari, read_minari
from data.npz import is_npz, read_npz
from data.pickles import is_pickle, read_pickle
from data.robomimic import is_robomimic, read_robomimic
from data.trajectories import Finding, Trajectory
from utils import InputError


@dataclass(frozen=True)
class Format:
    """A row of ``FORMATS``.

    Attributes:
        name: What to call it.
        recognises: Whether a path is of this format, unless an earlier one has recognised it.
        read: Reads it into memory once.
        is_one_file: Whether a dataset is known by the digest of its one file, and not by that of its arrays.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Wanted], Recording]
    is_one_file: bool = True


# Asked in this order; D4RL's layout is that of every HDF5 file that has no other.
FORMATS = (
    Format("Minari", is_minari, read_minari, is_one_file=False),
    Format("robomimic", is_robomimic, read_robomimic),
    Format("D4RL's HDF5", is_hdf5, read_d4rl),
    Format("pickle of paths", is_pickle, read_pickle),
    Format(".npz", is_npz, read_npz),
)


def find_format(path: Path) -> Format:
    """Returns the format of a file or folder.

    Raises:
        InputError: If it has none of them.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path} is truncated (incomplete): it has 0 bytes; fetch it again under another name")
    found = next((format for format in FORMATS if format.recognises(path)), None)
    if found is None:
        kinds = ", ".join(format.name for format in FORMATS)
        raise InputError(f"{path} has none of the formats that can be read: {kinds}; give a file or folder of one")
    return found


def to_trajectories(
    recording: Recording, where: str, limit: int | None = None, rules: EpisodeRules | None = None
) -> tuple[list[Trajectory], tuple[Finding, ...]]:
    """Cuts what a reader returned into trajectories.

    Args:
        recording: Validated columns.
        where: What they are from, for messages.
        limit: Steps after which the environment ends an episode.
        rules: How the data set records its episodes; None: as usual.

    Returns:
        The trajectories, and what was found while reading and cutting.

    Raises:
        InputError: If there is no transition in them.
    """
    trajectories, found = cut_episodes(recording.columns, limit, rules or EpisodeRules())
    if not any(trajectory.num_transitions for trajectory in trajectories):
        raise InputError(
            f"{where} has no transition: all its trajectories have length 1 and there are no next_observations; "
            "give trajectories of 2 rows or more"
        )
    findings = (*recording.findings, *found)
    if limit is None and not {"timeouts", "next_observations"} & set(recording.columns):
        findings += (_only_terminals(trajectories),)
    return trajectories, findings


def _only_terminals(trajectories: Sequence[Trajectory]) -> Finding:
    return Finding(
        name="episode ends from terminals only",
        count=len(trajectories),
        where="the whole file",
        effect="it has neither timeouts nor next_observations: where a time limit cut an episode, a transition across "
        "the cut is learned",
        advice="if time limits cut some episodes, add a boolean array 'timeouts'",
        matters=True,
    )
