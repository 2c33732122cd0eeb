"""Trains soft actor-critic inside ``model.pkl``, pessimistic where the model does not know; tries it in the real one.

python examples/train_policy.py model.pkl --dataset data/bundled/hopper-medium-demo.hdf5

The model halts episodes where its members disagree more than on nearly all of the data (MOReL, Kidambi et al. 2020);
with ``--pessimism mopo`` it pays less where it is unsure (MOPO, Yu et al. 2020), with ``none`` it is trusted. As in
MOPO, episodes in the model are short and start anywhere in the data, since errors grow with every step, and the policy
learns from the data, too. HalfCheetah needs a model that has learned the reward (``--params learn_reward=true``).
"""

import argparse
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy

# Where the model modules are; last, so that a planner's own modules of equal names (utils, config) come first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from dynamics_model import load_ensemble
from model_env import MOPO, ModelEnv, MOReL, VectorModelEnv, as_sb3, disagreement_threshold

DISCOUNT = 0.99

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="model.pkl")
parser.add_argument("--dataset", required=True, help="D4RL-format HDF5 that the model learned from")
parser.add_argument("--pessimism", choices=["morel", "mopo", "none"], default="morel")
parser.add_argument("--quantile", type=float, default=0.999, help="MOReL: share of the data that counts as known")
parser.add_argument("--penalty", type=float, default=1.0, help="MOPO: rewards per unit of uncertainty")
parser.add_argument("--horizon", type=int, default=20, help="steps of an episode in the model")
parser.add_argument("--envs", type=int, default=20, help="environments inside the model that run at a time")
parser.add_argument("--steps", type=int, default=40_000, help="in the model, and gradient steps")
parser.add_argument("--evaluations", type=int, default=8, help="how often the policy is tried in the real environment")
parser.add_argument("--episodes", type=int, default=5, help="of each evaluation")
parser.add_argument("--width", type=int, default=128, help="of the two hidden layers")
args = parser.parse_args()

ensemble = load_ensemble(args.model)
with h5py.File(args.dataset) as file:
    states, actions, rewards, terminals, timeouts = (
        file[name][:] for name in ("observations", "actions", "rewards", "terminals", "timeouts")
    )
    has_next = "next_observations" in file  # else the next row's, within an episode
    next_states = file["next_observations"][:] if has_next else np.roll(states, -1, axis=0)
ends = terminals | timeouts
pessimism = None
if args.pessimism == "morel":  # a halt is as bad as an end, or as the lowest reward for ever
    threshold = disagreement_threshold(ensemble, states, actions, quantile=args.quantile)
    pessimism = MOReL(threshold, halt_reward=min(0.0, float(rewards.min())) / (1 - DISCOUNT))
elif args.pessimism == "mopo":  # members that predict points have no uncertainty of their own
    pessimism = MOPO(args.penalty, "max_aleatoric" if "max_aleatoric" in ensemble.disagreements else "max_pairwise")
core = ModelEnv(ensemble, pessimism=pessimism)
print(core)

envs = VectorModelEnv(core, args.envs, initial_states=states, horizon=args.horizon, autoreset_mode="SameStep")
torch.set_num_threads(1)  # networks this small gain nothing from a second one
sac = SAC(
    "MlpPolicy",
    as_sb3(envs),
    gamma=DISCOUNT,
    learning_rate=1e-3,
    gradient_steps=-1,  # as many as steps were taken
    buffer_size=len(states) + args.steps,
    learning_starts=min(2000, args.steps // 4),
    policy_kwargs={"net_arch": [args.width, args.width]},
    seed=0,
    device="cpu",
)
rows = np.arange(len(states)) if has_next else np.flatnonzero(~ends)
for batch in rows[: len(rows) // args.envs * args.envs].reshape(-1, args.envs):
    told = [{}] * args.envs
    sac.replay_buffer.add(states[batch], next_states[batch], actions[batch], rewards[batch], terminals[batch], told)
real = gymnasium.make(core.task.env_name)
print(f"the data's policy: {len(rewards) / ends.sum():.0f} steps, return {rewards.sum() / ends.sum():.0f}")
for _ in range(args.evaluations):
    sac.learn(args.steps // args.evaluations, reset_num_timesteps=False)
    returns, lengths = evaluate_policy(sac, real, args.episodes, return_episode_rewards=True, warn=False)
    earned, length = (sum(values) / args.episodes for values in (returns, lengths))
    print(f"{sac.num_timesteps} steps in the model; real: {length:.0f} steps, return {earned:.0f}", flush=True)
