"""What the commands share: parser, exit codes, Ctrl-C, checks of where results go, the choice of a device."""

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

    Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Lets SIGTERM, as schedulers send it, end the block like Ctrl-C does: by a KeyboardInterrupt.

    Yields:
        The signals received so far. Python drops an exception that a signal raises inside a finaliser, so a loop looks
        here, too, when it has finished a piece of work.
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


# --- Where results go ---


def check_output_file(path: Path, flag: str) -> None:
    """Checks that a file can be written where it was asked for, without writing it.

    Args:
        path: The file.
        flag: What asked for it, for the message.

    Raises:
        InputError: If the path is no file, or its nearest existing folder takes none.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {str(path)!r} is a folder or a device; give the name of a file")
    existing = _nearest_existing(path)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{existing}: {error.strerror}"
        raise InputError(f"{flag} {str(path)!r} cannot be written ({reason}); give another path") from None


def check_output_folder(folder: Path, is_ours: bool, expected: str, flag: str = "--output") -> None:
    """Checks that results can be written to a folder: a new or empty one, or one that holds earlier results.

    Args:
        folder: Where results go.
        is_ours: Whether what the folder holds, if anything, was written by the same command.
        expected: What that command writes, such as ``a report``, for the message.
        flag: What asked for it, for the message.

    Raises:
        InputError: If they cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {str(folder)!r} is a file; give a folder")
    if not is_ours and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise InputError(f"{flag} {str(folder)!r} holds other files than {expected}; give a new or empty folder")
    existing = folder if folder.exists() else _nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{flag} {str(folder)!r} cannot be made in {str(existing)!r}; give another folder")


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


# --- Where to compute ---


def choose_device(name: str) -> str:
    """Returns the device to compute on: ``auto`` takes CUDA where there is one, any other name must exist.

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
