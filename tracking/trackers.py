"""Trackers: what receives a training's numbers, behind the same few methods."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    pass

Row = dict[str, float | int | None]
"""One member's numbers of one epoch; ``step`` and ``model_id`` are integers, None is a number that was not measured."""


class NullTracker:
    """The methods that all trackers share; by itself the tracker that does nothing."""

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Takes the numbers of one epoch.

        Args:
            epoch: Counted from 0.
            rows: One row per member, all with the same columns.
        """

    def finish(self, summary: dict[str, Any], artifacts: list[Path]) -> None:
        """Takes the outcome of a training that succeeded.

        Args:
            summary: ``metrics`` (name to number, of the ensemble), ``members`` (a list of the same, one per member) and
                ``elites`` (indices of members). They describe the weights that are saved.
            artifacts: Files to keep with the run.
        """

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Ends tracking, whether training succeeded or not.

        Args:
            failed: An exception ended training.
            interrupted: That exception was the user's Ctrl-C.
        """

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self.close(failed=kind is not None, interrupted=kind is KeyboardInterrupt)


class Trackers(NullTracker):
    """Several trackers as one. One that raises at the end does not keep the others from ending properly."""

    def __init__(self, trackers: Iterable[NullTracker]):
        self._trackers = list(trackers)

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Hands the epoch to each tracker."""
        for tracker in self._trackers:
            tracker.log_epoch(epoch, rows)

    def finish(self, summary: dict[str, Any], artifacts: list[Path]) -> None:
        """Hands the outcome to each tracker."""
        self._call_each(lambda tracker: tracker.finish(summary, artifacts))

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Closes each tracker."""
        self._call_each(lambda tracker: tracker.close(failed, interrupted))

    def _call_each(self, call: Callable[[NullTracker], None]) -> None:
        with contextlib.ExitStack() as stack:
            for tracker in reversed(self._trackers):  # an exit stack runs its last callback first
                stack.callback(call, tracker)


class ProgressTracker(NullTracker):
    """Epochs done, loss, validation error and time left, on stderr: a bar in a terminal, ten lines in a log file.

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
        """Shows the mean loss and the median validation error over members."""
        loss_name = next(name for name in rows[0] if name.endswith("_loss"))
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
