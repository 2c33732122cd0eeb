"""What models are worth to planners and for evaluating policies: returns in the real environment, and in the model.

    python -m benchmarks.planning
    python -m benchmarks.planning --environments hopper --seeds 0 --episodes 3 --minutes 60
    python -m benchmarks.planning --quick

Two questions are put to each kind of ensemble, 5 models each, trained by ``learn_model.py`` with ``configs/``:

- Planning: what ``model_planning.CEM`` earns in the real environment, when it plans freely, around a policy cloned from
  the model's data, and with the data's value function, too; and what it would earn if it planned in the simulator.
- Policy evaluation: what a dozen policies earn in the model, next to what they earn in the simulator from the same
  start states. The measures are those of DOPE (Fu et al. 2021).

Each model, each batch of episodes and each policy is skipped where it is there already: a run that was stopped goes on
when the command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Generator

from benchmarks import harness
from benchmarks.real_environments import DOMAINS, Domain, Guides, Simulator, squashed_gaussian
from cli import exit_on_input_error
from dynamics_model import load_ensemble
from evaluation.metrics import spearman
from model_env import ModelEnv
from model_planning import CEM, Policy
from reporting.page import markdown_table
from utils import InputError

KINDS = {"dnn": "deterministic", "pnn": "probabilistic"}  # by the names of files in configs/
SIMULATOR = "simulator"  # stands in the place of a kind
ARMS = {
    "random": "random actions",
    "behaviour": "the data's policy",
    "cloned": "the policy cloned from the data",
    "free": "free planning",
    "around": "planning around the cloned policy",
    "guided": "planning around it, with tail and value",
}
NOISE, PERTURBATION = (0, 1, 2, 4), (0, 0.1, 0.2)  # of the policies that are evaluated
RETURNS = ("truncated", "discounted")
DISCOUNT = 0.99
MODEL_PATHS = 5  # of each start, in policy evaluation
EPISODES_AT_ONCE = 5


@dataclass(frozen=True)
class Budget:
    """How much is computed; quick trials take a tiny one.

    Attributes:
        free: Settings of ``CEM`` for planning freely.
        around: Those for planning around a policy.
        tail: Steps behind its horizon, of guided planning.
        epochs: Of what guides planning.
        params: Settings of models, as ``--params`` takes them.
    """

    free: dict[str, Any]
    around: dict[str, Any]
    tail: int
    epochs: int
    params: tuple[str, ...] = ()


WHOLE = Budget(
    free={"horizon": 15, "population": 64, "iterations": 2, "particles": 5},
    around={"horizon": 10, "population": 32, "iterations": 1, "particles": 5, "spread": 0.1},
    tail=30,
    epochs=20,
)
QUICK = Budget(
    free={"horizon": 2, "population": 4, "iterations": 1, "particles": 2},
    around={"horizon": 2, "population": 4, "iterations": 1, "particles": 2, "spread": 0.1},
    tail=2,
    epochs=1,
    params=("fit_epochs=1", "hidden_size=8", "ensemble_size=2", "batch_size=4096"),
)


# --- Measuring ---


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then makes the tables and the figure."""
    args = parse_arguments(argv)
    planned = harness.open_results("planning", args.quick, is_timed=False)
    evaluated = harness.ResultsFile("policy_evaluation", planned.folder, is_timed=False)
    if not args.tables:
        torch.set_num_threads(args.threads)
        deadline = time.monotonic() + 60 * args.minutes
        budget = QUICK if args.quick else WHOLE
        benches = (Bench(DOMAINS[name], budget, args, planned, evaluated) for name in args.environments)
        for _ in itertools.chain.from_iterable(bench.measure() for bench in benches):
            if time.monotonic() > deadline:
                print("time is up; the same command goes on from here", file=sys.stderr)
                break
    publish(planned, evaluated)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--environments", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="which (all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of ensemble (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of models (0 1 2 3 4)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what acts (all)")
    parser.add_argument("--episodes", type=int, default=10, help="of each planner and policy (10)")
    parser.add_argument("--steps", type=int, default=1000, help="after which the planners' episodes are cut (1000)")
    parser.add_argument("--evaluation_episodes", type=int, default=20, help="of each policy that is evaluated (20)")
    parser.add_argument("--evaluation_steps", type=int, default=250, help="after which their returns are cut (250)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, and go on another time")
    args = parser.parse_args(argv)
    if args.quick:
        args.environments, args.kinds, args.seeds, args.episodes, args.steps = ["hopper"], ["pnn"], [0], 2, 3
        args.evaluation_episodes, args.evaluation_steps = 2, 10
    return args


class Bench:
    """Measures one environment, bit by bit: what is there is skipped.

    Args:
        domain: The environment.
        budget: How much is computed.
        args: The command line: what is wanted.
        planned: Gets a row per episode: ``environment``; ``kind`` of the model, ``simulator``, or ``-`` where there is
            none; its ``seed``; ``arm``; ``cut``, the most steps; ``episode``; ``length`` in steps; and ``earned``.
        evaluated: Gets a row per policy and model: ``environment``, ``kind`` and ``seed``; ``noise`` and
            ``perturbation`` of the policy; ``cut``; ``episodes``; the means of the ``truncated`` and the
            ``discounted`` return.
    """

    def __init__(
        self,
        domain: Domain,
        budget: Budget,
        args: argparse.Namespace,
        planned: harness.ResultsFile,
        evaluated: harness.ResultsFile,
    ) -> None:
        self.domain, self.budget, self.args, self.planned, self.evaluated = domain, budget, args, planned, evaluated

    def measure(self) -> Iterator[None]:
        """Yields after each bit; models of one seed come before those of the next."""
        yield from self.evaluate_policies(SIMULATOR, 0)
        for arm in ("random", "behaviour", "cloned"):
            yield from self.play("-", 0, arm)
        for seed in self.args.seeds:
            for kind in self.args.kinds:
                yield from self.evaluate_policies(kind, seed)
                for arm in ("free", "around", "guided"):
                    yield from self.play(kind, seed, arm)
            if seed == self.args.seeds[0]:  # last, as it takes the longest
                for arm in ("free", "around", "guided"):
                    yield from self.play(SIMULATOR, 0, arm)

    @cached_property
    def guides(self) -> Guides:
        """What guides planning."""
        return self.domain.guides(self.budget.epochs)

    @cached_property
    def simulator(self) -> Simulator:
        """What is planned in by the best of all models."""
        return Simulator(self.domain)

    def core(self, kind: str, seed: int) -> ModelEnv:
        """Returns the environment inside a model, which is trained first if it has not been."""
        path = train(self.domain, kind, seed, self.budget.params, self.planned.folder)
        return ModelEnv(load_ensemble(path), self.domain.task, propagation="tsinf")

    def play(self, kind: str, seed: int, arm: str) -> Iterator[None]:
        """Plays the episodes of an arm that are missing, some at a time."""
        if arm not in self.args.arms:
            return
        key = {"environment": self.domain.name, "kind": kind, "seed": seed, "arm": arm, "cut": self.args.steps}
        done = set(self.planned.finished(**key).get("episode", ()))
        missing = [episode for episode in range(self.args.episodes) if episode not in done]
        for first in range(0, len(missing), EPISODES_AT_ONCE):
            episodes = missing[first : first + EPISODES_AT_ONCE]
            act = self.actor(kind, seed, arm, episodes[0])
            paid, lengths = self.domain.play(act, episodes, self.args.steps, kind == SIMULATOR)
            rows = zip(episodes, lengths, paid.sum(axis=0), strict=True)
            names = ("episode", "length", "earned")
            self.planned.append([key | dict(zip(names, row, strict=True)) for row in rows])
            print(f"{self.domain.name}: {arm}, {kind} {seed}: {paid.sum(axis=0).mean():.0f}", file=sys.stderr)
            yield

    def actor(self, kind: str, seed: int, arm: str, stream: int) -> Policy:
        """Returns what acts, from states ``(batch, ...)`` to actions; streams differ in what is drawn."""
        task, generator = self.domain.task, Generator().manual_seed(10_000 * seed + stream)
        if arm == "random":
            return lambda states: (
                task.action_bound * (2 * torch.rand(len(states), task.action_dim, generator=generator) - 1)
            )
        if arm == "behaviour":
            return squashed_gaussian(self.domain.weights, noise=1, perturbation=0, seed=stream)
        prior, value = self.guides
        if arm == "cloned":
            return lambda states: prior(states).clamp(-task.action_bound, task.action_bound)
        core, options = None, {"generator": generator}
        if kind == SIMULATOR:
            core, observe = self.simulator, self.simulator.observe
            prior, value = (lambda states, guide=guide: guide(observe(states)) for guide in (prior, value))
            options |= {"reward_after_end": 0.0}
        else:
            core = self.core(kind, seed)
        options |= self.budget.free if arm == "free" else self.budget.around | {"prior": prior}
        if arm == "guided":
            options |= {"tail": self.budget.tail, "value": value}
        if kind == SIMULATOR:
            options["particles"] = 1  # it is the same for all
        return CEM(core, **options).plan

    def evaluate_policies(self, kind: str, seed: int) -> Iterator[None]:
        """Evaluates the policies that are missing, in a model or in the simulator, one at a time."""
        count, cut = self.args.evaluation_episodes, self.args.evaluation_steps
        core = None
        for noise, perturbation in itertools.product(NOISE, PERTURBATION):
            key = {"environment": self.domain.name, "kind": kind, "seed": seed, "noise": noise}
            key |= {"perturbation": perturbation, "cut": cut, "episodes": count}
            if len(self.evaluated.finished(**key)):
                continue
            policy = squashed_gaussian(self.domain.weights, noise, perturbation, seed)
            if kind == SIMULATOR:
                paid = self.domain.play(policy, range(count), cut).paid
            else:
                core = core or self.core(kind, seed)
                paid = imagine(core, policy, self.domain.starts(range(count)), cut)
            each_step = paid.mean(axis=1)
            earned = each_step.sum(), each_step @ DISCOUNT ** np.arange(cut)
            self.evaluated.append([key | dict(zip(RETURNS, earned, strict=True))])
            yield


@torch.no_grad()
def imagine(core: ModelEnv, policy: Policy, starts: np.ndarray, steps: int) -> np.ndarray:
    """Returns what a policy is paid in a model, several times from each start: ``(steps, paths)``, 0 after an end."""
    state = core.start(starts.repeat(MODEL_PATHS, axis=0))
    alive, paid = torch.ones(len(state.states), dtype=torch.bool), []
    for _ in range(steps):
        step = core.step(state, policy(state.states))
        paid.append(torch.where(alive, step.reward, 0.0))
        state, alive = step.state, alive & ~step.terminated
    return torch.stack(paid).double().numpy()


def train(domain: Domain, kind: str, seed: int, params: Sequence[str], folder: Path) -> Path:
    """Trains a model as users do, if it has not been; a training that was cut off goes on.

    Args:
        domain: Whose dataset it learns from.
        kind: Key of ``KINDS``.
        seed: Of the training.
        params: Settings, after the domain's.
        folder: Of the benchmark; models are in ``logs/`` instead where that is the published one.

    Returns:
        Path of its ``model.pkl``.
    """
    place = (harness.ROOT / "logs" if folder == harness.FOLDER else folder) / "planning"
    name = f"{domain.name}_{kind}-{seed}"
    path = place / f"{name}.pkl"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        config = harness.ROOT / "configs" / f"{domain.name}_{kind}.yaml"
        command = [sys.executable, harness.ROOT / "learn_model.py", "--dataset", domain.dataset, "--config", config]
        command += ["--holdout_ratio", "0.2", "--seed", str(seed), "--output", path, "--quiet", "--device", "cpu"]
        command += ["--run_name", name, "--resume"]
        if settings := [*domain.params, *params]:
            command += ["--params", *settings]
        store = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        print(f"training {name}", file=sys.stderr)
        with exit_on_input_error():
            if subprocess.run(command, cwd=place, env=os.environ | store).returncode:
                raise InputError(f"training {name} failed; the same command goes on from its last epoch")
    return path


# --- The tables and the figure ---


def publish(planned: harness.ResultsFile, evaluated: harness.ResultsFile) -> None:
    """Makes tables and figure."""
    episodes, policies = planned.rows_to_show(), evaluated.rows_to_show()
    episodes, policies = latest(episodes), with_truth(latest(policies))
    planned.publish(text(episodes, policies), draw(episodes, policies))


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows whose episodes were cut where those measured last were."""
    return rows[rows["cut"] == rows["cut"].iloc[-1]]


def with_truth(policies: pd.DataFrame) -> pd.DataFrame:
    """Adds ``true_truncated`` and ``true_discounted`` to the rows of models, from the simulator's, and drops those."""
    case = ["environment", "noise", "perturbation", "cut", "episodes"]
    truth = policies[policies["kind"] == SIMULATOR].set_index(case)[list(RETURNS)].add_prefix("true_")
    return policies[policies["kind"] != SIMULATOR].join(truth, on=case, how="inner")


def text(episodes: pd.DataFrame, policies: pd.DataFrame) -> str:
    """Returns the tables of each environment, and what they show.

    Args:
        episodes: Rows as ``Bench`` writes them.
        policies: What ``with_truth`` returns.
    """
    cut, discount = episodes["cut"].iloc[-1], f"discounted by {DISCOUNT}"
    parts = [
        f"Returns in the real environment, of episodes that are cut after {cut} steps. Several models: means over "
        "models of their means over episodes, with the lowest and the highest model; else means over episodes, with "
        "the standard error. Free planning is iCEM; around: candidates are deviations from a policy cloned from the "
        "data; guided: a tail in which that policy acts alone and the value of the last state count, too. Settings of "
        "guided planning were chosen in the real Hopper, with one probabilistic model, from the same start states.",
    ]
    for name, of_name in episodes.groupby("environment", sort=False):
        parts.append(f"**{name}: planning**\n\n{planning_table(of_name)}")
        own = policies[policies["environment"] == name]
        if not own.empty:
            size, steps = own[["noise", "perturbation"]].drop_duplicates().shape[0], own["cut"].iloc[-1]
            parts.append(
                f"**{name}: {size} policies evaluated in models**, returns truncated after {steps} steps, and the same "
                f"{discount}; means over models, with the lowest and the highest\n\n{evaluation_table(own)}"
            )
    return "\n\n".join(parts)


def planning_table(episodes: pd.DataFrame) -> str:
    """Returns a line per arm and kind: models, episodes of each, what they earned and their mean length."""
    lines = []
    for arm in ARMS:
        of_arm = episodes[episodes["arm"] == arm]
        for kind in ("-", *KINDS, SIMULATOR):
            own = of_arm[of_arm["kind"] == kind]
            if own.empty:
                continue
            models = own.groupby("seed")["earned"].mean()
            earned = f"{own['earned'].mean():.0f} ± {own['earned'].sem():.0f}"
            counts = str(len(models)) if kind in KINDS else "-", f"{len(own) / len(models):.0f}"
            shown = spread(models, ".0f") if len(models) > 1 else earned
            lines.append([ARMS[arm], KINDS.get(kind, kind), *counts, shown, f"{own['length'].mean():.0f}"])
    return markdown_table(["", "planned in", "models", "episodes", "return", "steps"], lines)


def spread(values: pd.Series, form: str) -> str:
    """Returns the mean over models, with the lowest and the highest where there are several."""
    shown = f"{values.mean():{form}}"
    return shown if len(values) < 2 else f"{shown} ({values.min():{form}}–{values.max():{form}})"  # noqa: RUF001 - a range


def evaluation_table(policies: pd.DataFrame) -> str:
    """Returns a line per kind and return: how well models rank policies, and how far they are from the truth."""
    lines = []
    for kind, name in itertools.product(KINDS, RETURNS):
        models = [of_model for _, of_model in policies[policies["kind"] == kind].groupby("seed")]
        if models:
            scored = pd.DataFrame([measures(of_model[name], of_model[f"true_{name}"]) for of_model in models])
            lines.append([KINDS[kind], name, str(len(models)), *(spread(scored[each], ".2f") for each in scored)])
    return markdown_table(["", "return", "models", "rank correlation", "regret", "error / range"], lines)


def measures(model: pd.Series, true: pd.Series) -> dict[str, float]:
    """Returns what DOPE has: Spearman's rank correlation of returns in a model with true ones, regret and error.

    Regret is what is lost by trusting the model to name the best policy; it and the mean absolute error are shares of
    the range of true returns.
    """
    width = np.ptp(true)
    regret = (true.max() - true.iloc[model.argmax()]) / width
    return {"rank": spearman(model, true), "regret": regret, "error": (model - true).abs().mean() / width}


def draw(episodes: pd.DataFrame, policies: pd.DataFrame) -> Figure:
    """Draws returns of planners, a point per model, and returns of policies in models against the truth."""
    names = list(episodes["environment"].unique())
    figure = harness.new_figure(columns=2, lines=len(names))
    colours = {"-": "tab:grey", **dict(zip(KINDS, ("tab:blue", "tab:orange"), strict=True)), SIMULATOR: "black"}
    labels = {"-": "no model", **KINDS, SIMULATOR: SIMULATOR}
    for (bars, points), name in zip(figure.subplots(len(names), 2, squeeze=False), names, strict=True):
        own = episodes[episodes["environment"] == name]
        means = own.groupby(["arm", "kind", "seed"])["earned"].mean().reset_index()
        arms = [arm for arm in ARMS if arm in set(means["arm"])]
        for kind, of_kind in means.groupby("kind"):
            at = [arms.index(arm) for arm in of_kind["arm"]]
            bars.plot(at, of_kind["earned"], "o", alpha=0.7, color=colours[kind], label=labels[kind])
        bars.set_xticks(range(len(arms)), arms)
        bars.set(title=f"{name}: planning", ylabel=f"real return, {own['cut'].iloc[-1]} steps")
        of_name = policies[policies["environment"] == name]
        for kind, of_kind in of_name.groupby("kind"):
            points.plot(of_kind["true_truncated"], of_kind["truncated"], "o", alpha=0.7, color=colours[kind])
        points.axline((0, 0), slope=1, color="lightgrey", zorder=0)
        points.set(title=f"{name}: policies", xlabel="real return", ylabel="return in the model")
        for axes in (bars, points):
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    main()
