"""From the name of a dataset to its trajectories. ``SOURCES`` lists where datasets come from.

A new source takes a row in that table; how files are read is told in ``formats.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pickle
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import d4rl_registry, minari
from data.columns import Recording, Wanted
from data.episodes import find_rules
from data.formats import find_format, to_trajectories
from data.hdf5 import is_hdf5, open_hdf5
from data.joining import join_datasets, joint_name
from data.pickles import open_pickle, to_paths
from data.trajectories import Dataset, Finding, shown
from utils import InputError, atomic_write, did_you_mean

BUNDLED = Path(__file__).resolve().parent / "bundled"
KEYS_MARK = "::"  # between a name and the keys of nested observations
NUMBERS = {"process_noise", "mean_return"}  # that collected files say of themselves


def bundled_names() -> list[str]:
    """Returns the names of the datasets that come with the repository."""
    return sorted(path.stem for path in BUNDLED.glob("*.hdf5"))


def load_dataset(
    name: str, dataset_path: Path | None = None, *, simulator_states: bool = False, quiet: bool = False
) -> Dataset:
    """Finds a dataset, reads it into memory once and validates it.

    Args:
        name: A bundled name, a D4RL id (downloaded if need be), the path of a file or folder in one of ``FORMATS``, or
            the id of a Minari dataset on this machine; looked up in this order. Where observations are nested,
            ``NAME::KEY,KEY`` chooses what makes the state, in this order.
        dataset_path: A cache, which is a pickle of ``(list of paths, metadata)``: read if it is there (and holds what
            ``name`` stands for), else written.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If there is no such dataset, or it cannot be used.
    """
    return load_datasets([name], dataset_path, simulator_states=simulator_states, quiet=quiet)


def load_datasets(
    names: Sequence[str], dataset_path: Path | None = None, *, simulator_states: bool = False, quiet: bool = False
) -> Dataset:
    """Loads datasets and joins them to one, whose ``parts`` say which trajectories are from which.

    Args:
        names: One name or several, as in ``load_dataset``.
        dataset_path: A cache, as in ``load_dataset``, of all of them together.
        simulator_states: Whether to read ``infos/qpos`` and ``infos/qvel`` too, where all of them have them.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If one cannot be used, or states or actions are not the same in all of them.
    """
    if dataset_path is None:
        return join_datasets([_load(name, simulator_states, quiet) for name in names])
    if dataset_path.exists():
        return _load_cache(names, dataset_path, simulator_states)
    # Whoever reads the cache may want the simulator states.
    dataset = join_datasets([_load(name, True, quiet) for name in names])
    _write_cache(dataset, dataset_path)
    return dataset


def source_attributes(name: str) -> dict[str, Any]:
    """Returns what the HDF5 file behind a name says of how it was made; nothing for other formats and silent files.

    Raises:
        InputError: If a number, such as the process noise, is none or makes no sense.
    """
    file = existing_file(name)
    if file is None or not is_hdf5(file):
        return {}
    with open_hdf5(file) as content:
        found = dict(content.attributes)
    for key in NUMBERS & set(found):
        value = found[key]
        if not isinstance(value, np.number | np.bool_) or not math.isfinite(value):
            raise InputError(f"{file} has the {key} {shown(value)}; expected a finite number")
    return found


# --- Where datasets come from ---


@dataclass(frozen=True)
class Source:
    """A row of ``SOURCES``. Names come without the keys behind them.

    Attributes:
        has: Whether a name is one of this source's, unless an earlier source has it.
        file: Returns the file or folder that a name stands for, whether or not it is there.
        load: Reads the dataset of a name. Called as ``load(name, file, wanted, quiet)``.
    """

    has: Callable[[str], bool]
    file: Callable[[str], Path]
    load: Callable[[str, Path, Wanted, bool], Dataset]


def _load_file(name: str, file: Path, wanted: Wanted, quiet: bool) -> Dataset:
    recording, sha256 = _read(name, file, wanted)
    trajectories, findings = to_trajectories(recording, str(file), rules=find_rules(file.stem))
    return Dataset(name, recording.env_name, sha256, trajectories, findings)


def _load_d4rl(name: str, file: Path, wanted: Wanted, quiet: bool) -> Dataset:
    try:
        d4rl_registry.fetch(name, quiet=quiet)
    except InputError as error:
        raise InputError(f"{error}; bundled datasets need no download: {_listed(bundled_names())}") from None
    recording, sha256 = _read(name, file, wanted)
    limit = d4rl_registry.episode_limit(name)
    trajectories, findings = to_trajectories(recording, str(file), limit, find_rules(name))
    other = minari.local_folder(name)
    findings += (_name_finding(name, file, f"a Minari dataset in {other}"),) if other else ()
    return Dataset(name, name, sha256, trajectories, findings)


def _load_minari(name: str, file: Path, wanted: Wanted, quiet: bool) -> Dataset:
    if minari.local_folder(name) is None:
        similar = did_you_mean(name, minari.local_ids())
        raise InputError(
            f"Minari has no dataset {name!r} in {minari.datasets_folder()}{similar}; first: pip install "
            f"'minari[hf,hdf5]', then: minari download {name}"
        )
    recording, sha256 = _read(name, file, wanted)
    trajectories, findings = to_trajectories(recording, name)
    if name in d4rl_registry.bundled_table():
        findings += (_name_finding(name, file, "a D4RL id, whose file is not on this machine"),)
    return Dataset(name, recording.env_name, sha256, trajectories, findings)


def _name_finding(name: str, taken: Path, other: str) -> Finding:
    return Finding(
        name="two datasets of one name",
        count=2,
        where=name,
        effect=f"{taken} was read; the name is also {other}",
        advice="if the other is meant, give its path",
        matters=True,
    )


def _d4rl_file_is_wanted(name: str) -> bool:
    """Whether a name is D4RL's: Minari's own dataset of that id is taken where only that is on this machine."""
    if name not in d4rl_registry.bundled_table():
        return False
    return minari.local_folder(name) is None or d4rl_registry.local_path(name).exists()


# Asked in this order: the first source that has a name loads it.
SOURCES = (
    Source(lambda name: name in bundled_names(), lambda name: BUNDLED / f"{name}.hdf5", _load_file),
    Source(_d4rl_file_is_wanted, d4rl_registry.local_path, _load_d4rl),
    Source(lambda name: Path(name).exists(), Path, _load_file),
    Source(
        lambda name: minari.local_folder(name) is not None or ("/" in name and minari.ID.fullmatch(name) is not None),
        lambda name: minari.datasets_folder() / name,
        _load_minari,
    ),
)


def _load(name: str, simulator_states: bool, quiet: bool) -> Dataset:
    base, keys = _split(name)
    source = _find_source(base)
    if source is None:
        raise InputError(_unknown(base))
    dataset = source.load(base, source.file(base), Wanted(simulator_states, keys), quiet)
    return dataclasses.replace(dataset, name=name)


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    """Takes a name apart from the keys behind it."""
    base, mark, keys = name.partition(KEYS_MARK)
    try:
        is_path = Path(name).exists()
        Path(base).exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"dataset {shown(name)} can be no name and no path ({reason}); give another") from None
    if not mark or is_path:
        return name, ()
    chosen = tuple(filter(None, keys.split(",")))
    if not chosen:
        raise InputError(f"dataset {name!r} names no key behind {KEYS_MARK!r}; give NAME::KEY,KEY or the name alone")
    return base, chosen


def _find_source(base: str) -> Source | None:
    return next((source for source in SOURCES if source.has(base)), None)


def existing_file(name: str) -> Path | None:
    """Returns the file that a name stands for, where it is one and on this machine."""
    base, _ = _split(name)
    source = _find_source(base)
    file = source.file(base) if source else None
    return file if file and file.is_file() else None


def _unknown(name: str) -> str:
    known = [*bundled_names(), *d4rl_registry.usable_ids(), *minari.local_ids()]
    return (
        f"dataset {name!r} is neither a known name nor a file{did_you_mean(name, known)}; give a path, a D4RL id with "
        "float vectors (CARLA's and Atari's images and minigrid's discrete actions cannot be learned), the id of a "
        f"Minari dataset on this machine, or a bundled name: {_listed(bundled_names())}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


# --- Reading ---


def _read(name: str, file: Path, wanted: Wanted) -> tuple[Recording, str]:
    """Reads a file or folder, and takes its digest meanwhile."""
    if not file.exists() or not (file.is_file() or minari.is_minari(file)):
        raise InputError(
            f"dataset {name!r} is a folder or a device, expected a file (or a folder with data/{minari.MAIN_FILE}); "
            "give the path of a data file"
        )
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} may not be read; change its permissions")
    with ThreadPoolExecutor(1) as thread:
        digest = thread.submit(_sha256, file) if file.is_file() else None
        recording = find_format(file).read(file, wanted)
        return recording, recording.sha256 or digest.result()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- The cache ---


def _load_cache(names: Sequence[str], dataset_path: Path, simulator_states: bool) -> Dataset:
    """Loads a cache, if it was made of what the names stand for.

    A source that is gone, or is not one file, cannot be compared with: then the names decide alone.
    """
    remedy = "give another --dataset_path, under which it will be made again"
    if not dataset_path.is_file():
        raise InputError(f"--dataset_path {dataset_path} is a folder or a device, expected a file; {remedy}")
    cache, name = open_pickle(dataset_path), joint_name(names)
    if not isinstance(cache.dataset, str) or cache.dataset != name:
        raise InputError(f"{dataset_path} holds dataset {shown(cache.dataset)}, asked for was {name!r}; {remedy}")
    for sha256 in (cache.sha256, *(part.sha256 for part in cache.parts)):
        if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
            held = shown(sha256)
            raise InputError(f"{dataset_path} has the sha256 {held}; expected 64 hexadecimal digits; {remedy}")
    made_of = [part.sha256 for part in cache.parts] or [cache.sha256]
    if len(made_of) != len(names):
        raise InputError(f"{dataset_path} was made of {len(made_of)} datasets, asked for were {len(names)}; {remedy}")
    for part, sha256 in zip(names, made_of, strict=True):
        source = existing_file(part)
        if sha256 is not None and source and find_format(source).is_one_file and sha256 != (found := _sha256(source)):
            raise InputError(
                f"{dataset_path} was made of another {part!r} (sha256 {sha256:.12}) than {source} is now "
                f"({found:.12}); {remedy}"
            )
    if cache.parts and [part.name for part in cache.parts] != list(names):
        raise InputError(f"{dataset_path} was made of other datasets than {name!r}; {remedy}")
    recording = cache.read(Wanted(simulator_states))
    trajectories, findings = to_trajectories(recording, str(dataset_path))
    counts = [part.num_trajectories for part in cache.parts]
    if cache.parts and (min(counts) < 0 or sum(counts) != len(trajectories)):
        raise InputError(f"{dataset_path} has parts of other trajectories than its {len(trajectories)}; {remedy}")
    return Dataset(name, recording.env_name, cache.sha256 or _sha256(dataset_path), trajectories, findings, cache.parts)


def _write_cache(dataset: Dataset, dataset_path: Path) -> None:
    try:
        with atomic_write(dataset_path) as file:
            pickle.dump(to_paths(dataset), file, protocol=4)
    except OSError as error:
        raise InputError(f"--dataset_path {dataset_path} cannot be written: {error.strerror}; give another") from None
