"""How much reading a file may make: no more than memory holds, and nothing out of proportion to the file.

A few bytes can stand for very many: zeros that were compressed, arrays that were declared and never stored, one array
under a thousand names. So readers count what they are about to make before they make it.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

from utils import InputError

FREE = 128 * 2**20  # bytes that may be made of any file, however small
RATIO = 100  # bytes that may be made of each byte of a larger one; recorded data compress to a tenth at best
UNCHECKED = 2**24  # bytes for which nobody asks how much memory there is


class Budget:
    """What may still be made of a file.

    Args:
        path: The file, or a folder of files, for messages and its size.

    Attributes:
        left: How many bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._stored = path, stored_bytes(path)
        self.left = max(FREE, RATIO * self._stored)

    def take(self, size: int, what: str) -> None:
        """Counts bytes that are about to be made.

        Args:
            size: How many bytes.
            what: What they are, for the message.

        Raises:
            InputError: If memory does not hold them, or the file is too small for them.
        """
        if size > self.left:
            raise InputError(
                f"{self._path}: {what} would take {size:,} bytes of memory, out of proportion to the {self._stored:,} "
                "bytes that are stored; such a file is damaged or made to do harm: fetch it again from its source"
            )
        if size > UNCHECKED and size > (there := available_memory()):
            raise InputError(
                f"{self._path}: {what} would take {size:,} bytes of memory, of which {there:,} are left; read it on a "
                "larger machine, or give a part of it"
            )
        self.left -= size


def stored_bytes(path: Path) -> int:
    """Returns the size of a file, or of all files in a folder."""
    return sum(part.stat().st_size for part in (path.rglob("*") if path.is_dir() else (path,)) if part.is_file())


def available_memory() -> int:
    """Returns how many bytes this process may still take, by what the system and its own limits say."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError, KeyError):  # where the system has no such files
        limits.append(_numbers("/proc/meminfo", ":")["MemAvailable"] * 1024)
    with suppress(OSError, ValueError, KeyError):  # likewise, or where there is no limit; its files in memory can go
        limits.append(
            int(Path("/sys/fs/cgroup/memory.max").read_text()) - _numbers("/sys/fs/cgroup/memory.stat")["anon"]
        )
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY:
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(own - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits))


def _numbers(path: str, separator: str = " ") -> dict[str, int]:
    """Returns the numbers of a file of the system by name."""
    lines = (line.split(separator, 1) for line in Path(path).read_text().splitlines())
    return {name: int(rest.split()[0]) for name, rest in lines}
