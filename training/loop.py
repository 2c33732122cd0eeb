"""The training loop.

    for epoch in train_ensemble(ensemble, config, train, holdout):
        print(epoch.index, epoch.losses, epoch.holdout_scores["mse"])

It yields the results of each epoch; the caller logs and saves them, and stops training by leaving the loop. How members
are spread over threads is in ``member_threads.py``; what an ensemble is trained on is its kind's ``losses``. Kinds with
``holdout_losses`` are completed at the end, by ``learn_from_holdout``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsEnsemble
from training.batches import NormalisedRows, draw_bootstrap, draw_order
from training.best_weights import BestWeights
from training.build import JUDGED_BY, check_holdout, loss_settings
from training.checkpoint import checkpoint_state
from training.member_threads import MemberGroup, MemberThreads
from training.optimisation import build_optimizer, clip_gradients, learning_rate
from training.precision import product_precision, reduced_epochs
from training.products import Products, default_products
from training.scores import Epoch


def train_ensemble(
    ensemble: DynamicsEnsemble,
    config: LearnConfig,
    train: NormalisedRows,
    holdout: NormalisedRows | None = None,
    *,
    score_every: int | None = 50,
    checkpoint: dict[str, Any] | None = None,
    optimizer: Callable[[DynamicsEnsemble, LearnConfig], torch.optim.Optimizer] = build_optimizer,
    products: Products | None = None,
) -> Iterator[Epoch]:
    """Trains all members at once, in place, epoch by epoch; with a holdout, each ends with its best weights.

    A member whose numbers are no longer finite has failed: it ends with its last good weights, the others go on as if
    nothing had happened, and it is not among the ensemble's elites afterwards.

    Args:
        ensemble: What to train; its device is where ``train`` and ``holdout`` are.
        config: Settings.
        train: Training rows.
        holdout: Rows that select weights and stop training; None trains to the end.
        score_every: Training rows are scored every so many epochs, in the first and in the last; None never does.
        checkpoint: State of an interrupted training, which then ends in the same bits as if it had never stopped; None
            starts anew.
        optimizer: Builds the optimiser of a group of members.
        products: How to multiply; None takes what the configuration says, or else the default.

    Yields:
        The results of each epoch.

    Raises:
        FloatingPointError: At the end, if all members have failed.
    """
    check_holdout(type(ensemble), 0 if holdout is None else len(holdout.inputs))
    ensemble.requires_grad_(True)
    rows, is_cuda = len(train.inputs), train.inputs.is_cuda
    best = BestWeights(ensemble, config.patience)
    bootstrap = draw_bootstrap(config.seed, len(ensemble), rows) if config.bootstrap else None
    losses = partial(type(ensemble).losses, **loss_settings(type(ensemble), config))
    step = partial(take_step, config, losses, train)

    if products is None:
        products = default_products() if config.products is None else Products.parse(config.products)

    with MemberThreads(ensemble, config, step, optimizer, products) as threads:
        if checkpoint is not None:
            ensemble.load_state_dict(checkpoint["network"])
            threads.load_optimizer_state(checkpoint["optimizer"])
            best.load_state_dict(checkpoint["best"])
        for epoch in range(checkpoint["epochs"] if checkpoint is not None else 0, config.fit_epochs):
            if all(best.stopped):
                break
            order = draw_order(config.seed, len(ensemble), rows, epoch)  # (ensemble, rows)
            if bootstrap is not None:
                order = bootstrap.gather(1, order)
            with product_precision(epoch < reduced_epochs(config, is_cuda), is_cuda):
                reported = threads.take_epoch(order.to(ensemble.device), epoch)

            holdout_scores = threads.score(holdout) if holdout is not None else {}
            best.update(ensemble, reported, holdout_scores.get("mse"))
            is_end = epoch in (0, config.fit_epochs - 1) or all(best.stopped)
            is_scored = score_every is not None and (is_end or (epoch + 1) % score_every == 0)
            train_scores = threads.score(train) if is_scored else {}
            state = partial(checkpoint_state, epoch + 1, ensemble, threads, best)
            yield Epoch(epoch, reported, train_scores, holdout_scores, tuple(best.failed), state)
    ensemble.elites = best.restore(ensemble)
    if ensemble.holdout_losses is not None:
        learn_from_holdout(ensemble, config, holdout, optimizer, products)


def learn_from_holdout(
    ensemble: DynamicsEnsemble,
    config: LearnConfig,
    holdout: NormalisedRows,
    optimizer: Callable[[DynamicsEnsemble, LearnConfig], torch.optim.Optimizer],
    products: Products,
) -> None:
    """Takes the second phase of kinds that have ``holdout_losses``: another training, with the same settings.

    Only what these losses reach learns. The last fifth of the held-out rows, which are in the order of trajectories, is
    not learned from: each member ends with the weights of its best likelihood there, so that it does not learn the
    others by heart. Depends on its arguments alone, so an interrupted phase is simply taken again.

    Args:
        ensemble: Trained, with its best weights.
        config: Settings; the phase has as many epochs as training.
        holdout: Held-out rows; rewards do not count.
        optimizer: As in ``train_ensemble``.
        products: How to multiply.

    Raises:
        FloatingPointError: If all members have failed.
    """
    learned = len(holdout.inputs) - len(holdout.inputs) // JUDGED_BY
    train = NormalisedRows(holdout.inputs[:learned], holdout.targets[:learned], None)
    judge = NormalisedRows(holdout.inputs[learned:], holdout.targets[learned:], None)
    best = BestWeights(ensemble, config.patience)
    step = partial(take_step, config, type(ensemble).holdout_losses, train)
    with MemberThreads(ensemble, config, step, optimizer, products) as threads:
        for epoch in range(config.fit_epochs):
            order = draw_order(config.seed, len(ensemble), learned, config.fit_epochs + epoch)  # other than in training
            reported = threads.take_epoch(order.to(ensemble.device), epoch)
            best.update(ensemble, reported, threads.score(judge)["nll"])
    good = best.restore(ensemble)
    ensemble.elites = [member for member in ensemble.elites if member in good]


def take_step(
    config: LearnConfig,
    losses: Callable[..., tuple[Tensor, Tensor]],
    train: NormalisedRows,
    group: MemberGroup,
    rows: Tensor,
    time: float,
) -> Tensor:
    """Takes one gradient step with a group of members.

    Args:
        config: Settings.
        losses: The kind's, with its settings.
        train: Training rows.
        group: Members that step together, with their optimiser.
        rows: The minibatch of each, ``(ensemble, batch)`` of row indices.
        time: In epochs, such as 2.5 in the middle of the third.

    Returns:
        The reported loss of each member, ``(ensemble,)``, a mean over the minibatch.
    """
    ensemble, optimizer = group.ensemble, group.optimizer
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(config, time)
    batch = train.select(rows)  # (ensemble, batch, ...)
    objective, reported = losses(ensemble, batch.inputs, batch.targets, time / config.fit_epochs)
    if batch.rewards is not None:
        objective = objective + ensemble.reward_loss(*batch)
    optimizer.zero_grad(set_to_none=True)
    objective.sum().backward()  # members share no parameter: each gets its own gradient
    if config.grad_clip is not None:
        clip_gradients(ensemble, config.grad_clip)
    optimizer.step()
    return reported
