import pandas as pd
import pytest

from study.schemas import CHOSEN_HORIZONS, OF_CELLS, OF_TRIALS, TABLES, Schema, check_tables, read_table
from utils import InputError

SCHEMA = Schema(texts=("name",), counts=("step",), numbers=("error",), flags=("is_chosen",))
TABLE = pd.DataFrame({"name": ["a"], "step": [3], "error": [0.5], "is_chosen": [True], "more": [None]})


def test_what_is_as_it_should_be_has_no_fault():
    assert SCHEMA.fault(TABLE) is None
    assert SCHEMA.fault(TABLE.assign(error=float("inf"))) is None
    assert SCHEMA.fault(TABLE[:0].astype(object)) is None


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("name", 3, "text"),
        ("name", None, "text"),
        ("step", -1, "whole numbers"),
        ("step", 0.5, "whole numbers"),
        ("step", 2**50, "whole numbers"),
        ("error", "x", "numbers"),
        ("error", True, "numbers"),
        ("is_chosen", 1, "true or false"),
    ],
)
def test_a_column_of_another_kind_is_a_fault(column, values, expected):
    assert SCHEMA.fault(TABLE.assign(**{column: values})) == f"its column {column!r} does not hold {expected}"
    assert SCHEMA.fault(TABLE.drop(columns=column)) == f"it has no column {column!r}"


def test_names_are_text_whatever_they_look_like(tmp_path):
    path = tmp_path / "horizons.csv"
    path.write_text("dataset,horizon\n007,5\nNA,10\n,25\n")
    table = read_table(path, CHOSEN_HORIZONS, "advice", names=("arm", "dataset"))
    assert table.dataset.tolist() == ["007", "NA", ""]
    assert table.horizon.tolist() == [5, 10, 25]
    path.write_text("dataset,horizon\nx,5\nx,10\n")
    with pytest.raises(InputError, match=r"horizons\.csv is damaged: it has two rows of one dataset; advice"):
        read_table(path, CHOSEN_HORIZONS, "advice", names=("dataset",))


def test_tables_of_a_cell_are_of_the_same_trajectories():
    scores = dict.fromkeys(("mse", "nll", "crps", "sharpness"), 0.5)
    tables = {
        "trajectories": pd.DataFrame({"trajectory": [1, 2], "rows": 5, **scores}),
        "row_errors": pd.DataFrame({"trajectory": [1] * 5 + [2] * 5, "error": 0.5}),
        "unknown": pd.DataFrame({"a": ["b"]}),
    }
    check_tables(tables, "cell", "advice")
    with pytest.raises(InputError, match="row_errors of cell is damaged: it is of other trajectories; advice"):
        check_tables(tables | {"row_errors": pd.DataFrame({"trajectory": [3], "error": 0.5})}, "cell", "advice")
    with pytest.raises(InputError, match="row_errors of cell is damaged: it has not all rows; advice"):
        check_tables(tables | {"row_errors": tables["row_errors"][1:]}, "cell", "advice")


def test_a_table_that_is_cut_off_is_damaged(tmp_path):
    path, table = (
        tmp_path / "rollout.csv",
        pd.DataFrame({"propagation": ["mean"] * 2 + ["ts1"] * 2, "horizon": [1, 2] * 2}),
    )
    table.assign(median=0.5, skill=0.5, exploded=0.0).to_csv(path, index=False)
    read_table(path, TABLES["rollout"], "advice")
    whole = path.read_text()
    for text, fault in ((whole[:-2], "it is cut off"), (whole[: whole.rindex("ts1")], "has not the same horizon")):
        path.write_text(text)
        with pytest.raises(InputError, match=f"rollout.csv is damaged: .*{fault}"):
            read_table(path, TABLES["rollout"], "advice")


def test_members_come_in_all_pairs():
    pairs = pd.DataFrame({"first": [0, 0, 1], "second": [0, 1, 1], "product": 1.0})
    assert TABLES["member_products"].fault(pairs) is None
    for damaged in (pairs[1:], pairs.iloc[::-1], pairs.assign(second=[0, 1, 9])):
        assert "all pairs" in TABLES["member_products"].fault(damaged)


def test_trials_have_a_part_of_what_cells_have():
    assert OF_TRIALS < OF_CELLS < set(TABLES)
