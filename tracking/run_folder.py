"""``logs/<run name>/``: what one training run owns on disk, and how a run that was interrupted is found again.

config.yaml   the effective configuration, written before the first step; ``--config`` takes it to train the same model
run.json      a ``RunRecord``: what was asked for (dataset, holdout, configuration), the code's commit, how it ended
audit.md      what was found about the dataset, as a table
metrics.csv   one row per epoch and member (elsewhere with ``--csv``)
checkpoint    everything needed to continue after the last finished epoch; removed when the run has finished, and so is
              checkpoint.before, that of the epoch before
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tracking.checkpoints import CheckpointFiles
from tracking.records import parse_record
from utils import InputError, Origin, atomic_write, read_file

_LONGEST_STEM = 150  # bytes of a made-up name; file systems allow 255
OWN_FILES = (
    *("config.yaml", "run.json", "audit.md", "metrics.csv", "learning_curves.png"),
    *("checkpoint", "checkpoint.before", ".lock"),
)


@dataclass(frozen=True)
class RunRequest:
    """What decides the result of a run. A run resumes an earlier one only if both ask for the same.

    Attributes:
        dataset: Name of the dataset.
        sha256: Checksum of its contents, in hexadecimal digits.
        holdout_ratio: Share of the rows to hold out, from 0 to 1.
        holdout_samples: Rows to hold out, instead of a share; None where the share says it.
        test_ratio: Share of the rows that neither train nor select anything, from 0 to 1.
        track_training: Whether training rows are scored after every epoch.
        config: Every setting of the configuration by name, as plain values (numbers, strings, lists, None).
        holdout_blocks: Into how many blocks trajectories are cut; None where that was left to the data.
        holdout_dataset: Name of a dataset of its own that validates; None without one.
        holdout_sha256: Checksum of its contents.
    """

    dataset: str
    sha256: str
    holdout_ratio: float
    holdout_samples: int | None
    test_ratio: float
    track_training: bool
    config: dict[str, Any]
    holdout_blocks: int | None = None
    holdout_dataset: str | None = None
    holdout_sha256: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was asked for, by name; the configuration's settings stand among the rest."""
        return {name: value for name, value in vars(self).items() if name != "config"} | self.config


@dataclass(frozen=True)
class RunOrigin(Origin):
    """Which code and which command line began a run.

    Attributes:
        command: The command line, quoted for a shell.
    """

    command: str

    @classmethod
    def here(cls) -> RunOrigin:
        """Returns the origin of a run that this process begins."""
        return cls(**vars(Origin.here()), command=shlex.join(sys.argv))


@dataclass(frozen=True)
class RunOutcome:
    """The results of a run that has succeeded.

    Attributes:
        output: Path of the trained model.
        scores: Final scores of each member by name; None is a score that was not measured.
        elites: Indices of the elite members, best first.
        failed: Indices of the members that failed.
    """

    output: str
    scores: list[dict[str, float | None]]
    elites: list[int]
    failed: list[int] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class RunShown:
    """What MLflow shows of a run beside its request and its numbers.

    Attributes:
        tags: What to find the run by, such as the kind of ensemble.
        rows: Number of transitions of the dataset.
        trajectories: Number of its trajectories.
        members: Number of members.
    """

    tags: dict[str, str]
    rows: int
    trajectories: int
    members: int


@dataclass(frozen=True)
class RunRecord:
    """Contents of ``run.json``.

    Attributes:
        request: What decides the result of the run.
        origin: Which code and which command line began it.
        csv: Path of its metrics; None for ``metrics.csv`` in its folder.
        findings: What was found about the dataset, each as a dictionary of plain values.
        mlflow_run_id: Id of the ensemble's MLflow run; None where no store has answered yet.
        products: How training multiplies, as in the configuration; None before that was chosen.
        finished: Its results; None until it has succeeded.
        shown: What MLflow shows beside this; None before the run has begun to train.
    """

    request: RunRequest
    origin: RunOrigin
    csv: str | None = None
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    mlflow_run_id: str | None = None
    products: str | None = None
    finished: RunOutcome | None = None
    shown: RunShown | None = None

    def __post_init__(self) -> None:
        """Checks what goes to the system or to MLflow, where anything might happen to it.

        Raises:
            ValueError: If it is not what a run writes.
        """
        if self.mlflow_run_id is not None and not re.fullmatch(r"[\w-]{1,64}", self.mlflow_run_id):
            raise ValueError(f"mlflow_run_id {reprlib.repr(self.mlflow_run_id)} is no id of a run")
        if self.csv is not None and not Path(self.csv).name.isprintable():
            raise ValueError("csv is no path of a file")

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as nested dictionaries of plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Any) -> RunRecord:
        """Returns the record that ``to_dict`` gave these dictionaries for.

        Raises:
            ValueError: If an entry is missing, unknown or of another type; the message names it.
        """
        return parse_record(cls, plain, "the record")


class RunFolder:
    """The folder of one run, held by one process at a time.

    Attributes:
        path: The folder.
        record: Contents of its ``run.json``.
        checkpoints: From which it goes on if it is interrupted.
    """

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record
        self.checkpoints = CheckpointFiles(path)
        self._begins = False
        self._lock = FileLock(path / ".lock")

    @classmethod
    def create(
        cls,
        logs: Path,
        name: str,
        request: RunRequest,
        origin: RunOrigin,
        csv: Path | None = None,
        findings: Iterable[dict[str, Any]] = (),
    ) -> RunFolder:
        """Makes the folder of a new run; ``hold`` then writes its first files.

        Args:
            logs: Folder of all runs.
            name: Name of the run.
            request: What decides its result.
            origin: Which code and which command line begin it.
            csv: Where its metrics go; None for ``metrics.csv`` in the folder.
            findings: What was found about its dataset, each as a dictionary of plain values.

        Raises:
            InputError: If there is a run of this name, or the folder cannot be made.
        """
        run = cls(logs / name, RunRecord(request, origin, csv and str(csv.absolute()), list(findings)))
        run._begins = True
        try:
            run._check_new()
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the run folder {run.path} cannot be made ({error.strerror}); check disk and rights"
            ) from None
        return run

    @classmethod
    def find_unfinished(
        cls, logs: Path, name: str | None, request: RunRequest, defaults: dict[str, Any]
    ) -> RunFolder | None:
        """Finds the run to resume: the one called ``name``, or the latest unfinished one that asked for the same.

        Args:
            logs: Folder of all runs.
            name: Name of the run; None looks at all runs.
            request: What is asked for now.
            defaults: Default of every setting of the configuration. A run of an older version lacks the newer ones; it
                counts as run with their defaults, since these are what the program did before.

        Returns:
            The run, whose ``record.request`` equals ``request``; None if there is none to resume.

        Raises:
            InputError: If the named run asked for something else, has finished, or has a damaged ``run.json``.
        """
        for path in _latest_first(logs) if name is None else [logs / name]:
            try:
                record = _read_record(path / "run.json", defaults)
            except FileNotFoundError:
                continue  # killed before it wrote its first file: there is nothing to resume
            except InputError:
                if name is None:
                    continue
                raise
            if record.request == request and record.finished is None:
                return cls(path, record)
            if name is not None:
                raise InputError(_why_not(name, record.request, request))
        return None

    @classmethod
    def open_finished(cls, path: Path) -> RunFolder:
        """Opens the folder of a run that has finished.

        Raises:
            InputError: If it is none.
        """
        try:
            record = _read_record(path / "run.json", {})
        except FileNotFoundError:
            raise InputError(f"{path} is no folder of a run: it has no run.json; give logs/NAME") from None
        if record.finished is None or record.shown is None:
            raise InputError(f"run {path.name!r} has not finished; learn_model.py --resume goes on with it")
        if not len(set(record.finished.failed)) < len(record.finished.scores) == record.shown.members:
            raise InputError(f"{path / 'run.json'} is damaged: it has scores of other members")
        return cls(path.absolute(), record)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def metrics_csv(self) -> Path:
        """Path of its metrics."""
        return Path(self.record.csv or self.path / "metrics.csv")

    @property
    def config_yaml(self) -> Path:
        """Path of its effective configuration."""
        return self.path / "config.yaml"

    @property
    def audit_md(self) -> Path:
        """Path of what was found about its dataset."""
        return self.path / "audit.md"

    @property
    def artifacts(self) -> list[Path]:
        """Paths of the files that MLflow keeps with the run, beside the model."""
        return [self.config_yaml, self.metrics_csv, self.audit_md, self.learning_curves]

    @property
    def learning_curves(self) -> Path:
        """Path of the picture of its metrics."""
        return self.path / "learning_curves.png"

    def hold(self, config_yaml: str, audit_md: str) -> None:
        """Locks the folder for this process until it ends, and writes its first files: these two and ``run.json``.

        Raises:
            InputError: If another process trains this run or has just done so, or the folder cannot be written.
        """
        try:
            self._lock.acquire(blocking=False)
            self._check_new()
            for leftover in self.path.glob(".*.tmp"):  # half-written files of a process that was killed
                if leftover.is_file():
                    leftover.unlink()
            for path, content in ((self.config_yaml, config_yaml), (self.audit_md, audit_md)):
                with atomic_write(path, "w") as file:
                    file.write(content)
            self.update()
            self._begins = False
        except Timeout:
            raise InputError(f"run {self.name!r} is being trained by another process; wait for it or stop it") from None
        except OSError as error:
            if self._begins:
                self.discard()
            raise InputError(
                f"the run folder {self.path} cannot be written ({error.strerror}); check disk and rights"
            ) from None

    def _check_new(self) -> None:
        """Checks that no other process has begun a new run of this name, or finished the one to resume.

        Raises:
            InputError: If one has.
        """
        path = self.path / "run.json"
        if self._begins and path.exists():  # a folder without it is of a run that was killed before it began
            raise InputError(
                f"run {self.name!r} exists already ({self.path}); go on with it by --resume, or give another --run_name"
            )
        if not self._begins and _read_record(path, {}).finished is not None:
            raise InputError(_why_not(self.name, self.record.request, self.record.request))

    def settle(self, products: str, config_yaml: str) -> None:
        """Records how training multiplies: in the configuration, so that it trains the same again, and in the record.

        Args:
            products: As in the configuration.
            config_yaml: The configuration with it.
        """
        with atomic_write(self.config_yaml, "w") as file:
            file.write(config_yaml)
        self.update(products=products)

    def update(self, **changes: Any) -> None:
        """Changes fields of the record and writes it to ``run.json``."""
        self.record = dataclasses.replace(self.record, **changes)
        with atomic_write(self.path / "run.json", "w") as file:
            json.dump(self.record.to_dict(), file, indent=2)

    def discard(self) -> None:
        """Removes the files of a run that could not begin, and its folder unless it holds anything else."""
        self._lock.release()
        for path in (self.config_yaml, self.audit_md, self.path / "run.json", self.path / ".lock"):
            with contextlib.suppress(OSError):  # something else lies there
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder is not empty
            self.path.rmdir()
            self.path.parent.rmdir()

    def finish(self, outcome: RunOutcome) -> None:
        """Marks the run as finished and removes its checkpoints, from which nothing will continue."""
        self.update(finished=outcome)
        self.checkpoints.remove()


def claim_name(logs: Path, stem: str) -> str:
    """Makes the folder of a new run, which is therefore nobody else's, and returns its name.

    Args:
        logs: Folder of all runs.
        stem: What the name begins with; what a ``--run_name`` may not have is replaced. The time follows, and a number
            if there is such a run already.

    Raises:
        InputError: If the folder cannot be made.
    """
    plain = re.sub(r"[^\w.+-]|^[.+]", "_", stem).encode()[:_LONGEST_STEM].decode(errors="ignore")
    stem = f"{plain}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        try:
            (logs / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"the run folder {logs / name} cannot be made ({error.strerror}); check disk and rights"
            ) from None
        return name
    raise AssertionError("numbers do not end")


def _latest_first(logs: Path) -> list[Path]:
    folders = [path for path in logs.glob("*") if path.is_dir()]
    return sorted(folders, key=os.path.getmtime, reverse=True)


def _read_record(path: Path, defaults: dict[str, Any]) -> RunRecord:
    """Reads a ``run.json``; settings that it lacks, being of an older version, get their defaults.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it cannot be read, or is not what a run writes.
    """
    try:
        record = RunRecord.from_dict(json.loads(read_file(path)))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give another --run_name to train anew") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, JSON nested too deeply, or other entries
        raise InputError(f"{path} is damaged ({error}); give another --run_name to train anew") from None
    config = defaults | record.request.config
    return dataclasses.replace(record, request=dataclasses.replace(record.request, config=config))


def _why_not(name: str, before: RunRequest, now: RunRequest) -> str:
    """Returns the message why a named run cannot be resumed: it asked for something else, or it has finished."""
    for setting in sorted(before.settings | now.settings):
        old, new = (request.settings.get(setting, "unknown") for request in (before, now))
        if old != new:
            return (
                f"run {name!r} was started with other settings "
                f"({setting[:40]} {reprlib.repr(old)}, now {reprlib.repr(new)}); "
                "resume it with its own, or give another --run_name"
            )
    return f"run {name!r} has finished, there is nothing to resume; give another --run_name to train again"
