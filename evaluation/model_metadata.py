"""What a ``model.pkl`` must say of itself to be evaluated, checked whole before anything is made of it.

Metadata are whatever somebody wrote into a file: names in them become those of folders, lists become tables, and a list
that holds itself never ends. So there is one schema, of what ``learn_model.py`` writes: what is missing may be, if it
is not needed, and what is there must fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from utils import InputError

LARGEST = 2**53  # of whole numbers
LONGEST_NAME, LONGEST_TEXT = 4096, 10_000  # characters
MOST_VALUES = 5_000_000  # of metadata together
DEEPEST = 8  # containers in containers

SIDES = {"train", "holdout", "test"}

Check = Callable[[Any], bool]


def check_metadata(metadata: Mapping[str, Any], where: str, kind: str, members: int) -> None:
    """Checks the metadata of a model.

    Args:
        metadata: What the file says.
        where: The file, for messages.
        kind: The kind of its members.
        members: How many there are.

    Raises:
        InputError: If something is none of what is written there; it is named.
    """
    if not is_plain(metadata):
        raise InputError(f"{where} has metadata that are no plain Python, or hold themselves; train the model again")
    schema = {
        "kind": lambda value: value == kind,
        "config": lambda value: type(value) is dict and all(type(key) is str for key in value),
        "elites": lambda value: (
            _is_list(_is_count)(value) and bool(value) and _is_distinct(value) and max(value) < members
        ),
        "dataset": lambda value: type(value) is dict,
        "scores": lambda value: _is_list(_is_scores)(value) and len(value) == members,
        "run_name": _or_none(is_name_of_file),
        "mlflow_run_id": _or_none(lambda value: type(value) is str and re.fullmatch(r"[\w-]{1,64}", value) is not None),
        "git_commit": _or_none(_is_name),
        "versions": lambda value: type(value) is dict and all(map(_is_name, value.values())),
        "data": lambda value: type(value) is dict,
    }
    dataset = {
        "name": _is_name,
        "sha256": _or_none(_is_name),
        "split": lambda value: type(value) is dict and set(value) <= SIDES and all(map(_is_indices, value.values())),
        "env_name": _or_none(_is_name),
        "rows": _is_count,
        "findings": _is_list(_is_finding),
        "fingerprints": lambda value: type(value) is dict and all(map(_is_list(_is_name), value.values())),
        "parts": _is_list(_is_part),
        "pieces": _or_none(_is_list(_is_piece)),
    }
    _check(metadata, schema, "metadata", where)
    _check(metadata.get("dataset", {}), dataset, "metadata of its dataset", where)


def is_plain(value: Any) -> bool:
    """Whether a value is plain Python, as JSON knows it, that does not hold itself and is not larger than its file."""
    level, left = [value], MOST_VALUES
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for part in level:
            if type(part) is dict:
                if not all(type(key) is str and len(key) <= LONGEST_NAME for key in part):
                    return False
                inner += part.values()
            elif type(part) in (list, tuple):
                inner += part
            elif type(part) not in (str, int, float, bool, type(None)) or _is_too_long(part):
                return False
            if (left := left - 1) < len(inner):
                return False
        if not inner:
            return True
        level = inner
    return False


def is_name_of_file(value: Any) -> bool:
    """Whether a value can name a file or folder, and nothing in another one."""
    return (
        type(value) is str
        and re.fullmatch(r"[^/\\]{1,250}", value) is not None
        and value.strip(". ") != ""
        and value.isprintable()
    )


def _check(values: Mapping[str, Any], schema: Mapping[str, Check], what: str, where: str) -> None:
    for key, check in schema.items():
        if key in values and not check(values[key]):
            raise InputError(f"{where} has {what} whose {key!r} is not what learn_model.py writes; train it again")


def _is_too_long(value: Any) -> bool:
    return len(value) > LONGEST_TEXT if type(value) is str else type(value) is int and abs(value) > LARGEST


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= LONGEST_NAME


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_list(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_distinct(value: list[int]) -> bool:
    return len(set(value)) == len(value)


def _is_indices(value: Any) -> bool:
    return _is_list(_is_count)(value) and _is_distinct(value)


def _is_scores(value: Any) -> bool:
    return type(value) is dict and all(score is None or type(score) in (int, float, bool) for score in value.values())


def _is_finding(value: Any) -> bool:
    kinds = {"name": str, "count": int, "where": str, "effect": str, "advice": str, "matters": bool}
    return type(value) is dict and {key: type(part) for key, part in value.items()} == kinds


def _is_part(value: Any) -> bool:
    return (
        type(value) is dict
        and _is_name(value.get("name"))
        and _is_name(value.get("sha256"))
        and _is_count(value.get("num_trajectories"))
    )


def _is_piece(value: Any) -> bool:
    return type(value) in (list, tuple) and len(value) == 3 and all(map(_is_count, value)) and value[1] < value[2]
