"""What a planner does with ``model.pkl``: predictions, uncertainty and imagined rollouts.

python examples/load_model.py model.pkl
"""

import sys
from pathlib import Path

import torch

# Where the model modules are; last, so that a planner's own modules of equal names (utils, config) come first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from dynamics_model import load_ensemble

ensemble = load_ensemble(sys.argv[1], device="cpu")
states = torch.zeros(5, ensemble.state_dim)  # (batch, state_dim), raw units
actions = torch.zeros(5, 30, ensemble.action_dim)  # (batch, horizon, action_dim)

mean, variance = ensemble.predict(states, actions[:, 0])  # (ensemble, batch, state_dim); variance None: deterministic
penalty = ensemble.disagreement(states, actions[:, 0], "max_pairwise")  # (batch,), as MOReL measures it
imagined = ensemble.rollout(states, actions, propagation="tsinf")  # (batch, horizon + 1, state_dim), as PETS does

print(
    f"{len(ensemble)} members; mean {tuple(mean.shape)}, variance {None if variance is None else tuple(variance.shape)}"
)
print(f"disagreement {penalty.numpy().round(4)}; rollout {tuple(imagined.shape)}")
