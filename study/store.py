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
import json
import shutil
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from study.cells import Cell, CellRecord, Result, read_record
from utils import InputError, atomic_write

_TEXT_OR_NUMBER = ("rows", "horizon")  # columns that are text in some tables and numbers in others


class CellStore:
    """The finished cells of one study, by name.

    Args:
        folder: Folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).exists() or name in self._packed

    def read(self, name: str) -> Result:
        """Returns the result of a cell that is done."""
        folder = self.folder / name
        return Result.read(folder) if folder.exists() else self._packed[name]

    def write(self, name: str, result: Result) -> None:
        """Keeps the result of a cell in a folder of its own."""
        result.write(self.folder / name)

    def check_request(self, cell: Cell, sha256: str) -> None:
        """Checks that a cell, if it is done, was asked for in the same way.

        Args:
            cell: The cell, as it is asked for now.
            sha256: Checksum of its dataset.

        Raises:
            InputError: If the result of another request is in the cell's place.
        """
        if cell.name not in self:
            return
        folder = self.folder / cell.name
        record = read_record(folder) if folder.exists() else self._packed[cell.name].record
        found, wanted = record.request.settings(), cell.request(sha256).settings()
        for key in sorted(wanted):
            if found[key] != wanted[key]:
                again = ", or delete that folder to have its cell made again" if folder.exists() else ""
                raise InputError(
                    f"{str(folder)!r} was made with {key} {found[key]!r}, asked for is {wanted[key]!r}; give another "
                    f"--output{again}"
                )

    def lock(self, name: str) -> FileLock:
        """Returns the lock of a cell, or of another name; it is released when the process that holds it dies."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name.replace('/', '.')}.lock")

    def remove_locks(self) -> None:
        """Removes the files that locks leave behind."""
        shutil.rmtree(self.folder / ".locks", ignore_errors=True)

    @cached_property
    def _packed(self) -> dict[str, Result]:
        path = self.folder / "cells.parquet"
        return read_packed(path) if path.exists() else {}


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
    file = folder / "cells.parquet"
    rows = [_packed_rows(name, folders[name]) for name in sorted(folders)]
    if file.exists():
        before = pq.read_table(file)
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
    """Reads all cells of a ``cells.parquet``, by name."""
    rows = pq.read_table(file)
    sizes = rows.select(["cell", "table"]).to_pandas().groupby(["cell", "table"], sort=False).size()
    parts = {
        key: rows.slice(start, size)
        for key, start, size in zip(sizes.index, sizes.cumsum() - sizes, sizes, strict=True)
    }
    results = {}
    for cell in sizes.index.unique("cell"):
        kept = json.loads(parts[cell, "cell"]["record"][0].as_py())
        tables = {}
        for name, types in kept["types"].items():
            packed = _packed_names(types)
            table = parts.get((cell, name), rows.slice(0, 0)).select(list(packed.values())).to_pandas()
            table.columns = list(types)
            tables[name] = table.astype({column: kind for column, kind in types.items() if kind != "str"})
        results[cell] = Result(CellRecord.from_dict(kept["record"], source=str(file)), tables)
    return results


def is_same(one: Result, other: Result) -> bool:
    """Whether two results are equal, types and missing values included."""
    return (
        one.record == other.record
        and one.tables.keys() == other.tables.keys()
        and all(table.equals(other.tables[name]) for name, table in one.tables.items())
    )
