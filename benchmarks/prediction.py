"""Rows per second of prediction for planners: the stacked ensemble against loops over members.

    python -m benchmarks.prediction
    python -m benchmarks.prediction --rows 500 --threads 1
    python -m benchmarks.prediction --quick

Planners predict from 20 to 1000 rows at a time, over and over along a horizon. Measured are ``predict`` (the same rows
with every member) and rollouts over the horizon, in turn with a loop over the members of ``model.pkl`` and a loop over
plain ``nn.Linear`` networks with the same weights, the published way. All three are first checked to predict the same.
Ours and the published way are measured with rounded products, too, which is a matter of PyTorch's own switch,
``torch.set_float32_matmul_precision("medium")``, and pays where the processor has AMX.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness
from benchmarks.plain_loop import plain_member
from benchmarks.step_arms import Case
from dynamics_model import DynamicsEnsemble, DynamicsModel

KINDS = {"probabilistic": "4x200", "deterministic": "4x256"}
ROWS = (20, 50, 100, 200, 500, 1000)
THREADS = (1, 2)
HORIZON = 30
CASE = ["kind", "task", "rows", "threads"]
OTHERS = {
    "members": "loop over members of model.pkl",
    "plain": "loop over nn.Linear networks",
    "rounded": "ours, products rounded",
    "plain rounded": "loop over nn.Linear networks, products rounded",
}


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then draws the table and the figure."""
    args = parse_arguments(argv)
    study = harness.open_study("prediction", args.quick)
    if not args.tables:
        grid = itertools.product(args.kind, args.threads, args.rows)
        for kind, threads, rows in tqdm(list(grid), unit="case"):
            measure(study, kind, threads, rows, args.rounds, args.seconds)
    summary = harness.compare(study.shown(), CASE, base="ours")
    study.save_figure(figure(summary))
    study.write_table(table(summary))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of ensemble (all)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows per prediction (20 to 1000)")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="threads (1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each arm (7)")
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long an arm runs in a round (0.1)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.threads, args.rounds, args.seconds = (20, 500), (1,), 2, 0.02
    return args


def measure(study: harness.Study, kind: str, threads: int, rows: int, rounds: int, seconds: float) -> None:
    """Measures each task of a case that has no rows yet."""
    torch.set_num_threads(threads)
    case = Case(kind, KINDS[kind], batch=256, size="hopper", threads=threads, rounds=0)
    ensemble = case.ensemble
    ensemble.requires_grad_(False)
    members = ensemble.members()
    plain = plain_loop(ensemble, case)
    states = torch.as_tensor(case.transitions.states[:rows])
    plans = torch.randn(rows, HORIZON, case.transitions.actions.shape[1])
    actions = plans[:, 0]
    check_equal(ensemble, members, plain, states, actions)

    def along_horizon(step: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        """Each member on its own predictions, one member after the other."""
        for member in range(len(members)):
            current = states
            for time in range(HORIZON):
                current = step(current, plans[:, time], member)

    tasks = {
        "predict": {
            "ours": lambda: ensemble.predict(states, actions),
            "members": lambda: [member.forward(states, actions) for member in members],
            "plain": lambda: [plain(states, actions, member) for member in range(len(members))],
        },
        f"rollout of {HORIZON} steps, every member": {
            "ours": lambda: ensemble.rollout(states, plans, "member"),
            "members": lambda: along_horizon(lambda state, action, member: first(members[member](state, action))),
            "plain": lambda: along_horizon(lambda state, action, member: first(plain(state, action, member))),
        },
        f"rollout of {HORIZON} steps, tsinf": {"ours": lambda: ensemble.rollout(states, plans, "tsinf")},
    }
    for task, arms in tasks.items():
        arms["rounded"] = rounded(arms["ours"])
        if "plain" in arms:
            arms["plain rounded"] = rounded(arms["plain"])
        values = {"kind": kind, "task": task, "rows": rows, "threads": threads}
        if study.finished(**values).empty:
            with torch.no_grad():
                study.append([values | row for row in harness.in_turn(arms, rounds, seconds)])


def rounded(predict: Callable[[], Any]) -> Callable[[], None]:
    """Returns a function that predicts with products that round their operands."""

    def predict_rounded() -> None:
        torch.set_float32_matmul_precision("medium")
        predict()
        torch.set_float32_matmul_precision("highest")

    return predict_rounded


def first(prediction: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean of either kind's prediction."""
    return prediction[0] if isinstance(prediction, tuple) else prediction


def plain_loop(ensemble: DynamicsEnsemble, case: Case) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Any]]:
    """Returns a function that predicts with one ``nn.Linear`` network, from raw units to raw units."""
    network = ensemble.network
    networks = [plain_member(case.config, network, member) for member in range(len(ensemble))]

    def predict(states: Tensor, actions: Tensor, member: int) -> tuple[Tensor, Tensor | None]:
        inputs = (torch.cat((states, actions), dim=-1) - network.input_shift) / network.input_scale
        mean, log_variance = networks[member](inputs)
        mean = states + (mean * network.delta_scale + network.delta_shift)
        return mean, None if log_variance is None else log_variance.exp() * network.delta_scale.square()

    return predict


@torch.no_grad()
def check_equal(
    ensemble: DynamicsEnsemble, members: list[DynamicsModel], plain: Callable[..., Any], states: Tensor, actions: Tensor
) -> None:
    """Raises AssertionError unless all ways predict the same."""
    mean, variance = ensemble.predict(states, actions)
    for index, member in enumerate(members):
        torch.testing.assert_close(first(member.forward(states, actions)), mean[index], rtol=1e-4, atol=1e-5)
        plain_mean, plain_variance = plain(states, actions, index)
        torch.testing.assert_close(plain_mean, mean[index], rtol=1e-4, atol=1e-5)
        if variance is not None:
            torch.testing.assert_close(plain_variance, variance[index], rtol=1e-3, atol=1e-5)


# --- The table and the figure ---


def rows_per_second(summary: pd.DataFrame) -> pd.Series:
    """Returns how many rows a second pass through all members, one step of a rollout counting as one pass."""
    steps = summary["task"].str.startswith("rollout") * (HORIZON - 1) + 1
    return summary["rows"] * steps / summary["median"] * 1e3


def table(summary: pd.DataFrame) -> str:
    """Returns ours in milliseconds and rows per second, and how the others' time compares."""
    summary = summary.reset_index()
    summary = summary.assign(rate=rows_per_second(summary))
    groups = sorted(summary.groupby(["kind", "threads"], sort=False), key=lambda group: -group[0][1])
    titled = {
        f"{kind} {KINDS[kind]}, {harness.count(threads, 'thread')}": lines(group) for (kind, threads), group in groups
    }
    return (
        "7 members, hopper sizes. Medians over rounds, with the smallest and the largest; rows/s: rows that pass "
        "through all 7 members in a second (for tsinf: through one of them), a step of a rollout counting as one pass; "
        "x: median over rounds of the other's time divided by ours; rounded: with "
        f"`torch.set_float32_matmul_precision('medium')`, PyTorch's own switch.\n\n{harness.sections(titled)}"
    )


def lines(summary: pd.DataFrame) -> str:
    """Returns the table of one kind and number of threads."""
    header = ["task", "rows", "ours, ms", "ours, rows/s", *(f"{name}, x" for name in OTHERS.values())]
    table = []
    for (task, rows), case in summary.sort_values(["task", "rows"]).groupby(["task", "rows"]):
        arms = {row["arm"]: row for _, row in case.iterrows()}
        ratios = [f"{arms[arm]['ratio']:.2f}" if arm in arms else "-" for arm in OTHERS]
        table.append([task, str(rows), harness.spread(arms["ours"]), f"{arms['ours']['rate']:,.0f}", *ratios])
    return harness.markdown(header, table)


def figure(summary: pd.DataFrame) -> Any:
    """Draws rows per second against rows, a panel per task, for the kind and threads measured first."""
    summary = summary.reset_index()
    summary = summary.assign(rate=rows_per_second(summary))
    summary = summary[(summary["kind"] == summary["kind"].iloc[0])]
    summary = summary[summary["threads"] == summary["threads"].max()]
    tasks = list(summary["task"].unique())
    drawn = harness.new_figure(columns=len(tasks))
    colours = {arm: f"C{index}" for index, arm in enumerate(["ours", *OTHERS])}
    for axes, task in zip(drawn.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for arm, rows in summary[summary["task"] == task].groupby("arm", sort=False):
            rows = rows.sort_values("rows")
            axes.plot(rows["rows"], rows["rate"], "o-", color=colours[arm], label=OTHERS.get(arm, "ours, stacked"))
        axes.set(title=task, xlabel="rows", ylabel="rows per second, all members", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    drawn.axes[0].legend(fontsize="x-small")
    return drawn


if __name__ == "__main__":
    main()
