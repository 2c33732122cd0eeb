import math
from pathlib import Path

import pytest

from tracking.csv_tracker import CsvTracker
from utils import InputError


def test_a_line_per_epoch_and_member_whose_floats_round_trip(tmp_path, columns, epoch_rows):
    path = tmp_path / "new" / "folder" / "metrics.csv"
    rows = epoch_rows(0)
    rows[0]["mse_loss"], rows[1]["mse_loss"], rows[1]["lr"] = 0.1 + 0.2, math.inf, math.nan
    with CsvTracker(path, columns) as tracker:
        tracker.log_epoch(0, rows)
        tracker.log_epoch(1, epoch_rows(1))
        lines = path.read_text().splitlines()  # before the file is closed
    assert lines == [
        "step,model_id,mse_loss,lr,train_mse,val_mse",
        "1,0,0.30000000000000004,0.001,0.0,0.0",
        "1,1,inf,nan,1.0,1.0",
        "2,0,0.5,0.001,,100.0",
        "2,1,1.5,0.001,,101.0",
    ]


@pytest.mark.parametrize("change", [{"surprise": 1.0}, {"lr": ...}])
def test_a_column_that_is_unknown_or_missing_is_named(tmp_path, columns, epoch_rows, change):
    row = {name: value for name, value in (epoch_rows(0)[0] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=next(iter(change))):
        CsvTracker(tmp_path / "metrics.csv", columns).log_epoch(0, [row])


def test_what_was_there_is_replaced_at_the_first_epoch(tmp_path, monkeypatch, columns, run_epochs, read_csv):
    monkeypatch.chdir(tmp_path)
    Path("metrics.csv").write_text("of another run\n" * 100)
    tracker = CsvTracker("metrics.csv", columns)  # a bare file name, without a folder
    assert Path("metrics.csv").read_text().startswith("of another run")
    run_epochs(tracker, range(2))
    assert [row["step"] for row in read_csv("metrics.csv")] == ["1", "1", "2", "2"]
    assert [path.name for path in Path().iterdir()] == ["metrics.csv"]


def test_a_resumed_file_keeps_whole_epochs_before_the_given_one(tmp_path, columns, epoch_rows, run_epochs):
    path, whole = tmp_path / "metrics.csv", tmp_path / "whole.csv"
    run_epochs(CsvTracker(whole, columns), range(6))
    run_epochs(CsvTracker(path, columns), range(5))
    path.write_bytes(path.read_bytes()[:-7])  # a kill amid the last line
    tracker = CsvTracker(path, columns, resume_epoch=3)
    assert tracker.kept_rows == [row for epoch in range(3) for row in epoch_rows(epoch)]
    run_epochs(tracker, range(3, 6))
    assert path.read_bytes() == whole.read_bytes()


def test_a_file_is_resumed_without_further_epochs(tmp_path, columns, run_epochs, read_csv, summary):
    path = tmp_path / "metrics.csv"
    run_epochs(CsvTracker(path, columns), range(3))
    with CsvTracker(path, columns, resume_epoch=2) as tracker:
        tracker.finish(summary, [])
    assert len(read_csv(path)) == 4


def test_epochs_that_a_resumed_file_lacks_are_said(tmp_path, capsys, columns):
    CsvTracker(tmp_path / "gone.csv", columns, resume_epoch=4)
    assert "holds 0 of the 4 epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "columns are"), ("step,other\n1,2\n", "other"), ("{header}\n1,0,rubbish,1,1,1\n", "damaged")],
)
def test_another_file_is_not_resumed(tmp_path, columns, content, message):
    path = tmp_path / "metrics.csv"
    path.write_text(content.format(header=",".join(columns)))
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        CsvTracker(path, columns, resume_epoch=1)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_refused(tmp_path, columns):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "metrics.csv", "/dev/null"):
        with pytest.raises(InputError, match="cannot be written"):
            CsvTracker(path, columns)
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("epochs_before", [0, 2])
def test_no_row_is_lost_when_the_disk_is_full_for_a_while(tmp_path, capsys, columns, run_epochs, epochs_before):
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.csv"
    tracker = CsvTracker(path, columns)
    run_epochs(tracker, range(epochs_before))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size if path.exists() else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # ten bytes more, which is no whole line
    try:
        run_epochs(tracker, range(epochs_before, 4))
        with pytest.raises(OSError, match="lacks its last rows"):
            tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("warning") == 1
    run_epochs(tracker, [4])
    tracker.close()
    run_epochs(CsvTracker(tmp_path / "whole.csv", columns), range(5))
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
