"""The horizon at which rollouts are compared: chosen on validation trajectories, by a rule that knows no test result.

The skill of a forecast is ``1 - error / error of predicting the mean training state``: 1 is perfect, and 0 says nothing
of where a trajectory is. At horizons where nobody has skill, arms would be ranked by how timidly they predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

HORIZONS = (1, 5, 10, 25, 50, 100, 200)
MAX_STARTS = 256
LEAST_SKILL = 0.5  # of the best arm, at the horizon that is chosen
RULE = (
    "the longest horizon, of those that half of the start points reach, at which the best arm's mean rollout keeps at "
    f"least {LEAST_SKILL:g} of skill against the mean training state, on validation trajectories"
)


def choose_horizons(skills: Mapping[tuple[str, str], pd.DataFrame], datasets: Sequence[str]) -> pd.DataFrame:
    """Chooses each dataset's horizon by ``RULE``; the shortest one where no arm has so much skill.

    Args:
        skills: Tables of ``evaluation.rollouts.validation_skill`` by arm and dataset, at the arm's chosen rate.
        datasets: Their names.

    Returns:
        dataset, horizon, arm (the best one there), skill (its skill).
    """
    records = []
    for dataset in datasets:
        parts = [table.assign(arm=arm) for (arm, where), table in skills.items() if where == dataset]
        table = pd.concat(parts, ignore_index=True)
        table = table[2 * table.starts >= table.starts.max()]
        able = table[table.skill >= LEAST_SKILL]
        horizon = able.horizon.max() if len(able) else table.horizon.min()
        at_horizon = table[table.horizon == horizon]
        best = at_horizon.loc[at_horizon.skill.idxmax()]
        records.append({"dataset": dataset, "horizon": int(horizon), "arm": best.arm, "skill": best.skill})
    return pd.DataFrame(records, columns=["dataset", "horizon", "arm", "skill"])
