"""member_threads: groups of members, the order of their steps, their scores and optimisers, and how threads end."""

import copy
import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from config import LearnConfig
from data.trajectories import Transitions
from deterministic_model import DeterministicEnsemble
from dynamics_model import stacked_linear
from training import member_threads, precision
from training.batches import normalise_rows
from training.build import build_ensemble
from training.loop import train_ensemble
from training.member_threads import MemberThreads, view_members
from training.optimisation import build_optimizer
from training.products import Products, has_onednn, onednn_linear
from training.scores import score_rows

# In full precision: two products that differ in a last bit may round to neighbouring numbers of bfloat16.
CONFIG = LearnConfig(ensemble_size=5, hidden_size=(16, 16), batch_size=32, fit_epochs=2, reduced_precision=0.0)
APART, TOGETHER = ("torch", "apart"), ("torch", "together")  # ways to multiply, but for the number of threads
KINDS = pytest.mark.parametrize("kind", ["deterministic", "probabilistic"])


@pytest.fixture(autouse=True)
def threads_as_before():
    """Leaves PyTorch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def transitions(rows=200):
    """A noisy linear system."""
    rng = np.random.default_rng(0)
    states, actions, noise = (rng.standard_normal((rows, width)).astype(np.float32) for width in (3, 2, 3))
    return Transitions(states, actions, 0.9 * states + 0.1 * noise, states.sum(axis=1))


def trained(config, threads, way=APART, checkpoint=None):
    """Trains with so many threads, with a holdout; gives the ensemble and the checkpoints."""
    ensemble = build_ensemble(config, transitions())
    rows = normalise_rows(ensemble, transitions())
    holdout = type(rows)(*(part if part is None else part[:60] for part in rows))
    products = Products(*way, threads)
    epochs = train_ensemble(ensemble, config, rows, holdout, checkpoint=checkpoint, products=products)
    return ensemble, [copy.deepcopy(epoch.checkpoint()) for epoch in epochs]


def untrained(config=CONFIG):
    return build_ensemble(config, transitions())


def groups_of(take_step, threads, config=CONFIG, ensemble=None, way=APART):
    """Groups of an ensemble's members, for so many threads."""
    torch.set_num_threads(threads)
    return MemberThreads(ensemble or untrained(config), config, take_step, build_optimizer, Products(*way, threads))


def no_step(group, rows, time):
    return torch.zeros(len(group.ensemble))


def in_order(rows, members=5):
    """The order in which every member sees row 0 first, then row 1, ...: a minibatch begins with its own start."""
    return torch.arange(rows).expand(members, rows)


def alive():
    """Names of the threads that train members."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("members")]


def assert_close(one, other, members):
    """Compares the first members' parameters: sums over grouped members may be rounded differently."""
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left[:members], right[:members], rtol=1e-5, atol=3e-6)


# --- What is learned ---


@KINDS
def test_the_number_of_threads_changes_rounding_only(kind):
    config = dataclasses.replace(CONFIG, kind=kind, bootstrap=True, learn_reward=True, grad_clip=1.0)

    alone, _ = trained(config, 1)

    for threads in (2, 3, 8):
        assert_close(alone, trained(config, threads)[0], members=5)
    assert_close(alone, trained(config, 2, TOGETHER)[0], members=5)


@KINDS
def test_a_member_learns_the_same_in_a_small_and_in_a_large_ensemble(kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    small, _ = trained(dataclasses.replace(config, ensemble_size=2), threads=2)

    assert_close(small, trained(config, threads=2)[0], members=2)


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN linear layer")
def test_products_of_onednn_do_not_depend_on_the_number_of_threads():
    config = dataclasses.replace(CONFIG, hidden_size=(160, 160), batch_size=160, ensemble_size=3, fit_epochs=1)

    one, two = (trained(config, threads, ("onednn", "apart"))[0] for threads in (1, 2))

    assert_close(one, two, members=3)
    assert_close(one, trained(config, 1)[0], members=3)


# --- Going on from a checkpoint ---


@KINDS
def test_a_checkpoint_goes_on_with_another_number_of_threads(kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    whole, checkpoints = trained(config, 1)

    assert_close(whole, trained(config, 3, checkpoint=checkpoints[0])[0], members=5)


@KINDS
def test_a_checkpoint_goes_on_in_the_same_bits_with_the_same_number_of_threads(kind, assert_same_weights):
    config = dataclasses.replace(CONFIG, kind=kind, bootstrap=True)
    whole, checkpoints = trained(config, 2)

    assert_same_weights(trained(config, 2, checkpoint=checkpoints[0])[0], whole)


def test_optimizer_state_is_that_of_one_optimiser_of_all_members():
    config = dataclasses.replace(CONFIG, weight_decay=0.1)
    ensemble, whole = untrained(config), untrained(config)
    with groups_of(no_step, 2, config, ensemble) as threads:
        assert [group.members for group in threads.groups] == [slice(0, 2), slice(2, 4), slice(4, 5)]
        for group in threads.groups:
            for parameter in group.ensemble.parameters():
                parameter.grad = torch.ones_like(parameter)
            group.optimizer.step()
        state = threads.optimizer_state()

    optimizer = build_optimizer(whole, config)
    for parameter in whole.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    torch.testing.assert_close(state["state"], optimizer.state_dict()["state"])
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    for stepped, expected in zip(ensemble.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(stepped, expected)  # groups are the ensemble's own memory


# --- Groups ---


@KINDS
def test_a_view_is_some_members_in_the_ensembles_own_memory(kind):
    ensemble = untrained(dataclasses.replace(CONFIG, kind=kind, learn_reward=True))

    view = view_members(ensemble, slice(1, 3), onednn_linear)

    assert type(view) is type(ensemble) and len(view) == 2
    assert view.normalisation.equals(ensemble.normalisation)
    mine, its = dict(ensemble.named_parameters()), dict(view.named_parameters())
    assert mine.keys() == its.keys()
    for name, part in its.items():
        assert torch.equal(part, mine[name][1:3])
        part.data.fill_(7.0)
        assert (mine[name][1:3] == 7).all() and not (mine[name][[0, 3, 4]] == 7).any()
    assert view.dynamics.linear is view.reward.linear is onednn_linear
    assert ensemble.dynamics.linear is ensemble.reward.linear is stacked_linear, "predictions multiply as ever"


@pytest.mark.parametrize(
    ("threads", "groups"), [(1, [5]), (2, [2, 2, 1]), (3, [1, 1, 1, 1, 1]), (5, [1] * 5), (8, [1] * 5)]
)
def test_every_thread_has_members_of_its_own_and_those_left_over_are_groups_too(threads, groups):
    with groups_of(no_step, threads) as made:
        assert [len(group.ensemble) for group in made.groups] == groups
        assert [member for group in made.groups for member in range(5)[group.members]] == [0, 1, 2, 3, 4]


def test_members_that_step_together_need_no_threads_of_their_own():
    with groups_of(no_step, 2, way=TOGETHER) as threads:
        assert [len(group.ensemble) for group in threads.groups] == [5]
        assert alive() == []


# --- The steps of an epoch ---


@pytest.mark.parametrize("way", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 32), (32, 32), (33, 32), (250, 32), (300, 7)])
def test_every_group_takes_every_minibatch_once_and_in_order(rows, batch_size, way):
    running, taken, lock = set(), {}, threading.Lock()

    def take(group, batch, time_in_epochs):
        first = group.members.start
        with lock:
            assert first not in running, "two pieces of a group ran at the same time"
            running.add(first)
        time.sleep(0.0002 * first)  # some groups are slower
        with lock:
            assert torch.equal(batch, batch[:1].expand(len(group.ensemble), -1))
            taken.setdefault(first, []).append((batch[0].tolist(), time_in_epochs))
            running.remove(first)
        return batch.double().mean(dim=1) + torch.arange(5)[group.members]

    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    with groups_of(take, 3, config, way=way) as threads:
        losses = threads.take_epoch(in_order(rows), epoch=4)
        firsts = [group.members.start for group in threads.groups]

    starts = range(0, rows, batch_size)
    expected = [(list(range(start, min(start + batch_size, rows))), 4 + start / rows) for start in starts]
    assert taken == dict.fromkeys(firsts, expected)
    # The mean over rows, not over minibatches, of which the last may be small: (rows - 1) / 2, and the member's index.
    assert losses == pytest.approx([(rows - 1) / 2 + member for member in range(5)])


def test_every_member_sees_its_own_rows():
    seen, order = {}, torch.stack([torch.arange(8).roll(member) for member in range(5)])

    def take(group, batch, time_in_epochs):
        seen.setdefault(group.members.start, []).append(batch)
        return torch.zeros(len(group.ensemble))

    with groups_of(take, 2, dataclasses.replace(CONFIG, batch_size=4)) as threads:
        threads.take_epoch(order, epoch=0)

    assert torch.equal(torch.cat([torch.cat(seen[first], dim=1) for first in (0, 2, 4)]), order)


def test_scores_are_those_of_the_whole_ensemble():
    ensemble = untrained(dataclasses.replace(CONFIG, kind="probabilistic"))
    rows = normalise_rows(ensemble, transitions())
    with groups_of(no_step, 2, ensemble=ensemble) as threads:
        scores = threads.score(rows)

    expected = score_rows(ensemble, rows)
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this PyTorch rounds no products on CPUs")
def test_steps_round_as_the_epoch_says_in_every_thread_and_scores_never(monkeypatch):
    monkeypatch.setattr(precision, "can_round", lambda is_cuda: True)
    seen = {"losses": [], "score_rows": []}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments):
            seen[name].append(torch.backends.mkldnn.matmul.fp32_precision)
            return original(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(DeterministicEnsemble, "losses")
    watch(member_threads, "score_rows")
    before = torch.backends.mkldnn.matmul.fp32_precision
    trained(dataclasses.replace(CONFIG, fit_epochs=3, reduced_precision=0.67), threads=2)

    steps = len(seen["losses"]) // 3
    assert seen["losses"] == ["bf16"] * 2 * steps + ["ieee"] * steps
    assert set(seen["score_rows"]) == {before}


# --- How threads end ---


@pytest.mark.parametrize("failing", [0, 2])
def test_what_goes_wrong_in_a_thread_reaches_the_caller_and_ends_the_others(failing):
    taken = []

    def take(group, rows, time_in_epochs):
        taken.append(group.members.start)
        if group.members.start == failing:
            raise MemoryError("no room")
        time.sleep(0.001)
        return torch.zeros(len(group.ensemble))

    config = dataclasses.replace(CONFIG, batch_size=10)
    with pytest.raises(MemoryError, match="no room"), groups_of(take, 2, config) as threads:
        threads.take_epoch(in_order(800), epoch=0)

    assert alive() == []
    assert torch.get_num_threads() == 2
    assert taken.count(failing) == 1, "a group goes no further than its mistake"
    if failing == 0:  # the caller looks at the first group first, and so has the others stop soon
        assert len(taken) < 80, "pieces that had not begun were taken all the same"


@pytest.fixture
def ctrl_c():
    """Has Ctrl-C interrupt tests that were started in the background, too, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_training_between_two_pieces():
    taken = []

    def take(group, rows, time_in_epochs):
        taken.append(rows)
        if group.members.start == 0 and rows[0, 0] == 100:  # the first step of its second piece
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        return torch.zeros(len(group.ensemble))

    config = dataclasses.replace(CONFIG, batch_size=10)
    with pytest.raises(KeyboardInterrupt), groups_of(take, 2, config) as threads:
        threads.take_epoch(in_order(800), epoch=0)

    assert alive() == []
    assert len(taken) < 120


def test_threads_that_come_later_have_as_many_threads_as_before():
    torch.set_num_threads(2)
    trained(CONFIG, threads=3)
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()

    assert seen == [2]
    assert torch.get_num_threads() == 2
