"""Milliseconds per optimiser step of a 7-member ensemble: ours, other ways to take the same step, and the floor.

    python -m benchmarks.step_throughput --size hopper --threads 2
    python -m benchmarks.step_throughput --hidden 4x200 --batch 256 --arms ours jax
    python -m benchmarks.step_throughput --quick

Each way to take a step, an arm of ``step_arms.py``, runs in a process of its own, on as many cores as threads. All
processes of a case are warmed up and then run in turn, a round each; ratios are taken within a round. Arms of a case
that have been measured are skipped when the command is run again, except ``ours``, which is measured along with every
new one.
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
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import harness, step_arms
from benchmarks.step_arms import ARMS, FLOORS, NEEDS, OWN, SIZES, Case
from reporting.page import markdown_details, markdown_table

KINDS = ("probabilistic", "deterministic")
HIDDEN = ("4x200", "4x256", "4x512", "2x512")
BATCHES = (256, 1024)
THREADS = (1, 2)
CASE = ["kind", "hidden", "batch", "size", "threads"]
INTRODUCTION = """\
Medians over rounds, with the smallest and the largest. x: the other's time divided by ours in the same round, median
over rounds.

- ours: a step of the first 80 % of training, in which products round their operands to bfloat16 if the processor has
  AMX (`reduced_precision`); `full precision`: a step of the last 20 %.
- `plain`: the published loop over members; `mbrl`: mbrl-lib; `jax`: JAX, `vmap` and `scan`. They compute in float32,
  and, `rounded`, with PyTorch's own switch for products that round.
- `products`: the matrix products of our step alone.
- floor: the step's FLOPs at the speed of a large float32 product, and the optimiser's memory traffic at the speed of
  copies, both measured in the same rounds; rounded floor: with a large product that rounds as ours do.
- ours, otherwise: our loop with each library of products, and with cores that share every product (together) or that
  take members of their own (apart); ours has tried them and taken one."""
BUSY = """\
As above, while another process keeps one of the cores busy all the time."""
OTHERS = [arm for arm in ARMS if arm not in ("ours", *FLOORS, *OWN)]
# Of arms that differ by a setting only, one.
QUICK_ARMS = ["ours", "plain, rounded", "mbrl", "jax", "products", "floor", "onednn, together"]


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing of the cases asked for, then makes the tables and the figure."""
    args = parse_arguments(argv)
    results = harness.open_results("step_throughput_busy" if args.busy else "step_throughput", args.quick)
    if not args.tables:
        arms = [arm for arm in args.arms if is_available(arm)]
        grid = itertools.product(args.kind, args.hidden, args.batch, args.size, args.threads)
        with busy_core() if args.busy else contextlib.nullcontext():
            for case in tqdm([Case(*values, rounds=args.rounds) for values in grid], unit="case"):
                measure(results, case, arms)
    publish(results)


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
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="ways to take a step (all)")
    parser.add_argument("--busy", action="store_true", help="keep one core busy with another process meanwhile")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds of each arm (5)")
    args = parser.parse_args(argv)
    if args.quick:  # layers just wide enough for oneDNN
        args.kind, args.hidden, args.batch, args.size, args.threads = KINDS[:1], ("2x160",), (160,), ("hopper",), (1,)
        args.rounds = 2
    args.arms = args.arms or (QUICK_ARMS if args.quick else list(ARMS))
    return args


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keeps one core busy, the first that this process may use."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        yield
    finally:
        process.kill()
        process.wait()


def is_available(arm: str) -> bool:
    """Whether the packages that an arm needs are installed; prints which are not."""
    missing = [package for package in NEEDS.get(arm, ()) if importlib.util.find_spec(package) is None]
    if missing:
        print(f"arm {arm} is left out: {', '.join(missing)} not found; see requirements-bench.txt", file=sys.stderr)
    return not missing


def measure(results: harness.ResultsFile, case: Case, arms: list[str]) -> None:
    """Runs the arms of a case that have no rows yet in alternating rounds, and ``ours`` with them.

    Adds a row per round and arm: those of ``CASE``; ``arm``; ``started``, the time of day, the same for all of these
    rounds; ``round``; ``ms`` per step; for floors ``gflops_per_s`` and ``gbytes_per_s``, the speeds they follow from.
    """
    of_case = {name: getattr(case, name) for name in CASE}
    measured = results.finished(**of_case)
    missing = [arm for arm in arms if measured.empty or arm not in set(measured["arm"])]
    if not missing:
        return
    rows, started = [], harness.timestamp()
    with contextlib.ExitStack() as stack:
        workers = {arm: stack.enter_context(start_worker(arm, case)) for arm in dict.fromkeys(["ours", *missing])}
        for process in workers.values():
            read_answer(process)  # of the warm-up
        for turn in range(case.rounds):
            for arm, process in workers.items():
                process.stdin.write("\n")
                process.stdin.flush()
                rows.append(of_case | {"arm": arm, "started": started, "round": turn} | read_answer(process))
    results.append(rows)


def start_worker(arm: str, case: Case) -> subprocess.Popen[str]:
    """Starts the process of an arm; it ends when its standard input is closed, as leaving its context does."""
    threads = {name: str(case.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.Popen(
        step_arms.command(arm, case),
        cwd=harness.ROOT,
        env=os.environ | threads | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """Waits for the end of a worker's round, and returns what it measured."""
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(
            f"an arm ended with code {process.wait()} ({' '.join(process.args[3:])}); see its error above"
        )
    return json.loads(line)


# --- Tables and the figure ---


def publish(results: harness.ResultsFile) -> None:
    """Makes tables and figure of the machine that measured last, and tables of the other machines, folded away."""
    latest = results.rows_to_show()
    others = results.machines()[1:]
    folded = [markdown_details(f"On {machine}", tables(results.rows(machine))) for machine in others]
    is_busy = results.name.endswith("_busy")
    text = "\n\n".join([BUSY if is_busy else INTRODUCTION, tables(latest), *folded])
    command = "step_throughput --busy" if is_busy else None
    results.publish(text, draw(harness.compare(latest, CASE, base="ours")), command)


def tables(rows: pd.DataFrame) -> str:
    """Returns a machine's speeds, and a table for each environment's sizes and number of threads."""
    floors = rows[rows["arm"].isin(FLOORS)].reindex(columns=[*CASE, "arm", "gflops_per_s", "gbytes_per_s"])
    median = floors.groupby(["threads", "arm"])[["gflops_per_s", "gbytes_per_s"]].median()
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
    return (f"Speeds. {speeds}.\n\n" if speeds else "") + harness.sections(titled)


def case_table(group: pd.DataFrame) -> str:
    """Returns the table of one environment's sizes and number of threads.

    Args:
        group: Rows of ``harness.compare``.

    Returns:
        A line per kind, network and batch: ours in milliseconds, each other arm as a multiple of ours, the floor in
        milliseconds, and ours as a multiple of each floor.
    """
    header = ["kind", "hidden", "batch", "ours, ms", *(f"{arm}, x" for arm in OTHERS)]
    header += ["floor, ms", *(f"ours / {arm}" for arm in FLOORS)]
    lines = []
    for (kind, hidden, batch), case in group.groupby(["kind", "hidden", "batch"], sort=False):
        arms: dict[str, Any] = {row["arm"]: row for _, row in case.iterrows()}
        ratios = [f"{arms[arm]['ratio']:.2f}" if arm in arms else "not measured" for arm in OTHERS]
        floors = [f"{1 / arms[arm]['ratio']:.2f}" if arm in arms else "-" for arm in FLOORS]
        floors = [harness.spread(arms["floor"]) if "floor" in arms else "-", *floors]
        lines.append([kind, hidden, str(batch), harness.spread(arms["ours"]), *ratios, *floors])
    return markdown_table(header, lines)


def own_table(group: pd.DataFrame) -> str:
    """Returns the table of the product's own loop with other libraries and groupings of members, as multiples of ours.

    Args:
        group: Rows of ``harness.compare``, of one environment's sizes and number of threads.
    """
    lines = []
    for (kind, hidden, batch), case in group.groupby(["kind", "hidden", "batch"], sort=False):
        ratios = dict(zip(case["arm"], case["ratio"], strict=True))
        lines.append([kind, hidden, str(batch), *(f"{ratios[arm]:.2f}" if arm in ratios else "-" for arm in OWN)])
    return markdown_table(["kind", "hidden", "batch", *(f"{arm}, x" for arm in OWN)], lines)


def draw(summary: pd.DataFrame) -> Figure:
    """Draws the time of a step as a multiple of ours, a panel per kind and batch, for the table that is in sight."""
    table = summary.reset_index()
    table = table[table["size"] == ("hopper" if "hopper" in set(table["size"]) else table["size"].iloc[0])]
    table = table[table["threads"] == table["threads"].max()]
    panels = [key for key, _ in table.groupby(["kind", "batch"], sort=False)]
    figure = harness.new_figure(columns=len(panels))
    for axes, (kind, batch) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
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
    figure.axes[0].legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    main()
