"""Evaluates policies inside ``model.pkl``, next to what they earn in the simulator from the same start states.

python examples/evaluate_policies.py model.pkl --policy data/policies/hopper-medium.npz

The policies are variants of one that was trained by soft actor-critic: its actions made less or more noisy, its weights
perturbed. The summary has the measures of DOPE (Fu et al. 2021): Spearman's rank correlation; regret, what is lost by
trusting the model to name the best policy; and the mean absolute error, the last two over the range of true returns.
"""

import argparse
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch

# Where the model modules are; last, so that a planner's own modules of equal names (utils, config) come first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from dynamics_model import load_ensemble
from model_env import ModelEnv


def load_policy(path, noise, perturbation):
    """Returns a squashed Gaussian policy with so many times its own noise, and relative noise on its weights."""
    with np.load(path) as file:
        weights = {name: torch.as_tensor(file[name]) for name in file.files if file[name].ndim}
    random = torch.Generator().manual_seed(0)
    for name in weights.keys() - {"low", "high"}:
        weights[name] = weights[name] * (1 + perturbation * torch.randn(weights[name].shape, generator=random))

    def policy(states):
        hidden = states
        for layer in range(sum(name.startswith("weight_") for name in weights)):
            hidden = (hidden @ weights[f"weight_{layer}"].T + weights[f"bias_{layer}"]).relu()
        mean, log_std = (hidden @ weights[f"{head}_weight"].T + weights[f"{head}_bias"] for head in ("mean", "log_std"))
        drawn = mean + noise * log_std.clamp(-20, 2).exp() * torch.randn(mean.shape, generator=random)
        return weights["low"] + (drawn.tanh() + 1) / 2 * (weights["high"] - weights["low"])

    return policy


def in_model(core, policy, starts, steps):
    """Yields rewards in the model, 0 after an episode's end, ``(episodes,)`` per step."""
    state, alive = core.start(starts), torch.ones(len(starts), dtype=torch.bool)
    for _ in range(steps):
        step = core.step(state, policy(state.states))
        yield (step.reward * alive).numpy()
        state, alive = step.state, alive & ~step.terminated


def in_simulator(envs, policy, seed, steps):
    """Yields the same of the real environments."""
    observations, alive = envs.reset(seed=seed)[0], np.ones(envs.num_envs, dtype=bool)
    for _ in range(steps):
        actions = policy(torch.as_tensor(observations, dtype=torch.float32)).numpy()
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        yield rewards * alive
        alive &= ~(terminated | truncated)


def main():
    """Prints a table of returns, and how well the model ranks the policies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model.pkl")
    parser.add_argument("--policy", required=True, help=".npz that collect_dataset.py saved")
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 1, 2, 4], help="multiples of the policy's own")
    parser.add_argument("--perturbation", type=float, nargs="+", default=[0, 0.1, 0.2], help="of weights, relative")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=250, help="after which returns are truncated")
    parser.add_argument("--discount", type=float, default=0.99)
    args = parser.parse_args()

    core = ModelEnv(load_ensemble(args.model), propagation="tsinf")
    envs = gymnasium.make_vec(core.task.env_name, args.episodes, vectorization_mode="sync")
    starts, discounts, found = envs.reset(seed=0)[0], args.discount ** np.arange(args.steps), []
    print("noise  perturbed   truncated: real    model  discounted: real    model")
    for noise in args.noise:
        for perturbation in args.perturbation:
            policy, row = load_policy(args.policy, noise, perturbation), []
            for rewards in (in_simulator(envs, policy, 0, args.steps), in_model(core, policy, starts, args.steps)):
                earned = np.stack(list(rewards)).mean(axis=1)  # (steps,)
                row += [earned.sum(), earned @ discounts]
            found.append(row)
            shown = f"{row[0]:17.1f} {row[2]:8.1f} {row[1]:17.1f} {row[3]:8.1f}"
            print(f"{noise:5g} {perturbation:10g} {shown}", flush=True)
    for name, real, model in zip(("truncated", "discounted"), *np.array(found).T.reshape(2, 2, -1), strict=True):
        rank = np.corrcoef(real.argsort().argsort(), model.argsort().argsort())[0, 1]
        regret, error = (real.max() - real[model.argmax()]) / np.ptp(real), np.abs(model - real).mean() / np.ptp(real)
        print(f"{name}: Spearman's rank correlation {rank:.2f}, regret {regret:.2f}, error over range {error:.2f}")


if __name__ == "__main__":
    main()
