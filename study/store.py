"""Where the cells of a study are kept: in a folder each while it runs, in one Parquet file once it is packed.

cells/ARM/DATASET/split-S-seed-N/    ``cell.json`` and a CSV file per table
trials/ARM/DATASET/rate-X/           the same, of the trainings that choose rates and horizons
cells.parquet                        all of them, once the study is packed
.locks/                              locks by which processes that share the folder divide the cells among them

A packed study goes on like any other: what the file holds is done, further cells get folders, and packing again adds
them to the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import AcquireReturnProxy, FileLock, Timeout

from cli import nearest_existing
from data.limits import Budget
from study.cells import Cell, CellRecord, Result
from study.schemas import check_tables
from tracking.records import parse_record
from tracking.trackers import warn
from utils import InputError, atomic_write, read_file

PACKED = "cells.parquet"
_BACK = "bring it back from where it was published"
_TEXT_OR_NUMBER = ("rows", "horizon")  # columns that are text in some tables and numbers in others
_TYPES = {"int64", "float64", "bool", "str", "object"}  # of columns, as CSV files give them
_LONGEST_LOCK = 200  # bytes of a name; file systems allow 255
_PATIENCE = 2.0  # seconds after which it is said that another process is waited for


class CellStore:
    """The finished cells of one study, by name.

    Args:
        folder: Folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Result] = {}  # cells never change once they are whole

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> Result:
        """Returns the result of a cell that is there.

        Raises:
            InputError: If it is damaged.
        """
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.folder / name} is gone; the same command makes it again")
        return found

    def has(self, cell: Cell) -> bool:
        """Whether a cell is done. One that lacks a table is not, and is made again.

        Raises:
            InputError: If it is damaged, or a part of it is missing in the packed file.
        """
        found = self._find(cell.name)
        if found is None or found.is_whole(cell.is_trial):
            return found is not None
        if not (self.folder / cell.name).exists():
            raise InputError(f"{self.folder / PACKED} is damaged: {cell.name} lacks tables; bring it back")
        self._known.pop(cell.name)
        return False

    def write(self, name: str, result: Result) -> None:
        """Keeps the result of a cell in a folder of its own; whoever calls this holds the lock of the cell.

        What is there of it already, not being whole, is removed, and so is what a process that was killed had begun.
        """
        folder = self.folder / name
        for rest in (folder, *folder.parent.glob(f".{folder.name}.*")):
            shutil.rmtree(rest, ignore_errors=True)
        result.write(folder)
        self._known.pop(name, None)

    def check_place(self, cell: Cell) -> None:
        """Checks that a cell can be kept, whatever its arm and dataset are called.

        Raises:
            InputError: If the system takes no such path, or something else is in its place.
        """
        folder = self.folder / cell.name
        longest = folder.with_name(f".{folder.name}.12345678") / ".member_products.csv.12345678.tmp"
        try:
            nearest_existing(longest)
        except OSError as error:
            raise InputError(
                f"{str(folder)[:80]!r} ... cannot be made ({error.strerror}); give files and folders shorter names, "
                "or another --output"
            ) from None
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file, but a cell needs a folder there; delete it")

    def check_request(self, cell: Cell, sha256: str) -> None:
        """Checks that a cell, if it is done, was asked for in the same way.

        Args:
            cell: The cell, as it is asked for now.
            sha256: Checksum of its dataset.

        Raises:
            InputError: If the result of another request is in the cell's place, or what is there is damaged.
        """
        kept = self._find(cell.name)
        if kept is None:
            return
        folder = self.folder / cell.name
        found, wanted = kept.record.request.settings(), cell.request(sha256).settings()
        for key in sorted(wanted):
            if found[key] != wanted[key]:
                again = ", or delete that folder to have its cell made again" if folder.exists() else ""
                raise InputError(
                    f"{str(folder)!r} was made with {key} {found[key]!r}, asked for is {wanted[key]!r}; give another "
                    f"--output{again}"
                )

    # --- Locks ---

    def lock(self, name: str) -> FileLock:
        """Returns the lock of a cell, or of another name; it is released when the process that holds it dies."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        plain = name.replace("/", ".")
        if len(os.fsencode(plain)) > _LONGEST_LOCK:
            plain = hashlib.sha256(os.fsencode(plain)).hexdigest()
        return FileLock(locks / f"{plain}.lock")

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Holds a lock for the block; where another process has it, says so and waits."""
        with self._acquire(name):
            yield

    def _acquire(self, name: str) -> AcquireReturnProxy:
        patience = _PATIENCE
        while True:
            try:
                return self.lock(name).acquire(timeout=patience)
            except Timeout:
                warn(f"waiting for another process, which holds {name!r} of {self.folder}; stop it if it hangs")
                patience = -1  # without limit
            except FileNotFoundError:  # another process has ended, and has removed the folder of locks
                continue

    def remove_leftovers(self) -> None:
        """Removes half-written files of processes that were killed; whoever calls this holds the lock ``study``."""
        for leftover in self.folder.glob(".*.tmp"):
            if leftover.is_file():
                leftover.unlink()
        for leftover in self.folder.glob("*/*/*/.*/"):  # that ``Result.write`` had begun
            cell = leftover.with_name(leftover.name[1:].rpartition(".")[0]).relative_to(self.folder)
            with contextlib.suppress(Timeout), self.lock(cell.as_posix()).acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)

    def remove_locks(self) -> None:
        """Removes the files that locks leave behind, unless another process holds one of them."""
        folder = self.folder / ".locks"
        with contextlib.suppress(Timeout, OSError), contextlib.ExitStack() as held:
            for path in folder.glob("*.lock"):
                held.enter_context(FileLock(path).acquire(timeout=0))
            shutil.rmtree(folder)

    def _find(self, name: str) -> Result | None:
        """Returns what is kept of a cell; None where there is nothing, or only the rest of something."""
        if name not in self._known:
            try:
                self._known[name] = Result.read(self.folder / name)
            except (FileNotFoundError, NotADirectoryError):
                return self._packed.get(name)
        return self._known[name]

    @cached_property
    def _packed(self) -> dict[str, Result]:
        path = self.folder / PACKED
        return read_packed(path) if os.path.lexists(path) else {}


# --- Packing ---


def pack(folder: Path) -> None:
    """Moves the cells of a study, which no command may be working on, from their folders into ``cells.parquet``.

    The file holds the rows of all tables of all cells, one below the other. ``cell`` and ``table`` name the cell and
    table that a row is of. ``record`` is set in the first row of each cell only, whose ``table`` is ``cell``: it holds,
    as JSON, the contents of ``cell.json`` (``record``) and the types of the columns of the cell's tables (``types``).
    All other columns are those of the tables, empty in the rows of tables that lack them. Tables that share a column
    must agree whether it holds text; where ``rows`` and ``horizon`` are text, they are ``rows_text``, ``horizon_text``.
    """
    folders = {path.parent.relative_to(folder).as_posix(): path.parent for path in folder.glob("*/*/*/*/cell.json")}
    if not folders:
        return
    file = folder / PACKED
    rows = [_packed_rows(name, folders[name]) for name in sorted(folders)]
    if file.exists():
        before = _read_rows(file)
        is_new = pc.is_in(before["cell"], pa.array(list(folders)))
        rows.insert(0, before.filter(pc.invert(is_new)))
    with atomic_write(file) as stream:
        pq.write_table(pa.concat_tables(rows, promote_options="permissive"), stream, compression="zstd")

    packed = read_packed(file)
    for name, place in folders.items():
        assert is_same(packed[name], Result.read(place)), f"{name} is not the same in {file}"
        shutil.rmtree(place)
        with contextlib.suppress(OSError):  # ends at the first parent that still holds something
            for parent in place.relative_to(folder).parents[:-1]:
                (folder / parent).rmdir()


def _packed_rows(name: str, folder: Path) -> pa.Table:
    """Returns the rows of one cell, from its folder."""
    tables = Result.read(folder).tables
    types = {table: frame.dtypes.astype(str).to_dict() for table, frame in tables.items()}
    kept = {"record": json.loads((folder / "cell.json").read_text(encoding="utf-8")), "types": types}
    rows = [pa.table({"table": ["cell"], "record": [json.dumps(kept)]})]
    for table, frame in tables.items():
        frame = frame.rename(columns=_packed_names(types[table]))
        part = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        rows.append(part.add_column(0, "table", pa.array([table] * len(part), pa.string())))
    joined = pa.concat_tables(rows, promote_options="permissive")
    return joined.add_column(0, "cell", pa.array([name] * len(joined), pa.string()))


def _packed_names(types: dict[str, str]) -> dict[str, str]:
    """Returns the names in the packed file of a table's columns, by name, from the types of the columns."""
    return {
        column: f"{column}_text" if column in _TEXT_OR_NUMBER and kind in ("str", "object") else column
        for column, kind in types.items()
    }


def read_packed(file: Path) -> dict[str, Result]:
    """Reads all cells of a ``cells.parquet``, by name.

    Raises:
        InputError: If it is damaged, or another version made it.
    """
    try:
        return _unpack(_read_rows(file), str(file))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"{file} is damaged ({str(error)[:200]}); {_BACK}") from None


def _read_rows(file: Path) -> pa.Table:
    """Reads the rows of a packed file, unless they are more than its size can stand for, or than memory holds."""
    content = pq.ParquetFile(pa.BufferReader(read_file(file)))
    Budget(file).take(content.metadata.num_rows * content.metadata.num_columns, "its rows")
    return content.read()


def _unpack(rows: pa.Table, source: str) -> dict[str, Result]:
    sizes = rows.select(["cell", "table"]).to_pandas().groupby(["cell", "table"], sort=False).size()
    parts = {
        key: rows.slice(start, size)
        for key, start, size in zip(sizes.index, sizes.cumsum() - sizes, sizes, strict=True)
    }
    results = {}
    for cell in sizes.index.unique("cell"):
        kept = parse_record(dict[str, dict[str, Any]], json.loads(parts[cell, "cell"]["record"][0].as_py()), "record")
        record = CellRecord.from_dict(kept["record"], source=source)
        tables = {}
        for name, types in parse_record(dict[str, dict[str, str]], kept["types"], "types").items():
            if unknown := set(types.values()) - _TYPES:
                raise ValueError(f"{cell} has columns of the types {sorted(unknown)[:3]}")
            packed = _packed_names(types)
            table = parts.get((cell, name), rows.slice(0, 0)).select(list(packed.values())).to_pandas()
            table.columns = list(types)
            tables[name] = table.astype({column: kind for column, kind in types.items() if kind != "str"})
        check_tables(tables, f"{cell} in {source}", _BACK)
        results[cell] = Result(record, tables)
    return results


def is_same(one: Result, other: Result) -> bool:
    """Whether two results are equal, types and missing values included."""
    return (
        one.record == other.record
        and one.tables.keys() == other.tables.keys()
        and all(table.equals(other.tables[name]) for name, table in one.tables.items())
    )
