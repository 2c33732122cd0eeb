"""Rows per second of prediction for planners: the stacked ensemble against loops over members.

    python -m benchmarks.prediction
    python -m benchmarks.prediction --rows 500 --threads 1
    python -m benchmarks.prediction --quick

Planners predict 20 to 1000 rows at a time, over and over along a horizon, and an agent that acts predicts one. Two
tasks are timed: ``predict`` (the same rows with every member) and rollouts over the horizon. Three ways to do them run
in turn: the stacked ensemble, a loop over the members of ``model.pkl``, and the published way, a loop over plain
``nn.Linear`` networks. They share their weights, and are first checked to predict the same. One such network by itself
shows what the other members cost.

All three multiply with PyTorch's own products, whichever products training chooses on the machine. The ensemble and the
published way are also timed with PyTorch's switch for products that round their operands,
``torch.set_float32_matmul_precision("medium")``, which pays where the processor has AMX.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.plain_loop import plain_member
from benchmarks.step_arms import Case
from dynamics_model import DynamicsEnsemble, DynamicsModel
from reporting.page import markdown_table

KINDS = {"probabilistic": "4x200", "deterministic": "4x256"}  # layers x width of each kind
ROWS = (1, 20, 50, 100, 200, 500, 1000)
THREADS = (1, 2)
HORIZON = 30
CASE = ["kind", "task", "rows", "threads"]
OTHERS = {
    "members": "loop over members of model.pkl",
    "plain": "loop over nn.Linear networks",
    "single": "one of them",
    "rounded": "ours, products rounded",
    "plain rounded": "loop over nn.Linear networks, products rounded",
}


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then makes the table and the figure."""
    args = parse_arguments(argv)
    results = harness.open_results("prediction", args.quick)
    if not args.tables:
        cases = {kind: Case(kind, KINDS[kind], batch=256, size="hopper", threads=1, rounds=0) for kind in args.kind}
        grid = itertools.product(args.kind, args.threads, args.rows)
        for kind, threads, rows in tqdm(list(grid), unit="case"):
            torch.set_num_threads(threads)
            measure(results, cases[kind], threads, rows, args.rounds, args.seconds)
    publish(results)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of ensemble (all)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows per prediction (1 to 1000)")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="threads (1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each arm (7)")
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long an arm runs in a round (0.1)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.threads, args.rounds, args.seconds = (20,), (1,), 2, 0
    return args


def measure(results: harness.ResultsFile, case: Case, threads: int, rows: int, rounds: int, seconds: float) -> None:
    """Times each task that has no rows yet, with members of a case.

    Adds a row per task, round and arm: the columns of ``CASE``, and those of ``harness.in_turn``.
    """
    ensemble = case.ensemble.requires_grad_(False)
    members = ensemble.members()
    plain = plain_loop(ensemble, case)
    states = torch.as_tensor(case.transitions.states[:rows])
    plans = torch.randn(rows, HORIZON, ensemble.action_dim)
    actions = plans[:, 0]
    check_equal(ensemble, members, plain, states, actions)

    def along_horizon(predict: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        """Rolls out one member after the other, each on its own predictions."""
        for member in range(len(members)):
            current = states
            for time in range(HORIZON):
                current = predict(current, plans[:, time], member)

    tasks: dict[str, dict[str, Callable[[], Any]]] = {
        "predict": {
            "ours": lambda: ensemble.predict(states, actions),
            "members": lambda: [member.forward(states, actions) for member in members],
            "plain": lambda: [plain(states, actions, member) for member in range(len(members))],
            "single": lambda: plain(states, actions, 0),
        },
        f"rollout of {HORIZON} steps, every member": {
            "ours": lambda: ensemble.rollout(states, plans, "member"),
            "members": lambda: along_horizon(lambda state, action, member: mean_of(members[member](state, action))),
            "plain": lambda: along_horizon(lambda state, action, member: mean_of(plain(state, action, member))),
        },
        f"rollout of {HORIZON} steps, tsinf": {"ours": lambda: ensemble.rollout(states, plans, "tsinf")},
    }
    for task, arms in tasks.items():
        arms["rounded"] = rounded(arms["ours"])
        if "plain" in arms:
            arms["plain rounded"] = rounded(arms["plain"])
        values = {"kind": case.kind, "task": task, "rows": rows, "threads": threads}
        if results.finished(**values).empty:
            with torch.no_grad():
                results.append([values | row for row in harness.in_turn(arms, rounds, seconds)])


def rounded(predict: Callable[[], Any]) -> Callable[[], None]:
    """Returns a function that predicts with products that round their operands."""

    def predict_rounded() -> None:
        torch.set_float32_matmul_precision("medium")
        predict()
        torch.set_float32_matmul_precision("highest")

    return predict_rounded


def mean_of(prediction: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """Returns the mean of a prediction, which for members that predict a point is the prediction itself."""
    return prediction[0] if isinstance(prediction, tuple) else prediction


def plain_loop(ensemble: DynamicsEnsemble, case: Case) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]:
    """Returns a function of states, actions and a member that predicts with one ``nn.Linear`` network, in raw units."""
    networks = [plain_member(case.config, ensemble, member) for member in range(len(ensemble))]

    def predict(states: Tensor, actions: Tensor, member: int) -> tuple[Tensor, Tensor | None]:
        inputs = (torch.cat((states, actions), dim=-1) - ensemble.input_shift) / ensemble.input_scale
        mean, log_variance = networks[member](inputs)
        mean = states + (mean * ensemble.delta_scale + ensemble.delta_shift)
        return mean, None if log_variance is None else log_variance.exp() * ensemble.delta_scale.square()

    return predict


@torch.no_grad()
def check_equal(
    ensemble: DynamicsEnsemble, members: list[DynamicsModel], plain: Callable[..., Any], states: Tensor, actions: Tensor
) -> None:
    """Raises an AssertionError unless all ways predict the same."""
    mean, variance = ensemble.predict(states, actions)
    for index, member in enumerate(members):
        torch.testing.assert_close(mean_of(member.forward(states, actions)), mean[index], rtol=1e-4, atol=1e-5)
        plain_mean, plain_variance = plain(states, actions, index)
        torch.testing.assert_close(plain_mean, mean[index], rtol=1e-4, atol=1e-5)
        if variance is not None:
            torch.testing.assert_close(plain_variance, variance[index], rtol=1e-3, atol=1e-5)


# --- The table and the figure ---


def publish(results: harness.ResultsFile) -> None:
    """Makes table and figure."""
    summary = harness.compare(results.rows_to_show(), CASE, base="ours").reset_index()
    steps = summary["task"].str.startswith("rollout") * (HORIZON - 1) + 1
    summary = summary.assign(rate=summary["rows"] * steps / summary["median"] * 1e3)
    results.publish(tables(summary), draw(summary))


def tables(summary: pd.DataFrame) -> str:
    """Returns a table per kind and number of threads.

    Args:
        summary: Columns of ``CASE`` and ``harness.compare``, and ``rate``: rows per second.
    """
    groups = sorted(summary.groupby(["kind", "threads"], sort=False), key=lambda group: -group[0][1])
    titled = {
        f"{kind} {KINDS[kind]}, {harness.count(threads, 'thread')}": table(group) for (kind, threads), group in groups
    }
    return (
        "7 members, hopper sizes. Medians over rounds, with the smallest and the largest. rows/s: rows that pass "
        "through all 7 members in a second (tsinf: through one of them), each step of a rollout counting as one pass. "
        "x: the other's time divided by ours in the same round, median over rounds. Rounded: with "
        f"`torch.set_float32_matmul_precision('medium')`, PyTorch's own switch.\n\n{harness.sections(titled)}"
    )


def table(group: pd.DataFrame) -> str:
    """Returns the table of one kind and number of threads.

    A line per task and number of rows: ours in milliseconds and rows per second, each other arm as a multiple of ours.
    """
    header = ["task", "rows", "ours, ms", "ours, rows/s", *(f"{name}, x" for name in OTHERS.values())]
    lines = []
    for (task, rows), case in group.sort_values(["task", "rows"]).groupby(["task", "rows"]):
        arms = {row["arm"]: row for _, row in case.iterrows()}
        ratios = [f"{arms[arm]['ratio']:.2f}" if arm in arms else "-" for arm in OTHERS]
        lines.append([task, str(rows), harness.spread(arms["ours"]), f"{arms['ours']['rate']:,.0f}", *ratios])
    return markdown_table(header, lines)


def draw(summary: pd.DataFrame) -> Figure:
    """Draws rows per second against rows, a panel per task, for the kind measured first and the most threads."""
    summary = summary[summary["kind"] == summary["kind"].iloc[0]]
    summary = summary[summary["threads"] == summary["threads"].max()]
    return harness.draw_rates(
        summary, "task", "rows", "rows per second, all members", {"ours": "ours, stacked", **OTHERS}
    )


if __name__ == "__main__":
    main()
