"""Input errors, atomic writes, the origin of results: small things that know nothing of the domain."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.metadata
import os
import platform
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what was expected and what to do."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the known name closest to the given one, or an empty string."""
    closest = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f" (did you mean {closest[0]!r}?)" if closest else ""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Returns what is in a file; an OSError where it is no regular file: a named pipe would keep its reader waiting."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return file.read()


def make_temporary(path: Path, folder: Path) -> tuple[int, str]:
    """Makes the temporary file of ``atomic_write(path)`` in a folder: returns its descriptor and its path."""
    return tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` that replaces it, synced to disk, only if the block succeeds.

    A process that is killed, at whatever moment, leaves either the old file or the whole new one.

    Args:
        path: The file to write; its folder is made where it is missing.
        mode: ``wb`` for bytes, ``w`` for UTF-8 text; what UTF-8 cannot express (names of files) is written escaped.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = make_temporary(path, path.parent)
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; the result should have the permissions of any file the user makes.
        os.umask(umask := os.umask(0))
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Origin:
    """Which code made a result, and with which versions of Python and packages.

    Attributes:
        git_commit: The commit, with ``+`` behind it if files differ from it; None outside a repository.
        versions: Of Python and of the packages that results can depend on, by name.
    """

    git_commit: str | None
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Origin:
        """Returns the origin of what this process makes."""
        packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
        return cls(git_commit(), {"python": platform.python_version(), **packages})


def git_commit(folder: str | os.PathLike[str] = ROOT) -> str | None:
    """Returns the commit checked out in a folder, with ``+`` behind it if files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
