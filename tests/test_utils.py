"""utils: devices, atomic writes, commits; and what the module may be (small, no classes, no domain)."""

import ast
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import torch

import utils
from cli import choose_device
from utils import atomic_write, git_commit

SOURCE = Path(utils.__file__)
ROOT = SOURCE.parent


# --- Devices ---


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
    with pytest.raises(ValueError, match=rf"'{name}' is not here \(CUDA devices found: {found}\).*--cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "CUDA"])
def test_unknown_device_is_an_error_that_names_the_known_ones(cuda_devices, name):
    cuda_devices(1)
    with pytest.raises(ValueError, match=re.escape(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")):
        choose_device(name)


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


# --- Seeds and commits ---


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


# --- What the module may be ---


def test_module_stays_small_has_no_class_and_imports_nothing_of_the_project():
    text = SOURCE.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    modules = {path.stem for path in ROOT.glob("*.py")}
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}

    assert len(text.splitlines()) < 100
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    assert "tempfile" in imported and not imported & modules


def test_module_knows_no_word_of_the_domain():
    words = set(re.findall(r"[a-z]+", SOURCE.read_text(encoding="utf-8").lower()))
    assert not words & {"state", "states", "action", "actions", "ensemble", "loss", "reward", "member", "trajectory"}
