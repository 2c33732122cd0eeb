"""``metrics.csv`` of a run: every number of every epoch and member, complete also after a crash and a resume."""

from __future__ import annotations

import csv
import io
import itertools
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tracking.trackers import Row, Summary, Tracker, warn
from utils import InputError, atomic_write, make_temporary, read_file


class CsvTracker(Tracker):
    """Writes one line per epoch and member, which is on disk before the next epoch begins.

    A file that is already at the path is replaced in the first epoch; a run that ends earlier leaves it untouched. Rows
    that cannot be written (the disk is full) are kept in memory, and every epoch tries again.

    Args:
        path: The file; its folder is made.
        columns: The header. Every row has exactly these keys.
        resume_epoch: Continues the file of an interrupted run from this epoch on: earlier rows are kept, later ones
            dropped. None starts a new file.

    Attributes:
        kept_rows: The rows kept from the interrupted run, in order.

    Raises:
        InputError: If the file cannot be written, or is not one to go on with.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str], resume_epoch: int | None = None):
        self._path = Path(path)
        self._columns = list(columns)
        self._check_writable()
        self.kept_rows = [] if resume_epoch is None else self._read_epochs(resume_epoch)
        header = dict(zip(self._columns, self._columns, strict=True))
        self._unwritten = self._format([header, *self.kept_rows])
        self._written_size: int | None = None  # bytes of whole lines on disk; None until this run's file is there
        self._error: OSError | None = None

    def log_epoch(self, epoch: int, rows: list[Row]) -> None:
        """Appends the rows. A missing or unknown column is a ValueError."""
        for row in rows:
            if different := row.keys() ^ set(self._columns):
                raise ValueError(f"CSV columns missing or unknown: {sorted(different)}; expected {self._columns}")
        self._unwritten += self._format(rows)
        self._write()

    def finish(self, summary: Summary, artifacts: list[Path]) -> None:
        """Writes the rows that are left: the file may be among the artifacts, of which MLflow takes copies."""
        self._write()

    def close(self, failed: bool = False, interrupted: bool = False) -> None:
        """Tries once more to write rows that are left; an OSError if that fails after a training that succeeded."""
        if self._error is not None:
            self._write()
        if self._error is not None and not failed:
            raise OSError(f"the CSV {str(self._path)!r} lacks its last rows") from self._error

    def _check_writable(self) -> None:
        try:
            if self._path.exists() and not self._path.is_file():
                raise OSError("it is not a regular file")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = make_temporary(self._path, self._path.parent)
            os.close(descriptor)
            Path(temporary).unlink()
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"the CSV {str(self._path)!r} cannot be written ({reason}); choose another path") from None

    def _read_epochs(self, count: int) -> list[Row]:
        """Returns the rows of the file's first ``count`` epochs, without a last line that a kill has cut short."""
        try:
            lines = read_file(self._path).decode(errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            lines = [",".join(self._columns) + "\n"]
        except OSError as error:
            raise InputError(f"the CSV {str(self._path)!r} cannot be read ({error.strerror})") from None
        try:
            header, *body = [*csv.reader(line for line in lines if line.endswith("\n"))] or [[]]
            if header != self._columns:
                raise InputError(
                    f"cannot resume the CSV {str(self._path)!r}: its columns are {reprlib.repr(header)}, this run's "
                    f"are {self._columns}; give the interrupted run's own file, or start anew without --resume"
                )
            epochs = _parse(header, body)[:count]
        except (ValueError, csv.Error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"cannot resume the CSV {str(self._path)!r}: it is damaged ({str(error)[:200]}); start anew without "
                "--resume"
            ) from None
        if len(epochs) < count:
            warn(f"the CSV {str(self._path)!r} holds {len(epochs)} of the {count} epochs that are resumed")
        return list(itertools.chain.from_iterable(epochs))

    def _format(self, rows: Iterable[dict[str, Any]]) -> bytes:
        """Returns the lines of the rows. Floats are written with all their digits: reading gives the same bits."""
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    def _write(self) -> None:
        try:
            if self._written_size is None:
                with atomic_write(self._path) as file:
                    file.write(self._unwritten)
                self._written_size = 0
            else:
                with self._path.open("r+b") as file:
                    file.seek(self._written_size)  # overwrites the half line that a failed write has left
                    file.write(self._unwritten)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            if self._error is None:
                warn(f"the CSV {str(self._path)!r} cannot be written ({error}); its rows are kept and tried again")
            self._error = error
        else:
            self._written_size += len(self._unwritten)
            self._unwritten = b""
            self._error = None


def read_rows(path: Path) -> list[Row]:
    """Reads a run's CSV.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        header, *body = csv.reader(read_file(path).decode().splitlines())
        return list(itertools.chain.from_iterable(_parse(header, body)))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(f"the CSV {str(path)!r} cannot be read ({str(error)[:200]})") from None


def _parse(columns: list[str], body: list[list[str]]) -> list[list[Row]]:
    """Returns the rows of each epoch.

    Raises:
        ValueError: If they are not what ``log_epoch`` has written: one row per member, epoch after epoch.
    """
    parse = {"step": int, "model_id": int}
    if columns[:2] != list(parse):
        raise ValueError(f"its columns are {reprlib.repr(columns)}, expected step, model_id and numbers")
    rows = [
        {name: parse.get(name, float)(cell) if cell else None for name, cell in zip(columns, cells, strict=True)}
        for cells in body
    ]
    epochs = [list(epoch) for _, epoch in itertools.groupby(rows, key=lambda row: row["step"])]
    for number, epoch in enumerate(epochs):
        if epoch[0]["step"] != epochs[0][0]["step"] + number:
            raise ValueError(f"epoch {epoch[0]['step']} is out of turn")
        is_last_and_cut = number == len(epochs) - 1 and len(epoch) < len(epochs[0])
        if not is_last_and_cut and [row["model_id"] for row in epoch] != list(range(len(epochs[0]))):
            raise ValueError(f"epoch {epoch[0]['step']} has rows of other members")
    return epochs
