import pandas as pd
import pytest

from benchmarks import harness
from benchmarks.harness import ResultsFile

# --- Results ---


def rows_of(table, *columns):
    return table[list(columns)].to_numpy().tolist()


def test_rows_are_added_with_the_machine_and_the_commit(results):
    assert results.rows().empty

    results.append([{"arm": "ours", "ms": 1.5}])
    results.append([{"arm": "ours", "ms": 2.5}, {"arm": "loop", "ms": 4.0, "note": "slow"}])

    table = results.rows()
    assert rows_of(table, "arm", "ms") == [["ours", 1.5], ["ours", 2.5], ["loop", 4.0]]
    assert table["note"].tolist()[2] == "slow" and table["note"].isna().tolist() == [True, True, False]
    assert set(table["machine"]) == {harness.machine()}
    assert table["commit"].str.fullmatch(r"[0-9a-f]{10}\+?|unknown").all()


def test_times_are_those_of_the_machine_that_measured_last(results):
    results.append([{"arm": "ours", "ms": 1.0}, {"arm": "ours", "ms": 2.0}])
    table = pd.read_csv(results.csv)
    pd.concat([table.assign(machine="old"), table, table.assign(machine="new", ms=9.0)]).to_csv(results.csv)

    assert results.machines() == ["new", harness.machine(), "old"]
    assert results.rows()["ms"].tolist() == [9.0, 9.0]
    assert results.rows("old")["ms"].tolist() == [1.0, 2.0]
    assert len(ResultsFile("speed", results.folder, is_timed=False).rows()) == 6


def test_what_another_machine_has_measured_is_not_finished_here(results):
    results.append([{"arm": "ours", "size": 1}, {"arm": "loop", "size": 1}, {"arm": "ours", "size": 2}])
    assert rows_of(results.finished(arm="ours", size=2), "arm", "size") == [["ours", 2]]
    assert results.finished(arm="loop", size=2).empty

    pd.read_csv(results.csv).assign(machine="other").to_csv(results.csv)
    assert results.finished(arm="ours", size=2).empty


def test_rows_are_discarded_by_their_values(results):
    results.discard(arm="ours")  # there is nothing yet
    results.append([{"arm": "ours", "size": 1}, {"arm": "loop", "size": 1}, {"arm": "ours", "size": 2}])
    results.discard(arm="ours", size=1)
    assert rows_of(results.rows(), "arm", "size") == [["loop", 1], ["ours", 2]]


def test_publishing_replaces_the_section_and_leaves_the_rest(results):
    results.append([{"arm": "ours", "ms": 1.0}])
    results.publish("first")
    readme = results.folder / "README.md"
    assert "\nfirst\n" in readme.read_text() and "![" not in readme.read_text()

    figure = harness.new_figure(columns=1)
    figure.subplots().plot([1, 2])
    results.publish("second", figure)

    text = readme.read_text()
    assert text.startswith("before\n<!-- begin speed -->\n\nWritten by `python -m benchmarks.speed`; measured at `")
    assert text.endswith(
        f"on {harness.machine()}.\n\nsecond\n\n![speed](plots/speed.png)\n\n<!-- end speed -->\nafter\n"
    )
    assert "old" not in text and "first" not in text
    assert (results.folder / "plots" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_without_rows_there_is_nothing_to_show(results, capsys):
    with pytest.raises(SystemExit) as exit_:
        results.rows_to_show()
    assert exit_.value.code == 2
    assert "has no rows yet; run benchmarks.speed without --tables" in capsys.readouterr().err


# --- Rounds ---


def test_functions_are_timed_in_turn():
    called = []
    rows = harness.in_turn({name: lambda name=name: called.append(name) for name in "ab"}, rounds=2, seconds=0)

    assert "".join(called) == "aabb" + "abab"  # twice each before the first round
    assert [(row["round"], row["arm"]) for row in rows] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert len({row["started"] for row in rows}) == 1
    assert all(row["ms"] > 0 for row in rows)


def test_a_round_repeats_what_is_quick():
    called = []
    harness.in_turn({"a": lambda: called.append("a")}, rounds=1, seconds=0.01)
    assert len(called) > 10


def test_ratios_are_taken_within_a_round():
    measured = {"ours": (1, 4, 2), "loop": (3, 8, 8)}
    rows = [
        {"size": "s", "started": "now", "round": turn, "arm": arm, "ms": ms}
        for arm, values in measured.items()
        for turn, ms in enumerate(values)
    ]
    summary = harness.compare(pd.DataFrame(rows), ["size"], base="ours")
    assert summary.loc["s", "loop"].to_dict() == {"median": 8, "low": 3, "high": 8, "ratio": 3}  # of 3, 2 and 4
    assert summary.loc["s", "ours"].to_dict() == {"median": 2, "low": 1, "high": 4, "ratio": 1}
    assert harness.spread(summary.loc["s", "loop"]) == "8 (3–8)"  # noqa: RUF001


def test_only_the_first_table_is_in_sight():
    text = harness.sections({"one": "| 1 |", "two": "| 2 |"})
    assert text == "**one**\n\n| 1 |\n\n<details><summary>two</summary>\n\n| 2 |\n\n</details>"
