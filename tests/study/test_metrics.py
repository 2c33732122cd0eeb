import numpy as np
import pytest

from study.cells import CellKey
from study.metrics import METRICS, find_metrics, metrics_of

NAMED = {metric.name: metric for metric in METRICS}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.7, 0.94, "better"),
        (1.06, 1.3, "worse"),
        (0.96, 1.04, "tie"),
        (0.9, 1.01, "undecided"),
        (0.7, 0.96, "undecided"),  # better, but perhaps by less than the margin
        (0.9, 1.2, "undecided"),
        (np.nan, np.nan, "too few runs"),
    ],
)
def test_ratios_count_beyond_five_percent(low, high, verdict):
    assert NAMED["nrmse"].verdict(low, high) == verdict


def test_more_is_better_for_some_and_neither_for_sharpness():
    assert NAMED["spearman"].verdict(0.06, 0.2) == "better"
    assert NAMED["spearman"].verdict(-0.2, -0.06) == "worse"
    assert NAMED["nll"].verdict(-0.3, -0.06) == "better"
    assert NAMED["ece_raw"].verdict(-0.009, 0.009) == "tie"
    assert NAMED["sharpness"].verdict(0.5, 0.6) == "lower"


def test_probes_add_metrics_that_are_found_by_their_names(make_study):
    names = [metric.name for metric in metrics_of(make_study())]
    assert names == [*NAMED, "spearman_probe", "auroc_probe"]
    found = find_metrics(["auroc_probe", "nrmse", "nrmse"])
    assert list(found) == ["nrmse", "auroc_probe"]
    assert found["auroc_probe"].label == "AUROC, probe"


def test_every_metric_has_a_name_of_its_own():
    assert len(NAMED) == len(METRICS)


def test_what_a_cell_lacks_is_no_number(make_study):
    result = make_study()[CellKey("a", "x", 0)]
    assert NAMED["rollout_ts1"].read(result, 10) is None
    assert NAMED["energy_tsinf"].read(result, 10) is None
    assert NAMED["ece_isotonic"].read(result, 10) is None
