"""Minari's datasets, read without Minari: by id from its folder on this machine, or by their own folder or file.

An episode of T steps has T + 1 observations. It lies in ``data/main_data.hdf5`` as a group ``episode_N``, or in
``data/N/`` as Arrow or Parquet. ``data/metadata.json`` names the environment. Dictionaries of observations are nested
groups (or structures), whose order is told in ``nested.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.columns import Recording, Stretch, Wanted, find_entry, read_columns
from data.hdf5 import Group, is_hdf5, open_hdf5, text_attribute
from data.limits import Budget
from data.nested import is_vector, map_arrays
from data.trajectories import Finding
from utils import InputError

ID = re.compile(r"([\w.-]+/)*[\w.-]+-v\d+")
EPISODE = re.compile("episode_([0-9]{1,18})")
MAIN_FILE = "main_data.hdf5"
STEP_KEYS = ("actions", "rewards", "terminations", "truncations")  # T rows each, where observations have T + 1
# What the digest of a dataset is taken of, episode by episode: interrupted runs know their dataset by it.
DIGESTED = ("observations", "actions", "rewards", "terminals", "next_observations", "timeouts")


def datasets_folder() -> Path:
    """Returns the folder where Minari keeps its datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def local_folder(name: str) -> Path | None:
    """Returns the folder of a dataset by its id, with or without a namespace; None where it is not on this machine."""
    folder = datasets_folder() / name
    return folder if ID.fullmatch(name) and is_minari(folder) else None


def local_ids() -> list[str]:
    """Returns the ids of the datasets on this machine."""
    root = datasets_folder()
    found = (path.parent for depth in ("*", "*/*", "*/*/*") for path in root.glob(f"{depth}/data"))
    return sorted(folder.relative_to(root).as_posix() for folder in found if is_minari(folder))


def is_minari(path: Path) -> bool:
    """Whether a path is the folder of a dataset, its ``data`` folder, or its main file."""
    if path.is_dir():
        return _data_folder(path) is not None
    if not (path.is_file() and is_hdf5(path)):
        return False
    with open_hdf5(path) as file:
        return any(EPISODE.fullmatch(key) for key in file)


def read_minari(path: Path, wanted: Wanted) -> Recording:
    """Reads a dataset. Episodes whose arrays do not fit together are left out and named.

    Raises:
        InputError: If it cannot be read or learned from.
    """
    folder = _data_folder(path) if path.is_dir() else None
    main = path if folder is None else folder / MAIN_FILE
    metadata, budget = _metadata(main.parent), Budget(main.parent if folder else main)
    with _open_episodes(main, metadata, budget) as (episodes, attribute):
        stretches, skipped = [], {}
        for number, episode in episodes:
            entries, problem = _steps_of(episode, wanted, f"{path}, episode {number}")
            if problem:
                skipped[number] = problem
            else:
                stretches.append(Stretch(f"{path}, episode {number}", entries))
        if skipped and not stretches:
            number, problem = next(iter(skipped.items()))
            raise InputError(f"{path} has no usable episode; episode {number} {problem}; collect or fetch it again")
        columns, findings = read_columns(stretches, str(path), wanted, budget, stretches_are_episodes=True)
        lengths = [stretch.entries["actions"].shape[0] for stretch in stretches]
        env_name = _env_id(metadata.get("env_spec") or attribute)
    return Recording(columns, (*findings, *_skipped_findings(skipped)), env_name, _digest(columns, lengths))


def _data_folder(folder: Path) -> Path | None:
    """Returns the folder with the data of a dataset's folder, or the folder itself if it is that."""
    found = (data for data in (folder / "data", folder) if (data / MAIN_FILE).is_file() or _metadata(data))
    return next(found, None)


def _metadata(data_folder: Path) -> Mapping[str, Any]:
    """Returns what ``metadata.json`` says; nothing where there is none that Minari wrote."""
    try:
        content = json.loads((data_folder / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and "total_episodes" in content else {}


def _env_id(spec: object) -> str | None:
    """Returns the environment's id of its specification, which is JSON inside JSON."""
    try:
        name = json.loads(spec)["id"] if isinstance(spec, str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _digest(columns: Mapping[str, np.ndarray], lengths: Iterable[int]) -> str:
    digest, start = hashlib.sha256(), 0
    for length in lengths:
        for key in DIGESTED:
            if key in columns:
                digest.update(columns[key][start : start + length])
        start += length
    return digest.hexdigest()


# --- Episodes ---


def _steps_of(episode: Mapping[str, Any], wanted: Wanted, where: str) -> tuple[dict[str, Any], str | None]:
    """Returns one row per step of an episode, or why it has none that fit together."""
    entries = {key: episode.get(key) for key in ("observations", *STEP_KEYS)}  # each is opened once
    missing = [key for key in ("observations", "actions") if entries[key] is None]
    if missing:
        return {}, f"has no {' and no '.join(missing)}"
    steps = {key: entries[key] for key in STEP_KEYS if entries[key] is not None}
    lengths = {key: rows for key, column in steps.items() if (rows := _rows(column)) is not None}
    count = lengths.get("actions", 0)
    if not count or set(lengths.values()) != {count}:
        return {}, f"has {', '.join(f'{rows} {key}' for key, rows in lengths.items())}"
    states = map_arrays(lambda array: array[...] if is_vector(array) else array, entries["observations"], where)
    wrong = [column.shape[0] for column in _arrays(states) if column.shape[0] != count + 1]
    if wrong:
        return {}, f"has {wrong[0]} observations for {count} actions, expected {count + 1}"
    steps["observations"] = _sliced(states, slice(0, -1))
    steps["next_observations"] = _sliced(states, slice(1, None))
    if wanted.simulator_states:
        infos = {key: find_entry(episode, f"infos/{key}") for key in ("qpos", "qvel")}
        steps["infos"] = {key: column[:-1] for key, column in infos.items() if _rows(column) == count + 1}
    return steps, None


def _rows(column: Any) -> int | None:
    """Returns how many rows an array has; None for what is none."""
    return column.shape[0] if getattr(column, "shape", None) else None


def _arrays(tree: Any) -> Iterator[np.ndarray]:
    if isinstance(tree, Mapping):
        for entry in tree.values():
            yield from _arrays(entry)
    elif isinstance(tree, np.ndarray):
        yield tree


def _sliced(tree: Any, rows: slice) -> Any:
    if isinstance(tree, Mapping):
        return {key: _sliced(entry, rows) for key, entry in tree.items()}
    return tree[rows] if isinstance(tree, np.ndarray) else tree


def _skipped_findings(skipped: Mapping[int, str]) -> list[Finding]:
    if not skipped:
        return []
    shown = "; ".join(f"episode {number} {problem}" for number, problem in list(skipped.items())[:3])
    found = Finding(
        name="episodes skipped",
        count=len(skipped),
        where=shown + f"; {len(skipped) - 3} more" * (len(skipped) > 3),
        effect="their arrays do not fit together, so they were left out",
        advice="collect or fetch them again if they matter",
        matters=True,
    )
    return [found]


# --- Storage ---


@contextmanager
def _open_episodes(
    main: Path, metadata: Mapping[str, Any], budget: Budget
) -> Iterator[tuple[Iterator[tuple[int, Mapping[str, Any]]], str | None]]:
    """Opens a dataset: yields its episodes by number, and the environment's specification as old files have it."""
    storage = metadata.get("data_format", "hdf5")
    if storage in ("arrow", "parquet"):
        yield _arrow_episodes(main.parent, storage, budget), None
        return
    if storage != "hdf5":
        raise InputError(f"{main.parent} has the data_format {str(storage)[:40]!r}; expected hdf5, arrow or parquet")
    with open_hdf5(main) as file:
        keys = sorted((int(match[1]), key) for key in file if (match := EPISODE.fullmatch(key)))
        episodes = ((number, file[key]) for number, key in keys)
        yield (
            ((number, episode) for number, episode in episodes if isinstance(episode, Group)),
            text_attribute(file, "env_spec"),
        )


def _arrow_episodes(folder: Path, storage: str, budget: Budget) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.dataset

    numbered = [(int(path.name), path) for path in folder.iterdir() if re.fullmatch("[0-9]{1,18}", path.name)]
    for number, path in sorted(entry for entry in numbered if entry[1].is_dir()):
        try:
            source = pyarrow.dataset.dataset(str(path), format=storage, ignore_prefixes=["_", ".", "metadata.json"])
            budget.take(source.count_rows() * sum(_width(field.type) for field in source.schema), f"episode {number}")
            table = source.to_table().combine_chunks()
            columns = {name: _decoded(table[name].combine_chunks()) for name in table.column_names if name != "infos"}
        except InputError:
            raise
        # Arrow's own errors are of these kinds.
        except (OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} cannot be read as {storage} ({reason}); fetch it again") from None
        yield number, {key: column[:-1] if key in STEP_KEYS else column for key, column in columns.items()}


def _width(kind: Any) -> int:
    """Returns how many bytes a value of an Arrow type takes, as far as the type tells."""
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return sum(_width(field.type) for field in kind)
    if pyarrow.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    return -(-kind.bit_width // 8) if pyarrow.types.is_primitive(kind) else 1


def _decoded(column: Any) -> Any:
    """Returns an Arrow column as an array, ``(rows, features)`` or ``(rows,)``; structures as dictionaries."""
    import pyarrow.types

    if pyarrow.types.is_struct(column.type):
        names = [field.name for field in column.type]
        keys = [f"_index_{name}" for name in names] if all(name.isdecimal() for name in names) else names
        return {key: _decoded(column.field(index)) for index, key in enumerate(keys)}
    if pyarrow.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return column.to_numpy(zero_copy_only=False)
