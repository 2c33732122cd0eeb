"""What the commands share: parser, exit codes, Ctrl-C, checks of outputs, choice of device."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from utils import InputError


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


def check_output_file(path: Path, flag: str) -> None:
    """Checks that a file can be written to a path, without writing it.

    Args:
        path: The file.
        flag: The flag that gave the path, for the message.

    Raises:
        InputError: If the path is not that of a file, or its nearest existing folder cannot be written to.
    """
    folder = path.parent
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{flag} {str(path)!r} is a folder or a device; give the name of a file")
        folder = _nearest_existing(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
        raise InputError(f"{flag} {str(path)!r} cannot be written ({reason}); give another path") from None


def check_output_folder(folder: Path, is_ours: bool, expected: str) -> None:
    """Checks that results can be written to a folder: a new one, an empty one, or one with results of the same command.

    Args:
        folder: The folder that ``--output`` names.
        is_ours: Whether the folder holds earlier results of the same command.
        expected: What that command writes, such as ``a report``, for the message.

    Raises:
        InputError: If it is a file, holds other files (hidden ones do not count), or cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {str(folder)!r} is a file; give a folder")
    if not is_ours and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise InputError(f"--output {str(folder)!r} holds other files than {expected}; give a new or empty folder")
    existing = _nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--output {str(folder)!r} cannot be made in {str(existing)!r}; give another folder")


def _nearest_existing(folder: Path) -> Path:
    """Returns the folder, or the nearest of its parents that exists, as an absolute path."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


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
