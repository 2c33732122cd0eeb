"""What surrounds the optimiser's steps: loading, memory, tracking, start-up, model.pkl, and how costs grow.

    python -m benchmarks.around_training
    python -m benchmarks.around_training --parts memory tracking
    python -m benchmarks.around_training --quick

load      a million hopper-sized transitions, against the bare h5py read
memory    peak of ``learn_model.py`` beyond importing PyTorch: the command itself, watched from outside
tracking  share of the wall time of a training with ``--track_training`` that trackers take. It cannot be seen from
          outside, so the benchmark is the command here: it composes dataset, loop, trackers and run folder as
          ``learn_model.py`` does, and times the calls
startup   ``learn_model.py --help``
model     size and load time of model.pkl
growth    time per step against members, width and rows

What has been measured is skipped when the command is run again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import harness
from benchmarks.prepare import HOLDOUT_RATIO, prepare
from benchmarks.step_arms import SIZES, Case, time_rounds
from config import LearnConfig, load_config
from data.audit import audit
from data.sources import load_dataset
from dynamics_model import FORMAT_VERSION, load_ensemble
from reporting.learning_curves import plot_learning_curves
from reporting.page import markdown_table
from tracking.csv_tracker import CsvTracker
from tracking.mlflow_tracker import DatasetInfo, MlflowTracker
from tracking.run_folder import RunFolder, RunOrigin, RunRequest
from tracking.trackers import ProgressTracker, Summary, Trackers
from training.batches import draw_order
from training.loop import train_ensemble
from training.scores import mean_scores, metric_columns, metric_rows, rank_elites, score_members


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then makes the tables and the figure."""
    args = parse_arguments(argv)
    results = harness.open_results("around_training", args.quick)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # runs go to stores in temporary folders
    if not args.tables:
        if args.quick:
            torch.set_num_threads(1)  # networks this small gain nothing from a second one
        with tempfile.TemporaryDirectory() as scratch:
            for part in tqdm(args.parts, unit="part"):
                PARTS[part](results, Path(scratch), args.quick)
    publish(results)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    return parser.parse_args(argv)


def measure(results: harness.ResultsFile, part: str, case: str, take: Callable[[], list[dict[str, Any]]]) -> None:
    """Measures a case and adds its rows, unless this machine has done so before.

    Rows have ``part`` and ``case``; ``started``, the time of day; ``round``; ``arm``, what was measured; and its value,
    ``ms`` or ``mib``.
    """
    if results.finished(part=part, case=case).empty:
        origin = {"part": part, "case": case, "started": harness.timestamp(), "round": 0}
        results.append([origin | row for row in take()])


# --- Loading ---


def load(results: harness.ResultsFile, scratch: Path, quick: bool) -> None:
    """Reads files of hopper size: bare h5py, ``load_dataset``, with the audit, and all up to training, in turn."""

    def bare_read(path: Path) -> None:
        with h5py.File(path, "r") as file:
            for key in file:
                file[key][...]

    count = 20_000 if quick else 1_000_000
    for compression in (None, "gzip"):
        path = write_hopper_size(scratch / f"load-{compression}.hdf5", count, compression)
        arms = {
            "bare h5py read": lambda path=path: bare_read(path),
            "load_dataset": lambda path=path: load_dataset(str(path), quiet=True),
            "load_dataset and audit": lambda path=path: audit(load_dataset(str(path), quiet=True)),
            "all up to normalised rows": lambda path=path: prepare(LearnConfig(), load_dataset(str(path), quiet=True)),
        }
        case = f"{count:,} transitions, {compression or 'not compressed'}"
        measure(results, "load", case, lambda arms=arms: harness.in_turn(arms, rounds=2 if quick else 5, seconds=0))
        path.unlink()


def write_hopper_size(path: Path, rows: int, compression: str | None = None) -> Path:
    """Writes noise in D4RL's format, in episodes of 1000 steps whose rows follow each other."""
    random = np.random.default_rng(0)
    state_dim, action_dim = SIZES["hopper"]
    widths = {"observations": (state_dim,), "actions": (action_dim,), "rewards": (), "next_observations": (state_dim,)}
    with h5py.File(path, "w") as file:
        for key, width in widths.items():
            values = random.standard_normal((rows, *width), dtype=np.float32)
            if key == "next_observations":
                values = np.roll(file["observations"][:], -1, axis=0)
            file.create_dataset(key, data=values, compression=compression, shuffle=compression is not None)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(1, rows + 1) % 1000 == 0
    return path


# --- Memory ---


def memory(results: harness.ResultsFile, scratch: Path, quick: bool) -> None:
    """Runs learn_model.py on growing files and ensembles until the end of its first epoch."""
    if not Path("/proc").exists():
        print("memory is left out: peaks are read from /proc, which only Linux has", file=sys.stderr)
        return
    counts, sizes = ((20_000,), (7,)) if quick else ((100_000, 1_000_000, 4_000_000), (7, 20))
    params = ["hidden_size=8"] if quick else []
    for count in counts:
        path = write_hopper_size(scratch / f"memory-{count}.hdf5", count)
        for members in sizes:
            configuration = harness.ROOT / "configs" / "hopper_pnn.yaml"
            command = [harness.ROOT / "learn_model.py", "--dataset", path, "--config", configuration]
            command += ["--holdout_ratio", "0.1", "--params", f"ensemble_size={members}", *params, "--cpu"]
            case = f"{count:,} transitions, {members} members"
            measure(results, "memory", case, lambda command=command: memory_peaks(command))
        path.unlink()


def memory_peaks(command: list[str | Path]) -> list[dict[str, Any]]:
    """Runs a training command until the end of its first epoch, scoring included.

    Returns:
        Peaks so far, ``arm`` and ``mib``, at three moments: ``torch``, of a process that only imports PyTorch;
        ``ready``, when the command says what it is about to train; ``training``, when it says that an epoch has ended.
    """
    only_imports = [sys.executable, "-c", "import sys, torch; sys.stderr.write('imported\\n'); sys.stdin.read()"]
    peaks = peaks_at({"torch": "imported"}, only_imports)
    peaks |= peaks_at({"ready": "training rows of", "training": "epoch 1/"}, [sys.executable, *command])
    return [{"arm": moment, "mib": mib} for moment, mib in peaks.items()]


def peaks_at(moments: dict[str, str], command: list[str | Path]) -> dict[str, float]:
    """Runs a command in a folder of its own until it has come to all of some moments, and then ends it.

    Args:
        moments: What the command prints to standard error at each moment, by the moment's name.
        command: The command.

    Returns:
        The largest resident size up to each moment, MiB.
    """
    peaks: dict[str, float] = {}
    printed = []
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        for line in process.stderr:
            printed.append(line)
            for moment in (moment for moment, text in moments.items() if text in line):
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                peaks[moment] = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**10
            if peaks.keys() == moments.keys():
                process.terminate()
                break
    if peaks.keys() != moments.keys():
        raise RuntimeError(f"{command} ended with code {process.returncode}:\n{''.join(printed)}")
    return peaks


# --- Tracking ---


def tracking(results: harness.ResultsFile, scratch: Path, quick: bool) -> None:
    """Trains both kinds of ensemble as learn_model.py does with --track_training."""
    params = ["fit_epochs=2", "hidden_size=8", "batch_size=4096"] if quick else ["fit_epochs=20"]
    for name in ("hopper_dnn", "hopper_pnn"):
        path = f"configs/{name}.yaml"
        config = load_config(harness.ROOT / path, params)
        measure(results, "tracking", path, lambda name=name, config=config: tracked_training(name, config, scratch))


def tracked_training(name: str, config: LearnConfig, scratch: Path) -> list[dict[str, Any]]:
    """Trains and tracks a run, its files and MLflow's in a folder of its own.

    Returns:
        Milliseconds, ``arm`` and ``ms``: of the loop, ``training``, with checkpoints and all; and in trackers, of
        ``tracker.log_epoch``, which is part of the loop, and of ``tracker.finish`` and ``tracker.close`` after it.
    """
    seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def timed(arm: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[arm] += time.perf_counter() - start

    dataset = load_dataset("hopper-medium-demo", quiet=True)
    ensemble, train, holdout = prepare(config, dataset)
    with inside(scratch):
        request = RunRequest(dataset.name, dataset.sha256, HOLDOUT_RATIO, None, 0.0, True, config.to_dict())
        run = RunFolder.create(Path("logs"), name, request, RunOrigin.here())
        run.hold(config.to_yaml(), "")
        tracker = Trackers(
            [
                CsvTracker(run.metrics_csv, metric_columns(ensemble)),
                MlflowTracker(
                    run_name=run.name,
                    params=request.config,
                    tags={"kind": ensemble.kind},
                    dataset=DatasetInfo(dataset.name, dataset.sha256, dataset.num_rows, len(dataset.trajectories)),
                    ensemble_size=len(ensemble),
                ),
                ProgressTracker(config.fit_epochs, quiet=True),
            ]
        )
        with timed("training"):
            for epoch in train_ensemble(ensemble, config, train, holdout, score_every=1):
                with timed("tracker.log_epoch"):
                    tracker.log_epoch(epoch.index, metric_rows(ensemble, config, epoch))
                run.checkpoints.save(epoch.checkpoint())
        scores = score_members(ensemble, train, holdout)
        model = Path("model.pkl")
        model.write_bytes(pickle.dumps((ensemble.members(), {})))
        curves = plot_learning_curves(run.metrics_csv, run.path / "learning_curves.png")
        with timed("tracker.finish"):
            summary = Summary(mean_scores(scores), members=scores, elites=rank_elites(scores, config.num_elites))
            tracker.finish(summary, [run.config_yaml, run.metrics_csv, curves, model])
        with timed("tracker.close"):
            tracker.close()
    return [{"arm": arm, "ms": value * 1e3} for arm, value in seconds.items()]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Makes a folder the current one inside the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# --- Start-up ---


def startup(results: harness.ResultsFile, scratch: Path, quick: bool) -> None:
    """Asks for help, in turn with starting Python alone."""

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], cwd=harness.ROOT, stdout=subprocess.DEVNULL, check=True)

    arms = {"learn_model.py --help": lambda: run("learn_model.py", "--help"), "python alone": lambda: run("-c", "")}
    measure(results, "startup", "help", lambda: harness.in_turn(arms, rounds=2 if quick else 10, seconds=0))


# --- model.pkl ---


def model(results: harness.ResultsFile, scratch: Path, quick: bool) -> None:
    """Loads model.pkl as planners and as ``load_ensemble`` do, in turn with reading its bytes."""
    networks = [("probabilistic", "4x200"), ("deterministic", "4x256"), ("probabilistic", "4x512")]
    for kind, hidden in [("probabilistic", "2x16")] if quick else networks:
        case = Case(kind, hidden, batch=256, size="hopper", threads=1, rounds=0)
        path = scratch / f"{kind}-{hidden}.pkl"
        path.write_bytes(pickle.dumps((case.ensemble.members(), {"format_version": FORMAT_VERSION, "seed": 0})))
        arms = {
            "bytes alone": path.read_bytes,
            "pickle.load": lambda path=path: pickle.load(io.BytesIO(path.read_bytes())),
            "load_ensemble": lambda path=path: load_ensemble(path),
        }

        def take(path: Path = path, arms: dict[str, Callable[[], Any]] = arms) -> list[dict[str, Any]]:
            size = {"arm": "size", "mib": path.stat().st_size / 2**20}
            return [size, *harness.in_turn(arms, rounds=2 if quick else 7, seconds=0.0 if quick else 0.05)]

        measure(results, "model", f"7 x {kind} {hidden}", take)


# --- Growth ---


def growth(results: harness.ResultsFile, scratch: Path, quick: bool) -> None:
    """Times the product's steps against members and width, and the drawing of an epoch's order against rows."""
    members, widths, counts = (1, 2, 4, 7, 14, 28), (64, 128, 256, 512, 1024), (10_000, 100_000, 1_000_000)
    usual = Case("probabilistic", "4x200", batch=256, size="hopper", threads=1, rounds=5)
    if quick:
        members, widths, counts = (1, 2), (8, 16), (1000, 10_000)
        usual = dataclasses.replace(usual, hidden="4x16", rounds=2)
    for number in members:
        case = dataclasses.replace(usual, members=number)
        measure(results, "growth", f"{number} members", lambda case=case: step_times(case))
    for width in widths:
        case = dataclasses.replace(usual, hidden=f"4x{width}")
        measure(results, "growth", f"{width} wide", lambda case=case: step_times(case))
    for count in counts:
        measure(results, "growth", f"{count} rows", lambda count=count: order_times(count))


def step_times(case: Case) -> list[dict[str, Any]]:
    """Runs the product's training for some rounds of steps, after one that is a warm-up."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    rounds = list(itertools.islice(time_rounds("ours", case), 1, 1 + case.rounds))
    torch.set_num_threads(before)
    return [{"arm": "step", "round": index, **measured} for index, measured in enumerate(rounds)]


def order_times(count: int) -> list[dict[str, Any]]:
    """Draws the order of an epoch for 7 members, the only cost of an epoch besides steps and scoring."""
    return harness.in_turn({"order of an epoch": lambda: draw_order(0, 7, count, epoch=0)}, rounds=5, seconds=0)


PARTS = {part.__name__: part for part in (load, memory, tracking, startup, model, growth)}


# --- Tables and the figure ---


def publish(results: harness.ResultsFile) -> None:
    """Makes the tables and, where growth has been measured, the figure."""
    rows = results.rows_to_show()
    results.publish(tables(rows), draw(rows) if (rows["part"] == "growth").any() else None)


def tables(rows: pd.DataFrame) -> str:
    """Returns the tables of the parts that were measured, one below the other."""
    written = []
    for part, shown in rows.groupby("part", sort=False):
        times = shown.dropna(subset=["ms"]).groupby(["case", "arm"], sort=False)["ms"]
        summary = times.agg(median="median", low="min", high="max").reset_index()
        written.append(f"**{TITLES[part]}**\n\n{TABLES[part](summary, shown)}")
    return "\n\n".join(written)


def time_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per case and arm: milliseconds."""
    lines = [[row["case"], row["arm"], harness.spread(row)] for _, row in summary.iterrows()]
    return markdown_table(["case", "what", "ms"], lines)


def ratio_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per case and arm: milliseconds, and how many times the first arm's of the same round."""
    base = shown["arm"].dropna().iloc[0]
    compared = harness.compare(shown, ["part", "case"], base).reset_index()
    lines = [[row["case"], row["arm"], harness.spread(row), f"{row['ratio']:.2f}"] for _, row in compared.iterrows()]
    return markdown_table(["case", "what", "ms", f"x of {base}"], lines)


def memory_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per case: the peak, what PyTorch takes of it, and the difference."""
    lines = []
    for case, values in shown.groupby("case", sort=False):
        mib = values.set_index("arm")["mib"]
        lines.append([case, *(f"{mib[name]:.0f}" for name in mib.index), f"{mib['training'] - mib['torch']:.0f}"])
    header = ["case", "after importing PyTorch, MiB", "before the first step", "in training", "beyond PyTorch"]
    return markdown_table(header, lines)


def tracking_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per configuration: seconds in the loop, share of the trackers, and their end."""
    lines = []
    for case, values in shown.groupby("case", sort=False):
        seconds = values.set_index("arm")["ms"] / 1e3
        share = seconds["tracker.log_epoch"] / seconds["training"]
        end = seconds["tracker.finish"] + seconds["tracker.close"]
        lines.append([case, f"{seconds['training']:.1f}", f"{share:.2%}", f"{end:.2f}"])
    return markdown_table(["case", "training loop, s", "of it in trackers", "trackers' end, s"], lines)


def model_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per ensemble: size, and time to load."""
    sizes = shown.dropna(subset=["mib"]).set_index("case")["mib"]
    lines = []
    for case, values in summary.groupby("case", sort=False):
        arms = {row["arm"]: harness.spread(row) for _, row in values.iterrows()}
        lines.append([case, f"{sizes[case]:.1f}", *(arms[arm] for arm in MODEL_ARMS)])
    return markdown_table(["ensemble", "MiB", *(f"{arm}, ms" for arm in MODEL_ARMS)], lines)


MODEL_ARMS = ("bytes alone", "pickle.load", "load_ensemble")
TITLES = {
    "load": "Loading transitions of hopper size",
    "memory": "Peak memory of learn_model.py with configs/hopper_pnn.yaml",
    "tracking": "Time in trackers with --track_training, 20 epochs of hopper-medium-demo",
    "startup": "Start-up",
    "model": "model.pkl",
    "growth": "Growth: a step of probabilistic members, 4x200 unless said, batch 256, one thread",
}
TABLES = {
    "load": ratio_table,
    "memory": memory_table,
    "tracking": tracking_table,
    "startup": time_table,
    "model": model_table,
    "growth": time_table,
}


def draw(rows: pd.DataFrame) -> Figure:
    """Draws time against members, width and rows."""
    shown = rows[rows["part"] == "growth"].groupby("case", sort=False)["ms"].median()
    figure = harness.new_figure(columns=3)
    for axes, unit in zip(figure.subplots(1, 3), ("members", "wide", "rows"), strict=True):
        own = {int(case.split()[0]): ms for case, ms in shown.items() if case.endswith(unit)}
        axes.plot(list(own), list(own.values()), marker="o")
        what = "to draw the order of an epoch" if unit == "rows" else "per step"
        axes.set(xlabel={"wide": "width"}.get(unit, unit), ylabel=f"ms {what}", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
