"""What surrounds the optimiser's steps: loading, memory, tracking, start-up, model.pkl, and how costs grow.

    python -m benchmarks.around_training
    python -m benchmarks.around_training --parts memory tracking
    python -m benchmarks.around_training --quick

Parts: ``load`` (a million hopper-sized transitions, against the bare h5py read), ``memory`` (peak of a whole
``learn_model.py`` beyond importing PyTorch), ``tracking`` (share of the wall time of a training with
``--track_training``), ``startup`` (``learn_model.py --help``), ``model`` (size and load time of model.pkl) and
``growth`` (time per step against members, width and rows). Finished measurements are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks import harness
from benchmarks.step_arms import Case, EnoughRounds, Pace, ours

HOPPER = (11, 3)  # state_dim, action_dim


def main(argv: list[str] | None = None) -> None:
    """Measures what is missing, then draws the tables and the figure."""
    args = parse_arguments(argv)
    study = harness.open_study("around_training", args.quick)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # the runs of benchmarks go nowhere
    if not args.tables:
        with tempfile.TemporaryDirectory() as scratch:
            for part in tqdm(args.parts, unit="part"):
                PARTS[part](study, Path(scratch), args.quick)
    rows = study.shown()
    if (rows["part"] == "growth").any():
        study.save_figure(figure(rows))
    study.write_table(tables(rows))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    return parser.parse_args(argv)


def measure(study: harness.Study, part: str, case: str, take: Callable[[], list[dict[str, Any]]]) -> None:
    """Takes the rows of a case and adds them, unless this machine has done so before."""
    if study.finished(part=part, case=case).empty:
        study.append([{"part": part, "case": case, "started": harness.timestamp(), "round": 0} | row for row in take()])


# --- Loading ---


def load(study: harness.Study, scratch: Path, quick: bool) -> None:
    """Reads files of hopper size: bare h5py, ``load_dataset``, and everything up to normalised rows, in turn."""
    import h5py

    from config import LearnConfig
    from data.sources import load_dataset
    from data.trajectories import gather_transitions, split_trajectories
    from training.build import build_ensemble

    def until_ready(path: Path) -> None:
        dataset = load_dataset(str(path), quiet=True)
        split = split_trajectories(dataset, 0, holdout_ratio=0.2)
        transitions = gather_transitions(dataset, split.train)
        ensemble = build_ensemble(LearnConfig(), transitions)
        ensemble.normalise(transitions)
        ensemble.normalise(gather_transitions(dataset, split.holdout))

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
            "all up to normalised rows": lambda path=path: until_ready(path),
        }
        case = f"{count:,} transitions, {compression or 'not compressed'}"
        measure(study, "load", case, lambda arms=arms: harness.in_turn(arms, rounds=2 if quick else 5, seconds=0))
        path.unlink()


def write_hopper_size(path: Path, rows: int, compression: str | None = None) -> Path:
    """Writes noise in D4RL's format, in episodes of 1000 steps."""
    import h5py

    random = np.random.default_rng(0)
    state_dim, action_dim = HOPPER
    widths = {"observations": (state_dim,), "actions": (action_dim,), "rewards": (), "next_observations": (state_dim,)}
    with h5py.File(path, "w") as file:
        for key, width in widths.items():
            values = random.standard_normal((rows, *width), dtype=np.float32)
            file.create_dataset(key, data=values, compression=compression, shuffle=compression is not None)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(1, rows + 1) % 1000 == 0
    return path


# --- Memory ---


def memory(study: harness.Study, scratch: Path, quick: bool) -> None:
    """Runs learn_model.py on growing files and ensembles, each in a process of its own, until memory has peaked."""
    grid = itertools.product((20_000,) if quick else (100_000, 1_000_000, 4_000_000), (7,) if quick else (7, 20))
    for count, members in grid:
        path = scratch / f"memory-{count}.hdf5"
        if not path.exists():
            write_hopper_size(path, count)

        def take(path: Path = path, members: int = members) -> list[dict[str, Any]]:
            command = [sys.executable, "-m", "benchmarks.memory_probe", str(path), str(members)]
            done = subprocess.run(command, cwd=harness.ROOT, stdout=subprocess.PIPE, check=True, text=True)
            peaks = json.loads(done.stdout.splitlines()[-1])
            return [{"arm": name, "mib": mib} for name, mib in peaks.items()]

        measure(study, "memory", f"{count:,} transitions, {members} members", take)


# --- Tracking ---


def tracking(study: harness.Study, scratch: Path, quick: bool) -> None:
    """Trains with --track_training and adds up what the loop spends inside trackers."""
    import learn_model
    from tracking.trackers import NullTracker

    class TimedTracker(NullTracker):
        """Passes everything on, and takes the time."""

        def __init__(self, tracker: NullTracker) -> None:
            self.tracker = tracker
            self.seconds = {"log_epoch": 0.0, "finish": 0.0, "close": 0.0}

        def _pass_on(self, name: str, *arguments: Any) -> None:
            start = time.perf_counter()
            getattr(self.tracker, name)(*arguments)
            self.seconds[name] += time.perf_counter() - start

        def log_epoch(self, *arguments: Any) -> None:
            """Takes the time of an epoch's rows."""
            self._pass_on("log_epoch", *arguments)

        def finish(self, *arguments: Any) -> None:
            """Takes the time of the outcome."""
            self._pass_on("finish", *arguments)

        def close(self, failed: bool = False, interrupted: bool = False) -> None:
            """Takes the time of the end."""
            self._pass_on("close", failed, interrupted)

    def take(kind: str) -> list[dict[str, Any]]:
        timed: list[TimedTracker] = []
        spent: dict[str, float] = {}
        open_trackers, train_ensemble = learn_model.open_trackers, learn_model.train_ensemble

        def timed_trackers(*arguments: Any) -> TimedTracker:
            timed.append(TimedTracker(open_trackers(*arguments)))
            return timed[0]

        def timed_training(*arguments: Any) -> None:
            start = time.perf_counter()
            train_ensemble(*arguments)
            spent["training"] = time.perf_counter() - start

        configuration = harness.ROOT / "configs" / f"hopper_{kind}.yaml"
        command = ["--dataset", "hopper-medium-demo", "--config", str(configuration), "--holdout_ratio", "0.2"]
        command += ["--track_training", "--quiet", "--cpu"]
        command += ["--params", *(["fit_epochs=2", "hidden_size=8", "batch_size=4096"] if quick else ["fit_epochs=20"])]
        learn_model.open_trackers, learn_model.train_ensemble = timed_trackers, timed_training
        folder = Path.cwd()
        os.chdir(scratch)  # its logs and MLflow's database are no part of the results
        try:
            learn_model.main(command)
        finally:
            os.chdir(folder)
            learn_model.open_trackers, learn_model.train_ensemble = open_trackers, train_ensemble
        seconds = spent | {f"tracker.{name}": value for name, value in timed[0].seconds.items()}
        return [{"arm": name, "ms": value * 1e3} for name, value in seconds.items()]

    for kind in ("dnn", "pnn"):
        measure(study, "tracking", f"configs/hopper_{kind}.yaml", lambda kind=kind: take(kind))


# --- Start-up ---


def startup(study: harness.Study, scratch: Path, quick: bool) -> None:
    """Asks for help, in turn with starting Python alone."""

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], cwd=harness.ROOT, stdout=subprocess.DEVNULL, check=True)

    arms = {"learn_model.py --help": lambda: run("learn_model.py", "--help"), "python alone": lambda: run("-c", "")}
    measure(study, "startup", "help", lambda: harness.in_turn(arms, rounds=2 if quick else 10, seconds=0))


# --- model.pkl ---


def model(study: harness.Study, scratch: Path, quick: bool) -> None:
    """Loads model.pkl as planners and as ``load_ensemble`` do, in turn with reading its bytes."""
    from dynamics_model import FORMAT_VERSION, load_ensemble

    for kind, hidden in (("probabilistic", "4x200"), ("deterministic", "4x256"), ("probabilistic", "4x512")):
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
            return [size, *harness.in_turn(arms, rounds=2 if quick else 7, seconds=0.05)]

        measure(study, "model", f"7 x {kind} {hidden}", take)


# --- Growth ---


def growth(study: harness.Study, scratch: Path, quick: bool) -> None:
    """Times the product's steps against members and width, and what an epoch costs besides against rows."""
    members, widths, counts = (1, 2, 4, 7, 14, 28), (64, 128, 256, 512, 1024), (10_000, 100_000, 1_000_000)
    if quick:
        members, widths, counts = (1, 7), (64, 128), (10_000,)
    for number in members:
        case = Case("probabilistic", "4x200", 256, "hopper", threads=1, rounds=5, members=number)
        measure(study, "growth", f"{number} members", lambda case=case: step_times(case))
    for width in widths:
        case = Case("probabilistic", f"4x{width}", 256, "hopper", threads=1, rounds=5)
        measure(study, "growth", f"{width} wide", lambda case=case: step_times(case))
    for count in counts:
        measure(study, "growth", f"{count} rows", lambda count=count: order_times(count))


def step_times(case: Case) -> list[dict[str, Any]]:
    """Runs the product's training for some rounds of steps, with one thread."""
    import torch

    torch.set_num_threads(case.threads)
    rows: list[dict[str, Any]] = []

    def report(ms: float) -> None:
        rows.append({"arm": "step", "round": len(rows) - 1, "ms": ms})
        if len(rows) > case.rounds:
            raise EnoughRounds

    with contextlib.suppress(EnoughRounds):
        ours(case, Pace(case.steps, report))
    return rows[1:]  # the first was the warm-up


def order_times(count: int) -> list[dict[str, Any]]:
    """Draws the order of an epoch for 7 members, the only cost of an epoch besides steps and scoring."""
    from training.batches import draw_order

    return harness.in_turn({"order of an epoch": lambda: draw_order(0, 7, count, epoch=0)}, rounds=5, seconds=0)


PARTS = {part.__name__: part for part in (load, memory, tracking, startup, model, growth)}


# --- Tables and the figure ---


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
    return harness.markdown(["case", "what", "ms"], lines)


def ratio_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per case and arm: milliseconds, and how many times the first arm's of the same round."""
    base = shown["arm"].dropna().iloc[0]
    compared = harness.compare(shown, ["part", "case"], base).reset_index()
    lines = [[row["case"], row["arm"], harness.spread(row), f"{row['ratio']:.2f}"] for _, row in compared.iterrows()]
    return harness.markdown(["case", "what", "ms", f"x of {base}"], lines)


def memory_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per case: the peak, what PyTorch takes of it, and the difference."""
    lines = []
    for case, values in shown.groupby("case", sort=False):
        mib = values.set_index("arm")["mib"]
        lines.append([case, *(f"{mib[name]:.0f}" for name in mib.index), f"{mib['training'] - mib['torch']:.0f}"])
    header = ["case", "after importing PyTorch, MiB", "before the first step", "in training", "beyond PyTorch"]
    return harness.markdown(header, lines)


def tracking_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per configuration: seconds in the loop, share of the trackers, and their end."""
    lines = []
    for case, values in shown.groupby("case", sort=False):
        seconds = values.set_index("arm")["ms"] / 1e3
        share = seconds["tracker.log_epoch"] / seconds["training"]
        end = seconds["tracker.finish"] + seconds["tracker.close"]
        lines.append([case, f"{seconds['training']:.1f}", f"{share:.2%}", f"{end:.2f}"])
    return harness.markdown(["case", "training loop, s", "of it in trackers", "trackers' end, s"], lines)


def model_table(summary: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Returns a line per ensemble: size, and time to load."""
    sizes = shown.dropna(subset=["mib"]).set_index("case")["mib"]
    lines = []
    for case, values in summary.groupby("case", sort=False):
        arms = {row["arm"]: harness.spread(row) for _, row in values.iterrows()}
        lines.append([case, f"{sizes[case]:.1f}", *(arms[arm] for arm in MODEL_ARMS)])
    return harness.markdown(["ensemble", "MiB", *(f"{arm}, ms" for arm in MODEL_ARMS)], lines)


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


def figure(rows: pd.DataFrame) -> Any:
    """Draws time against members, width and rows."""
    shown = rows[rows["part"] == "growth"].groupby("case", sort=False)["ms"].median()
    drawn = harness.new_figure(columns=3)
    for axes, unit in zip(drawn.subplots(1, 3), ("members", "wide", "rows"), strict=True):
        own = {int(case.split()[0]): ms for case, ms in shown.items() if case.endswith(unit)}
        axes.plot(list(own), list(own.values()), marker="o")
        what = "to draw the order of an epoch" if unit == "rows" else "per step"
        axes.set(xlabel={"wide": "width"}.get(unit, unit), ylabel=f"ms {what}", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    return drawn


if __name__ == "__main__":
    main()
