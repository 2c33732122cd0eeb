"""Steps per second of environments inside an ensemble: ``model_env.ModelEnv`` against mbrl-lib's class of that name.

    python -m benchmarks.model_env
    python -m benchmarks.model_env --environments 1001 --kind probabilistic
    python -m benchmarks.model_env --quick

A step predicts, draws, pays and judges a batch of Hopper environments. Both libraries have the same members with the
same weights, which is checked first, deal them anew at each step, and call the same functions for rewards and
terminations. mbrl-lib (Pineda et al. 2021) takes batches only that are multiples of the members, and neither clamps
states to the range of the data nor checks actions, as ours does.

The other ways run in turn with these: with a learned reward; with a member that each environment keeps; under MOReL,
for which all members predict all rows, in full precision and with products that round their operands; and as
``VectorModelEnv``, which adds episodes and NumPy.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.prediction import rounded
from benchmarks.step_arms import MEMBERS, NEEDS, Case
from dynamics_model import DynamicsEnsemble
from model_env import ModelEnv, MOReL, VectorModelEnv
from mujoco_tasks import task
from reporting.page import markdown_table
from training.build import build_ensemble

KINDS = ("probabilistic", "deterministic")
HIDDEN = "2x200"
ENVIRONMENTS = (1, 7, 98, 1001, 10_003)
CASE = ["kind", "environments", "threads"]
OTHERS = {
    "mbrl": "mbrl-lib",
    "learned": "ours, learned reward",
    "tsinf": "ours, tsinf",
    "morel": "ours, MOReL",
    "morel rounded": "ours, MOReL, products rounded",
    "vector": "VectorModelEnv",
}
TASK = task("Hopper-v5")


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then makes the table and the figure."""
    args = parse_arguments(argv)
    results = harness.open_results("model_env", args.quick)
    if not args.tables:
        cases = {kind: Case(kind, HIDDEN, batch=256, size="hopper", threads=1, rounds=0) for kind in args.kind}
        grid = itertools.product(args.kind, args.threads, args.environments)
        for kind, threads, environments in tqdm(list(grid), unit="case"):
            torch.set_num_threads(threads)
            measure(results, cases[kind], threads, environments, args.rounds, args.seconds)
    publish(results)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of ensemble (all)")
    parser.add_argument(
        "--environments", nargs="+", type=int, default=ENVIRONMENTS, help="environments per step (1 to 10003)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=(1,), help="threads (1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each arm (9)")
    parser.add_argument("--seconds", type=float, default=0.2, help="about how long an arm runs in a round (0.2)")
    args = parser.parse_args(argv)
    if args.quick:
        args.kind, args.environments, args.rounds, args.seconds = ["probabilistic"], (1, MEMBERS), 2, 0
    return args


def measure(
    results: harness.ResultsFile, case: Case, threads: int, environments: int, rounds: int, seconds: float
) -> None:
    """Times all arms on a number of environments that has no rows yet.

    Adds a row per round and arm: the columns of ``CASE``, and those of ``harness.in_turn``.
    """
    values = {"kind": case.kind, "environments": environments, "threads": threads}
    if results.finished(**values).empty:
        with torch.no_grad():
            rows = harness.in_turn(make_arms(case, environments), rounds, seconds)
        results.append([values | row for row in rows])


# --- The arms ---


def make_arms(case: Case, environments: int) -> dict[str, Callable[[], Any]]:
    """Returns a function per arm that takes a step; mbrl-lib's where it is installed and can take the batch."""
    random = np.random.default_rng(0)
    states = torch.as_tensor(random.normal(0, 0.1, size=(environments, case.ensemble.state_dim)), dtype=torch.float32)
    states[:, 0] += 1.25  # the height of a hopper that stands
    actions = torch.as_tensor(random.uniform(-1, 1, size=(environments, case.ensemble.action_dim)), dtype=torch.float32)
    bounds = states.amin(dim=0) - 1, states.amax(dim=0) + 1
    ensemble = case.ensemble.requires_grad_(False)

    def stepper(ensemble: DynamicsEnsemble, **options: Any) -> Callable[[], Any]:
        core = ModelEnv(ensemble, TASK, state_bounds=bounds, **options)
        state = core.start(states)
        return lambda: core.step(state, actions)

    learning = build_ensemble(dataclasses.replace(case.config, learn_reward=True), case.transitions)
    morel = stepper(ensemble, pessimism=MOReL(threshold=1.0, halt_reward=-1.0))
    episodes = VectorModelEnv(ModelEnv(ensemble, TASK, state_bounds=bounds), environments, initial_states=states)
    episodes.reset(seed=0)
    arms = {
        "ours": stepper(ensemble),
        "learned": stepper(learning, reward="learned"),
        "tsinf": stepper(ensemble, propagation="tsinf"),
        "morel": morel,
        "morel rounded": rounded(morel),
        "vector": lambda: episodes.step(actions.numpy()),
    }
    if environments % len(ensemble) == 0 and all(importlib.util.find_spec(package) for package in NEEDS["mbrl"]):
        arms["mbrl"] = mbrl_step(ensemble, states, actions)
    return arms


def mbrl_step(ensemble: DynamicsEnsemble, states: Tensor, actions: Tensor) -> Callable[[], Any]:
    """Returns a function that takes a step with mbrl-lib's ``ModelEnv`` and the weights of an ensemble."""
    from mbrl.models import GaussianMLP, ModelEnv, OneDTransitionRewardModel

    network = GaussianMLP(
        in_size=ensemble.state_dim + ensemble.action_dim,
        out_size=ensemble.state_dim,
        device="cpu",
        num_layers=len(ensemble.architecture.hidden_size),
        ensemble_size=len(ensemble),
        hid_size=ensemble.architecture.hidden_size[0],
        deterministic=ensemble.heads == 1,
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    layers = [*(layer[0] for layer in network.hidden_layers), network.mean_and_logvar]
    for layer, weight, bias in zip(layers, ensemble.dynamics.weights, ensemble.dynamics.biases, strict=True):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    inputs = ensemble.normalise_inputs(states, actions)
    mean, _ = network.forward(inputs, use_propagation=False)
    torch.testing.assert_close(
        mean, ensemble.predict_change(inputs.expand(len(ensemble), -1, -1))[0], rtol=1e-4, atol=1e-5
    )

    class Spaces:  # all that is read of the real environment
        observation_space = action_space = None

    env = ModelEnv(
        Spaces,
        OneDTransitionRewardModel(network, target_is_delta=True, normalize=True, learned_rewards=False),
        lambda actions, next_states: TASK.termination(next_states, actions, next_states)[:, None],
        lambda actions, next_states: TASK.reward(next_states, actions, next_states)[:, None],
        generator=torch.Generator().manual_seed(0),
    )
    model_state = env.reset(states.numpy(), return_as_np=False)
    return lambda: env.step(actions, dict(model_state), sample=True)  # it puts the next states into the dictionary


# --- The table and the figure ---


def publish(results: harness.ResultsFile) -> None:
    """Makes table and figure."""
    summary = harness.compare(results.rows_to_show(), CASE, base="ours").reset_index()
    summary = summary.assign(rate=summary["environments"] / summary["median"] * 1e3)
    results.publish(tables(summary), draw(summary))


def tables(summary: pd.DataFrame) -> str:
    """Returns a table per kind and number of threads.

    Args:
        summary: Columns of ``CASE`` and ``harness.compare``, and ``rate``: environments' steps per second.
    """
    titled = {
        f"{kind}, {harness.count(threads, 'thread')}": table(group)
        for (kind, threads), group in summary.groupby(["kind", "threads"], sort=False)
    }
    return (
        f"{MEMBERS} members of {HIDDEN}, hopper sizes, `ts1`, rewards by formula. Medians over rounds, with the "
        "smallest and the largest. steps/s: a step of a batch counts once for each environment. x: the other's time "
        "divided by ours in the same round, median over rounds. Rounded: with "
        f"`torch.set_float32_matmul_precision('medium')`, PyTorch's own switch.\n\n{harness.sections(titled)}"
    )


def table(group: pd.DataFrame) -> str:
    """Returns the table of one kind and number of threads.

    A line per number of environments: ours in milliseconds and steps per second, mbrl-lib and ours under MOReL in steps
    per second, and each other arm as a multiple of ours.
    """
    header = ["environments", "ours, ms", "ours, steps/s", "mbrl-lib, steps/s", "ours, MOReL, steps/s"]
    lines = []
    for environments, case in group.sort_values("environments").groupby("environments"):
        arms = {row["arm"]: row for _, row in case.iterrows()}
        rates = [f"{arms[arm]['rate']:,.0f}" if arm in arms else "-" for arm in ("ours", "mbrl", "morel")]
        ratios = [f"{arms[arm]['ratio']:.2f}" if arm in arms else "-" for arm in OTHERS]
        lines.append([str(environments), harness.spread(arms["ours"]), *rates, *ratios])
    return markdown_table([*header, *(f"{name}, x" for name in OTHERS.values())], lines)


def draw(summary: pd.DataFrame) -> Figure:
    """Draws steps per second against environments, a panel per kind, with the fewest threads."""
    summary = summary[summary["threads"] == summary["threads"].min()]
    return harness.draw_rates(summary, "kind", "environments", "steps per second", {"ours": "ours", **OTHERS})


if __name__ == "__main__":
    main()
