import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import dynamics_model
from config import LearnConfig
from data.trajectories import Transitions
from deterministic_model import DeterministicNetwork
from dynamics_model import DynamicsEnsemble
from tracking.trackers import NullTracker
from training import hardware, member_threads
from training.build import build_ensemble
from training.loop import train_ensemble
from training.member_threads import MemberThreads
from training.optimisation import build_optimizer

# In full precision: two products that differ in a last bit may round to neighbouring numbers of bfloat16.
CONFIG = LearnConfig(ensemble_size=5, hidden_size=(16, 16), batch_size=32, fit_epochs=2, reduced_precision=0.0)
KINDS = pytest.mark.parametrize("probabilistic", [False, True], ids=["deterministic", "probabilistic"])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """Leaves PyTorch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def several_groups(monkeypatch) -> None:
    """Has small networks trained in as many groups as large ones."""
    monkeypatch.setattr(member_threads, "_SMALL_STEP", 0)


def transitions(rows: int = 200) -> Transitions:
    """A noisy linear system."""
    rng = np.random.default_rng(0)
    states, actions, noise = (rng.standard_normal((rows, width)).astype(np.float32) for width in (3, 2, 3))
    return Transitions(states, actions, 0.9 * states + 0.1 * noise, states.sum(axis=1))


def trained(config: LearnConfig, threads: int, **options: Any) -> DynamicsEnsemble:
    """Trains with so many threads, with a holdout."""
    torch.set_num_threads(threads)
    ensemble = build_ensemble(config, transitions())
    rows = ensemble.normalise(transitions())
    holdout = type(rows)(*(part if part is None else part[:60] for part in rows))
    train_ensemble(ensemble, config, rows, holdout, NullTracker(), **options)
    return ensemble


def assert_close(one: DynamicsEnsemble, other: DynamicsEnsemble, members: int) -> None:
    """Compares the first members' parameters: sums over grouped members may be rounded differently."""
    for left, right in zip(one.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(left[:members], right[:members], rtol=1e-5, atol=3e-6)


@KINDS
@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.usefixtures("several_groups")
def test_the_number_of_threads_changes_rounding_only(probabilistic, threads):
    config = dataclasses.replace(CONFIG, probabilistic=probabilistic, bootstrap=True, learn_reward=True, grad_clip=1.0)

    assert_close(trained(config, 1), trained(config, threads), members=5)


@KINDS
@pytest.mark.usefixtures("several_groups")
def test_a_member_learns_the_same_in_a_small_and_in_a_large_ensemble(probabilistic):
    config = dataclasses.replace(CONFIG, probabilistic=probabilistic)
    small = trained(dataclasses.replace(config, ensemble_size=2), threads=2)

    assert_close(small, trained(config, threads=2), members=2)


@pytest.mark.usefixtures("several_groups")
def test_products_of_onednn_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(dynamics_model, "USES_ONEDNN", dynamics_model._HAS_ONEDNN)
    config = dataclasses.replace(CONFIG, hidden_size=(160, 160), batch_size=160, ensemble_size=3, fit_epochs=1)

    assert_close(trained(config, 1), trained(config, 2), members=3)


@KINDS
@pytest.mark.usefixtures("several_groups")
def test_a_checkpoint_goes_on_with_another_number_of_threads(probabilistic):
    config = dataclasses.replace(CONFIG, probabilistic=probabilistic)
    saved: list[dict[str, Any]] = []
    whole = trained(config, 1, save_checkpoint=lambda state: saved.append(clone(state)))

    assert_close(whole, trained(config, 3, checkpoint=saved[0]), members=5)


@KINDS
@pytest.mark.usefixtures("several_groups")
def test_a_checkpoint_goes_on_in_the_same_bits_with_the_same_number_of_threads(probabilistic):
    config = dataclasses.replace(CONFIG, probabilistic=probabilistic, bootstrap=True)
    saved: list[dict[str, Any]] = []
    whole = trained(config, 2, save_checkpoint=lambda state: saved.append(clone(state)))
    resumed = trained(config, 2, checkpoint=saved[0])

    for left, right in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(left, right)


def clone(state: Any) -> Any:
    """Copies nested dictionaries and lists of tensors."""
    if isinstance(state, dict):
        return {name: clone(part) for name, part in state.items()}
    if isinstance(state, list):
        return [clone(part) for part in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


@pytest.mark.usefixtures("several_groups")
def test_optimizer_state_is_that_of_one_optimiser_of_all_members():
    torch.set_num_threads(2)
    config = dataclasses.replace(CONFIG, weight_decay=0.1)
    ensemble = build_ensemble(config, transitions())
    with MemberThreads(ensemble.network, config) as threads:
        assert [group.members for group in threads.groups] == [slice(0, 2), slice(2, 4), slice(4, 5)]
        for group in threads.groups:
            for parameter in group.network.parameters():
                parameter.grad = torch.ones_like(parameter)
            group.optimizer.step()
        state = threads.optimizer_state()

    whole = build_ensemble(config, transitions()).network
    optimizer = build_optimizer(whole, config)
    for parameter in whole.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    torch.testing.assert_close(state["state"], optimizer.state_dict()["state"])
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    for stepped, expected in zip(ensemble.network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(stepped, expected)  # groups are the ensemble's own memory


@pytest.mark.usefixtures("several_groups")
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 32), (32, 32), (33, 32), (250, 32), (1000, 7)])
def test_every_group_takes_every_minibatch_once_and_in_order(rows, batch_size):
    torch.set_num_threads(3)
    running, taken, lock = set(), {}, threading.Lock()

    def take(group: member_threads.MemberGroup, starts: range) -> int:
        first = group.members.start
        with lock:
            assert first not in running, "two pieces of a group ran at the same time"
            running.add(first)
        time.sleep(0.002 * first)  # some groups are slower
        with lock:
            taken.setdefault(first, []).extend(starts)
            running.remove(first)
        return len(starts)

    ensemble = build_ensemble(CONFIG, transitions())
    with MemberThreads(ensemble.network, CONFIG) as threads:
        counts = threads.map_rows(take, rows, batch_size)

    expected = list(range(0, rows, batch_size))
    assert taken == dict.fromkeys(range(5), expected)
    assert [sum(own) for own in counts] == [len(expected)] * 5


@pytest.mark.usefixtures("several_groups")
def test_scores_are_those_of_the_whole_network():
    torch.set_num_threads(2)
    config = dataclasses.replace(CONFIG, probabilistic=True)
    ensemble = build_ensemble(config, transitions())
    rows = ensemble.normalise(transitions())
    with MemberThreads(ensemble.network, config) as threads:
        scores = threads.score(rows)

    expected = ensemble.network.score(rows)
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name] == pytest.approx(values, rel=1e-5)


def member_threads_alive() -> list[str]:
    """Names of the threads that train members."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("members")]


@pytest.mark.usefixtures("several_groups")
def test_what_goes_wrong_in_a_thread_reaches_the_caller_and_ends_the_others():
    torch.set_num_threads(2)
    taken = []

    def take(group: member_threads.MemberGroup, starts: range) -> None:
        taken.append(starts)
        if group.members.start == 2:
            raise MemoryError("no room")
        time.sleep(0.01)

    network = build_ensemble(CONFIG, transitions()).network
    with pytest.raises(MemoryError, match="no room"), MemberThreads(network, CONFIG) as threads:
        threads.map_rows(take, 10_000, 10)

    assert member_threads_alive() == []
    assert len(taken) < 3 * member_threads._PIECES, "pieces that had not begun were taken all the same"
    assert torch.get_num_threads() == 2


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Has Ctrl-C interrupt tests that were started in the background, too, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("several_groups", "ctrl_c")
def test_ctrl_c_ends_training_between_two_pieces():
    torch.set_num_threads(2)
    taken = []

    def take(group: member_threads.MemberGroup, starts: range) -> None:
        taken.append(starts)
        if group.members.start == 0 and starts[0] == 1250:  # its second piece
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)

    network = build_ensemble(CONFIG, transitions()).network
    with pytest.raises(KeyboardInterrupt), MemberThreads(network, CONFIG) as threads:
        threads.map_rows(take, 10_000, 10)

    assert member_threads_alive() == []
    assert len(taken) < 3 * member_threads._PIECES


@pytest.mark.usefixtures("several_groups")
def test_threads_that_come_later_have_as_many_threads_as_before():
    trained(CONFIG, threads=2)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()

    assert seen == [2]
    assert torch.get_num_threads() == 2


def test_small_networks_go_through_each_call_together():
    torch.set_num_threads(2)
    network = build_ensemble(CONFIG, transitions()).network
    with MemberThreads(network, CONFIG) as threads:
        assert [group.members for group in threads.groups] == [slice(0, 5)]
    assert member_threads_alive() == []


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch rounds no products on CPUs")
@pytest.mark.usefixtures("several_groups")
def test_steps_round_as_the_epoch_says_in_every_thread_and_scores_never(monkeypatch):
    monkeypatch.setattr(hardware, "MULTIPLIES_BFLOAT16", True)
    seen: dict[str, list[str]] = {"losses": [], "score": []}

    def watch(name: str) -> None:
        original = getattr(DeterministicNetwork, name)

        def watched(*arguments: Any) -> Any:
            seen[name].append(torch.backends.mkldnn.matmul.fp32_precision)
            return original(*arguments)

        monkeypatch.setattr(DeterministicNetwork, name, watched)

    watch("losses")
    watch("score")
    before = torch.backends.mkldnn.matmul.fp32_precision
    trained(dataclasses.replace(CONFIG, fit_epochs=3, reduced_precision=0.67), threads=2)

    steps = len(seen["losses"]) // 3
    assert seen["losses"] == ["bf16"] * 2 * steps + ["ieee"] * steps
    assert set(seen["score"]) == {before}
