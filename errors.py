"""What a user can get wrong, and how every command says so: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what was expected and what to do."""


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


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the known name closest to the given one, or an empty string."""
    closest = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f" (did you mean {closest[0]!r}?)" if closest else ""
