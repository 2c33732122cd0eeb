"""utils: near misses, atomic writes, origins; and what the module may be (small, without a word of the domain)."""

import ast
import os
import platform
import re
import stat
import subprocess
from pathlib import Path

import numpy
import pytest

import utils
from utils import InputError, Origin, atomic_write, did_you_mean, git_commit, read_file

SOURCE = Path(utils.__file__)
ROOT = SOURCE.parent


# --- Near misses ---


def test_did_you_mean_names_the_closest_and_only_the_closest():
    known = ["fit_epochs", "fit_lr", "ensemble_size"]

    assert did_you_mean("fit_epoch", known) == " (did you mean 'fit_epochs'?)"
    assert did_you_mean("ensemblesize", known) == " (did you mean 'ensemble_size'?)"


def test_did_you_mean_is_silent_where_nothing_is_close():
    assert did_you_mean("zzz", ["fit_epochs"]) == ""
    assert did_you_mean("fit_epochs", []) == ""


def test_did_you_mean_takes_any_iterable():
    assert did_you_mean("fit_l", {"fit_lr": 1}) == " (did you mean 'fit_lr'?)"


# --- Atomic writes ---


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "model.pkl"
    with atomic_write(path) as file:
        file.write(b"first half, ")
        file.flush()
        assert not path.exists(), "a reader sees no half-written file"
        file.write(b"second half")

    assert path.read_bytes() == b"first half, second half"
    assert names_in(tmp_path) == ["model.pkl"]


def test_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new and longer")
        file.flush()
        assert path.read_bytes() == b"old"

    assert path.read_bytes() == b"new and longer"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False], ids=["replacing", "new"])
def test_failed_write_keeps_what_was_there_and_leaves_no_temporary_file(tmp_path, error, existed):
    path = tmp_path / "model.pkl"
    if existed:
        path.write_bytes(b"old")

    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error

    assert names_in(tmp_path) == (["model.pkl"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_failed_replacement_leaves_no_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "folder") as file:
        file.write(b"x")

    assert names_in(tmp_path) == ["folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_file_the_user_makes(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "model.pkl") as file:
            file.write(b"x")
        assert os.umask(umask) == umask, "the process keeps its umask"
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "model.pkl").stat().st_mode) == mode


def test_missing_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "model.pkl") as file:
        file.write(b"x")

    assert (tmp_path / "a" / "b" / "model.pkl").read_bytes() == b"x"


def test_bare_file_name_goes_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("model.pkl") as file:
        file.write(b"x")

    assert names_in(tmp_path) == ["model.pkl"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    with atomic_write(tmp_path / "config.yaml", "w") as file:
        file.write("β: 1\n")

    assert (tmp_path / "config.yaml").read_bytes() == b"\xce\xb2: 1\n"


def test_content_is_on_disk_before_it_replaces_the_old_file(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("synced") or sync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append("replaced") or replace(self, target))
    with atomic_write(tmp_path / "model.pkl") as file:
        file.write(b"x")

    assert events == ["synced", "replaced"]


# --- Origin ---


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def outside_any_repository(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # set where a hook of git runs the tests
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_commit_is_the_full_hash_with_a_plus_where_files_differ(outside_any_repository):
    folder = outside_any_repository
    git(folder, "init")
    (folder / "file").write_text("one")
    git(folder, "add", "file")
    git(folder, "commit", "-m", "first")
    git(folder, "tag", "-a", "v1", "-m", "a tag, which is not what identifies a commit")
    commit = git(folder, "rev-parse", "HEAD")
    assert len(commit) == 40

    assert git_commit(folder) == commit
    (folder / "file").write_text("two")
    assert git_commit(folder) == commit + "+"


def test_commit_is_none_outside_a_repository(outside_any_repository):
    assert git_commit(outside_any_repository) is None


def test_commit_is_none_in_a_repository_without_commits(outside_any_repository):
    git(outside_any_repository, "init")
    assert git_commit(outside_any_repository) is None


def test_commit_is_none_where_git_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(ROOT) is None


def test_commit_is_none_in_a_folder_that_does_not_exist(tmp_path):
    assert git_commit(tmp_path / "missing") is None


def test_origin_is_the_commit_of_this_code_and_the_versions_of_what_decides_numbers():
    origin = Origin.here()

    assert origin.git_commit == git_commit(ROOT)
    assert list(origin.versions) == ["python", "torch", "numpy"]
    assert origin.versions["python"] == platform.python_version()
    assert origin.versions["numpy"] == numpy.__version__


def test_text_that_utf8_cannot_express_is_written_escaped(tmp_path):
    with atomic_write(tmp_path / "file", "w") as file:
        file.write("caf\u00e9 \udcff")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "caf\u00e9 \\udcff"


# --- Reading ---


def test_files_are_read_and_what_is_none_is_refused_without_waiting_for_it(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_file(tmp_path / "file") == b"content"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "missing", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"\w"):
            read_file(path)


# --- What the module may be ---


def test_input_error_is_a_value_error_for_those_who_call_functions_from_their_own_code():
    assert issubclass(InputError, ValueError)


def test_module_stays_small():
    text = SOURCE.read_text(encoding="utf-8")
    classes = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}

    assert len(text.splitlines()) < 100
    assert classes <= {"InputError", "Origin"}


def test_module_knows_no_word_of_the_domain():
    words = set(re.findall(r"[a-z]+", SOURCE.read_text(encoding="utf-8").lower()))
    assert not words & {"state", "states", "action", "actions", "ensemble", "loss", "reward", "member", "trajectory"}
