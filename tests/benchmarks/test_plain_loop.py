import pytest
import torch

from benchmarks.plain_loop import plain_member, train_steps, training_flops
from config import LearnConfig
from training.batches import draw_order, normalise_rows
from training.build import build_ensemble
from training.loop import train_ensemble


@pytest.mark.parametrize("kind", ["deterministic", "probabilistic"])
def test_the_plain_loop_learns_what_the_product_learns(kind, linear_system):
    settings = {"hidden_size": (16, 16), "fit_epochs": 3, "batch_size": 64, "fit_lr": 1e-3, "scheduler": None}
    config = LearnConfig(kind=kind, ensemble_size=2, reduced_precision=0, **settings)
    transitions = linear_system(200)
    ensemble = build_ensemble(config, transitions)
    rows = normalise_rows(ensemble, transitions)
    plain = plain_member(config, ensemble, member=1)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)

    for epoch in train_ensemble(ensemble, config, rows, score_every=None):
        train_steps(plain, optimizer, rows, draw_order(config.seed, 2, 200, epoch.index)[1], config.batch_size)

    outputs, stacked = plain(rows.inputs), ensemble.predict_change(rows.inputs.expand(2, -1, -1))
    expected = [None if part is None else part[1] for part in stacked]
    torch.testing.assert_close(list(outputs), expected, rtol=1e-4, atol=1e-4)


def test_flops_of_training():
    # Forward 2 (3 * 5 + 5 * 2) = 50; back to the weights 50; back to the inputs of the second layer 2 * 5 * 2 = 20.
    assert training_flops((3, 5, 2)) == 120
