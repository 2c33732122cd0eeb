"""checkpoint: training goes on from what it saved, and from nothing that is not quite that."""

import copy
import math

import pytest
import torch

from config import LearnConfig
from training.batches import normalise_rows
from training.build import build_ensemble
from training.checkpoint import check_checkpoint
from training.loop import train_ensemble

ROWS = 100
SETTINGS = {"ensemble_size": 2, "hidden_size": (6,), "batch_size": 30, "fit_epochs": 5, "weight_decay": 0.01}


@pytest.fixture(params=["deterministic", "probabilistic"])
def training(request, linear_system):
    """An ensemble, its settings, and the checkpoint of its second epoch."""
    config = LearnConfig(kind=request.param, **SETTINGS)
    ensemble = build_ensemble(config, linear_system(ROWS))
    train = normalise_rows(ensemble, linear_system(ROWS))
    holdout = normalise_rows(ensemble, linear_system(20, seed=1))
    epochs = train_ensemble(ensemble, config, train, holdout)
    next(epochs)
    state = copy.deepcopy(next(epochs).checkpoint())
    epochs.close()
    return ensemble, config, state


def weight(state):
    return state["network"]["dynamics.weights.0"]


DAMAGE = {
    "nothing": lambda state: None,
    "a list": lambda state: [1],
    "no keys": lambda state: {},
    "an unknown key": lambda state: state | {"extra": 1},
    "epochs of text": lambda state: state | {"epochs": "2"},
    "negative epochs": lambda state: state | {"epochs": -2},
    "no epochs": lambda state: state | {"epochs": 0},
    "half epochs": lambda state: state | {"epochs": 2.0},
    "true epochs": lambda state: state | {"epochs": True},
    "more epochs than there are": lambda state: state | {"epochs": 6},
    "epochs that were not trained": lambda state: state | {"epochs": 3},
    "no network": lambda state: state | {"network": {}},
    "a network as a list": lambda state: state | {"network": [*state["network"].values()]},
    "a tensor of another shape": lambda state: weight(state).resize_(3, 3),
    "a tensor with one member only": lambda state: state["network"].update({"dynamics.weights.0": weight(state)[:1]}),
    "a tensor of another type": lambda state: state["network"].update({"dynamics.weights.0": weight(state).double()}),
    "a sparse tensor": lambda state: state["network"].update({"dynamics.weights.0": weight(state).to_sparse()}),
    "a number for a tensor": lambda state: state["network"].update({"dynamics.weights.0": 1.0}),
    "a weight that is not a number": lambda state: weight(state).view(-1)[3:4].fill_(math.nan),
    "a weight without bounds": lambda state: weight(state).view(-1)[3:4].fill_(math.inf),
    "another normalisation": lambda state: state["network"]["input_scale"].mul_(2),
    "a normalisation that is not a number": lambda state: state["network"]["input_scale"].fill_(math.nan),
    "no optimiser": lambda state: state | {"optimizer": {}},
    "an optimiser of text": lambda state: state | {"optimizer": "adam"},
    "no moments": lambda state: state["optimizer"].update(state={}),
    "moments of one parameter missing": lambda state: state["optimizer"]["state"].pop(0) and None,
    "moments of a parameter too many": lambda state: state["optimizer"]["state"].update({99: {}}),
    "moments that are empty": lambda state: state["optimizer"]["state"].update({0: {}}),
    "moments that are too short": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    "second moments that are too short": lambda state: state["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(1)),
    "moments that are too long": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(999)),
    "moments that are not finite": lambda state: state["optimizer"]["state"][1]["exp_avg"].fill_(math.inf),
    "negative second moments": lambda state: state["optimizer"]["state"][1]["exp_avg_sq"].fill_(-1.0),
    "steps that were not taken": lambda state: state["optimizer"]["state"][1]["step"].add_(1),
    "many steps": lambda state: state["optimizer"]["state"][1].update(step=torch.zeros(5)),
    "a step without a tensor": lambda state: state["optimizer"]["state"][1].update(step=8.0),
    "no best weights": lambda state: state | {"best": None},
    "best weights of another number": lambda state: state["best"]["weights"].pop() is None,
    "best weights of another shape": lambda state: state["best"]["weights"][0].resize_(1, 1, 1),
    "best weights that are not finite": lambda state: state["best"]["weights"][0].fill_(math.nan),
    "scores of another number": lambda state: state["best"]["scores"].append(1.0),
    "a score that is not a number": lambda state: state["best"].update(scores=[1.0, math.nan]),
    "a score of text": lambda state: state["best"].update(scores=[1.0, "1.0"]),
    "waiting since before the start": lambda state: state["best"].update(epochs_since_best=[0, 3]),
    "waiting for a negative time": lambda state: state["best"].update(epochs_since_best=[0, -1]),
    "failed as a number": lambda state: state["best"].update(failed=[0, 1]),
}


def test_what_training_saved_is_one_to_go_on_from(training):
    ensemble, config, state = training
    check_checkpoint(state, ensemble, config, ROWS)


def test_numbers_that_are_not_finite_are_right_in_a_member_that_has_failed(training):
    ensemble, config, state = training
    weight(state)[1] = math.nan
    state["optimizer"]["state"][0]["exp_avg"][1] = math.nan
    state["optimizer"]["state"][0]["exp_avg_sq"][1] = math.nan
    state["best"]["failed"] = [False, True]
    check_checkpoint(state, ensemble, config, ROWS)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_anything_else_is_refused(training, damage):
    ensemble, config, state = training
    changed = damage(state)
    state = changed if isinstance(changed, (dict, list)) or damage is DAMAGE["nothing"] else state
    with pytest.raises(ValueError, match=r".{10}"):
        check_checkpoint(state, ensemble, config, ROWS)
