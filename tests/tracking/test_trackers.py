import fcntl
import os
import pty
import struct
import sys
import termios
import time

import pytest

from tracking.trackers import ProgressTracker, Tracker, Trackers, warn


def test_progress_writes_some_short_lines_into_a_log_file(capsys, run_epochs):
    with ProgressTracker(200, first_epoch=50) as tracker:
        run_epochs(tracker, range(50, 200))
    lines = capsys.readouterr().err.splitlines()
    # The loss is 1 / (epoch + 1) + member: 1 / 51 + 0.5 on average; the validation error 5000 and 5001.
    assert lines[0].startswith("epoch 51/200: loss 0.5196, val 5000")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"epoch {n}/200" for n in (60, 80, 100, 120, 140, 160, 180, 200)
    ]
    assert all(line.endswith("left") for line in lines)


def test_progress_quiet_writes_nothing(capsys, run_epochs):
    with ProgressTracker(3, quiet=True) as tracker:
        run_epochs(tracker, range(3))
    assert capsys.readouterr().err == ""


def test_progress_draws_a_bar_in_a_terminal_and_warnings_above_it(monkeypatch, epoch_rows):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    with os.fdopen(child, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        rows = [row | {"val_mse": None} for row in epoch_rows(0)]
        with ProgressTracker(2) as tracker:
            tracker.log_epoch(0, rows)
            warn("the disk is full")
            time.sleep(0.11)  # tqdm draws ten times a second
            tracker.log_epoch(1, rows)
        drawn = ""
        while "2/2" not in drawn:  # a terminal gives what was written piece by piece
            drawn += os.read(parent, 10_000).decode()
    os.close(parent)
    assert "loss 1.5" in drawn
    assert "val" not in drawn
    assert "epoch 2/2:" not in drawn
    assert "\rwarning: the disk is full\r\n" in drawn  # on a line of its own, from the line's beginning


class Recorder(Tracker):
    """Remembers what it was given; one that is broken raises in the end."""

    def __init__(self, broken=False):
        self.broken, self.epochs, self.outcome, self.closed = broken, [], None, None

    def log_epoch(self, epoch, rows):
        self.epochs.append((epoch, rows))

    def finish(self, summary, artifacts):
        self.outcome = (summary, artifacts)
        if self.broken:
            raise OSError("broken")

    def close(self, failed=False, interrupted=False):
        self.closed = (failed, interrupted)
        if self.broken:
            raise OSError("broken")


def test_a_plain_tracker_ignores_everything(summary, epoch_rows, capfd):
    with Tracker() as tracker:
        tracker.log_epoch(0, epoch_rows(0))
        tracker.finish(summary, [])
    assert capfd.readouterr() == ("", "")


def test_several_trackers_are_given_the_same(tmp_path, summary, epoch_rows, run_epochs):
    recorders = [Recorder(), Recorder()]
    with Trackers(recorders) as tracker:
        run_epochs(tracker, range(2))
        tracker.finish(summary, [tmp_path])
    for recorder in recorders:
        assert recorder.epochs == [(0, epoch_rows(0)), (1, epoch_rows(1))]
        assert recorder.outcome == (summary, [tmp_path])


@pytest.mark.parametrize(
    ("error", "closed"), [(None, (False, False)), (RuntimeError, (True, False)), (KeyboardInterrupt, (True, True))]
)
def test_trackers_close_each_and_tell_how_training_ended(error, closed):
    recorders = [Recorder(), Recorder()]
    try:
        with Trackers(recorders):
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert [recorder.closed for recorder in recorders] == [closed, closed]


def test_trackers_end_the_others_when_one_breaks(summary):
    recorders = [Recorder(), Recorder(broken=True), Recorder()]
    with pytest.raises(OSError, match="broken"), Trackers(recorders) as tracker:
        tracker.finish(summary, [])
    assert [recorder.outcome for recorder in recorders] == [(summary, [])] * 3
    assert [recorder.closed for recorder in recorders] == [(True, False)] * 3
