import pandas as pd
import pytest
import torch

from benchmarks import recipes_tried


def test_a_quick_trial_measures_draws_and_leaves_what_is_published_alone(check_quick_trial):
    folder = check_quick_trial("recipes_tried")

    table = pd.read_csv(folder / "results" / "recipes_tried.csv")
    assert set(table["group"]) == set(recipes_tried.GROUPS)
    assert table[table["group"] == "hopper_dnn"]["val_mse"].nunique() == len(recipes_tried.QUICK_VARIANTS)


def test_published_tables_are_those_of_the_results(check_published):
    check_published(recipes_tried.publish, recipes_tried=False)


def test_averaged_weights_replace_the_last_ones_after_the_last_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    recipes_tried.average_weights(optimizer, steps=3)
    found = []
    for _ in range(3):
        weight.grad = torch.ones(1)
        optimizer.step()
        found.append(weight.item())
    # The average starts at -1, then -1 + (-2 + 1) / 200 = -1.005 and -1.005 + (-3 + 1.005) / 200.
    assert found == pytest.approx([-1, -2, -1.014975])
