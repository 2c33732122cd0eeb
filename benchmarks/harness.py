"""What the benchmarks share: results files, the machine they were measured on, rounds in turn, tables and figures.

A benchmark appends the rows that it has measured to ``results/NAME.csv`` and skips them when it is run again; its
tables and its figure are made from that file alone. Each row says on which machine and at which commit it was measured.
Tables of times show the machine that measured last.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure  # no pyplot: no global state, no display

from cli import CommandLine, exit_on_input_error
from reporting.page import markdown_details, replace_section
from reporting.style import png
from utils import ROOT, InputError, atomic_write, git_commit

FOLDER = Path(__file__).resolve().parent


# --- Results ---


class ResultsFile:
    """The CSV of a benchmark, with the figure and the section of README.md that are made from it.

    Rows have columns of the benchmark's own, and ``commit`` and ``machine``.

    Args:
        name: Of the CSV and the figure; for most benchmarks also that of the script and the section.
        folder: Holds ``results/``, ``plots/`` and ``README.md``.
        is_timed: Whether rows tell how long something took, so that those of different machines must not be mixed.
    """

    def __init__(self, name: str, folder: Path = FOLDER, is_timed: bool = True) -> None:
        self.name = name
        self.folder = folder
        self.is_timed = is_timed
        self.csv = folder / "results" / f"{name}.csv"

    def rows(self, machine: str | None = None) -> pd.DataFrame:
        """Returns the rows of a machine, by default of the one that measured last; empty where there are none.

        If rows are not timed, those of all machines are returned.
        """
        if not self.csv.exists():
            return pd.DataFrame()
        table = pd.read_csv(self.csv)
        if not self.is_timed:
            return table
        return table[table["machine"] == (table["machine"].iloc[-1] if machine is None else machine)]

    def machines(self) -> list[str]:
        """Returns the machines that have measured, the last one first."""
        return list(dict.fromkeys(reversed(pd.read_csv(self.csv)["machine"].tolist())))

    def rows_to_show(self) -> pd.DataFrame:
        """Returns the rows for tables and figures; ends the program if nothing has been measured."""
        rows = self.rows()
        with exit_on_input_error():
            if rows.empty:
                raise InputError(f"{self.csv} has no rows yet; run benchmarks.{self.name} without --tables")
        return rows

    def finished(self, **wanted: Any) -> pd.DataFrame:
        """Returns the rows of this machine that have these values in these columns."""
        return _select(self.rows(machine()), wanted)

    def discard(self, **wanted: Any) -> None:
        """Removes the rows of all machines that have these values in these columns."""
        with locked(self.folder):
            if self.csv.exists():
                table = pd.read_csv(self.csv)
                self._write(table.drop(_select(table, wanted).index))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows, with commit and machine, all at once: a run that is killed leaves whole measurements.

        Several processes may add to one file.
        """
        commit = git_commit(ROOT) or "unknown"
        origin = {"commit": commit[:10] + "+" * commit.endswith("+"), "machine": machine()}
        table = pd.DataFrame([row | origin for row in rows])
        with locked(self.folder):
            if self.csv.exists():
                table = pd.concat([pd.read_csv(self.csv), table])
            self._write(table)

    def _write(self, table: pd.DataFrame) -> None:
        with atomic_write(self.csv, "w") as file:
            table.to_csv(file, index=False, float_format="%.6g")

    def publish(self, text: str, figure: Figure | None = None, command: str | None = None) -> None:
        """Writes the figure to ``plots/``, and its section of README.md: origin of the rows, text with tables, figure.

        Args:
            text: Markdown.
            figure: A new figure; None leaves the one in ``plots/``, if any, as it is.
            command: What made the rows, after ``python -m benchmarks.``; None is the name.
        """
        picture = Path("plots") / f"{self.name}.png"
        if figure is not None:
            with atomic_write(self.folder / picture) as file:
                file.write(png(figure, dpi=110))
        rows = self.rows()
        commits = " to ".join(f"`{commit}`" for commit in dict.fromkeys(rows["commit"].iloc[[0, -1]]))
        machines = "; ".join(rows["machine"].unique())
        origin = f"Written by `python -m benchmarks.{command or self.name}`; measured at {commits} on {machines}."
        shown = f"![{self.name}]({picture.as_posix()})" if (self.folder / picture).exists() else ""
        readme = self.folder / "README.md"
        replace_section(readme, self.name, f"{origin}\n\n{text.strip()}\n\n{shown}")
        print(f"\n{text.strip()}\n\n{self.csv}, {readme}", file=sys.stderr)


def _select(table: pd.DataFrame, wanted: dict[str, Any]) -> pd.DataFrame:
    for column, value in wanted.items() if len(table) else ():
        table = table[table[column] == value]
    return table


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- The command line ---


def command_line(description: str | None) -> CommandLine:
    """Returns a parser with the flags that all benchmarks have."""
    parser = CommandLine(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="try it out: tiny settings, with results, tables and figure in a temporary folder; not for publishing",
    )
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing; make the tables and the figure again from the CSV"
    )
    return parser


def open_results(name: str, quick: bool, is_timed: bool = True) -> ResultsFile:
    """Returns the benchmark's results file; that of a quick trial is in a temporary folder."""
    if not quick:
        return ResultsFile(name, is_timed=is_timed)
    folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
    shutil.copy(FOLDER / "README.md", folder)
    return ResultsFile(name, folder, is_timed)


# --- Machine and versions ---


def machine() -> str:
    """Returns in one line what speed depends on: processor, cores, memory, system, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy"))
    system = f"{platform.system()} {platform.machine()}"
    return f"{_cpu_model()} ({cores} cores; {memory:.0f} GiB; {system}; Python {platform.python_version()} {packages})"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
    facts = {name.strip(): value.strip() for name, _, value in lines}
    model = facts.get("model name", platform.machine())
    return f"{model} family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else model


# --- Measuring in turn ---


def in_turn(arms: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Times functions in alternating rounds, so that whatever disturbs the machine disturbs all of them.

    Args:
        arms: Functions by name. Each is called twice before the first round, to warm up and to see how long it takes.
        rounds: How often each is timed.
        seconds: About how long each is called over and over in a round; at least once.

    Returns:
        A row per round and arm: ``started``, the time of day, the same in all rows; ``round``; ``arm``; ``ms`` per
        call.
    """
    calls = {}
    for name, function in arms.items():
        function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    rows, started = [], timestamp()
    for turn in range(rounds):
        for name, function in arms.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            elapsed = time.perf_counter() - start
            rows.append({"started": started, "round": turn, "arm": name, "ms": elapsed / calls[name] * 1e3})
    return rows


def timestamp() -> str:
    """Returns the time of day, by which rows that were measured together are known."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def compare(rows: pd.DataFrame, case: list[str], base: str, value: str = "ms") -> pd.DataFrame:
    """Summarises rounds, and compares each arm with one of them.

    Args:
        rows: With the columns of ``case``, ``started``, ``round``, ``arm`` and ``value``.
        case: Columns that tell cases apart.
        base: The arm to compare with.
        value: The column that was measured.

    Returns:
        A row per case and arm (the index): ``median``, ``low`` and ``high`` of the value over rounds, and ``ratio``,
        the median over rounds of the arm's value divided by the base's in the same round.
    """
    turn = [*case, "started", "round"]
    of_base = rows[rows["arm"] == base].set_index(turn)[value].rename("base")
    rows = rows.join(of_base, on=turn)
    rows = rows.assign(ratio=rows[value] / rows["base"])
    return rows.groupby([*case, "arm"], sort=False).agg(
        median=(value, "median"), low=(value, "min"), high=(value, "max"), ratio=("ratio", "median")
    )


# --- Tables and figures ---


def sections(tables: dict[str, str]) -> str:
    """Returns Markdown tables below their titles, the first one in sight and the others folded away."""
    first, *others = tables.items()
    return "\n\n".join([f"**{first[0]}**\n\n{first[1]}", *(markdown_details(*titled) for titled in others)])


def spread(summary: pd.Series, form: str = ".3g") -> str:
    """Returns ``median (low-high)`` of a row of ``compare``."""
    return f"{summary['median']:{form}} ({summary['low']:{form}}–{summary['high']:{form}})"  # noqa: RUF001 - a range


def count(number: int, noun: str) -> str:
    """Returns ``1 thread``, ``2 threads``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def new_figure(columns: int, lines: int = 1) -> Figure:
    """Returns a figure with room for so many panels."""
    return Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")


def draw_rates(summary: pd.DataFrame, panel: str, size: str, ylabel: str, arms: dict[str, str]) -> Figure:
    """Draws a rate against the size of what is processed at once, both on log axes.

    Args:
        summary: Columns ``arm``, ``rate`` and those named below.
        panel: Column whose values get a panel each.
        size: Column of sizes, and the label of their axis.
        ylabel: What the rate is.
        arms: Labels of the arms, in the order of their colours.
    """
    panels = list(summary[panel].unique())
    figure = new_figure(columns=len(panels))
    colours = {arm: f"C{index}" for index, arm in enumerate(arms)}
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for arm, rows in summary[summary[panel] == title].groupby("arm", sort=False):
            rows = rows.sort_values(size)
            axes.plot(rows[size], rows["rate"], "o-", color=colours[arm], label=arms[arm])
        axes.set(title=title, xlabel=size, ylabel=ylabel, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="x-small")
    return figure
