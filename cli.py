"""What the commands share: parser, exit codes, Ctrl-C, checks of outputs, choice of device.

A command ends with 0 if it succeeded, 1 if something failed while it worked, 2 if something given is wrong (nothing is
written then), 3 if it succeeded but for members that failed in training, and 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import reprlib
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from utils import ROOT, InputError, make_temporary

_SHORT = reprlib.Repr()  # shortens paths that would fill the screen
_SHORT.maxstring = 250
_SQLITE = b"SQLite format 3\0"  # how every database of SQLite begins


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error of the commands."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and where to read on, and exits with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; {self.prog} --help explains every flag\n")


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an ``InputError`` raised inside the block into one line on stderr and exit code 2.

    What is not printable, such as a terminal's control characters in names out of files, is escaped.
    Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except InputError as error:
        line = " ".join(str(error).split())
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def exit_when_out_of_memory(advice: str) -> Iterator[None]:
    """Turns memory that runs out inside the block, the CPU's or a GPU's, into one line on stderr and exit code 1.

    Args:
        advice: What to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        where = " on the GPU" if "CUDA" in str(error) else ""
        print(f"error: not enough memory{where}; {advice}", file=sys.stderr)
        raise SystemExit(1) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, whoever says so: Python, NumPy, PyTorch, CUDA or the system."""
    says = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "can't start new thread")
    return isinstance(error, MemoryError) or any(words in str(error) for words in says)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Lets SIGTERM, which schedulers send, end the block as Ctrl-C does: by a KeyboardInterrupt.

    Yields:
        The signals received so far. Python drops a KeyboardInterrupt that is raised inside a finaliser, so a long loop
        should look here, too, between two pieces of work.
    """
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Outputs ---


def output_path(text: str) -> Path:
    """Is the type of flags that name an output file: a path that does not look like that of a folder.

    Raises:
        ArgumentTypeError: If it does.
    """
    if not text or text.endswith(("/", "/.")):
        raise argparse.ArgumentTypeError(f"{text!r} is the name of a folder; give the name of a file")
    return Path(text)


def dataset_paths(names: Sequence[str]) -> list[Path]:
    """Returns the files that names of datasets may stand for, those in ``data/bundled`` included.

    Args:
        names: As they were given: names, paths, or ``FILE::KEYS``, which chooses entries of a file.
    """
    bases = [name.partition("::")[0] for name in names]
    return [Path(name) for name in (*names, *bases)] + [ROOT / "data" / "bundled" / f"{base}.hdf5" for base in bases]


def check_outputs(outputs: Iterable[tuple[str, Path | None]], kept: Iterable[tuple[str, Path]]) -> None:
    """Checks that files can be written without harm to others, without writing them.

    Files are the same by what they are, not by what they are called: hard and symbolic links are found, too. No
    output replaces a database, whichever it is.

    Args:
        outputs: Flags and the paths that they gave, None where they gave none.
        kept: What must stay as it is, each with what it is: a flag, or words such as ``the MLflow store``.

    Raises:
        InputError: If one cannot be written, or is a file that is kept or another output.
    """
    taken = {identity: what for what, path in kept for identity in _identities(path)}
    for flag, path in outputs:
        if path is None:
            continue
        check_output_file(path, flag)
        own = _identities(path)
        if other := next((taken[identity] for identity in own if identity in taken), None):
            raise InputError(
                f"{flag} {_SHORT.repr(str(path))} is the file of {other}, which it would overwrite; give another path"
            )
        if path.is_file() and _is_database(path):
            raise InputError(
                f"{flag} {_SHORT.repr(str(path))} is a database, which it would overwrite; give another path"
            )
        taken |= dict.fromkeys(own, flag)


def check_output_file(path: Path, flag: str) -> None:
    """Checks that a file can be written to a path, without writing it: its temporary file is made and removed.

    Args:
        path: The file.
        flag: The flag that gave the path, for the message.

    Raises:
        InputError: If the path is not that of a file, or its nearest existing folder cannot be written to.
    """
    folder = path.parent
    try:
        if _exists(path) and not path.is_file():
            raise InputError(f"{flag} {_SHORT.repr(str(path))} is a folder or a device; give the name of a file")
        folder = nearest_existing(folder)
        descriptor, temporary = make_temporary(path, folder)
        os.close(descriptor)
        Path(temporary).unlink()
        _exists(path.absolute().with_name(Path(temporary).name))  # longer than the path: is it too long?
    except OSError as error:
        reason = f"{_SHORT.repr(str(folder))[1:-1]}: {error.strerror}"
        raise InputError(f"{flag} {_SHORT.repr(str(path))} cannot be written ({reason}); give another path") from None


def _exists(path: Path) -> bool:
    """Whether there is anything; an OSError if there can be nothing: too long a name, links in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_database(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE
    return False


def _identities(path: Path) -> set[object]:
    """Returns what two paths of the same file have in common at least one of: the resolved path, the inode."""
    found: set[object] = {os.path.realpath(path)}
    with contextlib.suppress(OSError, ValueError):
        found.add((path.stat().st_dev, path.stat().st_ino))
    return found


def check_output_folder(folder: Path, is_ours: bool, expected: str, flag: str = "--output") -> None:
    """Checks that results can be written to a folder: a new one, an empty one, or one with results of the same command.

    Args:
        folder: The folder.
        is_ours: Whether the folder holds earlier results of the same command.
        expected: What that command writes, such as ``a report``, for the message.
        flag: The flag that names the folder, for the message.

    Raises:
        InputError: If it is a file, holds other files (hidden ones do not count), or cannot be made or written.
    """
    try:
        existing = nearest_existing(folder)
    except OSError as error:
        raise InputError(
            f"{flag} {_SHORT.repr(str(folder))} cannot be made ({error.strerror}); give another folder"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {_SHORT.repr(str(folder))} is a file; give a folder")
    if not is_ours and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise InputError(
            f"{flag} {_SHORT.repr(str(folder))} holds other files than {expected}; give a new or empty folder"
        )
    try:
        descriptor, temporary = make_temporary(Path("new"), existing)
        os.close(descriptor)
        Path(temporary).unlink()
    except OSError:
        raise InputError(
            f"{flag} {_SHORT.repr(str(folder))} cannot be made in {_SHORT.repr(str(existing))}; give another folder"
        ) from None


def nearest_existing(folder: Path) -> Path:
    """Returns the folder, or the nearest of its parents that exists, as an absolute path.

    Raises:
        OSError: If the folder can be none: too long a name, links in a circle.
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if _exists(path))
    for missing in folder.relative_to(existing).parts:
        _exists(existing / missing)  # the system does not look at names below a folder that does not exist yet
    return existing


# --- Device ---


def choose_device(name: str) -> str:
    """Returns the device to compute on: for ``auto`` CUDA if there is any, else the one named, which must exist.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: If the name is none of these, or asks for a CUDA device that this machine lacks.
    """
    import torch

    available = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name == "auto":
        return "cuda:0" if available else "cpu"
    if name == "cpu":
        return name
    if name != "cuda" and not (name.startswith("cuda:") and name[5:].isdecimal()):
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        found = ", ".join(available) or "none"
        raise InputError(f"device {name!r} is not here (CUDA devices found: {found}); use --device auto or --cpu")
    return wanted
