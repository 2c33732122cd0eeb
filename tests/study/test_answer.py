"""The answer, from made-up verdicts."""

import numpy as np
import pandas as pd
import pytest

from study.answer import PLANNED, answer_text, extent_text, loss_and_type_texts, picks_table, primary_pairs
from study.verdicts import judge_claims
from utils import ROOT


def lines(metric, arm, reference, effects, verdicts):
    """Comparisons on datasets d0, d1, ..., and over all of them."""
    rows = [
        {"dataset": f"d{place}", "effect": effect, "low": effect * 0.9, "high": effect * 1.1, "verdict": verdict}
        for place, (effect, verdict) in enumerate(zip(effects, verdicts, strict=True))
    ]
    mean = {"effect": float(np.exp(np.mean(np.log(effects)))), "least": min(effects), "most": max(effects)}
    rows.append({"dataset": "all datasets", "verdict": "better", "low": 0.1, "high": 0.2} | mean)
    return pd.DataFrame(rows).assign(metric=metric, arm=arm, reference=reference, pairs=6)


@pytest.fixture
def pairs():
    """Three arms: ``b`` beats ``a`` on two of three datasets, ``c`` beats ``b`` on the third and ties otherwise."""
    return primary_pairs(
        pd.concat(
            [
                lines("nrmse", "b", "a", [0.5, 0.5, 0.5], ["better", "better", "tie"]),
                lines("nrmse", "c", "a", [1.0, 1.0, 1.0], ["tie", "tie", "undecided"]),
                lines("nrmse", "c", "b", [1.6, 2.0, 0.8], ["worse", "worse", "better"]),
                lines("crps", "c", "b", [0.1, 0.1, 0.1], ["better", "better", "better"]),
            ]
        ),
        None,
    )


def test_the_pick_says_by_how_much_how_sure_and_where_not(pairs):
    (line,) = picks_table(pairs).to_dict("records")  # CRPS is not primary
    assert line == {
        "for": "one step, root mean square",
        "metric": "nRMSE",
        "pick": "b",
        "by how much": "0.5 (0.5 to 0.5)",
        "how sure": "better on 2, tie on 1 of 3 datasets",
        "not on": "d2 (c)",
        "as good": "-",
    }


def test_where_no_arm_is_better_none_is_picked():
    tied = primary_pairs(lines("nll", "b", "a", [0.01, 0.02], ["tie", "too few runs"]), None)
    (line,) = picks_table(tied).to_dict("records")
    assert line["pick"].startswith("none") and line["by how much"] == "-"


def test_comparisons_are_read_both_ways(pairs):
    turned = pairs[(pairs.arm == "b") & (pairs.reference == "c") & (pairs.dataset == "d0")].iloc[0]
    assert (turned.effect, turned.verdict) == (1 / 1.6, "better")
    assert turned.low < turned.effect < turned.high
    pooled = pairs[(pairs.arm == "b") & (pairs.reference == "c") & (pairs.dataset == "all datasets")].iloc[0]
    assert (pooled.least, pooled.most) == (0.5, 1.25)


def test_errors_of_values_are_those_that_the_protocol_compares_first():
    policies = [
        lines("value_error", "b", "a", [effect], ["better"]).assign(propagation=name, horizon="truncated")
        for name, effect in (("ts1", 0.9), ("tsinf", 0.8))
    ]
    pairs = primary_pairs(lines("nrmse", "b", "a", [0.5], ["better"]), pd.concat(policies))
    assert picks_table(pairs)["by how much"].tolist() == ["0.5 (0.5 to 0.5)", "0.8 (0.8 to 0.8)"]


def test_a_study_that_is_not_whole_says_so():
    planned = int(np.prod(list(PLANNED.values())))
    extent = pd.DataFrame([{"planned": planned, "done": planned - 1, "failed": 2}])
    assert extent_text(extent).startswith(f"**Preliminary: {planned - 1} of the {planned} trainings")
    assert extent_text(extent.assign(done=planned)) == (
        f"{planned} of the {planned} trainings that the protocol plans are in, 2 of which failed."
    )


def test_planned_trainings_are_those_of_the_protocol():
    protocol = (ROOT / "results" / "PROTOCOL.md").read_text()
    assert "Six training seeds" in protocol and PLANNED["seeds"] == 6
    datasets = protocol.partition("## Datasets")[2].partition("\n\nEach has")[0]
    assert datasets.count("\n| ") - 1 == PLANNED["datasets"]


def test_loss_and_type_are_taken_apart():
    effects = {("dnn_huber", "dnn"): 0.8, ("faithful_huber", "faithful"): 0.7}
    effects |= {("faithful", "dnn"): 1.0, ("faithful_huber", "dnn_huber"): 1.01}
    pairs = primary_pairs(pd.concat([lines("rollout_mean", *pair, [e], ["tie"]) for pair, e in effects.items()]), None)
    (said,) = loss_and_type_texts(pairs)
    assert said == (
        "Long rollouts (`rollout_mean`): the loss alone changes it by the factors 0.8 (0.8 to 0.8; `dnn_huber` / "
        "`dnn`) and 0.7 (0.7 to 0.7; `faithful_huber` / `faithful`), the type alone changes it by the factors 1 "
        "(1 to 1; `faithful` / `dnn`) and 1.01 (1.01 to 1.01; `faithful_huber` / `dnn_huber`)."
    )


def test_the_paragraph_counts_what_is_undecided_and_the_runs_that_would_decide(pairs):
    extent = pd.DataFrame([{"planned": 384, "done": 384, "failed": 0}])
    text = answer_text(pairs, judge_claims({}), extent)
    assert "Of 9 comparisons of primary metrics, 1 are undecided; some" in text
    assert "where arms change their order between datasets: of 3 pairs, 1 in `nrmse`." in text
    assert "*The likelihood itself helps long rollouts*: the study cannot tell (0 intervals for it" in text
    # An interval from 0.9 to 1.1 of six pairs: half its width in logs is 0.1003, the margin 0.0488.
    assert f"some {int(np.ceil(6 * (np.log(1.1 / 0.9) / 2 / np.log(1.05)) ** 2))} seeds" in text
