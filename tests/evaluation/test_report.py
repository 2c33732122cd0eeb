import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from data.trajectories import Finding
from evaluation.report import EvaluationFacts, audit_section, earlier_files, headline_cards, slug, write_report
from evaluation.selection import Model, Selection

SUMMARY = {
    "nrmse": 0.5,
    "median_error": 0.2,
    "nrmse_no_change": 1.0,
    "crps_mixture": 0.1,
    "nll_mixture": -1.0,
    "coverage_90_raw": 0.876,
    "ece_raw": 0.1,
    "calibrated_horizon_tsinf_raw": 7.0,
    **{f"error_tsinf_{step}": float(step) for step in (1, 10, 50)},
    **{f"exploded_tsinf_{step}": 0.25 for step in (1, 10, 50)},
    **{f"skill_tsinf_{step}": 0.5 for step in (1, 10, 50)},
}


FOUND = Finding("jumps", 4, "trajectory 0 step 2", "they dominate", "remove them", matters=True)


@pytest.fixture
def facts_of(knowing_ensemble, walks):
    """Returns a function that gathers the facts of evaluating a model on some of three trajectories."""

    def gather(
        *indices, part="test", available=None, has_training_rows=True, findings=(), dataset=None, known_rows=0, **more
    ):
        trained_on = {"name": "d", "fingerprints": {}, "findings": [dataclasses.asdict(FOUND)]}
        metadata = {"kind": "of its own", "config": {"seed": 3}, "dataset": trained_on}
        model = Model(None, "m", knowing_ensemble(), metadata)
        available = len(indices) if available is None else available
        selection = Selection(dataset or walks(2, 3, 4), np.array(indices), part, available, **more)
        options = {"has_training_rows": has_training_rows, "seed": 0, "command": "python evaluate_model.py"}
        options["known_rows"] = known_rows
        return EvaluationFacts.of(model, selection, findings, **options)

    return gather


def test_facts_count_what_was_evaluated(facts_of):
    facts = facts_of(0, 2)
    assert (facts.rows, facts.trajectories, facts.members) == (6, 2, 2)
    assert (facts.title, facts.kind) == ("m on walks", "of its own")
    (note,) = facts.notes
    assert note.startswith("Evaluated on test trajectories, which neither trained")


def test_facts_warn_of_what_a_reader_must_know(facts_of):
    drawn, single = facts_of(0, 1, part="unseen", available=3), facts_of(0, part="holdout", has_training_rows=False)
    assert drawn.notes[1].startswith("2 of 3 trajectories were drawn at random")
    assert "these scores flatter the model" in single.notes[0]
    assert single.notes[1].startswith("The training dataset d is not here in the version that was trained on")
    assert single.notes[2].startswith("With a single trajectory nothing can be recalibrated")


def test_facts_tell_of_copies_and_of_rows_in_no_order(facts_of, walks):
    left_out, kept = facts_of(0, 1, part="unseen", copies=1), facts_of(0, 1, part="unseen", copies=1, keeps_copies=True)
    assert left_out.notes[1].startswith("1 of 3 trajectories equal some that trained the model or selected its weights")
    assert kept.notes[1].startswith("1 of 2 trajectories equal") and "counted all the same" in kept.notes[1]
    assert facts_of(0, 1, part="unseen", known_rows=4).notes[1].startswith("4 of 5 rows equal training rows")
    mixed = walks(2, 3)
    mixed.trajectories[1] = dataclasses.replace(mixed.trajectories[1], in_order=False)
    assert facts_of(0, 1, dataset=mixed).notes[1].endswith("rollouts of more than one step are refused.")


def test_the_audit_is_shown_whole_and_that_of_other_training_data_beside_it(facts_of):
    own, other = (facts_of(0, 1, part=part, findings=[FOUND]) for part in ("test", "unseen"))
    assert (own.findings, own.training_findings, other.training_findings) == ([FOUND], [], [FOUND])
    section = audit_section(other)
    assert list(section.tables) == ["walks", "d"]
    assert section.tables["d"].to_dict("records") == [
        {
            "name": "jumps",
            "count": 4,
            "where": "trajectory 0 step 2",
            "effect": "they dominate",
            "advice": "remove them",
        }
    ]
    assert audit_section(facts_of(0, 1)).text == "Nothing was found."


def test_a_report_is_written_whole_and_replaces_an_earlier_one(facts_of, tmp_path):
    facts, folder = facts_of(0, 1), tmp_path / "new" / "report"
    assert earlier_files(folder) == []
    tables = {"first": pd.DataFrame({"a": [1]}), "second": pd.DataFrame({"a": [2]})}
    write_report(folder, facts, SUMMARY, tables, {"drawn": b"png"}, "page")
    (folder / "mine.txt").write_text("not the report's")
    files = write_report(folder, facts, SUMMARY, {"first": tables["first"]}, {}, "another page")
    assert [file.name for file in files] == earlier_files(folder) == ["report.html", "first.csv", "metrics.json"]
    assert {path.name for path in folder.iterdir()} == {*earlier_files(folder), "mine.txt"}
    content = json.loads((folder / "metrics.json").read_text())
    assert list(content) == [field.name for field in dataclasses.fields(facts)] + ["metrics", "files"]
    assert (content["notes"], content["config"], content["metrics"]) == (facts.notes, {"seed": 3}, SUMMARY)
    assert (folder / "report.html").read_text() == "another page"


def test_cards_show_the_last_horizon_up_to_25_and_leave_out_what_is_unknown():
    cards = {card.name: card for card in headline_cards(SUMMARY, [1, 10, 50])}
    assert cards["error after 10 steps"][1:] == ("10", "tsinf, median; skill 50%; 25% of paths exploded")
    assert cards["90 % interval covers"].value == "87.6%"
    assert "recalibrated -" in cards["90 % interval covers"].reading
    assert "linear regression -" in cards["one-step nRMSE"].reading
    assert not any("finds" in name for name in cards)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("hopper-medium-demo", "hopper-medium-demo"),
        ("/data/some where/file.v2.hdf5", "file.v2"),
        ("mujoco/hopper/medium-v0", "medium-v0"),
        ("a b", "a-b"),
        ("/data/one.hdf5 + hopper-medium-v0", "one-hopper-medium-v0"),
    ],
)
def test_slugs(name, short):
    assert slug(name) == short
