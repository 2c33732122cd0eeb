"""Plans in the real Hopper, Walker2d or HalfCheetah with ``model.pkl``, guided by the data that the model learned from.

python examples/plan.py model.pkl --dataset data/bundled/hopper-medium-demo.hdf5

Free planning finds the actions about which a model of offline data is wrong, and looks too short a way ahead to see
that Hopper will fall. Guided planning (MBOP, Argenson and Dulac-Arnold 2021) looks for small deviations from a policy
cloned from the data, and counts the last state by what the data's policy earned from there. The last row plans so in
the simulator itself. HalfCheetah needs a model that has learned the reward (``--params learn_reward=true``).
"""

import argparse
import sys
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from mujoco.rollout import rollout

# Where the model modules are; last, so that a planner's own modules of equal names (utils, config) come first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from dynamics_model import load_ensemble
from model_env import ModelEnv, ModelState, ModelStep
from model_planning import CEM, clone_policy, fit_value


class Simulator:
    """What a ``ModelEnv`` is, without errors; its states are the simulator's positions and velocities."""

    def __init__(self, task, action_bounds):
        self.env, self.task, self.action_bounds = gymnasium.make(task.env_name).unwrapped, task, action_bounds
        self.data, self.limit = mujoco.MjData(self.env.model), torch.inf if "HalfCheetah" in task.env_name else 10

    def observe(self, states):
        """Leaves the position along the track out, and clips velocities as the environment does."""
        nq = self.env.model.nq
        return torch.cat([states[:, 1:nq], states[:, nq:].clamp(-self.limit, self.limit)], dim=1)

    def start(self, states, generator):
        """As ``ModelEnv`` has it."""
        return ModelState(states, None)

    def step(self, state, actions, generator):
        """As ``ModelEnv`` has it."""
        control = actions.double().numpy()[:, None].repeat(self.env.frame_skip, axis=1)
        full = np.insert(state.states.double().numpy(), 0, 0, axis=1)  # the time comes first
        states = torch.tensor(rollout(self.env.model, self.data, full, control)[0][:, -1, 1:], dtype=torch.float32)
        seen, never = (self.observe(state.states), actions, self.observe(states)), torch.zeros(len(states), dtype=bool)
        reward, ended = self.task.reward(*seen), self.task.termination(*seen)
        return ModelStep(ModelState(states, None), reward, reward, ended, never, never, None)


def play(env_name, act, episodes, steps, with_simulator=False):
    """Returns what a planner or a policy earns in so many steps of real episodes, ``(episodes,)``."""
    envs = gymnasium.make_vec(env_name, episodes, vectorization_mode="sync")
    states, total, alive = envs.reset(seed=0)[0], np.zeros(episodes), np.ones(episodes, dtype=bool)
    for _ in range(steps):
        if with_simulator:
            states = np.stack([np.r_[env.unwrapped.data.qpos, env.unwrapped.data.qvel] for env in envs.envs])
        states, rewards, terminated, truncated, _ = envs.step(act(torch.as_tensor(states).float()).numpy())
        total += rewards * alive
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    return total


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="model.pkl")
parser.add_argument("--dataset", required=True, help="D4RL-format HDF5, to clone a policy from")
parser.add_argument("--episodes", type=int, default=3)
parser.add_argument("--steps", type=int, default=250, help="of each episode; 1000 for whole ones")
parser.add_argument("--population", type=int, default=32, help="candidates that are compared in each step")
parser.add_argument("--horizon", type=int, default=10, help="steps planned; guided planning looks 4 times as far")
parser.add_argument("--spread", type=float, default=0.1, help="of guided planning's candidates, in half ranges")
args = parser.parse_args()

core = ModelEnv(load_ensemble(args.model), propagation="tsinf")
print(core)
with h5py.File(args.dataset) as file:
    states, actions, *ends = (file[name][:] for name in ("observations", "actions", "rewards", "terminals", "timeouts"))
guides = {"prior": clone_policy(states, actions), "value": fit_value(states, *ends)}
(low, high), simulator = core.action_bounds, Simulator(core.task, core.action_bounds)
seen = {name: lambda states, guide=guide: guide(simulator.observe(states)) for name, guide in guides.items()}
seen |= {"particles": 1, "reward_after_end": 0, "generator": torch.Generator().manual_seed(0)}
free = {"horizon": args.horizon, "population": args.population}
guided = free | {"iterations": 1, "spread": args.spread, "tail": 3 * args.horizon}
for name, act in {
    "random": lambda states: low + (high - low) * torch.rand(len(states), len(low)),
    "behaviour, cloned": lambda states: guides["prior"](states).clamp(low, high),
    "free planning": CEM(core, **free).plan,
    "guided planning": CEM(core, **guided, **guides).plan,
    "guided, in the simulator": CEM(simulator, **guided, **seen).plan,
}.items():
    returns = play(core.task.env_name, act, args.episodes, args.steps, with_simulator="simulator" in name)
    print(f"{name:25} {returns.mean():6.0f}   episodes {returns.round()}", flush=True)
