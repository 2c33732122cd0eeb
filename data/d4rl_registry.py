"""D4RL ids: where their files are on the web and on disk, and how to get one that is missing.

The ids, addresses and reference scores are those of the ``d4rl`` package (``d4rl.infos``) where it can be imported, and
otherwise those of ``d4rl_registry.csv`` beside this file, which holds the same. No simulator is needed for either. This
command writes the table anew from the installed package:

    python -m data.d4rl_registry
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from types import ModuleType
from typing import IO

import h5py

from utils import InputError, atomic_write, did_you_mean

TABLE = Path(__file__).resolve().with_suffix(".csv")

# What `import d4rl` would load though its tables need none of it: mujoco_py raises a bare Exception where MuJoCo's
# binaries are missing, the others take seconds or print.
UNNEEDED_MODULES = ("mujoco_py", "pybullet_envs", "pybullet", "dm_control", "flow", "carla", "gym_notices")

REFUSED = {"carla": "image observations", "minigrid": "discrete actions"}  # by the first word of the id

# The max_episode_steps under which d4rl registers the environments of its ids, for files that record no timeouts.
EPISODE_LIMITS = {
    r"(bullet-)?(halfcheetah|hopper|walker2d|ant)-": 1000,
    r"antmaze-umaze-": 700,
    r"antmaze-": 1000,
    r"(bullet-)?maze2d-open-": 150,
    r"(bullet-)?maze2d-(eval-)?umaze-": 300,
    r"(bullet-)?maze2d-(eval-)?medium-": 600,
    r"(bullet-)?maze2d-(eval-)?large-": 800,
    r"pen-": 100,
    r"(hammer|door|relocate)-": 200,
    r"kitchen-": 280,
    r"flow-ring-": 500,
    r"flow-merge-": 750,
}

# The Gymnasium environments whose states, actions and physics are those of an id's data. Version 4 of MuJoCo's tasks
# has the models that D4RL used (v5 changed Walker2d's); Adroit's come with gymnasium-robotics. Others have no equal:
# Ant has 111 state dimensions in D4RL and 27 or 105 in Gymnasium; mazes and Kitchen have dictionaries of other content;
# PyBullet's and Flow's environments are not Gymnasium's.
GYMNASIUM_IDS = {
    r"halfcheetah-": "HalfCheetah-v4",
    r"hopper-": "Hopper-v4",
    r"walker2d-": "Walker2d-v4",
    r"pen-": "AdroitHandPen-v1",
    r"hammer-": "AdroitHandHammer-v1",
    r"door-": "AdroitHandDoor-v1",
    r"relocate-": "AdroitHandRelocate-v1",
}

# An unreachable server must not keep a user waiting for more than 30 s, whatever it is that does not answer.
CONNECT_TIMEOUT, READ_TIMEOUT = 4.0, 8.0  # seconds; the second is for silence, not for the whole file
ATTEMPTS, PAUSE = 3, 1.0  # the pause, in seconds, grows with every attempt
SILENCE = 10.0  # seconds after which, if the last attempt brought no data, no further one is made


@dataclass(frozen=True)
class Entry:
    """What D4RL knows of one id; a few ids have no reference scores."""

    url: str
    min_score: float | None
    max_score: float | None


def bundled_table() -> dict[str, Entry]:
    """Returns the bundled table by id."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return {name: Entry(url, *(float(score) if score else None for score in scores)) for name, url, *scores in rows}


def package_table() -> dict[str, Entry] | None:
    """Returns the table of the installed ``d4rl`` package by id; None where it is not installed or not importable."""
    infos = _import_d4rl_infos()
    if infos is None:
        return None
    return {
        name: Entry(url, infos.REF_MIN_SCORE.get(name), infos.REF_MAX_SCORE.get(name))
        for name, url in infos.DATASET_URLS.items()
    }


def registry() -> dict[str, Entry]:
    """Returns the table by id: the package's own, or the bundled one."""
    return package_table() or bundled_table()


def _import_d4rl_infos() -> ModuleType | None:
    """Imports ``d4rl.infos`` silently and without simulators."""
    blocked = [name for name in UNNEEDED_MODULES if name not in sys.modules]
    quiet = {"D4RL_SUPPRESS_IMPORT_ERROR": "1"} if "D4RL_SUPPRESS_IMPORT_ERROR" not in os.environ else {}
    sys.modules.update(dict.fromkeys(blocked))  # None in sys.modules makes an import fail at once
    os.environ.update(quiet)
    try:
        return importlib.import_module("d4rl.infos")
    except (ImportError, OSError):  # OSError: it makes its cache folder when imported, which may be forbidden
        return None
    finally:
        for name in blocked:
            del sys.modules[name]
        for name in quiet:
            del os.environ[name]


def episode_limit(name: str) -> int | None:
    """Returns after how many steps the environment of an id ends an episode; None for an id of none known."""
    return next((limit for pattern, limit in EPISODE_LIMITS.items() if re.match(pattern, name)), None)


def gymnasium_id(name: str) -> str | None:
    """Returns the Gymnasium environment that an id's data are from; None where there is none, or no such id."""
    if name not in bundled_table():
        return None
    return next((env_id for pattern, env_id in GYMNASIUM_IDS.items() if re.match(pattern, name)), None)


def cache_folder() -> Path:
    """Returns the folder where ``d4rl`` itself keeps its files."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


def usable_ids() -> list[str]:
    """Returns the ids whose data are float vectors."""
    return [name for name in bundled_table() if name.split("-")[0] not in REFUSED]


def local_path(name: str) -> Path:
    """Returns where the file of an id belongs, whether or not it is there.

    Raises:
        InputError: If D4RL has no such id, or its data are no float vectors.
    """
    kind = REFUSED.get(name.split("-")[0])
    if kind is not None:
        raise InputError(f"D4RL dataset {name!r} has {kind}; only float vectors of states and actions can be learned")
    table = registry()
    if name not in table:
        raise InputError(f"D4RL has no dataset {name!r}{did_you_mean(name, table)}")
    return cache_folder() / table[name].url.rsplit("/", 1)[1]


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Returns the file of an id, downloaded first if it is not in the cache folder.

    Raises:
        InputError: If there is no such file to be had.
    """
    target = local_path(name)
    if not target.exists():
        download(registry()[name].url, target, quiet=quiet)
    return target


def download(
    url: str, target: Path, *, quiet: bool = False, timeout: tuple[float, float] = (CONNECT_TIMEOUT, READ_TIMEOUT)
) -> None:
    """Downloads an HDF5 file; ``target`` appears only when the whole file has arrived and opens.

    Args:
        url: Where the file is.
        target: Where to put it; its folder is made.
        quiet: Whether to show no progress bar.
        timeout: Seconds to wait for a connection, and for more data.

    Raises:
        InputError: If every attempt fails.
    """
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=not quiet, chunk_size=1 << 16, timeout=timeout)
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        received = 0
        try:
            with atomic_write(target, "w+b") as file:
                try:
                    downloader(url, file, None)
                finally:
                    received = file.tell()
                _check_whole(file)
            return
        except OSError as error:  # the network's errors are OSErrors too
            reason = _reason(error)
            silent = received == 0 and time.monotonic() - started > SILENCE
            if silent or _is_final(error) or attempt == ATTEMPTS:
                break
            time.sleep(PAUSE * attempt)
    raise InputError(
        f"{target.name} is not in {target.parent} and could not be downloaded from {url} ({reason}); check the "
        f"connection and try again, or put the file into the folder {target.parent} by hand"
    )


def _check_whole(file: IO[bytes]) -> None:
    """Raises an error for half a file, and for the page that a hotel's network sends instead of one."""
    try:
        h5py.File(file, "r").close()
    except OSError:
        raise OSError("what arrived is not a whole HDF5 file") from None


def _is_final(error: OSError) -> bool:
    """Whether trying again is useless: the server knows of no such file, or the folder cannot be written."""
    response = getattr(error, "response", None)
    return isinstance(error, PermissionError) or (response is not None and 400 <= response.status_code < 500)


def _reason(error: OSError) -> str:
    """Returns a network error in a few words; those of ``requests`` fill lines."""
    import requests

    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection, or it was lost"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the answer was cut off"
    return str(error)


def main() -> None:
    """Writes the bundled table from the installed package."""
    table = package_table()
    if table is None:
        raise SystemExit("error: d4rl cannot be imported; pip install d4rl==1.1")
    with atomic_write(TABLE, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "url", "ref_min_score", "ref_max_score"])
        writer.writerows([name, *astuple(entry)] for name, entry in sorted(table.items()))
    print(f"wrote {len(table)} ids to {TABLE}")


if __name__ == "__main__":
    main()
