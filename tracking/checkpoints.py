"""The checkpoints in a run's folder: the last one, and the one before it in case that the last cannot be read.

A checkpoint is a file of ``torch.save``. What is read back was written by this program, or so it seems: the archive's
checksums are compared, nothing but tensors and plain values is built, and the caller checks what these mean.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracking.trackers import warn
from utils import InputError, atomic_write, read_file

_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z]\w*Storage")
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # ways around these names
_LONGEST_STRUCTURE = 1 << 20  # bytes that say what tensors there are; 7 members with a reward take 20,000


class CheckpointFiles:
    """``checkpoint`` and ``checkpoint.before`` in a folder.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._last, self._before = folder / "checkpoint", folder / "checkpoint.before"
        self._warned = False

    def save(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint; the last one becomes the one before.

        If the disk refuses, both stay as they are, and a warning says so once.
        """
        import torch

        # Into memory first: PyTorch's writer ends the process if the file it writes to fails or Ctrl-C comes.
        serialised = io.BytesIO()
        torch.save(state, serialised)
        try:
            with atomic_write(self._last) as file:
                file.write(serialised.getbuffer())
                file.flush()  # a full disk speaks up here, before anything is renamed
                if self._last.exists():
                    self._last.replace(self._before)
        except OSError as error:
            if not self._warned:
                warn(f"no checkpoint could be written ({error}); training goes on")
            self._warned = True

    def load(self, device: str, check: Callable[[Any], None] = lambda state: None) -> dict[str, Any] | None:
        """Returns the state that was saved last, or the one before where that cannot be read, which a warning says.

        Args:
            device: Where its tensors go.
            check: Raises a ValueError if a state is not one to go on from.

        Returns:
            The state; None if there is no checkpoint.

        Raises:
            InputError: If there are checkpoints, and none can be read.
        """
        unreadable = []
        for path in (self._last, self._before):
            if not path.exists() and not path.is_symlink():
                continue
            try:
                state = _read(path, device)
                check(state)
            except Exception as error:  # PyTorch raises many kinds; their messages advise to load the file unsafely
                unreadable.append((path, f"{str(error) or type(error).__name__}".partition("\n")[0][:200]))
            else:
                if unreadable:
                    warn(
                        f"the checkpoint {unreadable[0][0]} cannot be read ({unreadable[0][1]}); "
                        f"going on from the one before it, after epoch {state['epochs']}"
                    )
                return state
        if unreadable:
            path, reason = unreadable[0]
            raise InputError(
                f"the checkpoint {path} cannot be read ({reason}), nor one before it; delete it and resume again to "
                "train from the first epoch, or start a new run without --resume"
            )
        return None

    def remove(self) -> None:
        """Removes both."""
        for path in (self._last, self._before):
            path.unlink(missing_ok=True)


def _read(path: Path, device: str) -> Any:
    """Reads a file of ``torch.save``, of which nothing but tensors and plain values is built.

    Raises:
        Exception: If it is damaged, or is something else.
    """
    import torch

    content = io.BytesIO(read_file(path))
    with zipfile.ZipFile(content) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if (damaged := archive.testzip()) is not None:  # PyTorch does not look at the checksums
            raise ValueError(f"{damaged} does not have its checksum")
        (structure,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
        if structure.file_size > _LONGEST_STRUCTURE:
            raise ValueError("it has too many tensors")
        for operation, argument, _ in pickletools.genops(archive.read(structure)):
            if operation.name in _CALLS or (operation.name == "GLOBAL" and not _GLOBALS.fullmatch(argument)):
                raise ValueError(f"it calls {argument or operation.name}")
    content.seek(0)
    return torch.load(content, map_location=device, weights_only=True)
