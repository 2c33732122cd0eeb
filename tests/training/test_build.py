"""build: the kind that a configuration asks for, the settings of its loss, and an ensemble that fits into memory."""

import os
import re
import resource

import pytest
import torch

import dynamics_model
from config import LearnConfig
from dynamics_model import Architecture, DynamicsEnsemble
from probabilistic_model import PosthocEnsemble
from training.batches import measure_normalisation
from training.build import available_memory, build_ensemble, check_holdout, check_size, find_kind, loss_settings
from utils import InputError

# --- The kind ---


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "deterministic"),
        ({"probabilistic": True}, "probabilistic"),
        ({"kind": "deterministic"}, "deterministic"),
        ({"kind": "probabilistic"}, "probabilistic"),
        ({"kind": "probabilistic", "probabilistic": True}, "probabilistic"),
        ({"probabilistic": True, "beta_nll": 0.5, "beta_nll_decay": 0.8}, "probabilistic"),
        ({"huber_width": 0.02}, "deterministic"),
        ({"kind": "faithful", "huber_width": 0.02}, "faithful"),
        ({"kind": "posthoc", "huber_width": 0.02}, "posthoc"),
    ],
    ids=str,
)
def test_kind_is_the_one_asked_for(settings, kind):
    assert find_kind(LearnConfig(**settings)).ensemble_class.kind == kind


def test_unknown_kind_names_the_known_ones_and_the_closest():
    with pytest.raises(InputError) as error:
        find_kind(LearnConfig(kind="probabilistc"))
    known = "deterministic, probabilistic, faithful, posthoc"
    assert str(error.value) == f"kind is 'probabilistc'; expected one of {known} (did you mean 'probabilistic'?)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_nll": 0.5}, "beta_nll is 0.5; expected 0 for a deterministic ensemble"),
        ({"beta_nll": 0.5, "beta_nll_decay": 1.0}, "beta_nll is 0.5; expected 0 for a deterministic ensemble"),
        ({"kind": "deterministic", "beta_nll": 1.0}, "beta_nll is 1.0; expected 0 for a deterministic ensemble"),
        ({"kind": "faithful", "beta_nll": 1.0}, "beta_nll is 1.0; expected 0 for a faithful ensemble"),
        ({"probabilistic": True, "huber_width": 0.1}, "huber_width is 0.1; expected null for a probabilistic ensemble"),
    ],
    ids=str,
)
def test_setting_of_another_kinds_loss_is_refused(settings, message, linear_system):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        find_kind(LearnConfig(**settings))
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        build_ensemble(LearnConfig(**settings), linear_system(10))


@pytest.mark.parametrize(("kind", "rows"), [("posthoc", 5), ("posthoc", 5000), ("faithful", 0), ("deterministic", 0)])
def test_held_out_rows_are_needed_by_kinds_that_learn_from_them_alone(kind, rows):
    check_holdout(dynamics_model.member_class(kind).ensemble_class, rows)


@pytest.mark.parametrize("rows", [0, 4])
def test_kind_that_learns_from_held_out_rows_is_refused_without(rows):
    message = (
        f"a posthoc ensemble learns its variance from held-out rows, of which there are {rows}; expected at least 5, "
        "such as by --holdout_ratio 0.2"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_holdout(PosthocEnsemble, rows)


def test_settings_of_a_loss_are_the_fields_of_the_same_names(member_class):
    config = LearnConfig(probabilistic=True, beta_nll=0.5, beta_nll_decay=0.75, huber_width=0.1)

    found = loss_settings(member_class.ensemble_class, config)

    own = {"probabilistic": {"beta_nll": 0.5, "beta_nll_decay": 0.75}}
    assert found == own.get(member_class.ensemble_class.kind, {"huber_width": 0.1})


def test_setting_that_no_field_has_is_a_mistake_of_ours():
    class Other(DynamicsEnsemble):
        def losses(self, inputs, targets, progress=0.0, *, unheard_of=1.0):
            raise NotImplementedError

    with pytest.raises(AttributeError, match="unheard_of"):
        loss_settings(Other, LearnConfig())


# --- The ensemble ---


def test_ensemble_is_what_the_configuration_says(member_class, linear_system):
    transitions = linear_system(50)
    config = LearnConfig(
        kind=member_class.ensemble_class.kind,
        ensemble_size=3,
        hidden_size=(8, 4),
        activation_fn="relu",
        layer_norm=True,
        learn_reward=True,
        reward_hidden_size=(5,),
        seed=3,
    )

    ensemble = build_ensemble(config, transitions)

    assert type(ensemble) is member_class.ensemble_class and len(ensemble) == 3
    assert ensemble.normalisation.equals(measure_normalisation(transitions))
    architecture = ensemble.architecture
    assert (architecture.state_dim, architecture.action_dim) == (3, 2)
    assert (architecture.hidden_size, architecture.reward_hidden_size) == ((8, 4), (5,))
    assert (architecture.activation_fn, architecture.layer_norm) == ("relu", True)
    assert build_ensemble(LearnConfig(hidden_size=(8,)), transitions).reward is None


def test_start_depends_on_seed_and_member_alone(member_class, linear_system, assert_same_weights):
    transitions, kind = linear_system(50), member_class.ensemble_class.kind
    settings = {"kind": kind, "hidden_size": (8,), "learn_reward": True}

    three, two, other = (
        build_ensemble(LearnConfig(**settings, ensemble_size=size, seed=seed), transitions)
        for size, seed in ((3, 1), (2, 1), (2, 2))
    )

    for index in range(2):
        assert_same_weights(three.members()[index], two.members()[index])
    for weights in (two.dynamics.weights[0], two.reward.weights[0]):
        assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(two.dynamics.weights[0], other.dynamics.weights[0])


def test_draws_are_those_of_the_seed(linear_system):
    transitions = linear_system(20)
    config = LearnConfig(probabilistic=True, ensemble_size=2, hidden_size=(), seed=5)
    ensemble = build_ensemble(config, transitions)
    same = DynamicsEnsemble.from_members(ensemble.members(), seed=5)
    rows = transitions.states, transitions.actions

    assert torch.equal(ensemble.sample(*rows), same.sample(*rows))
    assert not torch.equal(ensemble.sample(*rows), DynamicsEnsemble.from_members(ensemble.members()).sample(*rows))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"ensemble_size": 10_000, "hidden_size": (4096,) * 3}, "[4096, 4096, 4096]"),
        ({"hidden_size": (65_536,) * 9}, "[65536, "),
    ],
)
def test_ensemble_that_cannot_fit_into_memory_is_refused_before_it_is_built(settings, layers, linear_system):
    with pytest.raises(
        InputError, match=re.escape(layers) + ".* GiB to train, this process may have .*; lower ensemble_"
    ):
        build_ensemble(LearnConfig(**settings), linear_system(10))


def test_memory_is_that_of_weights_gradients_moments_best_weights_and_checkpoint(monkeypatch):
    """8 * 5 + 6 * 8 + heads * 3 * 6 weights of a member, 6 floats of 4 bytes for each."""
    point, gaussian = 24 * (40 + 48 + 18), 24 * (40 + 48 + 36)
    architecture = Architecture(3, 2, hidden_size=(8, 6))
    config = LearnConfig(ensemble_size=5, hidden_size=(8, 6))
    for heads, needed in ((1, 5 * point), (2, 5 * gaussian)):
        monkeypatch.setattr("os.sysconf", lambda name, needed=needed: {"SC_PAGE_SIZE": 1}.get(name, needed))
        check_size(config, architecture, heads)
        monkeypatch.setattr("os.sysconf", lambda name, needed=needed: {"SC_PAGE_SIZE": 1}.get(name, needed - 1))
        with pytest.raises(InputError, match="5 members with layers"):
            check_size(config, architecture, heads)


def test_memory_may_be_limited_to_less_than_the_machine_has():
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    before, limit = resource.getrlimit(resource.RLIMIT_AS), available_memory() - 4096
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert available_memory() == limit
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
