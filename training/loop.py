"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from config import LearnConfig

if TYPE_CHECKING:  # PyTorch takes a second to import, which --help need not wait for
    from torch import Tensor

    from dynamics_model import DynamicsEnsemble, NormalisedRows
    from tracking.trackers import NullTracker
    from training.member_threads import MemberGroup

_TRAIN_SCORE_EVERY = 50  # epochs, where train_mse is not tracked every epoch


def train_ensemble(
    ensemble: DynamicsEnsemble,
    config: LearnConfig,
    train: NormalisedRows,
    holdout: NormalisedRows | None,
    tracker: NullTracker,
    track_training: bool = False,
    checkpoint: dict[str, Any] | None = None,
    save_checkpoint: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Trains all members at once, in place; with a holdout, each ends with its best weights.

    Args:
        ensemble: What to train; its device is where ``train`` and ``holdout`` are.
        config: Settings.
        train: Training rows, normalised.
        holdout: Rows that select weights and stop training, normalised; None trains to the end.
        tracker: Receives one row of numbers per epoch and member.
        track_training: Whether to score the training rows after every epoch rather than every now and then.
        checkpoint: What training goes on from, to end in the same bits as if it had never stopped; None starts anew.
        save_checkpoint: Called with such a checkpoint after every epoch.
    """
    import torch

    from training.batches import draw_bootstrap, draw_order
    from training.best_weights import BestWeights
    from training.hardware import product_precision
    from training.member_threads import MemberThreads
    from training.scores import metric_rows

    network, rows = ensemble.network, len(train.inputs)
    network.requires_grad_(True)
    best = BestWeights(network, config.patience) if holdout is not None else None
    bootstrap = draw_bootstrap(config.seed, len(ensemble), rows) if config.bootstrap else None

    with MemberThreads(network, config) as threads:
        if checkpoint is not None:
            network.load_state_dict(checkpoint["network"])
            threads.load_optimizer_state(checkpoint["optimizer"])
            if best is not None:
                best.load_state_dict(checkpoint["best"])
        for epoch in range(checkpoint["epochs"] if checkpoint is not None else 0, config.fit_epochs):
            if best is not None and all(best.stopped):
                break
            order = draw_order(config.seed, len(ensemble), rows, epoch)  # (ensemble, rows)
            if bootstrap is not None:
                order = bootstrap.gather(1, order)
            order = order.to(ensemble.device)
            with product_precision(config, epoch, order.is_cuda):
                losses = threads.map_rows(partial(take_steps, config, train, order, epoch), rows, config.batch_size)

            holdout_scores = threads.score(holdout) if holdout is not None else {}
            if best is not None:
                best.update(network, holdout_scores["mse"])
            is_last = epoch == config.fit_epochs - 1 or (best is not None and all(best.stopped))
            is_scored = track_training or epoch == 0 or is_last or (epoch + 1) % _TRAIN_SCORE_EVERY == 0
            train_scores = threads.score(train) if is_scored else {}
            mean_losses = (torch.cat([sum(pieces) for pieces in losses]) / rows).tolist()
            tracker.log_epoch(epoch, metric_rows(ensemble, config, epoch, mean_losses, train_scores, holdout_scores))
            if save_checkpoint is not None:
                save_checkpoint(
                    {
                        "epochs": epoch + 1,
                        "network": network.state_dict(),
                        "optimizer": threads.optimizer_state(),
                        "best": None if best is None else best.state_dict(),
                    }
                )
    if best is not None:
        best.restore(network)


def take_steps(
    config: LearnConfig, train: NormalisedRows, order: Tensor, epoch: int, group: MemberGroup, starts: range
) -> Tensor:
    """Takes the steps of one epoch, or of a piece of it, with a group of members.

    Args:
        config: Settings.
        train: Training rows, normalised.
        order: Rows in the order in which each member of the ensemble sees them, ``(ensemble, rows)``.
        epoch: Which one, from 0.
        group: Members that go through each step together, with their optimiser.
        starts: Where in ``order`` each minibatch starts.

    Returns:
        The reported loss of each member of the group, summed over rows.
    """
    import torch

    from training.optimisation import clip_gradients, learning_rate

    network, optimizer = group.network, group.optimizer
    loss_sum = torch.zeros(network.ensemble_size, device=order.device)  # stays there: no wait for the device
    for start in starts:
        time = epoch + start / len(train.inputs)  # in epochs
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(config, time)
        batch = train.select(order[group.members, start : start + config.batch_size])  # (ensemble, batch, ...)
        objective, reported = network.losses(batch, time / config.fit_epochs)  # (ensemble,)
        if network.reward is not None:
            objective = objective + network.reward_loss(batch)
        optimizer.zero_grad(set_to_none=True)
        objective.sum().backward()  # members share no parameter: each gets its own gradient
        for part in network.parts() if config.grad_clip is not None else ():
            clip_gradients(part, config.grad_clip)
        optimizer.step()
        loss_sum += reported * batch.inputs.shape[1]
    return loss_sum
