"""Input errors, atomic writes, the origin of results: small things that know nothing of the domain."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import os
import platform
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


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` that replaces it, synced to disk, only if the block succeeds.

    A process that is killed, at whatever moment, leaves either the old file or the whole new one.

    Args:
        path: The file to write; its folder is made where it is missing.
        mode: ``wb`` for bytes, ``w`` for UTF-8 text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; the result should have the permissions of any file the user makes.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
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
    """Returns the commit checked out in ``folder``, with ``+`` behind it if files differ; None outside a repository.

    Args:
        folder: A folder of the repository, by default of this one.
    """
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
