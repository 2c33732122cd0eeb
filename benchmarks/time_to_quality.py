"""Validation error against wall time, FLOPs and epochs: our recipes and the published ones.

    python -m benchmarks.time_to_quality --data hopper=logs/hopper-200k.hdf5
    python -m benchmarks.time_to_quality --recipes ours/hopper_dnn --seeds 0
    python -m benchmarks.time_to_quality --minutes 60
    python -m benchmarks.time_to_quality --times
    python -m benchmarks.time_to_quality --quick

Ours is ``train_ensemble`` with a file of ``configs/``, all 7 members at once. A published recipe (a file of
``configs/published/``) is trained by the plain loop (``plain_loop.py``), of which one member stands for seven: that
would take a day. The same whole trajectories are held out from all. What an epoch gives and what it takes are measured
apart: errors in trainings that may stop, go on from their last epoch when the command is given again, and share the
machine with others; times on a machine that does nothing else, of all recipes in turn, with all seven members, as
parts of an epoch (``--times``). Epochs of ours whose products round their operands (``reduced_precision``) take less
time than others, which are timed as ``full``.

The hopper data, 200,000 transitions, are made by

    python collect_dataset.py --env Hopper-v5 --policy data/policies/hopper-medium.npz --steps 200000 \
        --output logs/hopper-200k.hdf5
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from benchmarks import harness
from benchmarks.plain_loop import PlainMember, plain_member, train_steps, training_flops
from cli import exit_on_input_error
from config import LearnConfig, load_config
from data.sources import load_dataset
from data.trajectories import Dataset, gather_transitions, split_trajectories
from dynamics_model import DynamicsEnsemble, NormalisedRows
from tracking.trackers import NullTracker
from training.batches import draw_order
from training.build import build_ensemble
from training.hardware import reduced_epochs
from training.loop import train_ensemble
from training.optimisation import learning_rate
from utils import atomic_write

SOURCES = {"ours": "configs", "published": "configs/published"}
NAMES = [f"{environment}_{kind}" for environment in ("hopper", "halfcheetah") for kind in ("dnn", "pnn")]
RECIPES = [f"{source}/{name}" for source in SOURCES for name in NAMES]
DATA = {"hopper": "logs/hopper-200k.hdf5", "halfcheetah": "halfcheetah-medium-demo"}
HOLDOUT_RATIO = 0.2
MEMBERS = 7
TARGETS = (1.1, 1.0, 0.9)  # of the published recipe's best validation error
EPOCH_PARTS = 16  # of which one is timed


class TimeIsUp(Exception):  # noqa: N818 - no error
    """Ends a training for now; it goes on from its last epoch."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        recipe: ``ours/NAME`` or ``published/NAME``.
        config: What its file says, with seed and number of members; one member stands for seven published ones.
        dataset: Where rows come from.
    """

    recipe: str
    config: LearnConfig
    dataset: Dataset

    @cached_property
    def rows(self) -> tuple[DynamicsEnsemble, NormalisedRows, NormalisedRows]:
        """The untrained ensemble, its training rows and its held-out rows."""
        split = split_trajectories(self.dataset, split_seed=0, holdout_ratio=HOLDOUT_RATIO)
        transitions = gather_transitions(self.dataset, split.train)
        ensemble = build_ensemble(self.config, transitions)
        holdout = gather_transitions(self.dataset, split.holdout)
        return ensemble, ensemble.normalise(transitions), ensemble.normalise(holdout)

    @property
    def key(self) -> dict[str, Any]:
        """What its rows in the CSV have in common."""
        return {"recipe": self.recipe, "seed": self.config.seed, "data": self.dataset.sha256[:12]}

    @property
    def is_published(self) -> bool:
        """Whether the plain loop trains it."""
        return self.recipe.startswith("published")

    def is_reduced(self, epoch: int) -> bool:
        """Whether the products of an epoch, counted from 1, rounded their operands."""
        return not self.is_published and epoch <= reduced_epochs(self.config, is_cuda=False)

    @property
    def epoch_flops(self) -> int:
        """Matrix-multiply FLOPs of an epoch of seven members."""
        _, train, _ = self.rows
        outputs = train.targets.shape[1] * (2 if self.config.probabilistic else 1)
        sizes = (train.inputs.shape[1], *self.config.hidden_size, outputs)
        return MEMBERS * len(train.inputs) * training_flops(sizes)


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing, then draws the table and the figure."""
    args = parse_arguments(argv)
    study = harness.open_study("time_to_quality", args.quick, is_timed=False)
    times = harness.Study("epoch_times", study.folder)
    if not args.tables:
        deadline = time.monotonic() + 60 * args.minutes
        torch.set_num_threads(args.threads)
        with exit_on_input_error():
            runs = planned_runs(args)
        if args.times or args.quick:
            time_epochs(times, runs, *((2, 0.1) if args.quick else (7, 2)))
        if not args.times:
            try:
                for run in runs:
                    train(study, run, deadline)
            except TimeIsUp:
                print("time is up; the same command goes on from here", file=sys.stderr)
    timed = times.rows()
    if timed.empty:
        print("epochs have not been timed yet: on an idle machine, --times", file=sys.stderr)
        return
    table = with_seconds(study.shown(), timed)
    study.save_figure(figure(table))
    study.write_table(tables(table, timed))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="what to train (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of ours (0 1 2)")
    parser.add_argument("--published_seeds", nargs="+", type=int, default=[0], help="seeds of published recipes (0)")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="ENV=DATASET",
        help="datasets as learn_model.py takes them: " + " ".join(f"{name}={data}" for name, data in DATA.items()),
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (PyTorch's own choice)")
    parser.add_argument("--times", action="store_true", help="time parts of epochs, in turn, rather than train")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, and go on another time")
    args = parser.parse_args(argv)
    for entry in args.data:
        if entry.partition("=")[0] not in DATA or not entry.partition("=")[2]:
            parser.error(f"--data got {entry!r}; expected hopper=DATASET or halfcheetah=DATASET")
    return args


def planned_runs(args: argparse.Namespace) -> list[Run]:
    """Returns what was asked for, ours first as in ``RECIPES``: the published recipes take hours."""
    data = DATA | dict(entry.split("=", 1) for entry in args.data)
    datasets: dict[str, Dataset] = {}
    runs = []
    for recipe in args.recipes:
        source, name = recipe.split("/")
        config = load_config(harness.ROOT / SOURCES[source] / f"{name}.yaml")
        path = data[name.split("_")[0]]
        seeds = args.published_seeds if source == "published" else args.seeds
        if args.quick:
            path, seeds = "hopper-random-demo", seeds[:2]
            config = dataclasses.replace(config, fit_epochs=5, hidden_size=(16,), batch_size=512)
        dataset = datasets[path] = datasets.get(path) or load_dataset(path, quiet=True)
        for seed in seeds:
            own = dataclasses.replace(config, seed=seed, ensemble_size=1 if source == "published" else MEMBERS)
            runs.append(Run(recipe, own, dataset))
    return runs


# --- Training, epoch by epoch ---


class Progress:
    """What a run has measured: a row per epoch in the CSV, and a checkpoint from which it goes on."""

    def __init__(self, study: harness.Study, run: Run, deadline: float) -> None:
        self._study = study
        self._run = run
        self._deadline = deadline
        folder = harness.ROOT / "logs" if study.folder == harness.FOLDER else study.folder
        self._path = folder / "time_to_quality" / f"{'-'.join(map(str, run.key.values())).replace('/', '-')}.checkpoint"
        unscored = [[math.inf, math.nan]] * run.config.ensemble_size
        self._state: dict[str, Any] = {"epoch": 0, "kept": unscored, "row": None, "training": None}
        if not self.is_finished and not self._path.exists():
            study.discard(**run.key)  # what was begun on a machine whose checkpoint is not here
        if self._path.exists():
            self._state = torch.load(self._path, weights_only=True)
            if len(study.finished(**run.key)) < self.epoch:  # stopped between checkpoint and CSV
                study.append([self._state["row"]])

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self._state["epoch"]

    @property
    def training(self) -> dict[str, Any] | None:
        """What training goes on from; None at the start."""
        return self._state["training"]

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to train."""
        return not self._study.finished(**self._run.key, is_last=True).empty

    def add_epoch(self, scores: list[list[float]], training: dict[str, Any], is_last: bool) -> None:
        """Takes what an epoch gave.

        Args:
            scores: Validation error and likelihood (or NaN) of each member.
            training: What training goes on from.
            is_last: Whether training ends here.

        Raises:
            TimeIsUp: If this invocation has had its minutes.
        """
        epoch = self.epoch + 1
        # Each member keeps the weights of its lowest validation error; a likelihood counts where it belongs to them.
        kept = [min(best, new, key=lambda pair: pair[0]) for best, new in zip(self._state["kept"], scores, strict=True)]
        errors = [error for error, _ in kept]
        row = self._run.key | {
            "epoch": epoch,
            "tflop": epoch * self._run.epoch_flops / 1e12,
            "is_reduced": self._run.is_reduced(epoch),
            "val_mse": mean([error for error, _ in scores]),
            "nll": mean([nll for _, nll in scores]),
            "kept_mse": mean(errors),
            "kept_mse_low": min(errors),
            "kept_mse_high": max(errors),
            "kept_nll": mean([nll for _, nll in kept]),
            "is_last": is_last,
        }
        self._state = {"epoch": epoch, "kept": kept, "row": row, "training": training}
        with atomic_write(self._path) as file:
            torch.save(self._state, file)
        self._study.append([row])
        if is_last:
            self._path.unlink()
        elif time.monotonic() > self._deadline:
            raise TimeIsUp


def mean(values: list[float]) -> float:
    """Returns the mean of numbers."""
    return sum(values) / len(values)


def train(study: harness.Study, run: Run, deadline: float) -> None:
    """Trains a run from its last epoch to its end."""
    progress = Progress(study, run, deadline)
    if not progress.is_finished:
        print(f"{run.recipe}, seed {run.config.seed}: {progress.epoch} of {run.config.fit_epochs} epochs are done")
        (train_published if run.is_published else train_ours)(run, progress)


def train_ours(run: Run, progress: Progress) -> None:
    """Trains with the product's loop, all members at once."""
    ensemble, train, holdout = run.rows

    class Scores(NullTracker):
        """Remembers an epoch's scores until its checkpoint comes."""

        def log_epoch(self, epoch: int, rows: list[dict[str, Any]]) -> None:
            """Takes validation error and likelihood of each member."""
            self.latest = [[row["val_mse"], math.nan if row["nll"] is None else row["nll"]] for row in rows]

    scores = Scores()

    def save(checkpoint: dict[str, Any]) -> None:
        patience, waited = run.config.patience, checkpoint["best"]["epochs_since_best"]
        has_stopped = patience is not None and min(waited) >= patience
        progress.add_epoch(scores.latest, checkpoint, checkpoint["epochs"] == run.config.fit_epochs or has_stopped)

    train_ensemble(ensemble, run.config, train, holdout, scores, False, progress.training, save)


def train_published(run: Run, progress: Progress) -> None:
    """Trains one member with the plain loop; the learning rate moves between epochs, as published."""
    ensemble, train, holdout = run.rows
    member = plain_member(run.config, ensemble.network)
    optimizer = torch.optim.Adam(member.parameters(), lr=run.config.fit_lr)
    if progress.training is not None:
        member.load_state_dict(progress.training["member"])
        optimizer.load_state_dict(progress.training["optimizer"])
    for epoch in range(progress.epoch, run.config.fit_epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.config, epoch)
        order = draw_order(run.config.seed, 1, len(train.inputs), epoch)[0]
        train_steps(member, optimizer, train, order, run.config.batch_size)
        state = {"member": member.state_dict(), "optimizer": optimizer.state_dict()}
        progress.add_epoch([score(member, holdout)], state, is_last=epoch + 1 == run.config.fit_epochs)


@torch.no_grad()
def score(member: PlainMember, rows: NormalisedRows) -> list[float]:
    """Returns mean squared error and Gaussian likelihood (NaN for point predictions) as the product defines them."""
    squared_error, nll = 0.0, 0.0
    for chunk in rows.chunks(4096):
        predicted, log_variance = member(chunk.inputs)
        error = (predicted - chunk.targets).square()
        squared_error += error.mean(dim=-1).double().sum().item()
        if log_variance is not None:
            terms = 0.5 * (error / log_variance.exp() + log_variance + math.log(2 * math.pi))
            nll += terms.mean(dim=-1).double().sum().item()
    count = len(rows.inputs)
    return [squared_error / count, math.nan if log_variance is None else nll / count]


# --- What an epoch takes ---


class EpochIsOver(Exception):  # noqa: N818 - no error
    """Ends a training of which one epoch was wanted."""


def time_epochs(times: harness.Study, runs: list[Run], rounds: int, seconds: float) -> None:
    """Times, for each environment and kind, a part of an epoch of its recipes in turn, scoring included.

    Epochs of ours in full precision are a recipe of their own, ``full/NAME``.
    """
    for name in NAMES:
        of_name = {run.recipe: run for run in runs if run.recipe in (f"ours/{name}", f"published/{name}")}
        if (ours := of_name.get(f"ours/{name}")) is not None:
            in_full = dataclasses.replace(ours.config, reduced_precision=0.0)
            of_name[f"full/{name}"] = dataclasses.replace(ours, recipe=f"full/{name}", config=in_full)
        if not of_name or all(len(times.finished(recipe=run.recipe, data=run.key["data"])) for run in of_name.values()):
            continue
        print(f"{name}: timing {', '.join(of_name)}")
        rows = harness.in_turn({recipe: epoch_part(run) for recipe, run in of_name.items()}, rounds, seconds)
        data = next(iter(of_name.values())).key["data"]
        times.append(
            [{"recipe": row.pop("arm"), "data": data, "threads": torch.get_num_threads()} | row for row in rows]
        )


def epoch_part(run: Run) -> Callable[[], None]:
    """Returns a function that trains seven members on a share of the rows, and scores the same share of the holdout."""
    precision = float(run.config.reduced_precision > 0)
    config = dataclasses.replace(run.config, ensemble_size=MEMBERS, fit_epochs=3, reduced_precision=precision)
    ensemble, *rows = dataclasses.replace(run, config=config).rows
    train, holdout = (next(part.chunks(math.ceil(len(part.inputs) / EPOCH_PARTS))) for part in rows)
    if run.is_published:
        members = [plain_member(config, ensemble.network, member) for member in range(MEMBERS)]
        pairs = [(member, torch.optim.Adam(member.parameters(), lr=config.fit_lr)) for member in members]
        order = draw_order(0, 1, len(train.inputs), epoch=0)[0]

        def plain_part() -> None:
            for member, optimizer in pairs:
                train_steps(member, optimizer, train, order, config.batch_size)
                score(member, holdout)

        return plain_part

    saved: list[dict[str, Any]] = []

    def save(checkpoint: dict[str, Any]) -> None:
        saved[:] = [checkpoint]
        raise EpochIsOver

    def part() -> None:  # the second epoch of three: the first and the last score training rows, too
        with contextlib.suppress(EpochIsOver):
            train_ensemble(ensemble, config, train, holdout, NullTracker(), False, saved[0] | {"epochs": 1}, save)

    with contextlib.suppress(EpochIsOver):
        train_ensemble(ensemble, config, train, holdout, NullTracker(), False, None, save)
    return part


# --- The table and the figure ---


def with_seconds(rows: pd.DataFrame, timed: pd.DataFrame) -> pd.DataFrame:
    """Returns epochs with the name of their recipe and the wall time up to their end on the machine of the times."""
    rows = rows.assign(name=rows["recipe"].str.partition("/")[2])
    rows = rows[rows["data"] == rows.groupby("name")["data"].transform("last")]  # what was trained on last
    per_epoch = timed.groupby(["recipe", "data"])["ms"].median() * EPOCH_PARTS / 1e3
    kind_of_epoch = rows["is_reduced"].map({True: "ours/", False: "full/"}) + rows["name"]
    rows = rows.assign(timed=rows["recipe"].where(rows["recipe"].str.startswith("published/"), kind_of_epoch))
    rows = rows.join(per_epoch.rename("epoch_seconds"), on=["timed", "data"])
    return rows.assign(seconds=rows.groupby(["recipe", "seed"])["epoch_seconds"].cumsum(skipna=False))


def tables(rows: pd.DataFrame, timed: pd.DataFrame) -> str:
    """Returns a table per environment and kind: the published schedule, and when ours reaches its best error."""
    threads = harness.count(int(timed["threads"].iloc[-1]), "thread")
    text = [
        "Validation MSE in normalised units and NLL in nats, on whole trajectories that are held out; ours: means over "
        "members, each with the weights that it keeps (in brackets the best and the worst member). Minutes: the "
        "wall time of so many epochs of 7 members, scoring of the holdout included, which was measured in turn "
        f"({threads}; last table). Target: the best validation error in the whole published schedule, of one member, "
        "and the likelihood of the same weights (its lowest one is that of other weights, with a worse error); "
        "ours: median over seeds, and range. x: wall time of that whole schedule divided by ours up to the target; in "
        "brackets, of the schedule up to its best epoch. Of ours, the first 80 % of the epochs round products where "
        "the processor has AMX; `full`, in the last table, are epochs that do not."
    ]
    for name in rows["name"].unique():
        of_name = rows[rows["name"] == name]
        ours, published = (of_name[of_name["recipe"] == f"{source}/{name}"] for source in SOURCES)
        text.append(f"**{name}**\n\n{recipe_table(published, ours)}")
    text.append(f"**Seconds an epoch of 7 members takes: median and range**\n\n{times_table(timed)}")
    return "\n\n".join(text)


def times_table(timed: pd.DataFrame) -> str:
    """Returns what an epoch takes, by recipe, and what part of the published one that is."""
    timed = timed.assign(seconds=timed["ms"] * EPOCH_PARTS / 1e3)
    timed["arm"], timed["name"] = timed["recipe"].str.partition("/")[0], timed["recipe"].str.partition("/")[2]
    summary = harness.compare(timed, ["name"], "published", "seconds")
    lines = [[name, arm, harness.spread(row), f"{row['ratio']:.2f}"] for (name, arm), row in summary.iterrows()]
    return harness.markdown(["", "recipe", "seconds", "of the published one"], lines)


def recipe_table(published: pd.DataFrame, ours: pd.DataFrame) -> str:
    """Returns the lines of one environment and kind."""
    lines = []
    if not published.empty:
        end = published.iloc[-1]
        state = "" if end["is_last"] else " so far"
        kept = published.loc[published["val_mse"].idxmin()]
        best = [f"{kept['val_mse']:.5f}", number(kept["nll"], ".3f")]
        lines.append([f"published{state}, best", *effort(end), *best])
    for seed, run in ours.groupby("seed"):
        end = run.iloc[-1]
        error = f"{end['kept_mse']:.5f} ({end['kept_mse_low']:.5f}–{end['kept_mse_high']:.5f})"  # noqa: RUF001
        state = "" if end["is_last"] else " so far"
        lines.append([f"ours, seed {seed}{state}", *effort(end), error, number(end["kept_nll"], ".3f")])
    table = harness.markdown(["", "epochs", "TFLOP", "minutes", "validation MSE", "NLL"], lines)
    if published.empty or finished(ours).empty:
        return table
    return table + "\n\n" + harness.markdown(["target", "minutes", "x"], target_lines(published, finished(ours)))


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the epochs of the trainings of one recipe that have come to their end."""
    return rows[rows.groupby("seed")["is_last"].transform("any")]


def target_lines(published: pd.DataFrame, ours: pd.DataFrame) -> list[list[str]]:
    """Returns a line per target: when ours reaches it, and how much sooner than the published recipe."""
    best = published.loc[published["val_mse"].idxmin()]
    goals = {}
    for factor in TARGETS:
        target = factor * best["val_mse"]
        goals[f"{factor:g} x MSE, {target:.5f}"] = ours["kept_mse"] <= target
    if published["nll"].notna().any():
        lowest, reaches_nll = published["nll"].min(), ours["kept_nll"] <= best["nll"]
        goals[f"its lowest NLL of all epochs, {lowest:.3f}"] = ours["kept_nll"] <= lowest
        goals[f"NLL of the same weights, {best['nll']:.3f}"] = reaches_nll
        goals["both, MSE and NLL of the same weights"] = reaches_nll & (ours["kept_mse"] <= best["val_mse"])
    lines = []
    for goal, reached in goals.items():
        times = ours[reached].groupby("seed")["seconds"].min()
        missing = ours["seed"].nunique() - len(times)
        if times.empty:
            lines.append([goal, "not reached", "-"])
            continue
        spread = f"{times.median() / 60:.2f} ({times.min() / 60:.2f}–{times.max() / 60:.2f})"  # noqa: RUF001 - a range
        ratios = [seconds / times.median() for seconds in (published["seconds"].iloc[-1], best["seconds"])]
        also = f"; {harness.count(missing, 'seed')} did not get there" if missing else ""
        lines.append([goal, spread + also, f"{ratios[0]:.1f} ({ratios[1]:.1f})"])
    return lines


def effort(row: pd.Series) -> list[str]:
    """Returns epochs, TFLOP and minutes up to a row."""
    return [str(row["epoch"]), f"{row['tflop']:.1f}", f"{row['seconds'] / 60:.1f}"]


def number(value: float, form: str) -> str:
    """Returns a number, or a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def figure(rows: pd.DataFrame) -> Any:
    """Draws validation error against wall time, and below against FLOPs, a column per environment and kind."""
    names = list(rows["name"].unique())
    drawn = harness.new_figure(columns=len(names), lines=2)
    panels = drawn.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        for source, color in (("published", "tab:orange"), ("ours", "tab:blue")):
            for seed, run in rows[rows["recipe"] == f"{source}/{name}"].groupby("seed"):
                for axes, against in zip(panels[:, column], (run["seconds"] / 60, run["tflop"]), strict=True):
                    axes.plot(against, run["kept_mse"], color=color, label=f"{source}, seed {seed}")
        panels[0, column].set(title=name, xlabel="minutes, 7 members")
        panels[1, column].set(xlabel="TFLOP, 7 members")
        for axes in panels[:, column]:
            axes.set(xscale="log", yscale="log", ylabel="validation MSE of the best weights so far")
            axes.grid(alpha=0.3, which="both")
    panels[0, 0].legend(fontsize="x-small")
    return drawn


if __name__ == "__main__":
    main()
