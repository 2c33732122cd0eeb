"""HDF5 files: opening them safely, saying what is wrong with one, and D4RL's layout of them.

An HDF5 file can name other files to read: by external links, external storage and virtual datasets. A file from a
stranger must not read what is not its own, so all three are refused. It can also declare arrays that no memory holds.
So entries are only ever reached through ``Group``, which follows links inside the file and knows three layouts, and
read through ``Array``, which counts first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.columns import Recording, Stretch, Wanted, read_columns
from data.limits import Budget
from data.trajectories import Dataset
from utils import InputError, atomic_write

SIGNATURE = b"\x89HDF\r\n\x1a\n"  # at the start of the file, or at 512, 1024, 2048, ... bytes
CHUNK_ROWS = 50_000
MAX_SOFT_LINKS = 16  # a link may lead to a link
LAYOUTS = (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)  # of arrays that are in the file itself

# A lock that cannot be had for one of these reasons is held by somebody. For any other, the file system has no locks
# (NFS, Lustre and others), and none tells whether somebody writes.
HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, by its signature; works for files that are locked, too."""
    size = path.stat().st_size
    offsets = [0]
    while (offset := max(512, 2 * offsets[-1])) < size:
        offsets.append(offset)
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            if file.read(len(SIGNATURE)) == SIGNATURE:
                return True
    return False


def read_d4rl(path: Path, wanted: Wanted) -> Recording:
    """Reads a file in D4RL's layout: one array per key at the top, one row per step.

    Raises:
        InputError: If it cannot be read or learned from.
    """
    with open_hdf5(path) as file:
        stretches = [Stretch(str(path), file)]
        columns, findings = read_columns(stretches, str(path), wanted, file.budget, stretches_are_episodes=False)
        env_name = text_attribute(file, "env_name")
    return Recording(columns, tuple(findings), env_name)


def to_columns(dataset: Dataset) -> dict[str, np.ndarray]:
    """Returns a dataset as D4RL's arrays by key, ``(N, ...)``; every trajectory ends in a terminal or a timeout."""
    fields = {key: key for key in ("observations", "actions", "rewards", "next_observations")}
    fields |= {"infos/qpos": "qpos", "infos/qvel": "qvel"}
    columns = {
        key: np.concatenate([getattr(trajectory, field) for trajectory in dataset.trajectories])
        for key, field in fields.items()
        if getattr(dataset.trajectories[0], field) is not None
    }
    ends = np.cumsum([len(trajectory) for trajectory in dataset.trajectories]) - 1
    terminated = np.array([trajectory.terminated for trajectory in dataset.trajectories])
    for key, rows in (("terminals", ends[terminated]), ("timeouts", ends[~terminated])):
        columns[key] = np.zeros(dataset.num_rows, bool)
        columns[key][rows] = True
    return columns


def write_hdf5(
    path: Path, columns: Mapping[str, np.ndarray], attributes: Mapping[str, Any], compression: int = 4
) -> None:
    """Writes a compressed file in D4RL's layout, all of it or none.

    Args:
        path: The file.
        columns: Arrays by key, ``(N, ...)`` each.
        attributes: What the file says of how it was made.
        compression: Level of gzip, 1 (fast) to 9 (small).
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, column in columns.items():
            # A chunk holds one dimension over time: neighbours in time are alike, which saves 6% over whole rows.
            chunks = (min(len(column), CHUNK_ROWS), *(1 for _ in column.shape[1:]))
            options = {"compression": "gzip", "compression_opts": compression, "shuffle": True}
            file.create_dataset(key, data=column, chunks=chunks, **options)
        file.attrs.update(attributes)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


# --- Entries ---


class Group(Mapping[str, Any]):
    """A group of an HDF5 file by key: further groups and arrays, all of them in this file.

    A key may be a path, such as ``infos/qpos``.

    Attributes:
        budget: How much may still be made of the file.
    """

    def __init__(self, group: h5py.Group, path: Path, budget: Budget) -> None:
        self._group, self._path, self.budget = group, path, budget

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The group's attributes that are text, or one number or truth value."""
        found = {}
        for name in self._group.attrs:
            try:
                value = self._group.attrs[name]
            except (TypeError, ValueError, OSError, KeyError):  # a type that NumPy has not, or a damaged one
                continue
            if isinstance(value, np.ndarray) and value.size == 1:
                value = value.reshape(())[()]
            if isinstance(value, str | bytes | np.number | np.bool_):
                found[name] = value
        return found

    def __getitem__(self, key: str) -> Group | Array:
        """Returns an entry.

        Raises:
            KeyError: If there is none.
            InputError: If it stands in another file.
        """
        entry = self._find(self._group, key, MAX_SOFT_LINKS)
        if isinstance(entry, h5py.Group):
            return Group(entry, self._path, self.budget)
        return Array(entry, f"{self._path}: {key!r}", self.budget)

    def __iter__(self) -> Iterator[str]:
        for key in self._group:
            if not isinstance(key, str):
                raise InputError(f"{self._path}: the name {key!r:.80} is no text in UTF-8; rename that entry")
            yield key

    def __len__(self) -> int:
        return len(self._group)

    def _find(self, group: h5py.Group, key: str, links_left: int) -> h5py.Group | h5py.Dataset:
        entry = group.file["/"] if key.startswith("/") else group
        for part in filter(None, key.split("/")):
            if not isinstance(entry, h5py.Group):
                raise KeyError(key)
            try:
                link = entry.get(part, getlink=True)
            except TypeError:  # a kind of link that HDF5 itself does not know
                raise self._refused(key, "a link of an unknown kind") from None
            if link is None:
                raise KeyError(key)
            if isinstance(link, h5py.ExternalLink):
                raise self._refused(key, f"a link to another file, {link.filename!r}")
            if isinstance(link, h5py.SoftLink):
                if links_left == 0:
                    raise self._refused(key, "a link that leads to too many others")
                entry = self._find(entry, link.path, links_left - 1)
                continue
            try:
                entry = entry[part]
            except KeyError as error:  # the link is there, but what it leads to is damaged
                raise OSError(str(error)) from None
        if isinstance(entry, h5py.Dataset):
            if entry.is_virtual:
                raise self._refused(key, "a virtual dataset, which is made of other files' arrays")
            if entry.external:
                raise self._refused(key, f"stored in another file, {entry.external[0][0]!r}")
            if entry.id.get_create_plist().get_layout() not in LAYOUTS:
                raise self._refused(key, "stored in a layout that is not known, perhaps in another file")
        elif not isinstance(entry, h5py.Group):
            raise KeyError(key)
        return entry

    def _refused(self, key: str, kind: str) -> InputError:
        return InputError(
            f"{self._path}: {key!r} is {kind}; only what is in the file itself is read: copy the data into one file, "
            "by reading and writing them with h5py"
        )


class Array:
    """An array in an HDF5 file: its shape and type are known, its values are read by ``array[...]``.

    Args:
        dataset: The array.
        where: What it is called in messages.
        budget: How much may still be made of the file.
    """

    def __init__(self, dataset: h5py.Dataset, where: str, budget: Budget) -> None:
        self._dataset, self._where, self._budget = dataset, where, budget
        self.shape: tuple[int, ...] | None = dataset.shape

    @property
    def dtype(self) -> np.dtype:
        """Its type.

        Raises:
            InputError: If it is one that NumPy has not, such as HDF5's times.
        """
        try:
            return self._dataset.dtype
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._where} has a type that cannot be read ({error}); expected numbers") from None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self._counted(self.dtype)[index]

    def astype(self, dtype: type) -> Any:
        """Returns the array such that ``[...]`` reads it as another type, with no second copy of the whole."""
        return self._counted(np.dtype(dtype)).astype(dtype)

    def _counted(self, dtype: np.dtype) -> h5py.Dataset:
        """Returns the array once its values, or those of the piece in which one is stored, are known to fit."""
        numbers = max(math.prod(self.shape), math.prod(self._dataset.chunks or (1,)))
        self._budget.take(numbers * max(dtype.itemsize, self.dtype.itemsize), f"an array of shape {self.shape}")
        return self._dataset


def text_attribute(group: Group, name: str) -> str | None:
    """Returns an attribute that is text; None where there is none."""
    value = group.attributes.get(name)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value) if isinstance(value, str) else None


# --- Opening ---


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Group]:
    """Opens a file for reading, and says in words what HDF5 cannot read in it.

    Where the file system has no locks, the file is read without. A file that a writer has locked is refused, unless
    both sides have agreed on HDF5's single-writer multiple-reader mode.

    Raises:
        InputError: If the file cannot be opened, or reading it in the block fails.
    """
    try:
        with _open(path) as file:
            yield Group(file, path, Budget(path))
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # all of which h5py makes of HDF5's own
        raise InputError(_explain(path, str(error))) from None


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if _lock_errno(str(error)) not in (None, *HELD):
            return h5py.File(path, "r", locking=False)
        if "already open for write" in str(error):
            with contextlib.suppress(OSError):
                return h5py.File(path, "r", swmr=True)
        raise


def _lock_errno(message: str) -> int | None:
    """Returns why a lock could not be had; None for another error."""
    match = re.search(r"unable to lock file, errno = (\d+)", message)
    return int(match[1]) if match else None


def _explain(path: Path, message: str) -> str:
    """Says why HDF5 could not read a file, and what to do."""
    again = "compare its size or checksum with the source's, and fetch it again under another name"
    if _lock_errno(message) is not None:
        return (
            f"{path} is being written: {_holder(path)} has locked it; wait until that is done. If nobody writes it, "
            "set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "already open for write" in message:
        return (
            f"{path} is marked as open for writing: its writer is still at work, or ended without closing it; wait, or "
            "copy the file and clear the mark of the copy: h5clear -s COPY"
        )
    if "truncated" in message or path.stat().st_size == 0:
        return f"{path} is truncated (incomplete): a download or copy of it was cut off, or is still going on; {again}"
    return f"{path} is damaged, HDF5 cannot read it ({' '.join(message.split())[:200]}); {again}"


def _holder(path: Path) -> str:
    """Returns who has locked a file, as far as this machine knows."""
    with contextlib.suppress(OSError, AttributeError):  # where the system has no such list
        status = path.stat()
        file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            match = re.search(r"WRITE\s+(\d+)\s+(\S+)", line)
            if match and match[2] == file:
                name = Path(f"/proc/{match[1]}/comm").read_text().strip()
                return f"process {match[1]} ({name})"
    return "another process, perhaps on another machine,"
