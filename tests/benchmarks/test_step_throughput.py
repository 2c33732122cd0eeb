import pandas as pd
import pytest

from benchmarks import step_throughput
from benchmarks.step_arms import Case


def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(check_quick_trial):
    folder = check_quick_trial("step_throughput")

    table = pd.read_csv(folder / "results" / "step_throughput.csv")
    available = [arm for arm in step_throughput.QUICK_ARMS if step_throughput.is_available(arm)]
    assert table["arm"].tolist() == available * 2
    assert (table["ms"] > 0).all()
    assert table["gflops_per_s"].notna().tolist() == [arm == "floor" for arm in available * 2]


@pytest.mark.parametrize("name", ["step_throughput", "step_throughput_busy"])
def test_published_tables_are_those_of_the_results(check_published, name):
    check_published(step_throughput.publish, **{name: True})


def test_arms_that_have_been_measured_are_skipped(results):
    case = Case("probabilistic", "2x160", batch=160, size="hopper", threads=1, rounds=2)
    of_case = {name: getattr(case, name) for name in step_throughput.CASE}
    results.append([of_case | {"arm": arm, "round": 0, "ms": 1.0} for arm in ("ours", "plain")])
    step_throughput.measure(results, case, ["ours", "plain"])
    assert results.rows()["ms"].tolist() == [1.0, 1.0]


def test_an_arm_that_fails_is_an_error_that_names_it(capfd):
    case = Case("probabilistic", "no network", batch=1, size="hopper", threads=1, rounds=1)
    with (
        step_throughput.start_worker("products", case) as process,
        pytest.raises(RuntimeError, match=r"ended with code 1 \(products"),
    ):
        step_throughput.read_answer(process)
    assert "no network" in capfd.readouterr().err
