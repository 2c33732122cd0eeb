"""Where episodes end: recorded rows in, trajectories out.

Letters in shapes: ``N`` rows. A row is one time step, as in ``trajectories.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data.trajectories import Finding, Trajectory


def cut_episodes(columns: Mapping[str, np.ndarray], limit: int | None = None) -> tuple[list[Trajectory], list[Finding]]:
    """Cuts validated columns into episodes; trajectories are views, nothing is copied.

    Args:
        columns: Arrays by field of ``Trajectory``, ``(N, ...)``, and the flags ``terminals`` and, if there are any,
            ``timeouts``, bool ``(N,)``.
        limit: Steps after which the environment ends an episode, used where no timeouts are recorded.

    Returns:
        The episodes in order, and what was found while cutting.
    """
    ends = _episode_ends(columns["terminals"], columns.get("timeouts"), limit)
    starts = np.concatenate(([0], ends[:-1]))
    fields = {key: column for key, column in columns.items() if key not in ("terminals", "timeouts")}
    episodes = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        rows = {"next_observations": None, **{field: column[start:end] for field, column in fields.items()}}
        episodes.append(Trajectory(**rows, terminated=bool(columns["terminals"][end - 1])))
    return episodes, []


def _episode_ends(terminals: np.ndarray, timeouts: np.ndarray | None, limit: int | None) -> np.ndarray:
    """Returns the index after the last row of every episode.

    An episode ends at a terminal, at a timeout, and with the data. D4RL's oldest files have no timeouts: there it also
    ends ``limit`` steps after its start, as in D4RL's ``qlearning_dataset``.
    """
    last = terminals.copy() if timeouts is None else terminals | timeouts  # (N,)
    last[-1] = True
    ends = np.flatnonzero(last) + 1
    if timeouts is None and limit is not None:
        starts = np.concatenate(([0], ends[:-1]))
        pieces = [np.append(np.arange(start + limit, end, limit), end) for start, end in zip(starts, ends, strict=True)]
        ends = np.concatenate(pieces)
    return ends
