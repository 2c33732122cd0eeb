"""What the benchmarks share: rows in CSV files, the machine they were measured on, tables in README.md, figures.

A benchmark appends finished rows to ``results/NAME.csv`` and skips them when it is run again; its tables and figures
are made from that file alone. Every row says on which machine and at which commit it was measured; tables of times show
the rows of the machine that measured last.
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
from typing import TYPE_CHECKING, Any

import pandas as pd

from cli import CommandLine, exit_on_input_error
from reporting.page import replace_section
from utils import InputError, atomic_write, git_commit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


class Study:
    """The files of one benchmark.

    Args:
        name: Of the CSV, and of the script that writes it.
        folder: Holds ``results/``, ``plots/`` and ``README.md``.
        is_timed: Whether rows tell how long something took, so that those of different machines do not mix.
    """

    def __init__(self, name: str, folder: Path = FOLDER, is_timed: bool = True) -> None:
        self.name = name
        self.folder = folder
        self.is_timed = is_timed
        self.csv = folder / "results" / f"{name}.csv"

    def rows(self, machine: str | None = None) -> pd.DataFrame:
        """Returns the rows measured on a machine, by default the one that measured last; empty where there are none.

        Rows that are not timed are returned whatever the machine.
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

    def shown(self) -> pd.DataFrame:
        """Returns the rows for tables and figures; ends the program where nothing has been measured."""
        rows = self.rows()
        with exit_on_input_error():
            if rows.empty:
                raise InputError(f"{self.csv} has no rows yet; run benchmarks.{self.name} without --tables")
        return rows

    def finished(self, **wanted: Any) -> pd.DataFrame:
        """Returns the rows of this machine that have these values in these columns."""
        return _having(self.rows(machine()), wanted)

    def discard(self, **wanted: Any) -> None:
        """Removes the rows that have these values in these columns, whatever the machine."""
        with locked(self.folder):
            if self.csv.exists():
                table = pd.read_csv(self.csv)
                self._write(table.drop(_having(table, wanted).index))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows, with the machine and the commit, at once: a run that is killed leaves whole measurements.

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

    def write_table(self, text: str) -> None:
        """Replaces what README.md has between the benchmark's marker comments: table, figure, and their origin."""
        rows = self.rows()
        commits = " to ".join(f"`{commit}`" for commit in dict.fromkeys(rows["commit"].iloc[[0, -1]]))
        machines = "; ".join(rows["machine"].unique())
        origin = f"Written by `python -m benchmarks.{self.name}`; measured at {commits} on {machines}."
        picture = f"plots/{self.name}.png"
        shown = f"![{self.name}]({picture})\n\n" if (self.folder / picture).exists() else ""
        readme = self.folder / "README.md"
        replace_section(readme, self.name, f"{origin}\n\n{text.strip()}\n\n{shown}")
        print(f"\n{text.strip()}\n\n{self.csv}, {readme}", file=sys.stderr)

    def save_figure(self, figure: Figure) -> None:
        """Writes the benchmark's figure to ``plots/``."""
        path = self.folder / "plots" / f"{self.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _having(table: pd.DataFrame, wanted: dict[str, Any]) -> pd.DataFrame:
    for column, value in wanted.items() if len(table) else ():
        table = table[table[column] == value]
    return table


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process in at a time."""
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
        help="try it out: tiny settings, and results, tables and figures in a temporary folder; not for publishing",
    )
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing, draw tables and figures again from the CSV"
    )
    return parser


def open_study(name: str, quick: bool, is_timed: bool = True) -> Study:
    """Returns the benchmark's files; those of a quick trial are in a temporary folder."""
    if not quick:
        return Study(name, is_timed=is_timed)
    folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
    shutil.copy(FOLDER / "README.md", folder)
    return Study(name, folder, is_timed)


# --- Machine and versions ---


def machine() -> str:
    """Returns processor, cores, memory and the versions that speed depends on, in a line."""
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
    """Times functions in alternating rounds, so that what disturbs the machine disturbs all of them.

    Args:
        arms: Functions by name; each is called before the first round, too, unmeasured.
        rounds: How often each is timed.
        seconds: About how long each is called over and over in a round.

    Returns:
        A row per round and arm: ``started``, the same for all of one call; ``round``; ``arm``; ``ms`` per call.
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
    """Returns the time of day, which tells measurements of one sitting from another's."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def compare(rows: pd.DataFrame, case: list[str], base: str, value: str = "ms") -> pd.DataFrame:
    """Summarises rounds: per case and arm, ``median``, ``low``, ``high`` and ``ratio``.

    Args:
        rows: With the columns of ``case``, ``started``, ``round``, ``arm`` and ``value``.
        case: What tells cases apart.
        base: The arm that others are compared with: ``ratio`` is the median, over rounds, of the arm's value divided by
            the base's in the same round.
        value: What was measured.
    """
    turn = [*case, "started", "round"]
    of_base = rows[rows["arm"] == base].set_index(turn)[value].rename("base")
    rows = rows.join(of_base, on=turn)
    rows = rows.assign(ratio=rows[value] / rows["base"])
    return rows.groupby([*case, "arm"], sort=False).agg(
        median=(value, "median"), low=(value, "min"), high=(value, "max"), ratio=("ratio", "median")
    )


# --- Tables and figures ---


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def sections(tables: dict[str, str]) -> str:
    """Returns titled tables, the first in sight and the others folded away."""
    first, *others = tables.items()
    return "\n\n".join([f"**{first[0]}**\n\n{first[1]}", *(folded(title, table) for title, table in others)])


def folded(title: str, text: str) -> str:
    """Returns text that shows when its title is clicked on."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def spread(summary: pd.Series, form: str = ".3g") -> str:
    """Returns the median, and low and high in brackets, of a row of ``compare``."""
    return f"{summary['median']:{form}} ({summary['low']:{form}}–{summary['high']:{form}})"  # noqa: RUF001 - a range


def count(number: int, noun: str) -> str:
    """Returns ``1 thread``, ``2 threads``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def new_figure(columns: int, lines: int = 1) -> Figure:
    """Returns a figure for that many panels."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
