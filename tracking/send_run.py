"""Sends what MLflow lacks of a finished run, because its server was away while the run trained.

    python -m tracking.send_run logs/NAME

The run's folder has everything; what MLflow has already is not sent again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tracking.csv_tracker import read_rows
from tracking.run_folder import RunFolder
from tracking.run_tracker import open_run_tracker
from tracking.trackers import Summary
from utils import InputError


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if MLflow has everything, 1 if it still lacks something, 2 if the folder is none of a run."""
    parser = argparse.ArgumentParser(prog="python -m tracking.send_run", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the run, such as logs/NAME")
    folder = parser.parse_args(argv).folder
    try:
        return send(RunFolder.open_finished(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def send(run: RunFolder) -> int:
    """Sends what MLflow lacks of a finished run; returns the exit code."""
    outcome = run.record.finished
    tracker = open_run_tracker(run, read_rows(run.metrics_csv))
    measured = [score for member, score in enumerate(outcome.scores) if member not in outcome.failed]
    names = [name for name, value in measured[0].items() if value is not None]
    means = {name: sum(score[name] for score in measured) / len(measured) for name in names}
    with tracker:
        artifacts = [path for path in (*run.artifacts, Path(outcome.output)) if path.is_file()]
        tracker.finish(Summary(means, outcome.scores, outcome.elites, outcome.failed), artifacts)
    run.update(mlflow_run_id=tracker.run_id)
    return 0 if tracker.is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
