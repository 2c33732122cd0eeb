"""``logs/<run name>/``: what one training run owns on disk, and how a run that was cut off is found again.

config.yaml   the effective configuration, written before the first step; trains the same model when given again
run.json      what was asked for (dataset, holdout, configuration), where it came from (commit, versions), how it ended
metrics.csv   one row per epoch and member (elsewhere with --csv)
checkpoint    everything needed to go on after the last finished epoch; removed when the run has finished
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from utils import InputError, atomic_write


class RunFolder:
    """The folder of one run, held by one process at a time.

    Attributes:
        path: The folder.
        record: Contents of ``run.json``; ``record["request"]`` is what decides the result of the run.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self._lock = FileLock(path / ".lock")
        self._warned = False

    @classmethod
    def create(
        cls, logs: Path, name: str, request: dict[str, Any], origin: dict[str, Any], csv: Path | None = None
    ) -> RunFolder:
        """Makes the folder of a new run; ``hold`` then writes its first files.

        Args:
            logs: Folder of all runs.
            name: Name of the run.
            request: What decides its result, in plain Python types.
            origin: Where it comes from: commit, versions, command.
            csv: Where its metrics go; None for the folder.

        Raises:
            InputError: If a run of this name is there already, or the folder cannot be made.
        """
        path = logs / name
        if (path / "run.json").exists():  # without, it was cut off before it began
            raise InputError(
                f"run {name!r} exists already ({path}); go on with it by --resume, or give another --run_name"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the run folder {path} cannot be made ({error.strerror}); check disk and rights"
            ) from None
        return cls(
            path,
            {
                "request": request,
                "origin": origin,
                "csv": csv and str(csv.absolute()),
                "mlflow_run_id": None,
                "finished": None,
            },
        )

    @classmethod
    def find_unfinished(cls, logs: Path, name: str | None, request: dict[str, Any]) -> RunFolder | None:
        """Finds the run to resume: the one named, or the latest unfinished one that asked for the same.

        Raises:
            InputError: If the named run asked for something else, or has finished.
        """
        for path in _latest_first(logs) if name is None else [logs / name]:
            try:
                record = json.loads((path / "run.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue  # killed before its first file: nothing to go on from
            except ValueError:
                if name is None:
                    continue
                raise InputError(f"{path / 'run.json'} is damaged; give another --run_name to train anew") from None
            if record["request"] == request and record["finished"] is None:
                return cls(path, record)
            if name is not None:
                raise InputError(_why_not(name, record, request))
        return None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def metrics_csv(self) -> Path:
        """Where its metrics are."""
        return Path(self.record["csv"] or self.path / "metrics.csv")

    @property
    def config_yaml(self) -> Path:
        """The effective configuration."""
        return self.path / "config.yaml"

    def hold(self, config_yaml: str) -> None:
        """Takes the folder for this process until it ends, and writes the configuration and ``run.json``.

        Raises:
            InputError: If another process trains this run, or the folder cannot be written.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"run {self.name!r} is being trained by another process; wait for it or stop it") from None
        for leftover in self.path.glob(".*.tmp"):  # of writes that a kill cut off
            leftover.unlink()
        try:
            with atomic_write(self.config_yaml, "w") as file:
                file.write(config_yaml)
            self.update()
        except OSError as error:
            if not (self.path / "run.json").exists():
                self.discard()
            raise InputError(f"the run folder {self.path} cannot be written ({error.strerror}); free space") from None

    def update(self, **entries: Any) -> None:
        """Sets entries of ``run.json``."""
        self.record |= entries
        with atomic_write(self.path / "run.json", "w") as file:
            json.dump(self.record, file, indent=2)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint in one step; where the disk refuses, warns once and keeps the one before."""
        import torch

        # Into memory first: PyTorch's writer ends the process if the file it writes to fails or Ctrl-C comes.
        serialised = io.BytesIO()
        torch.save(state, serialised)
        try:
            with atomic_write(self.path / "checkpoint") as file:
                file.write(serialised.getbuffer())
        except OSError as error:
            if not self._warned:
                print(f"warning: no checkpoint could be written ({error}); training goes on", file=sys.stderr)
            self._warned = True

    def load_checkpoint(self, device: str) -> dict[str, Any] | None:
        """Returns what ``save_checkpoint`` wrote last, or None where the run was cut off before its first."""
        import torch

        path = self.path / "checkpoint"
        return torch.load(path, map_location=device, weights_only=True) if path.exists() else None

    def discard(self) -> None:
        """Removes the files of a run that could not begin, and its folder."""
        self._lock.release()
        for path in (self.config_yaml, self.path / "run.json", self.path / ".lock"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: something else is in it
            self.path.rmdir()
            self.path.parent.rmdir()

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished and removes its checkpoint, which nothing will go on from."""
        self.update(finished=summary)
        (self.path / "checkpoint").unlink(missing_ok=True)


def unique_name(logs: Path, stem: str) -> str:
    """Returns ``stem`` with the time behind it, and a number where that is taken."""
    name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    taken = 1
    while (logs / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    return name if taken == 1 else f"{name}-{taken}"


def _latest_first(logs: Path) -> list[Path]:
    folders = [path for path in logs.glob("*") if path.is_dir()]
    return sorted(folders, key=os.path.getmtime, reverse=True)


def _why_not(name: str, record: dict[str, Any], request: dict[str, Any]) -> str:
    """Says why a named run cannot be resumed: it has finished, or what it asked for differs."""
    before, now = _flatten(record["request"]), _flatten(request)
    differing = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        return (
            f"run {name!r} was started with other settings ({key} {before.get(key)!r}, now {now.get(key)!r}); "
            "resume it with its own, or give another --run_name"
        )
    return f"run {name!r} has finished, there is nothing to resume; give another --run_name to train again"


def _flatten(nested: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        flat |= _flatten(value) if isinstance(value, dict) else {key: value}
    return flat
