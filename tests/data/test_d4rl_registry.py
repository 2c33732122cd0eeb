"""data.d4rl_registry: the table of ids, where their files belong, and downloads from a server that misbehaves."""

import http.server
import importlib.util
import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import pytest

from data import d4rl_registry
from utils import InputError


def hdf5_bytes() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["observations"] = [[1.0, 2.0]] * 20_000  # several of the blocks in which a download is read
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of its ``answers``, the last one for ever."""

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.stopped = answers, 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/folder/hopper_medium.hdf5"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.answers[min(self.server.requests, len(self.server.answers) - 1)]
        self.server.requests += 1
        if isinstance(answer, int):
            self.send_error(answer)
        elif answer == "silence":
            self.server.stopped.wait(20)
        elif answer == "stall":  # half of the file, then nothing more, with the connection open
            self.send_half()
            self.server.stopped.wait(20)
        elif answer == "cut":  # half of the file, then the connection is closed
            self.send_half()
        elif answer == "cut without length":
            self.send_half(announce=False)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def send_half(self, announce=True):
        body = hdf5_bytes()
        self.send_response(200)
        if announce:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts servers on loopback, and makes the pauses between attempts short."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(d4rl_registry, "PAUSE", 0.0)
    servers = []

    def start(*answers):
        server = Server(answers)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stopped.set()
        server.shutdown()
        server.server_close()


def download(server, target):
    d4rl_registry.download(server.url, target, quiet=True, timeout=(1.0, 0.2))


def test_a_good_file_arrives_whole(serve, tmp_path):
    target = tmp_path / "new" / "folder" / "hopper_medium.hdf5"
    download(serve(hdf5_bytes()), target)
    assert target.read_bytes() == hdf5_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["hopper_medium.hdf5"]


@pytest.mark.parametrize(
    "fault", [500, 503, "cut", "cut without length", "stall", "silence", b"", b"<html>log in</html>"]
)
def test_a_fault_is_followed_by_another_attempt(serve, tmp_path, fault):
    server = serve(fault, hdf5_bytes())
    download(server, tmp_path / "file.hdf5")
    assert server.requests == 2
    assert (tmp_path / "file.hdf5").read_bytes() == hdf5_bytes()


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (404, "404", 1),  # asking again is useless
        (500, "500", 3),
        ("cut", "cut off", 3),
        ("cut without length", "not a whole HDF5 file", 3),
        ("stall", "lost", 2),
        ("silence", "no answer", 2),
        (b"<html>log in</html>", "not a whole HDF5 file", 3),
    ],
)
def test_a_fault_that_stays_leaves_no_file_and_says_what_to_do(serve, tmp_path, monkeypatch, fault, reason, requests):
    if requests == 2:  # the slow faults
        monkeypatch.setattr(d4rl_registry, "ATTEMPTS", 2)
    server = serve(fault)
    with pytest.raises(InputError) as caught:
        download(server, tmp_path / "file.hdf5")
    for words in (reason, server.url, f"put the file into the folder {tmp_path} by hand"):
        assert words in str(caught.value)
    assert server.requests == requests
    assert list(tmp_path.iterdir()) == []


def test_a_refused_connection_says_what_to_do(serve, tmp_path):
    server = serve(hdf5_bytes())
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="no connection"):
        download(server, tmp_path / "file.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_not_asked_for_ever(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(d4rl_registry, "SILENCE", 0.1)
    server = serve("silence")
    with pytest.raises(InputError, match="no answer"):
        download(server, tmp_path / "file.hdf5")
    assert server.requests == 1


def test_silence_ends_within_thirty_seconds():
    # The last attempt starts before SILENCE is over, or it is not made; it may wait for both timeouts.
    last = d4rl_registry.CONNECT_TIMEOUT + d4rl_registry.READ_TIMEOUT
    assert d4rl_registry.SILENCE + d4rl_registry.PAUSE * d4rl_registry.ATTEMPTS + last < 30


def test_a_folder_that_cannot_be_made_is_named(serve, tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="taken"):
        download(serve(hdf5_bytes()), tmp_path / "taken" / "file.hdf5")


def test_a_killed_download_leaves_nothing_that_is_trusted(serve, tmp_path):
    server = serve("stall", hdf5_bytes())
    target = tmp_path / "file.hdf5"
    script = (
        "import pathlib; from data.d4rl_registry import download; "
        f"download({server.url!r}, pathlib.Path({str(target)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert any(path.stat().st_size for path in tmp_path.iterdir())  # it was killed with half of the file on disk
    assert not target.exists()
    download(server, target)
    assert target.read_bytes() == hdf5_bytes()


def test_progress_is_shown_unless_quiet(serve, tmp_path, capfd):
    server = serve(hdf5_bytes())
    download(server, tmp_path / "quiet.hdf5")
    assert capfd.readouterr() == ("", "")
    d4rl_registry.download(server.url, tmp_path / "file.hdf5")
    assert "100%" in capfd.readouterr().err


def test_fetch_downloads_once_into_d4rl_s_own_folder(serve, tmp_path, monkeypatch):
    server = serve(hdf5_bytes())
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(
        d4rl_registry, "registry", lambda: {"hopper-medium-v0": d4rl_registry.Entry(server.url, 0.0, 1.0)}
    )
    for _ in range(2):
        assert d4rl_registry.fetch("hopper-medium-v0", quiet=True) == tmp_path / "hopper_medium.hdf5"
    assert server.requests == 1


def test_cache_folder_is_d4rl_s(monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert d4rl_registry.local_path("hopper-medium-v0") == Path("/home/someone/.d4rl/datasets/hopper_medium.hdf5")
    monkeypatch.setenv("D4RL_DATASET_DIR", "/data")
    assert d4rl_registry.local_path("hopper-medium-v2") == Path("/data/hopper_medium-v2.hdf5")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("carla-lane-v0", "image observations"),
        ("minigrid-fourrooms-v0", "discrete actions"),
        ("hopper-medum-v0", "did you mean 'hopper-medium-v0'"),
    ],
)
def test_ids_that_cannot_be_used_are_refused(name, words):
    with pytest.raises(InputError, match=re.escape(words)):
        d4rl_registry.local_path(name)


def test_usable_ids_leave_out_what_is_refused():
    usable = d4rl_registry.usable_ids()
    assert len(usable) == 155 - 3 - 2  # of CARLA and of minigrid
    assert "antmaze-umaze-v0" in usable and "carla-town-v0" not in usable


def test_bundled_table_is_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))  # importing d4rl makes its folder
    package = d4rl_registry.package_table()
    if package is None:
        pytest.skip("d4rl is not installed")
    assert package == d4rl_registry.bundled_table()
    assert len(package) == 155
    assert sum(entry.min_score is not None for entry in package.values()) == 147
    assert package["hopper-medium-v0"].url.endswith("/gym_mujoco/hopper_medium.hdf5")
    assert package["hopper-medium-v0"].min_score == -20.272305


def test_the_bundled_table_serves_where_there_is_no_d4rl(monkeypatch):
    monkeypatch.setitem(sys.modules, "d4rl", None)
    monkeypatch.delitem(sys.modules, "d4rl.infos", raising=False)
    assert d4rl_registry.package_table() is None
    assert d4rl_registry.registry() == d4rl_registry.bundled_table()


def test_importing_d4rl_is_silent_and_leaves_no_trace(tmp_path):
    script = (
        "import os, sys; from data import d4rl_registry; assert 'gym' not in sys.modules; before = dict(os.environ); "
        "d4rl_registry.package_table(); assert dict(os.environ) == before; "
        "assert not set(d4rl_registry.UNNEEDED_MODULES) & set(sys.modules)"
    )
    environment = {**os.environ, "D4RL_DATASET_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_usable_id_has_the_episode_limit_that_d4rl_registers():
    for name in d4rl_registry.bundled_table():
        assert (d4rl_registry.episode_limit(name) is None) == (name.split("-")[0] in d4rl_registry.REFUSED)
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        pytest.skip("d4rl is not installed")
    registered = {}
    for file in Path(spec.origin).parent.glob("*/__init__.py"):
        pattern = r"""id=['"]([\w-]+)['"],[^)]*?max_episode_steps=(\d+)"""
        registered.update(re.findall(pattern, file.read_text(encoding="utf-8")))
    checked = {name: int(limit) for name, limit in registered.items() if name in d4rl_registry.bundled_table()}
    usable = {name: limit for name, limit in checked.items() if name.split("-")[0] not in d4rl_registry.REFUSED}
    assert len(usable) > 60  # the others are registered in loops
    assert {name: d4rl_registry.episode_limit(name) for name in usable} == usable


DIMENSIONS = {  # of D4RL's data: states and actions
    "hopper-medium-v0": ("Hopper-v4", 11, 3),
    "halfcheetah-expert-v2": ("HalfCheetah-v4", 17, 6),
    "walker2d-random-v1": ("Walker2d-v4", 17, 6),
    "pen-human-v1": ("AdroitHandPen-v1", 45, 24),
    "hammer-cloned-v0": ("AdroitHandHammer-v1", 46, 26),
    "door-expert-v0": ("AdroitHandDoor-v1", 39, 28),
    "relocate-human-v0": ("AdroitHandRelocate-v1", 39, 30),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_ids_have_the_environment_of_their_data(name):
    env_id, state_dim, action_dim = DIMENSIONS[name]
    assert d4rl_registry.gymnasium_id(name) == env_id
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    if env_id.startswith("Adroit"):
        gymnasium.register_envs(pytest.importorskip("gymnasium_robotics"))
    env = gymnasium.make(env_id)
    assert (env.observation_space.shape, env.action_space.shape) == ((state_dim,), (action_dim,))


@pytest.mark.parametrize(
    "name",
    [
        "ant-medium-v2",  # 111 state dimensions, in Gymnasium 27 or 105
        "maze2d-umaze-v1",
        "antmaze-umaze-v2",
        "kitchen-mixed-v0",
        "bullet-hopper-medium-v0",
        "flow-ring-random-v1",
        "Hopper-v5",  # no id of D4RL
        "hopper-medium-demo",
    ],
)
def test_other_ids_have_none(name):
    assert d4rl_registry.gymnasium_id(name) is None
