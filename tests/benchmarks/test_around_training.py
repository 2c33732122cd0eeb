import sys

import pandas as pd
import pytest

from benchmarks import around_training

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")


def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(check_quick_trial):
    folder = check_quick_trial("around_training")

    table = pd.read_csv(folder / "results" / "around_training.csv")
    assert set(table["part"]) >= set(around_training.PARTS) - {"memory"}
    tracked = table[table["case"] == "configs/hopper_dnn.yaml"].set_index("arm")["ms"]
    assert 0 < tracked["tracker.log_epoch"] < tracked["training"]
    if sys.platform == "linux":
        peaks = table[table["part"] == "memory"].set_index("arm")["mib"]
        assert 50 < peaks["torch"] < peaks["ready"] <= peaks["training"]


def test_published_tables_are_those_of_the_results(check_published):
    check_published(around_training.publish, around_training=True)


@needs_proc
def test_peaks_are_those_up_to_the_moments():
    program = """
import sys
print("small", file=sys.stderr)
taken = bytearray(100 * 2**20)
del taken
print("large", file=sys.stderr)
sys.stdin.read()
"""
    peaks = around_training.peaks_at({"before": "small", "after": "large"}, [sys.executable, "-c", program])
    assert 80 < peaks["after"] - peaks["before"] < 120


@needs_proc
def test_a_command_that_fails_on_the_way_is_an_error_that_says_what_it_printed():
    program = "import sys; sys.stderr.write('lost'); sys.exit(3)"
    with pytest.raises(RuntimeError, match="ended with code 3:\nlost"):
        around_training.peaks_at({"end": "done"}, [sys.executable, "-c", program])
