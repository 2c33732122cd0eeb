"""Which states need float64.

Datasets are kept in float32, as models compute. That loses something where a state dimension is large and moves little,
such as a position of 5e5 m (its float32 neighbours are 3 cm apart): then changes of state are mostly rounding. A
dataset that comes in float64 and has such dimensions keeps its states in float64, so that changes can be taken before
anything is rounded.
"""

from __future__ import annotations

import numpy as np

from data.trajectories import Finding

# A dimension needs float64 if it spans few float32 steps (at its magnitude), or if nine out of ten of its changes are
# of few.
MIN_STEPS_OF_SPREAD = 1e4
MIN_STEPS_OF_CHANGE = 64.0
NOISE = 1e-9  # of the magnitude; what varies less is a simulator's noise, which nobody needs to resolve
SAMPLED_ROWS = 10_000
LARGEST = 1e38  # of float32, but for a factor of 3: readers refuse what is larger


def unresolved_dimensions(states: np.ndarray, next_states: np.ndarray) -> list[int]:
    """Returns the dimensions of which float32 would lose something.

    Args:
        states: Some states, ``(rows, state_dim)`` in float64.
        next_states: Those that followed them, likewise.
    """
    if not len(states):
        return []
    magnitude = np.abs(states).max(axis=0)
    step = np.spacing(np.minimum(magnitude, LARGEST).astype(np.float32)).astype(np.float64)
    spread = np.ptp(states, axis=0)
    change = np.abs(next_states - states)
    usual = np.array([np.quantile(column[column > 0], 0.9) if column.any() else 0.0 for column in change.T])
    noise = NOISE * magnitude
    is_narrow = (noise < spread) & (spread < MIN_STEPS_OF_SPREAD * step)
    is_slow = (noise < usual) & (usual < MIN_STEPS_OF_CHANGE * step)
    return np.flatnonzero(is_narrow | is_slow).tolist()


def precision_finding(dimensions: list[int]) -> Finding:
    """Returns what is to be said of dimensions that need float64."""
    shown = ", ".join(map(str, dimensions[:8])) + " ..." * (len(dimensions) > 8)
    return Finding(
        name="fine steps",
        count=len(dimensions),
        where=f"state dimension{'s' * (len(dimensions) > 1)} {shown}",
        effect="float32 would round their changes, so states are kept in float64",
        advice="subtract an offset, so that programs that read float32 resolve them too",
        matters=False,
    )
