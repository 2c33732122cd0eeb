"""Device choice, atomic writes, sections of documents, the commit: small functions that know nothing of the domain."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def choose_device(name: str) -> str:
    """Returns the device to compute on: ``auto`` takes CUDA where there is one, any other name must exist.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: If the name is none of these, or asks for a CUDA device that this machine lacks.
    """
    import torch

    available = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name == "auto":
        return "cuda:0" if available else "cpu"
    if name == "cpu":
        return name
    if name != "cuda" and not (name.startswith("cuda:") and name[5:].isdecimal()):
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        found = ", ".join(available) or "none"
        raise ValueError(f"device {name!r} is not here (CUDA devices found: {found}); use --device auto or --cpu")
    return wanted


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` that replaces it, synced to disk, only if the block succeeds.

    A reader therefore sees the old file or the whole new one, whenever the process is killed.

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


def replace_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Replaces what a document has between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, each a line of its own.

    Raises:
        ValueError: If the document lacks one of these lines.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    before, found, rest = Path(path).read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"{path} has no lines {begin.strip()!r} and {end.strip()!r} to write between")
    with atomic_write(path, "w") as file:
        file.write(f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def git_commit(folder: str | os.PathLike[str]) -> str | None:
    """Returns the commit checked out in ``folder``, with ``+`` behind it if files differ; None outside a repository."""
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
