"""Records: dataclasses that are kept as JSON, and checked whole when they are read back."""

from __future__ import annotations

import dataclasses
import typing
from types import UnionType
from typing import Any


def parse_record(kind: Any, value: Any, name: str) -> Any:
    """Returns a value read from JSON as the type that an annotation names, building dataclasses from dictionaries.

    Args:
        kind: A type, ``X | None``, ``list[X]``, ``dict[str, X]`` or a dataclass whose fields have such types.
        value: What JSON gave; where a dataclass stands in it already, that is taken as it is.
        name: What to call the value in messages.

    Raises:
        ValueError: If the value is of another type; the message names it.
    """
    if kind is Any:
        return value
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else parse_record(typing.get_args(kind)[0], value, name)
    if dataclasses.is_dataclass(kind) and isinstance(value, kind):
        return value
    plain = dict if dataclasses.is_dataclass(kind) else typing.get_origin(kind) or kind
    accepted = {float: (float, int)}.get(plain, plain)
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"{name} is {type(value).__name__}, expected {plain.__name__}")
    if plain is list:
        return [parse_record(*typing.get_args(kind), each, f"an entry of {name}") for each in value]
    if plain is dict and not dataclasses.is_dataclass(kind):
        of_entries = typing.get_args(kind)[1]
        return {key: parse_record(of_entries, each, f"{key[:40]} of {name}") for key, each in value.items()}
    if not dataclasses.is_dataclass(kind):
        return value
    types, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    # An older version did not know entries that have a default.
    missing = {key for key, field in fields.items() if _is_required(field)} - value.keys()
    if different := sorted(missing | (value.keys() - fields.keys())):
        raise ValueError(f"{name} has a missing or unknown entry {different[0][:40]!r}")
    return kind(**{key: parse_record(types[key], given, key) for key, given in value.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
