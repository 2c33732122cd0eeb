"""Opens the MLflow tracker of a run from what the run's folder says of it: while it trains, and afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from tracking.mlflow_tracker import DatasetInfo, MlflowTracker
from tracking.run_folder import RunFolder
from tracking.trackers import Row

_HELD_OUT_BY = ("holdout_ratio", "holdout_samples", "holdout_blocks", "holdout_dataset", "test_ratio")


def open_run_tracker(run: RunFolder, rows: Iterable[Row]) -> MlflowTracker:
    """Opens the tracker of a run, which goes on with its MLflow run where it has one.

    Args:
        run: The run.
        rows: The rows of its CSV so far; those that MLflow lacks are sent.

    Raises:
        InputError: If a local store cannot be used.
    """
    request, shown = run.record.request, run.record.shown
    return MlflowTracker(
        run_name=run.name,
        params=request.config | {name: getattr(request, name) for name in _HELD_OUT_BY},
        tags=shown.tags,
        dataset=DatasetInfo(request.dataset, request.sha256, shown.rows, shown.trajectories),
        ensemble_size=shown.members,
        resume_run_id=run.record.mlflow_run_id,
        resume_rows=rows,
        remedy=f"python -m tracking.send_run {run.path}",
    )
