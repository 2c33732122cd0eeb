"""Milliseconds per optimiser step of a 7-member ensemble: ours, other ways to take the same step, and the floor.

    python -m benchmarks.step_throughput --size hopper --threads 2
    python -m benchmarks.step_throughput --hidden 4x200 --batch 256 --arms ours jax
    python -m benchmarks.step_throughput --quick

Each way (``step_arms.py``) is a process of its own with its own thread settings; all processes of a case are warmed up
and then run in turn, one round each, and ratios are taken within a round. Measured arms of a case are skipped when the
command is run again; ``ours`` is measured along with every new one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pandas as pd
from tqdm import tqdm

from benchmarks import harness, step_arms
from benchmarks.step_arms import ARMS, NEEDS, OWN, SIZES, Case

KINDS = ("probabilistic", "deterministic")
HIDDEN = ("4x200", "4x256", "4x512", "2x512")
BATCHES = (256, 1024)
THREADS = (1, 2)
CASE = ["kind", "hidden", "batch", "size", "threads"]
INTRODUCTION = (
    "Medians over rounds, with the smallest and the largest; x: median over rounds of the other's time divided by ours "
    "in the same round. Ours: a step of the first 80 % of training, whose products round their operands to bfloat16 "
    "where the processor has AMX (`reduced_precision`); `full precision`: a step of the rest. The loop, mbrl-lib and "
    "JAX compute in float32, as they come; `rounded`: with PyTorch's own switch for products that round. `products`: "
    "the matrix products of ours alone. Floor: FLOPs and optimiser traffic at the speeds of a large float32 product "
    "and of copies, measured in the same rounds; rounded floor: the same with a large product that rounds as ours do. "
    "`Ours, otherwise`: the product's own loop with each of PyTorch's two libraries, when cores share every product "
    "and when they share members."
)
FLOORS = ("floor", "rounded floor")
OTHERS = [arm for arm in ARMS if arm not in ("ours", *FLOORS, *OWN)]


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing of the cases asked for, then draws the tables and the figure."""
    args = parse_arguments(argv)
    study = harness.open_study("step_throughput", args.quick)
    if not args.tables:
        arms = [arm for arm in args.arms if is_available(arm)]
        grid = itertools.product(args.kind, args.hidden, args.batch, args.size, args.threads)
        for case in tqdm([Case(*values, rounds=args.rounds) for values in grid], unit="case"):
            measure(study, case, arms)
    study.save_figure(figure(harness.compare(study.shown(), CASE, base="ours")))
    study.write_table(text({machine: study.rows(machine) for machine in study.machines()}))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; without flags, everything is measured."""
    parser = harness.command_line(__doc__)
    for flag, choices, meaning in (
        ("kind", KINDS, "kinds of ensemble"),
        ("hidden", HIDDEN, "layers x width"),
        ("batch", BATCHES, "rows per member and step"),
        ("size", tuple(SIZES), "environments whose sizes of state and action to take"),
        ("threads", THREADS, "threads and cores"),
    ):
        parser.add_argument(
            f"--{flag}", nargs="+", type=type(choices[0]), choices=choices, default=choices, help=f"{meaning} (all)"
        )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        help="ways to take a step (all)",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds of each arm (5)")
    args = parser.parse_args(argv)
    if args.quick:
        args.kind, args.hidden, args.batch, args.size, args.threads = KINDS[:1], ("4x200",), (256,), ("hopper",), (1,)
        args.rounds = 2
    return args


def is_available(arm: str) -> bool:
    """Whether what an arm needs is installed; says so where it is not."""
    missing = [package for package in NEEDS.get(arm, ()) if importlib.util.find_spec(package) is None]
    if missing:
        print(f"arm {arm} is left out: {', '.join(missing)} not found; see requirements-bench.txt", file=sys.stderr)
    return not missing


def measure(study: harness.Study, case: Case, arms: list[str]) -> None:
    """Runs the arms of a case that have no rows yet in alternating rounds, and ``ours`` with them."""
    measured = study.finished(**{name: getattr(case, name) for name in CASE})
    missing = [arm for arm in arms if measured.empty or arm not in set(measured["arm"])]
    if not missing:
        return
    rows, started = [], harness.timestamp()
    with contextlib.ExitStack() as stack:
        workers = {arm: stack.enter_context(worker(arm, case)) for arm in dict.fromkeys(["ours", *missing])}
        for process in workers.values():
            answer(process)  # of the warm-up
        for turn in range(case.rounds):
            for arm, process in workers.items():
                process.stdin.write("\n")
                process.stdin.flush()
                values = {name: getattr(case, name) for name in CASE}
                rows.append(values | {"arm": arm, "started": started, "round": turn} | answer(process))
    study.append(rows)


def worker(arm: str, case: Case) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Starts the process of an arm; it ends when its standard input is closed, as leaving the context does."""
    threads = {name: str(case.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.Popen(
        step_arms.arguments(arm, case),
        cwd=harness.ROOT,
        env=os.environ | threads | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """Waits for a worker's next round."""
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(
            f"an arm ended with code {process.wait()} ({' '.join(process.args[3:])}); see its error above"
        )
    return json.loads(line)


# --- Tables and the figure ---


def text(by_machine: dict[str, pd.DataFrame]) -> str:
    """Returns the tables of the machine that measured last, and below them, folded away, those of the others."""
    latest, *others = by_machine
    folded = [harness.folded(f"On {machine}", tables(by_machine[machine])) for machine in others]
    return "\n\n".join([INTRODUCTION, tables(by_machine[latest]), *folded])


def tables(rows: pd.DataFrame) -> str:
    """Returns a machine's speeds, and a table for each environment's sizes and number of threads."""
    median = rows[rows["arm"].isin(FLOORS)].groupby(["threads", "arm"])[["gflops_per_s", "gbytes_per_s"]].median()
    speeds = "; ".join(
        f"{harness.count(threads, 'thread')}, {arm}: {row.gflops_per_s:.0f} GFLOP/s in a 2048 x 2048 product and "
        f"{row.gbytes_per_s:.0f} GB/s in copies"
        for (threads, arm), row in median.iterrows()
    )
    groups = harness.compare(rows, CASE, base="ours").reset_index().groupby(["size", "threads"])
    groups = sorted(groups, key=lambda group: (group[0][0] != "hopper", -group[0][1]))  # what the README quotes first
    titled = {f"{size}, {harness.count(threads, 'thread')}": case_table(group) for (size, threads), group in groups}
    for (size, threads), group in groups:
        if set(group["arm"]) & set(OWN):
            titled[f"Ours, otherwise: {size}, {harness.count(threads, 'thread')}"] = own_table(group)
    return f"Speeds. {speeds}.\n\n{harness.sections(titled)}"


def case_table(group: pd.DataFrame) -> str:
    """Returns the table of one environment's sizes and number of threads: a line per kind, network and batch."""
    header = ["kind", "hidden", "batch", "ours, ms", *(f"{arm}, x" for arm in OTHERS)]
    header += ["floor, ms", *(f"ours / {arm}" for arm in FLOORS)]
    lines = []
    for (kind, hidden, batch), case in group.groupby(["kind", "hidden", "batch"], sort=False):
        arms: dict[str, Any] = {row["arm"]: row for _, row in case.iterrows()}
        ratios = [f"{arms[arm]['ratio']:.2f}" if arm in arms else "not measured" for arm in OTHERS]
        floors = [f"{1 / arms[arm]['ratio']:.2f}" if arm in arms else "-" for arm in FLOORS]
        floors = [harness.spread(arms["floor"]) if "floor" in arms else "-", *floors]
        lines.append([kind, hidden, str(batch), harness.spread(arms["ours"]), *ratios, *floors])
    return harness.markdown(header, lines)


def own_table(group: pd.DataFrame) -> str:
    """Returns how many times longer the product's own steps take with other libraries and groupings of members."""
    lines = []
    for (kind, hidden, batch), case in group.groupby(["kind", "hidden", "batch"], sort=False):
        ratios = dict(zip(case["arm"], case["ratio"], strict=True))
        lines.append([kind, hidden, str(batch), *(f"{ratios[arm]:.2f}" if arm in ratios else "-" for arm in OWN)])
    return harness.markdown(["kind", "hidden", "batch", *(f"{arm}, x" for arm in OWN)], lines)


def figure(summary: pd.DataFrame) -> Any:
    """Draws the time of a step as a multiple of ours, a panel per kind and batch, for the table that is in sight."""
    table = summary.reset_index()
    table = table[table["size"] == ("hopper" if "hopper" in set(table["size"]) else table["size"].iloc[0])]
    table = table[table["threads"] == table["threads"].max()]
    panels = [key for key, _ in table.groupby(["kind", "batch"], sort=False)]
    drawn = harness.new_figure(columns=len(panels))
    for axes, (kind, batch) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel = table[(table["kind"] == kind) & (table["batch"] == batch)]
        shown = list(panel["hidden"].unique())
        arms = [arm for arm in ARMS if arm in set(panel["arm"]) and arm not in OWN]
        for offset, arm in enumerate(arms):
            own = panel[panel["arm"] == arm]
            places = [shown.index(hidden) + (offset - len(arms) / 2) * 0.8 / len(arms) for hidden in own["hidden"]]
            axes.bar(places, own["ratio"], width=0.8 / len(arms), align="edge", label=arm)
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xticks(range(len(shown)), shown)
        axes.set(title=f"{kind}, batch {batch}", ylabel="time of a step, ours = 1")
        axes.grid(axis="y", alpha=0.3)
    drawn.axes[0].legend(fontsize="x-small")
    return drawn


if __name__ == "__main__":
    main()
