"""Trackers take the numbers of a training: a CSV file, MLflow runs and a progress display, behind the same few methods.

Trackers receive numbers and never decide anything. Whoever trains calls ``log_epoch`` after each epoch and ``finish``
once, when training has succeeded::

    with Trackers([CsvTracker("metrics.csv", columns), MlflowTracker(...), ProgressTracker(300)]) as tracker:
        tracker.log_epoch(0, rows)  # one dict per member: step, model_id, mse_loss | gauss_loss, lr, train_mse, ...
        tracker.finish(summary, artifacts)

The CSV (``csv_tracker.py``) is the complete record. MLflow (``mlflow_tracker.py``) is a copy to look at: nothing that a
tracking server does may stop training.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

Row = dict[str, float | int | None]
"""One member's numbers of one epoch; ``step`` and ``model_id`` are integers, None is a number that was not measured."""


@dataclass(frozen=True)
class Summary:
    """What a training has achieved, measured on the weights that are saved.

    Attributes:
        metrics: Final scores of the ensemble by name: means over its members.
        members: Final scores of each member by name; None is a score that was not measured.
        elites: Indices of the members that did best on held-out rows, best first; all members without a holdout.
        failed: Indices of the members that failed: their numbers were not finite any more.
    """

    metrics: dict[str, float]
    members: list[dict[str, float | None]]
    elites: list[int]
    failed: list[int] = field(default_factory=list)


class Tracker:
    """The methods that all trackers share. They do nothing here, so a plain ``Tracker()`` ignores what it is given.

    Attributes:
        run_id: Id under which a store keeps the numbers; None where there is none.
    """

    run_id: str | None = None

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Takes the numbers of one epoch.

        Args:
            epoch: Counted from 0.
            rows: One row per member, all with the same columns.
        """

    def finish(self, summary: Summary, artifacts: list[Path]) -> None:
        """Takes the outcome of a training that succeeded.

        Args:
            summary: The final scores.
            artifacts: Files to keep with the run.
        """

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Ends tracking, whether training succeeded or not.

        Args:
            failed: An exception ended training.
            interrupted: That exception was the user's Ctrl-C.
        """

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self.close(failed=kind is not None, interrupted=kind is KeyboardInterrupt)


class Trackers(Tracker):
    """Several trackers as one. If one of them raises at the end, the others still end properly."""

    def __init__(self, trackers: Iterable[Tracker]):
        self._trackers = list(trackers)

    @property
    def run_id(self) -> str | None:
        """The first id that one of them has."""
        return next((tracker.run_id for tracker in self._trackers if tracker.run_id is not None), None)

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Hands the epoch to each tracker."""
        for tracker in self._trackers:
            tracker.log_epoch(epoch, rows)

    def finish(self, summary: Summary, artifacts: list[Path]) -> None:
        """Hands the outcome to each tracker."""
        self._call_each(lambda tracker: tracker.finish(summary, artifacts))

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Closes each tracker."""
        self._call_each(lambda tracker: tracker.close(failed, interrupted))

    def _call_each(self, call: Callable[[Tracker], None]) -> None:
        with contextlib.ExitStack() as stack:
            for tracker in reversed(self._trackers):  # an exit stack runs its last callback first
                stack.callback(call, tracker)


class ProgressTracker(Tracker):
    """Shows epochs done, loss, validation error and time left on stderr: a bar in a terminal, ten lines in a log file.

    Args:
        fit_epochs: Epochs of the whole training.
        first_epoch: Epochs that an interrupted run has already done.
        quiet: Shows nothing.
    """

    def __init__(self, fit_epochs: int, first_epoch: int = 0, quiet: bool = False):
        in_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=fit_epochs,
            initial=first_epoch,
            desc="training",
            unit="epoch",
            dynamic_ncols=True,
            disable=quiet or not in_terminal,
        )
        self._fit_epochs = fit_epochs
        self._first_epoch = first_epoch
        self._prints_lines = not quiet and not in_terminal
        self._start = time.monotonic()

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Shows the mean loss and the median validation error over members that have not failed."""
        loss_name = next(name for name in rows[0] if name.endswith("_loss"))
        rows = [row for row in rows if not math.isnan(row[loss_name])] or rows
        shown = f"loss {statistics.fmean(row[loss_name] for row in rows):.4g}"
        if scores := [row["val_mse"] for row in rows if row.get("val_mse") is not None]:
            shown += f", val {statistics.median(scores):.4g}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        done = epoch + 1
        if self._prints_lines and (epoch == self._first_epoch or done * 10 % self._fit_epochs < 10):
            seconds_per_epoch = (time.monotonic() - self._start) / (done - self._first_epoch)
            left = tqdm.format_interval(seconds_per_epoch * (self._fit_epochs - done))
            print(f"epoch {done}/{self._fit_epochs}: {shown}, {left} left", file=sys.stderr, flush=True)

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


def warn(message: str) -> None:
    """Prints a warning on stderr without tearing a progress bar apart: the bar is cleared before and drawn again."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
