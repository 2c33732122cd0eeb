"""dynamics_model: random streams, the list of kinds, and what planners call of an ensemble.

Many tests use members that predict a constant change, so that a value tells which member made it.
"""

import re

import numpy as np
import pytest
import torch

import dynamics_model
from deterministic_model import DeterministicModel
from dynamics_model import KINDS, Architecture, DynamicsEnsemble, random_stream
from probabilistic_model import ProbabilisticModel

# --- Random streams ---


def test_streams_differ_by_seed_member_purpose_and_epoch():
    keys = [
        (seed, member, purpose, epoch)
        for seed in (0, 1, 2**32 - 1)
        for member in (0, 1, 2)
        for purpose in ("initialisation", "order", "bootstrap", "sampling", "propagation")
        for epoch in (0, 1, 2)
    ]
    draws = {torch.rand(2, generator=random_stream(*key)).numpy().tobytes() for key in keys}
    assert len(draws) == len(keys) == 135


def test_stream_is_the_same_whatever_the_global_generators_do():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
    first = torch.rand(5, generator=random_stream(3, 1, "order", 2))
    torch.rand(10)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    before = torch.get_rng_state()

    assert torch.equal(torch.rand(5, generator=random_stream(3, 1, "order", 2)), first)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not drawn from"


def test_unknown_purpose_is_an_error():
    with pytest.raises(ValueError):
        random_stream(0, 0, "bootstrapping")


# --- The list of kinds ---


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_a_kind_know_their_name_and_their_module(kind):
    found = dynamics_model.member_class(kind)

    assert (found.__module__, found.__name__) == KINDS[kind], "pickles name it so"
    assert found.ensemble_class.kind == kind
    assert set(found.ensemble_class.disagreements) <= set(dynamics_model.DISAGREEMENTS)


# --- The ensemble ---

LEADING = [(), (1,), (7,), (1000,), (2, 3), (0,)]


@pytest.fixture
def ensemble_of(random_member):
    """Returns a function that builds an ensemble of untrained members; also the members."""

    def build(kind, size=3, seed=0, **options):
        members = [random_member(kind, member, **options) for member in range(size)]
        return DynamicsEnsemble.from_members(members, seed), members

    return build


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_ensemble_predicts_what_its_members_predict(member_class, ensemble_of, leading, draw_rows, as_tuple):
    ensemble, members = ensemble_of(member_class, layer_norm=True)
    states, actions = draw_rows(*leading)

    mean, variance = ensemble.predict(states, actions)

    assert len(ensemble) == 3 and mean.shape == (3, *leading, 3)
    for index, member in enumerate(members):
        expected = as_tuple(member(states, actions))
        torch.testing.assert_close(mean[index], expected[0], rtol=1e-5, atol=1e-5)
        if variance is not None:
            torch.testing.assert_close(variance[index], expected[1], rtol=1e-4, atol=1e-8)
    assert (variance is None) == (member_class is DeterministicModel)


def test_each_member_predicts_its_own_rows(member_class, ensemble_of, draw_rows, as_tuple):
    ensemble, members = ensemble_of(member_class)
    states, actions = draw_rows(3, 5)

    mean, variance = ensemble.predict_each(states, actions)

    assert mean.shape == (3, 5, 3) and (variance is None or variance.shape == (3, 5, 3))
    for index, member in enumerate(members):
        expected = as_tuple(member(states[index], actions[index]))[0]
        torch.testing.assert_close(mean[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_moments_are_the_prediction_with_a_variance_of_zero_for_points(member_class, ensemble_of, draw_rows, leading):
    ensemble, _ = ensemble_of(member_class)
    rows = draw_rows(*leading)

    mean, variance = ensemble.moments(*rows)

    predicted, its_variance = ensemble.predict(*rows)
    assert torch.equal(mean, predicted)
    assert torch.equal(variance, torch.zeros_like(mean) if its_variance is None else its_variance)


@pytest.mark.parametrize(
    "members",
    [[0, 1, 2], [2, 2, 2, 2], [1, 0, 2, 1, 1, 0, 1], [[2, 0], [0, 0], [1, 2]], [0] * 500 + [2], []],
    ids=lambda members: f"{len(members)} rows",
)
def test_each_row_is_predicted_by_the_member_named_for_it(member_class, ensemble_of, draw_rows, members):
    ensemble, _ = ensemble_of(member_class)
    members = torch.tensor(members, dtype=torch.long)
    states, actions = draw_rows(*members.shape)

    mean, variance = ensemble.predict_members(states, actions, members)

    assert mean.shape == variance.shape == states.shape
    everyone = ensemble.moments(states, actions)  # each (ensemble, ..., state_dim)
    for found, of_all in zip((mean, variance), everyone, strict=True):
        expected = of_all.gather(0, members[None, ..., None].expand(1, *states.shape))[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_rows_reward_is_its_own_members(member_class, ensemble_of, draw_rows):
    ensemble, _ = ensemble_of(member_class, reward=True)
    states, actions = draw_rows(4, 5)
    members = torch.arange(20).reshape(4, 5) % 3

    rewards = ensemble.predict_reward(states, actions, states + 1, members)

    expected = ensemble.predict_reward(states, actions, states + 1).gather(0, members[None])[0]
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


def test_large_batches_are_predicted_in_chunks_that_no_one_sees(member_class, ensemble_of, draw_rows, monkeypatch):
    ensemble, _ = ensemble_of(member_class, reward=True)
    states, actions = (torch.as_tensor(part) for part in draw_rows(50))
    members = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0))
    features, widths = ensemble.dynamics.features, []
    monkeypatch.setattr(ensemble.dynamics, "features", lambda rows: widths.append(rows.shape[1]) or features(rows))

    def everything(states, actions):
        of_all, of_own = ensemble.moments(states, actions), ensemble.predict_members(states, actions, members)
        rewards = ensemble.predict_reward(states, actions, states + 1)
        return torch.cat([part.flatten() for part in (*of_all, *of_own, rewards)])

    def gradients(states, actions):
        return torch.func.grad(lambda *rows: everything(*rows).square().sum(), argnums=(0, 1))(states, actions)

    whole = everything(states, actions), *gradients(states, actions)
    assert max(widths) == 50
    monkeypatch.setattr(dynamics_model, "CHUNK", 7)
    widths.clear()
    for in_chunks, at_once in zip((everything(states, actions), *gradients(states, actions)), whole, strict=True):
        torch.testing.assert_close(in_chunks, at_once, rtol=1e-4, atol=1e-4)
    assert max(widths) == 7
    mapped = torch.func.vmap(ensemble.moments, out_dims=1)(states.view(2, 25, 3), actions.view(2, 25, 2))
    for part, expected in zip(mapped, ensemble.moments(states, actions), strict=True):
        torch.testing.assert_close(part.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_selected_members_are_an_ensemble_of_copies(member_class, ensemble_of, assert_same_weights):
    ensemble, members = ensemble_of(member_class, size=5, reward=True)
    ensemble.holdout_idx, ensemble.metadata, ensemble.elites = np.array([1]), {"kind": "any"}, [3, 0, 4]

    chosen = ensemble.select(np.array([4, 1, 3]))

    assert (type(chosen), len(chosen), chosen.device) == (type(ensemble), 3, "cpu")
    for member, index in zip(chosen.members(), (4, 1, 3), strict=True):
        assert_same_weights(member, members[index])
        assert member.holdout_idx.tolist() == [1]
    assert chosen.elites == [2, 0], "members 3 and 4, the better one first, where they are now"
    assert chosen.metadata == {"kind": "any"}
    chosen.dynamics.weights[0].data.fill_(0.0)
    assert_same_weights(ensemble.members()[4], members[4])


@pytest.mark.parametrize("indices", [[], [3], [0, -1]])
def test_members_that_there_are_not_cannot_be_selected(ensemble_of, indices):
    ensemble, _ = ensemble_of(DeterministicModel)
    with pytest.raises(ValueError, match=re.escape(f"members {indices} were asked for; expected some of 0 to 2")):
        ensemble.select(indices)


def test_draws_are_those_of_the_member_named_for_each_row(constant_member):
    pairs = ([0.0, 5.0], [1.0, 4.0]), ([10.0, 0.0], [0.01, 1.0])
    ensemble = DynamicsEnsemble.from_members([constant_member(ProbabilisticModel, *pair) for pair in pairs])
    members = torch.arange(40_000) % 2

    drawn = ensemble.draw_members(np.zeros((40_000, 2)), np.zeros((40_000, 1)), members, torch.Generator())

    for member, (mean, variance) in enumerate(pairs):
        own = drawn[members == member]
        assert own.mean(dim=0).tolist() == pytest.approx(mean, abs=0.08)
        assert own.var(dim=0).tolist() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("batch", [0, 1, 6, 7, 20, 100])
def test_deals_are_what_grouping_their_members_gives(counting_ensemble, batch, size):
    ensemble, generator = counting_ensemble(size), torch.Generator().manual_seed(0)
    rows, place = ensemble.deal(batch, generator)

    assert rows.shape == (size, -(-batch // size)) and place.shape == (batch,)
    assert torch.equal(rows.flatten()[place], torch.arange(batch)), "each row is where it is said to be"
    members = place // max(rows.shape[1], 1)
    counts = torch.bincount(members, minlength=size)
    assert counts.max() - counts.min() <= 1
    zeros = torch.zeros(batch, 2), torch.zeros(batch, 1)
    for dealt in ((rows, place), members, members.numpy()):
        mean, _ = ensemble.predict_members(*zeros, dealt)
        assert mean[:, 0].tolist() == (members + 1).tolist()


@pytest.mark.parametrize(("particles", "size"), [(6, 3), (7, 3), (2, 5), (1, 1), (20, 7)])
def test_particles_are_dealt_evenly_at_every_start_and_at_random(counting_ensemble, particles, size):
    ensemble, generator = counting_ensemble(size), torch.Generator().manual_seed(0)

    dealt = ensemble.deal_members(particles, 200, generator)

    assert dealt.shape == (particles, 200)
    counts = torch.nn.functional.one_hot(dealt, size).sum(dim=0)  # (starts, members)
    assert (counts.sum(dim=1) == particles).all()
    assert (counts.amax(dim=1) - counts.amin(dim=1) <= 1).all()
    for particle in dealt:  # one that never met a member by chance: 7 * (6/7)^200 = 3e-13
        assert len(set(particle.tolist())) == min(particles, size)
    if size > 1:
        assert not torch.equal(dealt, ensemble.deal_members(particles, 200, generator))
    assert torch.equal(dealt, ensemble.deal_members(particles, 200, torch.Generator().manual_seed(0)))


def test_ensemble_gives_back_the_members_it_was_built_from(member_class, ensemble_of, assert_same_weights):
    ensemble, members = ensemble_of(member_class, reward=True, layer_norm=True)
    returned = ensemble.members()

    assert [type(member) for member in returned] == [member_class] * 3
    for built_from, given_back in zip(members, returned, strict=True):
        assert_same_weights(built_from, given_back)


def test_members_and_ensemble_share_no_weights(member_class, ensemble_of, draw_rows):
    ensemble, members = ensemble_of(member_class)
    states, actions = draw_rows(4)
    before = ensemble.predict(states, actions)[0].detach().clone()
    for member in (*members, *ensemble.members()):
        for tensor in member.state_dict().values():
            tensor.fill_(3.0)

    assert torch.equal(ensemble.predict(states, actions)[0], before)


def test_sizes_are_read_from_the_ensemble(member_class, ensemble_of):
    ensemble, _ = ensemble_of(member_class)
    assert (len(ensemble), ensemble.state_dim, ensemble.action_dim, ensemble.device) == (3, 3, 2, "cpu")
    assert type(ensemble) is member_class.ensemble_class and ensemble.kind == member_class.ensemble_class.kind


def test_ensemble_needs_a_member():
    with pytest.raises(ValueError, match="at least one member, got none"):
        DynamicsEnsemble.from_members([])


def test_members_of_two_kinds_are_not_stacked(random_member):
    members = [random_member(DeterministicModel), random_member(DeterministicModel), random_member(ProbabilisticModel)]
    with pytest.raises(ValueError, match="member 2 differs from member 0 in kind or architecture"):
        DynamicsEnsemble.from_members(members)


@pytest.mark.parametrize("options", [{"hidden_size": (8, 7)}, {"activation_fn": "relu"}, {"layer_norm": True}])
def test_members_of_two_architectures_are_not_stacked(member_class, random_member, options):
    with pytest.raises(ValueError, match="member 1 differs from member 0 in kind or architecture"):
        DynamicsEnsemble.from_members([random_member(member_class), random_member(member_class, **options)])


@pytest.mark.parametrize("name", ["input_shift", "input_scale", "delta_shift", "delta_scale", "reward_scale"])
def test_members_of_two_normalisations_are_not_stacked(member_class, constant_member, name):
    other = constant_member(member_class, [0.0, 0.0])
    getattr(other.network, name).mul_(2).add_(1)
    with pytest.raises(ValueError, match="member 1 was normalised differently from member 0"):
        DynamicsEnsemble.from_members([constant_member(member_class, [0.0, 0.0]), other])


def test_sample_of_point_predictions_is_the_prediction(ensemble_of, draw_rows):
    ensemble, _ = ensemble_of(DeterministicModel)
    states, actions = draw_rows(2, 4)
    assert torch.equal(ensemble.sample(states, actions), ensemble.predict(states, actions)[0])


def test_samples_are_repeated_by_the_seed_and_differ_from_each_other(ensemble_of, draw_rows):
    rows = draw_rows(6)
    (first, _), (again, _), (other, _) = (ensemble_of(ProbabilisticModel, seed=seed) for seed in (0, 0, 1))

    draws = [first.sample(*rows), first.sample(*rows)]

    assert draws[0].shape == (3, 6, 3)
    assert torch.equal(draws[0], again.sample(*rows)) and torch.equal(draws[1], again.sample(*rows))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other.sample(*rows))


def test_a_users_generator_gives_the_draws_and_leaves_the_ensembles_own_streams_alone(ensemble_of, draw_rows):
    (ensemble, _), (untouched, _) = ensemble_of(ProbabilisticModel), ensemble_of(ProbabilisticModel)
    states, actions = draw_rows(6)
    plans = np.stack([actions] * 3, axis=1)

    for draw in (
        lambda ensemble, **stream: ensemble.sample(states, actions, **stream),
        lambda ensemble, **stream: ensemble.rollout(states, plans, "ts1", **stream),
    ):
        streams = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
        first, again, other = (draw(ensemble, generator=stream) for stream in streams)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(draw(ensemble), draw(untouched))


def test_a_members_noise_does_not_depend_on_how_many_there_are(constant_member):
    members = [constant_member(ProbabilisticModel, [0.0, 0.0])] * 3
    rows = np.zeros((5, 2)), np.zeros((5, 1))

    three, one = (
        DynamicsEnsemble.from_members(members).sample(*rows),
        DynamicsEnsemble.from_members(members[:1]).sample(*rows),
    )

    assert torch.equal(three[:1], one)
    assert not torch.equal(three[0], three[1]), "equal members draw noise of their own"


# --- Disagreement ---

# Three members that add (0, 0), (3, 4) and (6, 8): distances 5, 5 and 10; per dimension the variances (ddof 0) are
# (9 + 0 + 9) / 3 = 6 and (16 + 0 + 16) / 3 = 32/3, which sum to 50/3. Their own variances sum to 5, 25 and
# 20.25; the largest of each dimension, 9 and 20, are not one member's.
CHANGES = ([0.0, 0.0], [3.0, 4.0], [6.0, 8.0])
VARIANCES = ([1.0, 4.0], [9.0, 16.0], [0.25, 20.0])
DISAGREEMENTS = {
    "max_pairwise": 10.0,
    "ensemble_std": (50 / 3) ** 0.5,
    "max_aleatoric": 25.0**0.5,
    "total_std": (50 / 3 + 50.25 / 3) ** 0.5,
}


@pytest.fixture
def known_ensemble(constant_member):
    def build(kind, **scales):
        pairs = zip(CHANGES, VARIANCES, strict=True)
        return DynamicsEnsemble.from_members(
            [constant_member(kind, change, variance, **scales) for change, variance in pairs]
        )

    return build


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_disagreement_by_hand(known_ensemble, kind, leading):
    states = np.random.default_rng(0).normal(size=(*leading, 2))

    measured = known_ensemble(ProbabilisticModel).disagreement(states, np.zeros((*leading, 1)), kind)

    assert measured.shape == leading
    torch.testing.assert_close(measured, torch.full(leading, DISAGREEMENTS[kind]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["max_pairwise", "ensemble_std", "total_std"])
def test_disagreement_of_point_predictions_by_hand(known_ensemble, kind):
    measured = known_ensemble(DeterministicModel).disagreement(np.zeros((4, 2)), np.zeros((4, 1)), kind)
    expected = DISAGREEMENTS["ensemble_std" if kind == "total_std" else kind]  # no variance of their own to add
    torch.testing.assert_close(measured, torch.full((4,), expected))


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_disagreement_is_in_raw_units_unless_normalised(known_ensemble, kind):
    """The numbers above are normalised ones; in raw units dimensions count 10 and 0.5 times as much."""
    ensemble = known_ensemble(ProbabilisticModel, delta_scale=[10.0, 0.5], delta_shift=[5.0, -5.0])
    rows = np.zeros((1, 2)), np.zeros((1, 1))
    raw = {
        "max_pairwise": (60**2 + 4**2) ** 0.5,
        "ensemble_std": (100 * 6 + 0.25 * 32 / 3) ** 0.5,
        "max_aleatoric": (100 * 9 + 0.25 * 16) ** 0.5,
        "total_std": (100 * (6 + 10.25 / 3) + 0.25 * (32 + 40) / 3) ** 0.5,
    }

    assert ensemble.disagreement(*rows, kind).item() == pytest.approx(raw[kind], rel=1e-5)
    assert ensemble.disagreement(*rows, kind, normalised=True).item() == pytest.approx(DISAGREEMENTS[kind], rel=1e-5)


@pytest.mark.parametrize("kind", DISAGREEMENTS)
@pytest.mark.parametrize("normalised", [False, True])
def test_constant_dimensions_do_not_disagree(known_ensemble, kind, normalised):
    ensemble = known_ensemble(ProbabilisticModel, delta_scale=[1.0, 0.0, 1.0])  # three dimensions, two outputs
    rows = np.zeros((1, 3)), np.zeros((1, 1))
    assert ensemble.disagreement(*rows, kind, normalised).item() == pytest.approx(DISAGREEMENTS[kind], rel=1e-5)


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_disagreement_of_moments_that_are_known_already(known_ensemble, kind):
    ensemble = known_ensemble(ProbabilisticModel, delta_scale=[10.0, 0.5])
    rows = np.ones((4, 2)), np.zeros((4, 1))

    assert torch.equal(
        ensemble.disagreement_of(*ensemble.moments(*rows), kind).detach(), ensemble.disagreement(*rows, kind)
    )


def test_one_member_agrees_with_itself(constant_member):
    ensemble = DynamicsEnsemble.from_members([constant_member(DeterministicModel, [3.0, 4.0])])
    for kind in ("max_pairwise", "ensemble_std"):
        assert ensemble.disagreement(np.zeros((2, 2)), np.zeros((2, 1)), kind).tolist() == [0.0, 0.0]


def test_aleatoric_disagreement_needs_probabilistic_members(known_ensemble):
    with pytest.raises(ValueError, match="max_aleatoric needs probabilistic members; use max_pairwise or ensemble_std"):
        known_ensemble(DeterministicModel).disagreement(np.zeros((1, 2)), np.zeros((1, 1)), "max_aleatoric")


def test_unknown_disagreement_names_the_known_ones(known_ensemble):
    expected = "'variance' is unknown; use max_pairwise, ensemble_std, max_aleatoric or total_std"
    with pytest.raises(ValueError, match=expected):
        known_ensemble(DeterministicModel).disagreement(np.zeros((1, 2)), np.zeros((1, 1)), "variance")


# --- Rollouts ---


@pytest.fixture
def counting_ensemble(constant_member):
    """Member m adds m + 1 to the first dimension and nothing to the second: increments tell who made a step."""

    def build(size=3, seed=0):
        members = [constant_member(DeterministicModel, [member + 1.0, 0.0]) for member in range(size)]
        return DynamicsEnsemble.from_members(members, seed)

    return build


def roll(ensemble, batch, horizon, propagation, start=0.0):
    """Returns who made each step of each row: ``(..., batch, horizon)``, members counted from 1."""
    states, actions = np.full((batch, 2), start), np.zeros((batch, horizon, 1))
    trajectories = ensemble.rollout(states, actions, propagation)
    assert trajectories.shape[-3:] == (batch, horizon + 1, 2)
    assert (trajectories[..., 0, :] == start).all() and (trajectories[..., 1] == start).all()
    return trajectories[..., 0].diff(dim=-1)


@pytest.mark.parametrize("horizon", [1, 20])
def test_tsinf_keeps_one_member_for_each_row_and_deals_them_evenly(counting_ensemble, horizon):
    made_by = roll(counting_ensemble(), 6, horizon, "tsinf")

    assert (made_by == made_by[:, :1]).all()
    assert sorted(made_by[:, 0].tolist()) == [1, 1, 2, 2, 3, 3]


def test_ts1_deals_members_anew_and_evenly_at_each_step(counting_ensemble):
    made_by = roll(counting_ensemble(), 6, 20, "ts1")

    for step in made_by.T:
        assert sorted(step.tolist()) == [1, 1, 2, 2, 3, 3]
    assert all(len(set(row.tolist())) > 1 for row in made_by), "a row that kept its member by chance: 3 in 10^9"


def test_tsinf_is_what_a_rollout_does_by_default(counting_ensemble):
    rows = np.zeros((6, 2)), np.zeros((6, 4, 1))
    assert torch.equal(counting_ensemble().rollout(*rows), counting_ensemble().rollout(*rows, "tsinf"))


def test_mean_feeds_the_mean_over_members_back(counting_ensemble):
    assert (roll(counting_ensemble(), 4, 5, "mean") == 2.0).all()


def test_member_rolls_every_member_out_on_its_own(counting_ensemble):
    made_by = roll(counting_ensemble(), 4, 5, "member")
    assert made_by.shape == (3, 4, 5)
    for member in range(3):
        assert (made_by[member] == member + 1).all()


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_rows_start_where_they_are_told_and_keep_their_order(counting_ensemble, propagation):
    starts = np.column_stack([np.arange(7) * 1000, np.arange(7)])
    trajectories = counting_ensemble().rollout(starts, np.zeros((7, 3, 1)), propagation)

    assert trajectories.dtype == torch.float32
    assert (trajectories[..., 1] == torch.arange(7.0)[:, None]).all(), "the second dimension names the row"
    assert (trajectories[..., 0] - 1000 * torch.arange(7.0)[:, None] <= 9).all()


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_actions_and_predictions_are_fed_back_step_by_step(unit_normalisation, propagation):
    """One member whose change is -s/2 + a: from 8 with actions 0, 2, 4 the states are 4, 4, 6."""
    member = DeterministicModel(Architecture(1, 1, hidden_size=()), unit_normalisation(1, 1))
    with torch.no_grad():
        member.network.dynamics.weights[0].copy_(torch.tensor([[[-0.5], [1.0]]]))

    trajectory = DynamicsEnsemble.from_members([member]).rollout(
        np.array([[8.0]]), np.array([[[0.0], [2.0], [4.0]]]), propagation
    )

    assert trajectory.flatten().tolist() == [8.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_states_are_clamped_after_each_step_before_they_are_fed_back(unit_normalisation, propagation):
    """One member whose changes are -s/2 + a and -s/2: of (8, 8), the first goes to 12, so 5, 2.5 and below 0."""
    member = DeterministicModel(Architecture(2, 1, hidden_size=()), unit_normalisation())
    with torch.no_grad():
        member.network.dynamics.weights[0].copy_(torch.tensor([[[-0.5, 0.0], [0.0, -0.5], [1.0, 0.0]]]))
    ensemble, rows = DynamicsEnsemble.from_members([member]), ([[8.0, 8.0]], [[[8.0], [0.0], [-9.0]]])

    clamped = ensemble.rollout(*map(np.array, rows), propagation, clamp=(np.array([0.0, 3.0]), np.array([5.0, 99.0])))
    free = ensemble.rollout(*map(np.array, rows), propagation)

    assert clamped.reshape(4, 2).T.tolist() == [[8.0, 5.0, 2.5, 0.0], [8.0, 4.0, 3.0, 3.0]], "the start is as given"
    assert free.reshape(4, 2).T.tolist() == [[8.0, 12.0, 6.0, -6.0], [8.0, 4.0, 2.0, 1.0]]


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_dealt_members_draw_from_their_own_distribution(constant_member, propagation):
    """Each row's first step has the variance of the member it was dealt to, which its mean tells apart."""
    changes, variances = ([0.0], [100.0]), ([1.0], [9.0])
    pairs = zip(changes, variances, strict=True)
    ensemble = DynamicsEnsemble.from_members([constant_member(ProbabilisticModel, *pair) for pair in pairs])

    first = ensemble.rollout(np.zeros((20_000, 1)), np.zeros((20_000, 1, 1)), propagation)[:, 1, 0]

    for (mean,), (variance,) in zip(changes, variances, strict=True):
        drawn = first[(first - mean).abs() < 40]
        assert len(drawn) == 10_000
        assert drawn.mean().item() == pytest.approx(mean, abs=5 * (variance / 10_000) ** 0.5)
        assert drawn.var().item() == pytest.approx(variance, rel=5 * (2 / 10_000) ** 0.5)


@pytest.mark.parametrize("propagation", ["mean", "member"])
def test_means_are_rolled_out_without_noise(known_ensemble, propagation):
    rows = np.zeros((4, 2)), np.zeros((4, 3, 1))
    point, gaussian = (
        known_ensemble(kind).rollout(*rows, propagation) for kind in (DeterministicModel, ProbabilisticModel)
    )
    assert torch.equal(point, gaussian)


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
def test_rollouts_are_repeated_by_the_seed_and_differ_from_each_other(known_ensemble, propagation):
    rows = np.zeros((6, 2)), np.zeros((6, 3, 1))
    members = known_ensemble(ProbabilisticModel).members()
    first, again, other = (DynamicsEnsemble.from_members(members, seed) for seed in (0, 0, 1))

    draws = [first.rollout(*rows, propagation) for _ in range(2)]

    assert torch.equal(draws[0], again.rollout(*rows, propagation))
    assert torch.equal(draws[1], again.rollout(*rows, propagation))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other.rollout(*rows, propagation))


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean", "member"])
def test_rollout_of_no_steps_is_the_start(counting_ensemble, propagation):
    trajectories = counting_ensemble().rollout(np.ones((4, 2)), np.zeros((4, 0, 1)), propagation)
    assert trajectories.shape == ((3, 4, 1, 2) if propagation == "member" else (4, 1, 2))
    assert (trajectories == 1).all()


@pytest.mark.parametrize(
    ("states", "actions"), [((2,), (3, 1)), ((4, 2), (4, 1)), ((4, 2), (5, 3, 1)), ((1, 4, 2), (1, 4, 3, 1))]
)
def test_rollout_of_shapes_that_do_not_fit_says_what_it_expects(counting_ensemble, states, actions):
    expected = (
        f"got states {states} and actions {actions}; expected (batch, state_dim) and (batch, horizon, action_dim)"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        counting_ensemble().rollout(np.zeros(states), np.zeros(actions))


def test_unknown_propagation_names_the_known_ones(counting_ensemble):
    with pytest.raises(ValueError, match="propagation 'ts2' is unknown; use ts1, tsinf, mean or member"):
        counting_ensemble().rollout(np.zeros((1, 2)), np.zeros((1, 1, 1)), "ts2")


def test_rollouts_keep_no_graph(member_class, ensemble_of, draw_rows):
    ensemble, _ = ensemble_of(member_class)
    states, actions = draw_rows(4)
    for propagation in ("ts1", "tsinf", "mean", "member"):
        assert not ensemble.rollout(states, np.stack([actions] * 2, axis=1), propagation).requires_grad
    assert not ensemble.sample(states, actions).requires_grad
    assert not ensemble.disagreement(states, actions, "max_pairwise").requires_grad


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
@pytest.mark.parametrize(("batch", "size"), [(7, 3), (8, 3), (10, 7), (100, 7)])
def test_members_are_dealt_evenly_where_they_do_not_divide_the_batch(counting_ensemble, propagation, batch, size):
    made_by = roll(counting_ensemble(size), batch, 10, propagation)

    for step in made_by.T:
        counts = [(step == member + 1).sum().item() for member in range(size)]
        assert sum(counts) == batch
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("propagation", ["ts1", "tsinf"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_rows_than_members_are_dealt_to_all_members_in_turn(counting_ensemble, propagation, batch):
    ensemble = counting_ensemble(5)
    made_by = torch.stack([roll(ensemble, batch, 2, propagation) for _ in range(100)])

    for row in range(batch):  # a member that one row never met by chance: 5 * 0.8^100 = 1e-9
        assert set(made_by[:, row].flatten().tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    if batch == 2:
        assert (made_by[:, 0] != made_by[:, 1]).all(), "two rows are never dealt to one member of five"


def test_rollout_with_actions_of_the_wrong_width_is_refused(counting_ensemble):
    with pytest.raises(ValueError):
        counting_ensemble().rollout(np.zeros((4, 2)), np.zeros((4, 5, 3)))
