"""errors: whatever a user gets wrong is one line on stderr and exit code 2; our own defects keep their traceback."""

import pytest

from cli import CommandLine, exit_on_input_error
from utils import InputError, did_you_mean


def test_input_error_ends_with_code_2_and_exactly_one_line_on_stderr(capsys):
    with pytest.raises(SystemExit) as end, exit_on_input_error():
        raise InputError("the file is\n  not YAML:\tline 3\n")

    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the file is not YAML: line 3\n"
    assert captured.out == ""


def test_input_error_leaves_no_traceback_behind():
    with pytest.raises(SystemExit) as end, exit_on_input_error():
        raise InputError("wrong")

    assert end.value.__suppress_context__ and end.value.__cause__ is None


@pytest.mark.parametrize("defect", [ValueError, RuntimeError, KeyboardInterrupt])
def test_anything_else_passes_as_it_is(defect, capsys):
    with pytest.raises(defect, match="ours"), exit_on_input_error():
        raise defect("ours")

    assert capsys.readouterr().err == ""


def test_input_error_is_a_value_error_so_that_functions_can_be_used_as_a_library():
    assert issubclass(InputError, ValueError)


def test_nothing_happens_without_an_error(capsys):
    with exit_on_input_error():
        pass

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--config"),
        (["--config", "a", "--seed", "one"], "one"),
        (["--config", "a", "--sed", "1", "--unknown"], "--unknown"),
        (["--config"], "--config"),
    ],
    ids=["missing", "type", "unknown", "no_value"],
)
def test_command_line_error_is_one_line_that_names_the_flag_and_the_way_to_help(arguments, named, capsys):
    parser = CommandLine(prog="learn_model.py")
    parser.add_argument("--config", required=True)
    parser.add_argument("--seed", type=int)

    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)

    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert named in captured.err
    assert "learn_model.py --help" in captured.err


def test_did_you_mean_names_the_closest_and_only_the_closest():
    known = ["fit_epochs", "fit_lr", "ensemble_size"]

    assert did_you_mean("fit_epoch", known) == " (did you mean 'fit_epochs'?)"
    assert did_you_mean("ensemblesize", known) == " (did you mean 'ensemble_size'?)"


def test_did_you_mean_is_silent_where_nothing_is_close():
    assert did_you_mean("zzz", ["fit_epochs"]) == ""
    assert did_you_mean("fit_epochs", []) == ""


def test_did_you_mean_takes_any_iterable():
    assert did_you_mean("fit_l", {"fit_lr": 1}) == " (did you mean 'fit_lr'?)"


def test_unknown_argument_with_a_line_break_is_one_line(capsys):
    with pytest.raises(SystemExit):
        CommandLine(prog="x").parse_args(["a\nb"])
    assert capsys.readouterr().err.count("\n") == 1
