from dataclasses import dataclass, field

import pytest

from tracking.records import parse_record


@dataclass(frozen=True)
class Inner:
    share: float


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: list[str]
    counts: dict[str, int]
    note: str | None = None
    more: list[int] = field(default_factory=list)


PLAIN = {"inner": {"share": 1}, "names": ["a"], "counts": {"a": 3}}


def test_a_record_is_built_from_what_json_gives():
    record = parse_record(Outer, PLAIN, "the record")
    assert record == Outer(Inner(1), ["a"], {"a": 3})
    assert parse_record(Outer, PLAIN | {"inner": record.inner}, "the record") == record  # built already


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": None}, "inner is NoneType, expected dict"),
        ({"inner": {"share": "x"}}, "share is str, expected float"),
        ({"inner": {"share": True}}, "share is bool, expected float"),
        ({"inner": {}}, "inner has a missing or unknown entry 'share'"),
        ({"names": "a"}, "names is str, expected list"),
        ({"names": [1]}, "an entry of names is int, expected str"),
        ({"counts": {"a": 0.5}}, "a of counts is float, expected int"),
        ({"note": 3}, "note is int, expected str"),
        ({"less": 1}, "the record has a missing or unknown entry 'less'"),
    ],
)
def test_what_is_no_such_record_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        parse_record(Outer, PLAIN | change, "the record")
