"""From a configuration and a dataset to what the training loop takes, with the same trajectories held out from all."""

from __future__ import annotations

from typing import NamedTuple

from config import LearnConfig
from data.splits import split_trajectories
from data.trajectories import Dataset, gather_transitions
from dynamics_model import DynamicsEnsemble
from training.batches import NormalisedRows, normalise_rows
from training.build import build_ensemble

DATA = {"hopper": "logs/hopper-200k.hdf5", "halfcheetah": "halfcheetah-medium-demo"}  # to train on, by environment
HOLDOUT_RATIO = 0.2


class Prepared(NamedTuple):
    """What the training loop takes."""

    ensemble: DynamicsEnsemble  # untrained
    train: NormalisedRows
    holdout: NormalisedRows


def prepare(config: LearnConfig, dataset: Dataset) -> Prepared:
    """Splits a dataset, builds the ensemble and normalises the rows, as ``learn_model.py`` does."""
    split = split_trajectories(dataset, split_seed=0, holdout_ratio=HOLDOUT_RATIO)
    transitions = gather_transitions(dataset, split.train)
    ensemble = build_ensemble(config, transitions)
    train = normalise_rows(ensemble, transitions)
    return Prepared(ensemble, train, normalise_rows(ensemble, gather_transitions(dataset, split.holdout)))
