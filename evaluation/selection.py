"""Which models are evaluated, and on which trajectories: those that they have not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dynamics_model
from data.sources import load_datasets
from data.splits import Division, Split, row_keys, unlike
from data.trajectories import Dataset, Transitions
from dynamics_model import DynamicsEnsemble
from evaluation.model_metadata import check_metadata
from evaluation.predictions import Rows, gather_rows
from utils import InputError

MAX_ROWS = 50_000  # of the evaluated dataset; where there are more, whole trajectories are drawn
MAX_OTHER_ROWS = 10_000  # the same for every other dataset, and for every cell of the table across datasets


@dataclass(frozen=True)
class Model:
    """A ``model.pkl``, loaded.

    Attributes:
        path: The file.
        name: Name of the run that trained it.
        ensemble: Its members.
        metadata: The file's metadata.
    """

    path: Path
    name: str
    ensemble: DynamicsEnsemble
    metadata: dict[str, Any]

    @classmethod
    def load(cls, path: Path, device: str) -> Model:
        """Loads one ``model.pkl``.

        Raises:
            InputError: If it does not exist or is something else.
        """
        try:
            members, metadata = dynamics_model.load_models(path)
            ensemble = DynamicsEnsemble.from_members(members, metadata["seed"]).to(device)
        except FileNotFoundError:
            raise InputError(f"model {str(path)!r} does not exist; train one with learn_model.py") from None
        except (OSError, ValueError) as error:
            raise InputError(str(error) if str(path) in str(error) else f"{str(path)!r}: {error}") from None
        kind = members[0].network.kind
        check_metadata(metadata, f"model {str(path)!r}", kind, len(members))
        trained_on = {"name": "unknown", "env_name": None, "sha256": None, "split": {}, **metadata.get("dataset", {})}
        metadata = {"kind": kind, "config": {}, "elites": list(range(len(members))), **metadata, "dataset": trained_on}
        return cls(path, metadata.get("run_name") or path.stem, ensemble, metadata)

    @property
    def dataset_names(self) -> list[str]:
        """Names of the datasets that it was trained on."""
        trained_on = self.metadata["dataset"]
        return [part["name"] for part in trained_on.get("parts") or [trained_on]]

    def division(self, dataset: Dataset) -> Division | None:
        """Returns how the dataset was divided to train the model; None if it did not train it, or has changed since."""
        return Division.restore(dataset, self.metadata["dataset"])

    def was_trained_on(self, dataset: Dataset) -> bool:
        """Whether trajectories of this dataset trained the model."""
        return self.division(dataset) is not None


@dataclass(frozen=True)
class Selection:
    """Trajectories to evaluate on, and what they were to the model when it was trained.

    Attributes:
        dataset: The dataset that they are of; if training cut it into pieces, these pieces are its trajectories.
        indices: Sorted indices of the trajectories.
        part: ``test``, ``holdout``, ``train``, ``unseen``, or ``other holdout`` for a dataset that only validated.
        available: Trajectories that could be evaluated on, of which ``indices`` are a random draw if they are too many.
        copies: Trajectories of that part that equal some that trained the model (or, if it is ``unseen``, selected its
            weights).
        keeps_copies: Whether ``available`` counts these copies; if not, they were left out.
    """

    dataset: Dataset
    indices: np.ndarray
    part: str
    available: int
    copies: int = 0
    keeps_copies: bool = False


# --- Loading ---


def load_models(paths: Iterable[Path], device: str) -> list[Model]:
    """Loads every ``model.pkl``.

    Raises:
        InputError: If one does not exist or is something else, or two are of one run.
    """
    models = [Model.load(path, device) for path in paths]
    names = [model.name for model in models]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two of the models are of the run {repeated!r}; give every model once")
    return models


def check_fit(models: Iterable[Model], datasets: Sequence[Dataset]) -> None:
    """Checks that the dimensions of every model are those of every dataset.

    Raises:
        InputError: If they are not.
    """
    for dataset in datasets:
        for model in models:
            expected, found = (
                f"{part.state_dim} state and {part.action_dim} action dimensions" for part in (model.ensemble, dataset)
            )
            if found != expected:
                trained_on = model.metadata["dataset"]
                raise InputError(
                    f"{dataset.name} has {found}, but {str(model.path)!r} was trained on {expected}; give a dataset of "
                    f"{trained_on['env_name'] or trained_on['name']}"
                )


def find_training_rows(model: Model, dataset: Dataset, quiet: bool) -> Transitions | None:
    """Returns the rows that a model was trained on, from the given dataset or its own.

    Returns:
        None where the model's dataset is not here any more, or not in the version that it was trained on.
    """
    if dataset.sha256 != model.metadata["dataset"]["sha256"]:
        try:
            dataset = load_datasets(model.dataset_names, quiet=quiet)
        except InputError:
            return None
    if dataset.sha256 != model.metadata["dataset"]["sha256"]:
        return None
    return model.division(dataset).training()


def count_known_rows(selection: Selection, training: Transitions | None) -> int:
    """Returns how many rows of an unseen dataset equal training rows; 0 if the training rows are not here.

    Trajectories that are copies as a whole are left out already: these rows are in trajectories that were cut or
    ordered differently.
    """
    if training is None or selection.part != "unseen" or selection.keeps_copies:
        return 0
    rows = gather_rows(selection.dataset, selection.indices)
    known = row_keys(training.states, training.actions)
    return int(np.isin(row_keys(rows.states, rows.actions), known).sum())


# --- Selecting ---


def select_trajectories(
    model: Model, dataset: Dataset, max_rows: int, seed: int, split: str | None = None, keep_copies: bool = False
) -> Selection:
    """Chooses the trajectories that the model knows least, or those asked for; draws from them if they are too many.

    Args:
        model: The model to evaluate.
        dataset: The dataset to evaluate it on.
        max_rows: Transitions that are enough.
        seed: Seed of the draw.
        split: The part asked for: ``test``, ``holdout`` or ``train``.
        keep_copies: Whether to keep trajectories that equal some that trained the model or selected its weights.

    Raises:
        InputError: If there is no such trajectory.
    """
    trained_on = model.metadata["dataset"]
    division = model.division(dataset)
    if division is not None:
        part, indices = choose_part(model.name, division.split, dataset.name, split)
        dataset = division.dataset
    elif split is None:
        validated = trained_on.get("holdout_dataset") or {"sha256": None}
        part = "other holdout" if dataset.sha256 == validated["sha256"] else "unseen"
        indices = np.arange(len(dataset.trajectories))
    else:
        raise InputError(
            f"--split {split} is for the dataset the model was trained on, {trained_on['name']!r}; all of "
            f"{dataset.name!r} is unseen: leave --split out"
        )
    known = trained_on.get("fingerprints", {"train": [], "holdout": []})
    better_known = {"train": [], "holdout": known["train"], "other holdout": known["train"]}
    is_new = unlike(
        [dataset.trajectories[index] for index in indices], better_known.get(part, known["train"] + known["holdout"])
    )
    copies = len(indices) - len(is_new)
    if copies and not keep_copies:
        indices = indices[is_new]
    if not sum(dataset.trajectories[index].num_transitions for index in indices):
        raise InputError(
            f"every trajectory of {dataset.name!r} equals one that trained {model.name} or selected its weights; give "
            "other data, or evaluate on these by --keep_copies"
        )
    drawn = draw_trajectories(dataset, indices, max_rows, seed)
    return Selection(dataset, drawn, part, len(indices), copies, keep_copies)


def choose_part(model_name: str, split: Split, name: str, asked: str | None) -> tuple[str, np.ndarray]:
    """Chooses a part of the dataset that a model was trained on: the one asked for, else test, else the holdout.

    Returns:
        The part and the indices of its trajectories.

    Raises:
        InputError: If the model's split has no such part.
    """
    parts = {field.name: getattr(split, field.name) for field in dataclasses.fields(split)}
    parts = {part: indices for part, indices in parts.items() if indices.size}
    chosen = asked or next((part for part in ("test", "holdout") if part in parts), None)
    if chosen is None:
        raise InputError(
            f"{model_name} was trained on all of {name!r}; train with --test_ratio 0.2, give another dataset, or look "
            "at what it has seen with --split train"
        )
    if chosen not in parts:
        raise InputError(f"--split {asked}: {model_name} has no such part of {name!r}, only {', '.join(parts)}")
    return chosen, parts[chosen]


def draw_trajectories(dataset: Dataset, indices: Sequence[int] | np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """Draws whole trajectories until there are ``max_rows`` transitions; all of them where there are fewer.

    Returns:
        Sorted indices, at least two where there are two.
    """
    order = np.random.default_rng(seed).permutation(np.asarray(indices, dtype=np.int64))
    rows_before = np.cumsum([0, *(dataset.trajectories[index].num_transitions for index in order)])[:-1]
    return np.sort(order[(rows_before < max_rows) | (np.arange(len(order)) < 2)])


def unseen_rows(model: Model, dataset: Dataset, seed: int) -> Rows:
    """Returns rows of a dataset that a model was not trained on.

    Raises:
        InputError: If it was trained on all of them.
    """
    selection = select_trajectories(model, dataset, MAX_OTHER_ROWS, seed)
    return gather_rows(selection.dataset, selection.indices)
