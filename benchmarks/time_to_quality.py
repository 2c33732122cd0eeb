"""Validation error against wall time, FLOPs and epochs: our recipes and the published ones.

    python -m benchmarks.time_to_quality --data hopper=logs/hopper-200k.hdf5
    python -m benchmarks.time_to_quality --recipes ours/hopper_dnn --seeds 0
    python -m benchmarks.time_to_quality --minutes 60
    python -m benchmarks.time_to_quality --times
    python -m benchmarks.time_to_quality --quick

A recipe of ours is a file of ``configs/``, trained by ``train_ensemble``, all 7 members at once. A published recipe is
a file of ``configs/published/``, trained by the plain loop (``plain_loop.py``); only one of its members is, since seven
would take a day. The same whole trajectories are held out from all.

Errors and times are measured apart. Trainings give the errors of each epoch; they may be stopped, go on from their last
epoch when the command is given again, and may share the machine with others. ``--times`` measures what an epoch of
seven members takes, on a machine that does nothing else: parts of an epoch, of all recipes in turn. Epochs of ours
whose products round their operands (``reduced_precision``) take less time than the others, which are timed as ``full``.

The hopper data, 200,000 transitions, are made by

    python collect_dataset.py --env Hopper-v5 --policy data/policies/hopper-medium.npz --steps 200000 \
        --output logs/hopper-200k.hdf5
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.plain_loop import PlainMember, plain_member, train_steps, training_flops
from benchmarks.prepare import DATA, Prepared, prepare
from cli import exit_on_input_error
from config import LearnConfig, load_config
from data.sources import load_dataset
from data.trajectories import Dataset
from reporting.page import markdown_table
from training.batches import NormalisedRows, draw_order
from training.loop import train_ensemble
from training.optimisation import learning_rate
from training.precision import reduced_epochs
from utils import atomic_write

SOURCES = {"ours": "configs", "published": "configs/published"}
NAMES = [f"{environment}_{kind}" for environment in DATA for kind in ("dnn", "pnn")]
RECIPES = [f"{source}/{name}" for source in SOURCES for name in NAMES]
QUICK_RECIPES = [recipe for recipe in RECIPES if "hopper" in recipe]
MEMBERS = 7
TARGETS = (1.1, 1.0, 0.9)  # of the published recipe's best validation error
EPOCH_PARTS = 16  # of which one is timed
_ENDLESS = 10**6  # epochs, more than are ever timed


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
    def prepared(self) -> Prepared:
        """What it trains."""
        return prepare(self.config, self.dataset)

    @property
    def key(self) -> dict[str, Any]:
        """What its rows in the CSV have in common."""
        return {"recipe": self.recipe, "seed": self.config.seed, "data": self.dataset.sha256[:12]}

    @property
    def is_published(self) -> bool:
        """Whether the plain loop trains it."""
        return self.recipe.startswith("published")

    @property
    def rounded_epochs(self) -> int:
        """For how many epochs, from the first, its products round their operands."""
        return 0 if self.is_published else reduced_epochs(self.config, is_cuda=False)

    @property
    def epoch_flops(self) -> int:
        """FLOPs of the matrix products of an epoch of seven members."""
        ensemble, train, _ = self.prepared
        sizes = (train.inputs.shape[1], *self.config.hidden_size, ensemble.heads * ensemble.learned_dim)
        return MEMBERS * len(train.inputs) * training_flops(sizes)


def main(argv: list[str] | None = None) -> None:
    """Trains or times what is missing, then makes the tables and the figure."""
    args = parse_arguments(argv)
    results = harness.open_results("time_to_quality", args.quick, is_timed=False)
    times = harness.ResultsFile("epoch_times", results.folder)
    if not args.tables:
        deadline = time.monotonic() + 60 * args.minutes
        torch.set_num_threads(args.threads)
        with exit_on_input_error():
            runs = planned_runs(args)
        if args.times or args.quick:
            time_epochs(times, runs, *((2, 0) if args.quick else (7, 2)))
        if not args.times:
            has_time = all(train(results, run, deadline) for run in runs)
            if not has_time:
                print("time is up; the same command goes on from here", file=sys.stderr)
    publish(results, times)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="what to train (all)")
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
    if args.quick:
        args.threads = 1  # networks this small gain nothing from a second one
    args.recipes = args.recipes or (QUICK_RECIPES if args.quick else RECIPES)
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
            config = dataclasses.replace(config, fit_epochs=3, hidden_size=(16,), batch_size=4096)
        dataset = datasets[path] = datasets.get(path) or load_dataset(path, quiet=True)
        for seed in seeds:
            own = dataclasses.replace(config, seed=seed, ensemble_size=1 if source == "published" else MEMBERS)
            runs.append(Run(recipe, own, dataset))
    return runs


# --- Training, epoch by epoch ---


@dataclass(frozen=True)
class Scored:
    """What an epoch gave, whichever loop trained.

    Attributes:
        val_mse: Validation error of each member.
        nll: Validation likelihood of each member in nats, NaN for point predictions.
        checkpoint: What training goes on from.
    """

    val_mse: list[float]
    nll: list[float]
    checkpoint: dict[str, Any]


class Progress:
    """What a run has measured: a row per epoch in the CSV, and a checkpoint from which it goes on.

    Attributes:
        epoch: Epochs done.
        training: What training goes on from; None at the start.
    """

    def __init__(self, results: harness.ResultsFile, run: Run) -> None:
        self._results = results
        self._run = run
        folder = harness.ROOT / "logs" if results.folder == harness.FOLDER else results.folder
        self._path = folder / "time_to_quality" / f"{'-'.join(map(str, run.key.values())).replace('/', '-')}.checkpoint"
        self.epoch, self.training = 0, None
        self._kept = [(math.inf, math.nan)] * run.config.ensemble_size  # error and likelihood of each member
        if self._path.exists():
            state = torch.load(self._path, weights_only=True)
            self.epoch, self.training, self._kept = state["epoch"], state["training"], state["kept"]
            if len(results.finished(**run.key)) < self.epoch:  # killed between checkpoint and CSV
                results.append([state["row"]])
        elif not self.is_finished:
            results.discard(**run.key)  # begun on a machine whose checkpoint is not here

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return not self._results.finished(**self._run.key, is_last=True).empty

    def add_epoch(self, scored: Scored) -> None:
        """Adds an epoch.

        Its row has the columns of ``Run.key``; ``epoch``, counted from 1; ``tflop`` spent up to its end;
        ``is_reduced``, whether its products rounded their operands; ``val_mse`` and ``nll``, means over members;
        ``kept_mse`` and ``kept_nll``, the same of the weights that each member keeps so far, those of its lowest
        validation error, with ``kept_mse_low`` and ``kept_mse_high``, the best and the worst member; ``is_last``.
        """
        self.epoch, self.training = self.epoch + 1, scored.checkpoint
        latest = zip(scored.val_mse, scored.nll, strict=True)
        self._kept = [min(kept, new, key=lambda pair: pair[0]) for kept, new in zip(self._kept, latest, strict=True)]
        errors, likelihoods = zip(*self._kept, strict=True)
        is_last = self.epoch == self._run.config.fit_epochs
        row = self._run.key | {
            "epoch": self.epoch,
            "tflop": self.epoch * self._run.epoch_flops / 1e12,
            "is_reduced": self.epoch <= self._run.rounded_epochs,
            "val_mse": fmean(scored.val_mse),
            "nll": fmean(scored.nll),
            "kept_mse": fmean(errors),
            "kept_mse_low": min(errors),
            "kept_mse_high": max(errors),
            "kept_nll": fmean(likelihoods),
            "is_last": is_last,
        }
        with atomic_write(self._path) as file:
            torch.save({"epoch": self.epoch, "kept": self._kept, "row": row, "training": self.training}, file)
        self._results.append([row])
        if is_last:
            self._path.unlink()


def train(results: harness.ResultsFile, run: Run, deadline: float) -> bool:
    """Trains a run from its last epoch on, until its end or the deadline (of ``time.monotonic``).

    Returns:
        Whether it has come to its end.
    """
    progress = Progress(results, run)
    if progress.is_finished:
        return True
    print(f"{run.recipe}, seed {run.config.seed}: {progress.epoch} of {run.config.fit_epochs} epochs are done")
    epochs = train_published if run.is_published else train_ours
    for scored in epochs(run, progress.training):
        progress.add_epoch(scored)
        if time.monotonic() > deadline and not progress.is_finished:
            return False
    return True


def train_ours(run: Run, checkpoint: dict[str, Any] | None) -> Iterator[Scored]:
    """Trains with the product's loop, all members at once."""
    ensemble, train, holdout = run.prepared
    for epoch in train_ensemble(ensemble, run.config, train, holdout, score_every=None, checkpoint=checkpoint):
        nll = epoch.holdout_scores.get("nll", [math.nan] * len(ensemble))
        yield Scored(epoch.holdout_scores["mse"], nll, epoch.checkpoint())


def train_published(run: Run, checkpoint: dict[str, Any] | None) -> Iterator[Scored]:
    """Trains one member with the plain loop; the learning rate changes between epochs, as published."""
    ensemble, train, holdout = run.prepared
    member = plain_member(run.config, ensemble)
    optimizer = torch.optim.Adam(member.parameters(), lr=run.config.fit_lr)
    begin = 0
    if checkpoint is not None:
        begin = checkpoint["epochs"]
        member.load_state_dict(checkpoint["member"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    for epoch in range(begin, run.config.fit_epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.config, epoch)
        order = draw_order(run.config.seed, 1, len(train.inputs), epoch)[0]
        train_steps(member, optimizer, train, order, run.config.batch_size)
        mse, nll = score(member, holdout)
        state = {"epochs": epoch + 1, "member": member.state_dict(), "optimizer": optimizer.state_dict()}
        yield Scored([mse], [nll], state)


@torch.no_grad()
def score(member: PlainMember, rows: NormalisedRows) -> tuple[float, float]:
    """Returns mean squared error and Gaussian likelihood (NaN for point predictions), as the product defines them."""
    squared_error, nll = 0.0, 0.0
    for chunk in rows.chunks(4096):
        predicted, log_variance = member(chunk.inputs)
        error = (predicted - chunk.targets).square()
        squared_error += error.mean(dim=-1).double().sum().item()
        if log_variance is not None:
            terms = 0.5 * (error / log_variance.exp() + log_variance + math.log(2 * math.pi))
            nll += terms.mean(dim=-1).double().sum().item()
    count = len(rows.inputs)
    return squared_error / count, math.nan if log_variance is None else nll / count


# --- What an epoch takes ---


def time_epochs(times: harness.ResultsFile, runs: list[Run], rounds: int, seconds: float) -> None:
    """Times, for each environment and kind, a part of an epoch of its recipes in turn, scoring of the holdout included.

    Adds a row per recipe and round: ``recipe``, epochs of ours in full precision being one of their own, ``full/NAME``;
    ``data``, the dataset's checksum; ``threads``; and the columns of ``harness.in_turn``, ``ms`` being those of a part.
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


def epoch_part(run: Run) -> Callable[[], object]:
    """Returns a function that trains seven members on a share of the rows, and scores the same share of the holdout."""
    precision = float(run.config.reduced_precision > 0)  # of every epoch, rather than of the first
    config = dataclasses.replace(run.config, ensemble_size=MEMBERS, fit_epochs=_ENDLESS, reduced_precision=precision)
    ensemble, *rows = prepare(config, run.dataset)
    train, holdout = (next(part.chunks(math.ceil(len(part.inputs) / EPOCH_PARTS))) for part in rows)
    if run.is_published:
        members = [plain_member(config, ensemble, member) for member in range(MEMBERS)]
        return partial(next, plain_epochs(members, config, train, holdout))
    return partial(next, train_ensemble(ensemble, config, train, holdout, score_every=None))


def plain_epochs(
    members: list[PlainMember], config: LearnConfig, train: NormalisedRows, holdout: NormalisedRows
) -> Iterator[None]:
    """Trains plain members for epochs without end, and scores the holdout after each."""
    optimizers = [torch.optim.Adam(member.parameters(), lr=config.fit_lr) for member in members]
    order = draw_order(0, 1, len(train.inputs), epoch=0)[0]
    while True:
        for member, optimizer in zip(members, optimizers, strict=True):
            train_steps(member, optimizer, train, order, config.batch_size)
            score(member, holdout)
        yield


# --- The tables and the figure ---


def publish(results: harness.ResultsFile, times: harness.ResultsFile) -> None:
    """Makes tables and figure, once epochs have been timed."""
    timed = times.rows()
    if timed.empty:
        print("epochs have not been timed yet: on an idle machine, --times", file=sys.stderr)
        return
    rows = with_seconds(results.rows_to_show(), timed)
    results.publish(tables(rows, timed), draw(rows))


def with_seconds(rows: pd.DataFrame, timed: pd.DataFrame) -> pd.DataFrame:
    """Adds to each epoch what it took on the machine that was timed; drops those on other data than the last.

    Args:
        rows: The epochs, as ``Progress.add_epoch`` writes them.
        timed: Parts of epochs, as ``time_epochs`` writes them.

    Returns:
        The epochs with ``name``, the recipe without its source; ``timed``, the recipe whose time they took;
        ``epoch_seconds``; and ``seconds``, the wall time from the start to their end.
    """
    rows = rows.assign(name=rows["recipe"].str.partition("/")[2])
    rows = rows[rows["data"] == rows.groupby("name")["data"].transform("last")]
    per_epoch = timed.groupby(["recipe", "data"])["ms"].median() * EPOCH_PARTS / 1e3
    kind_of_epoch = rows["is_reduced"].map({True: "ours/", False: "full/"}) + rows["name"]
    rows = rows.assign(timed=rows["recipe"].where(rows["recipe"].str.startswith("published/"), kind_of_epoch))
    rows = rows.join(per_epoch.rename("epoch_seconds"), on=["timed", "data"])
    return rows.assign(seconds=rows.groupby(["recipe", "seed"])["epoch_seconds"].cumsum(skipna=False))


def tables(rows: pd.DataFrame, timed: pd.DataFrame) -> str:
    """Returns the tables of each environment and kind, and that of the times.

    Args:
        rows: What ``with_seconds`` returns.
        timed: What ``time_epochs`` wrote.
    """
    threads = harness.count(int(timed["threads"].iloc[-1]), "thread")
    text = [
        "Validation MSE in normalised units and NLL in nats, on held-out trajectories. Ours: means over members, each "
        "with the weights that it keeps, those of its lowest validation error (in brackets the best and the worst "
        "member). Minutes: wall time of 7 members, scoring of the holdout included; an epoch's was measured in turn "
        f"with those of the other recipes ({threads}; last table).",
        "Targets: the best validation error in the whole published schedule, of one member, and the likelihood of the "
        "same weights (the schedule's lowest likelihood belongs to other weights, with a larger error). Minutes: until "
        "ours is there, median over seeds and range. x: wall time of the whole published schedule divided by these "
        "minutes; in brackets, of the schedule up to its best epoch.",
        "In the first 80 % of our epochs products round their operands if the processor has AMX; `full`, in the last "
        "table, are epochs of ours in which they do not.",
    ]
    for name in rows["name"].unique():
        of_name = rows[rows["name"] == name]
        ours, published = (of_name[of_name["recipe"] == f"{source}/{name}"] for source in SOURCES)
        text.append(f"**{name}**\n\n{recipe_table(published, ours)}")
    text.append(f"**Seconds an epoch of 7 members takes: median and range**\n\n{times_table(timed)}")
    return "\n\n".join(text)


def times_table(timed: pd.DataFrame) -> str:
    """Returns a line per recipe: seconds that an epoch takes, and what share of a published epoch's they are."""
    timed = timed.assign(seconds=timed["ms"] * EPOCH_PARTS / 1e3)
    timed["arm"], timed["name"] = timed["recipe"].str.partition("/")[0], timed["recipe"].str.partition("/")[2]
    summary = harness.compare(timed, ["name"], "published", "seconds")
    lines = [[name, arm, harness.spread(row), f"{row['ratio']:.2f}"] for (name, arm), row in summary.iterrows()]
    return markdown_table(["", "recipe", "seconds", "of the published one"], lines)


def recipe_table(published: pd.DataFrame, ours: pd.DataFrame) -> str:
    """Returns the tables of one environment and kind.

    The first has a line for the published recipe and one per seed of ours: epochs, TFLOP and minutes so far, and the
    errors reached. The second, once both have come to their end, is that of ``target_lines``.
    """
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
    table = markdown_table(["", "epochs", "TFLOP", "minutes", "validation MSE", "NLL"], lines)
    if published.empty or finished(ours).empty:
        return table
    return table + "\n\n" + markdown_table(["target", "minutes", "x"], target_lines(published, finished(ours)))


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the epochs of the trainings of one recipe that have come to their end."""
    return rows[rows.groupby("seed")["is_last"].transform("any")]


def target_lines(published: pd.DataFrame, ours: pd.DataFrame) -> list[list[str]]:
    """Returns a line per target: minutes in which ours reaches it, and the published recipe's as a multiple of them."""
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


def draw(rows: pd.DataFrame) -> Figure:
    """Draws validation error against wall time, and below against FLOPs, a column per environment and kind."""
    names = list(rows["name"].unique())
    figure = harness.new_figure(columns=len(names), lines=2)
    panels = figure.subplots(2, len(names), squeeze=False)
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
    return figure


if __name__ == "__main__":
    main()
