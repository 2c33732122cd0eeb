"""cli: a mistake is one line on stderr and exit code 2; signals, outputs and devices that commands share."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cli import (
    CommandLine,
    check_output_file,
    check_output_folder,
    choose_device,
    exit_on_input_error,
    exit_when_out_of_memory,
    interruptible,
)
from utils import InputError

# --- Mistakes ---


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


def test_unknown_argument_with_a_line_break_is_one_line(capsys):
    with pytest.raises(SystemExit):
        CommandLine(prog="x").parse_args(["a\nb"])
    assert capsys.readouterr().err.count("\n") == 1


# --- Memory ---


@pytest.mark.parametrize(
    "ask",
    [
        lambda: np.empty(2**50),
        lambda: torch.empty(2**50),
        lambda: [0] * 2**50,
        lambda: os.read(os.open("/dev/zero", 0), 2**50),
    ],
    ids=["numpy", "torch", "list", "bytes"],
)
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(ask, capsys):
    with pytest.raises(SystemExit) as end, exit_when_out_of_memory("lower batch_size"):
        ask()
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: not enough memory; lower batch_size\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
        ),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "driver", "cublas"],
)
def test_a_full_gpu_is_told_apart(error, capsys):
    with pytest.raises(SystemExit) as end, exit_when_out_of_memory("lower batch_size"):
        raise error
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: not enough memory on the GPU; lower batch_size\n"


@pytest.mark.parametrize("defect", [RuntimeError, OSError, ValueError])
def test_other_errors_are_not_taken_for_memory(defect):
    with pytest.raises(defect, match="ours"), exit_when_out_of_memory(""):
        raise defect("ours")


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_and_is_listed(number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible() as received:
        assert received == []
        os.kill(os.getpid(), number)

    assert received == [number]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_finaliser_swallows_is_listed_all_the_same():
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with interruptible() as received:
        Finalised()
        assert received == [signal.SIGTERM]


# --- Outputs ---


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """The folder where relative paths lead, with a file and a folder in it; a test may change nothing."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    Path("folder").mkdir()
    yield tmp_path
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert Path("file").read_text() == "precious"


@pytest.mark.parametrize("path", ["model.pkl", "file", "folder/model.pkl", "new/folders/model.pkl"])
def test_a_file_may_be_new_or_replaced(working_folder, path):
    check_output_file(Path(path), "--csv")
    check_output_file(working_folder / path, "--csv")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("folder", "--csv 'folder' is a folder or a device; give the name of a file"),
        ("/dev/null", "--csv '/dev/null' is a folder or a device; give the name of a file"),
        (
            "file/model.pkl",
            "--csv 'file/model.pkl' cannot be written ({here}/file: Not a directory); give another path",
        ),
        ("/proc/model.pkl", "--csv '/proc/model.pkl' cannot be written (/proc: No such file or directory); give"),
        ("a" * 300, "cannot be written (.: File name too long); give another path"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(working_folder, path, words):
    with pytest.raises(InputError, match=re.escape(words.format(here=working_folder))):
        check_output_file(Path(path), "--csv")


@pytest.mark.parametrize("path", ["report", "folder", "new/report"])
def test_a_folder_may_be_new_or_empty(working_folder, path):
    check_output_folder(Path(path), is_ours=False, expected="a report")


def test_a_folder_with_earlier_results_may_be_written_again_and_no_other(working_folder):
    check_output_folder(Path(), is_ours=True, expected="a report")
    with pytest.raises(
        InputError, match=re.escape("--output '.' holds other files than a report; give a new or empty")
    ):
        check_output_folder(Path(), is_ours=False, expected="a report")


def test_hidden_files_do_not_make_a_folder_full(tmp_path):
    (tmp_path / ".gitkeep").touch()
    check_output_folder(tmp_path, is_ours=False, expected="a report")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file", "--output 'file' is a file; give a folder"),
        ("file/report", "--output 'file/report' cannot be made in '{here}/file'; give another folder"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused(working_folder, path, words):
    with pytest.raises(InputError, match=re.escape(words.format(here=working_folder))):
        check_output_folder(Path(path), is_ours=False, expected="a report")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(InputError, match=re.escape("'/proc/new' cannot be made in '/proc'")):
        check_output_folder(Path("/proc/new"), is_ours=False, expected="a report")


# --- Device ---


@pytest.fixture
def cuda_devices(monkeypatch):
    """Returns a function that makes PyTorch count that many CUDA devices."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("count", "chosen"), [(0, "cpu"), (1, "cuda:0"), (2, "cuda:0")])
def test_auto_takes_the_first_cuda_device_where_there_is_one(cuda_devices, count, chosen):
    cuda_devices(count)
    assert choose_device("auto") == chosen


def test_named_device_is_taken_and_cuda_is_the_first(cuda_devices):
    cuda_devices(2)
    chosen = [choose_device(name) for name in ("cpu", "cuda", "cuda:0", "cuda:1")]
    assert chosen == ["cpu", "cuda:0", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_cuda_that_is_not_there_is_an_error_and_never_the_cpu(cuda_devices, count, name):
    cuda_devices(count)
    found = "none" if count == 0 else "cuda:0, cuda:1"
    with pytest.raises(InputError, match=rf"'{name}' is not here \(CUDA devices found: {found}\).*--cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "CUDA"])
def test_unknown_device_is_an_error_that_names_the_known_ones(cuda_devices, name):
    cuda_devices(1)
    with pytest.raises(InputError, match=re.escape(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")):
        choose_device(name)
