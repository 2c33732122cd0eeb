import dataclasses
import pickle

import numpy as np
import pytest

from data.splits import Division, Piece, Split
from data.trajectories import Dataset, Part
from deterministic_model import DeterministicModel
from dynamics_model import FORMAT_VERSION
from evaluation.predictions import gather_rows
from evaluation.selection import (
    Model,
    check_fit,
    choose_part,
    count_known_rows,
    draw_trajectories,
    find_training_rows,
    load_models,
    select_trajectories,
    unseen_rows,
)
from utils import InputError


@pytest.fixture
def saved(tmp_path, constant_member):
    """Returns a function that writes a model of two members to a file of its name."""

    def save(name, **metadata):
        members = [constant_member(DeterministicModel, [0.0, change]) for change in (1.0, 2.0)]
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps((members, {"format_version": FORMAT_VERSION, "seed": 0, **metadata})))
        return path

    return save


def model_of(dataset, pieces=None, **split):
    """A model that was trained on a dataset, of whose trajectories or pieces it saw these."""
    parts = {side: np.array(split.get(side, []), np.int64) for side in ("train", "holdout", "test")}
    division = Division(dataset, dataset, Split(**parts), pieces)
    return Model(None, "m", None, {"dataset": {"name": dataset.name, **division.to_dict()}})


def test_models_bear_the_names_of_their_runs_or_else_of_their_files(saved):
    first, second = load_models([saved("first", run_name="run"), saved("second")], "cpu")
    assert (first.name, second.name) == ("run", "second")
    assert len(first.ensemble) == 2
    with pytest.raises(InputError, match="two of the models are of the run 'run'"):
        load_models([saved("first", run_name="run"), saved("other", run_name="run")], "cpu")


def test_files_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist; train one"):
        Model.load(tmp_path / "none.pkl", "cpu")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps("something else"))
    with pytest.raises(InputError, match="is not a model"):
        Model.load(tmp_path / "other.pkl", "cpu")


def test_models_must_fit_every_dataset(saved, walks, noisy_dataset):
    path = saved("m", dataset={"name": "walks", "env_name": "Walk-v1"})
    models, data = load_models([path], "cpu"), walks(3)
    check_fit(models, [data, noisy_dataset()])
    wide = noisy_dataset(deviation=(1.0, 1.0))
    wide.trajectories[0] = wide.trajectories[0].__class__(
        *(np.zeros((5, size), np.float32) for size in (4, 1)), np.zeros(5), np.zeros((5, 4), np.float32), False
    )
    with pytest.raises(InputError, match=r"noise has 4 state and 1 action .* trained on 2 state .* of Walk-v1"):
        check_fit(models, [data, wide])


# --- Trajectories ---


def test_trajectories_are_drawn_whole_until_there_are_enough_rows(walks):
    data = walks(*[10] * 20)
    drawn = draw_trajectories(data, np.arange(3, 20), max_rows=45, seed=0)
    assert len(drawn) == len(set(drawn)) == 5
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(range(3, 20))
    assert draw_trajectories(data, np.arange(3, 20), max_rows=10**6, seed=0).tolist() == list(range(3, 20))
    assert len(draw_trajectories(data, np.arange(20), max_rows=1, seed=0)) == 2  # standard errors need two


def test_the_part_that_the_model_knows_least_is_chosen(walks):
    def choose(asked, **split):
        dataset = walks(2, 3, 4)
        part, indices = choose_part("m", model_of(dataset, **split).division(dataset).split, "d", asked)
        return part, indices.tolist()

    assert choose(None, train=[0], holdout=[1], test=[2]) == ("test", [2])
    assert choose(None, train=[0], holdout=[1]) == ("holdout", [1])
    assert choose("train", train=[0], holdout=[1], test=[2]) == ("train", [0])
    with pytest.raises(InputError, match="--test_ratio"):
        choose(None, train=[0])
    with pytest.raises(InputError, match="no such part of 'd', only train, test"):
        choose("holdout", train=[0], test=[1])


def test_another_dataset_is_unseen_as_a_whole(walks):
    model, other = model_of(walks(5, 5), test=[1]), Dataset("other", None, "1" * 64, walks(3, 4, 6).trajectories)
    found = select_trajectories(model, other, max_rows=7, seed=0)
    assert (found.part, found.available, len(found.indices)) == ("unseen", 3, 2)
    assert len(unseen_rows(model, other, seed=0)) == 13
    own = select_trajectories(model, walks(5, 5), max_rows=7, seed=0)
    assert (own.part, own.available, own.indices.tolist()) == ("test", 1, [1])
    with pytest.raises(InputError, match="leave --split out"):
        select_trajectories(model, other, 7, seed=0, split="test")


def test_copies_of_what_the_model_knows_are_left_out_wherever_they_are(walks):
    model = model_of(walks(3, 4, 5), train=[0], test=[1], holdout=[2])
    other = Dataset("other", None, "1" * 64, walks(5, 6, 3, 4).trajectories)
    found = select_trajectories(model, other, max_rows=100, seed=0)
    assert (found.indices.tolist(), found.available, found.copies) == ([1, 3], 2, 2)
    assert len(unseen_rows(model, other, seed=0)) == 10
    counted = select_trajectories(model, other, max_rows=100, seed=0, keep_copies=True)
    assert (counted.indices.tolist(), counted.copies, counted.keeps_copies) == ([0, 1, 2, 3], 2, True)
    copies = Dataset("copies", None, "1" * 64, walks(5, 3).trajectories)
    with pytest.raises(InputError, match=r"every trajectory of 'copies' equals one that trained m .*--keep_copies"):
        select_trajectories(model, copies, max_rows=100, seed=0)


def test_rows_of_training_trajectories_are_counted_in_others(walks):
    data = walks(5, 8, start=np.array([3.0, 30.0]))
    model = model_of(data, train=[0], test=[1])
    other = Dataset("other", None, "1" * 64, walks(4, 6).trajectories)  # from 0 on; training rows are 3 to 7
    selection = select_trajectories(model, other, max_rows=100, seed=0)
    training = find_training_rows(model, data, quiet=True)
    assert count_known_rows(selection, training) == 1 + 3
    assert count_known_rows(selection, None) == 0
    assert count_known_rows(select_trajectories(model, data, 100, seed=0), training) == 0, (
        "the test's own, shared or not"
    )


def test_of_the_own_dataset_only_copies_across_sides_are_left_out(walks):
    """Versions before this one split copies like other trajectories."""
    data = walks(3, 4, 3, 5)
    model = model_of(data, train=[0], holdout=[1, 2], test=[3])
    for side, expected in (("train", [0]), ("holdout", [1]), ("test", [3])):
        assert select_trajectories(model, data, max_rows=100, seed=0, split=side).indices.tolist() == expected


def test_a_dataset_that_only_validated_is_no_unseen_one(walks):
    other = Dataset("other", None, "1" * 64, walks(5, 6).trajectories)
    model = model_of(walks(3, 4), train=[0, 1])
    model.metadata["dataset"]["holdout_dataset"] = {"name": "other", "sha256": other.sha256}
    assert select_trajectories(model, other, max_rows=100, seed=0).part == "other holdout"


def test_of_a_recording_in_blocks_the_pieces_kept_apart_are_evaluated(walks):
    recording = walks(30)
    model = model_of(recording, (Piece(0, 0, 18), Piece(0, 20, 30)), train=[0], test=[1])
    found = select_trajectories(model, recording, max_rows=100, seed=0)
    assert gather_rows(found.dataset, found.indices).states[:, 0].tolist() == list(range(20, 30))
    assert find_training_rows(model, recording, quiet=True).states[:, 0].tolist() == list(range(18))
    elsewhere = Dataset("other", None, "1" * 64, recording.trajectories)
    with pytest.raises(InputError, match="every trajectory of 'other' equals one"):
        select_trajectories(model, elsewhere, max_rows=100, seed=0)


def test_one_of_the_datasets_that_were_joined_is_known_by_its_own_split(walks):
    first, second = walks(2, 3), Dataset("second", None, "1" * 64, walks(4, 1, 5, 6).trajectories)
    parts = (Part("walks", first.sha256, 2), Part("second", second.sha256, 4))
    joined = Dataset("both", None, "2" * 64, [*first.trajectories, *second.trajectories], parts=parts)
    model = model_of(joined, train=[0, 2, 4], test=[1, 3, 5])
    assert model.dataset_names == ["walks", "second"]
    for dataset, expected in ((joined, [1, 3, 5]), (first, [1]), (second, [1, 3])):
        assert select_trajectories(model, dataset, max_rows=100, seed=0).indices.tolist() == expected
    # Joined with one that has next observations, a paired dataset loses the trajectories of a single row.
    paired = [dataclasses.replace(trajectory, next_observations=None) for trajectory in second.trajectories]
    model.metadata["dataset"]["parts"][1]["num_trajectories"] = 3
    model.metadata["dataset"] |= {"split": {"train": [0, 2], "holdout": [3], "test": [1, 4]}}
    found = select_trajectories(model, Dataset("second", None, second.sha256, paired), max_rows=100, seed=0)
    assert [len(found.dataset.trajectories[index]) for index in found.indices] == [6]


def test_training_rows_are_those_of_the_split(walks):
    data = walks(2, 3, 4)
    rows = find_training_rows(model_of(data, train=[0, 2]), data, quiet=True)
    assert rows.states[:, 0].tolist() == [0, 1, 0, 1, 2, 3]
    changed = Dataset(data.name, None, "1" * 64, data.trajectories)  # and its own is nowhere
    assert find_training_rows(model_of(data, train=[0, 2]), changed, quiet=True) is None
