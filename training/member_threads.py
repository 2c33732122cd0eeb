"""Trains members side by side: each core trains some of the members instead of sharing every matrix product.

Members do not depend on each other, so their threads wait for one another only at the end of an epoch; cores that share
a product wait after each one. How members are grouped changes what they learn by rounding errors only, and the same
``Products`` give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from config import LearnConfig
from dynamics_model import DynamicsEnsemble, Linear, StackedMLP
from training.batches import NormalisedRows
from training.products import Products
from training.scores import Scores, score_rows

Result = TypeVar("Result")

_PIECES = 8  # of an epoch; between two, threads may change groups, so that all finish at about the same time


@dataclass(frozen=True)
class MemberGroup:
    """Members that take each step together.

    Attributes:
        members: Which members of the whole ensemble these are.
        ensemble: These members as an ensemble that shares the memory of the whole one.
        optimizer: Updates their weights.
    """

    members: slice
    ensemble: DynamicsEnsemble
    optimizer: torch.optim.Optimizer


class MemberThreads:
    """Groups of an ensemble's members, and the threads that train and score them; a context that ends the threads.

    Args:
        ensemble: All members; the groups share its memory.
        config: Settings of the optimiser, and the size of a minibatch.
        take_step: Takes a gradient step: gets a group, the minibatch of each of its members ``(ensemble, batch)`` and
            the time in epochs; returns the reported loss of each, ``(ensemble,)``.
        build_optimizer: Builds the optimiser of a group.
        products: How to multiply, and which members take steps together.
    """

    def __init__(
        self,
        ensemble: DynamicsEnsemble,
        config: LearnConfig,
        take_step: Callable[[MemberGroup, Tensor, float], Tensor],
        build_optimizer: Callable[[DynamicsEnsemble, LearnConfig], torch.optim.Optimizer],
        products: Products,
    ) -> None:
        self._batch_size, self._take_step, self._products = config.batch_size, take_step, products
        size = len(ensemble)
        share = products.members_per_group(size)
        self.groups = []
        for start in range(0, size, share):
            members = slice(start, min(start + share, size))
            view = view_members(ensemble, members, products.linear)
            self.groups.append(MemberGroup(members, view, build_optimizer(view, config)))
        workers = min(products.threads, len(self.groups))
        self._pool = None
        if workers > 1:
            threads_each = (max(1, products.threads // workers),)
            self._pool = ThreadPoolExecutor(workers, "members", torch.set_num_threads, threads_each)

    def __enter__(self) -> MemberThreads:
        self._in_effect = self._products.in_effect()
        self._in_effect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._in_effect.__exit__(*exception)  # threads that start later would inherit the number of the workers

    def take_epoch(self, order: Tensor, epoch: int) -> list[float]:
        """Takes the gradient steps of an epoch with every member.

        Args:
            order: Rows in the order in which each member sees them, ``(ensemble, rows)`` of indices.
            epoch: Which one, from 0.

        Returns:
            The reported loss of each member, a mean over rows.
        """
        rows = order.shape[1]
        starts = range(0, rows, self._batch_size)
        size = math.ceil(len(starts) / (1 if self._pool is None else _PIECES))
        pieces = [starts[piece : piece + size] for piece in range(0, len(starts), size)]
        losses = self._run(partial(self._take_piece, order, epoch), pieces)
        return (torch.cat([sum(of_group) for of_group in losses]) / rows).tolist()

    def score(self, rows: NormalisedRows) -> Scores:
        """Scores every row, per member, as ``score_rows`` does."""
        of_groups = self._run(lambda group, _: score_rows(group.ensemble, rows), [range(1)])
        return {name: [value for (scores,) in of_groups for value in scores[name]] for name in of_groups[0][0]}

    def _take_piece(self, order: Tensor, epoch: int, group: MemberGroup, starts: range) -> Tensor:
        """Takes some of an epoch's steps with a group; returns each member's loss, summed over rows."""
        loss_sum = torch.zeros(len(group.ensemble), device=order.device)  # stays on the device: no step waits for it
        for start in starts:
            rows = order[group.members, start : start + self._batch_size]
            loss_sum += self._take_step(group, rows, epoch + start / order.shape[1]) * rows.shape[1]
        return loss_sum

    def _run(self, function: Callable[[MemberGroup, range], Result], pieces: list[range]) -> list[list[Result]]:
        """Calls a function with every group and piece, a group's pieces in order: results by group and piece."""
        if self._pool is None:
            return [[function(group, piece) for piece in pieces] for group in self.groups]

        def after(previous: Future[Result] | None, group: MemberGroup, piece: range) -> Result:
            if previous is not None:
                previous.result()  # tasks begin in order, so this one is running or done: it is a short wait
            return function(group, piece)

        futures: list[list[Future[Result]]] = [[] for _ in self.groups]
        for piece in pieces:
            for group, own in zip(self.groups, futures, strict=True):
                own.append(self._pool.submit(after, own[-1] if own else None, group, piece))
        return [[future.result() for future in own] for own in futures]

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimisers' state as one optimiser of all members would have it."""
        states = [group.optimizer.state_dict() for group in self.groups]
        stacked = {
            parameter: {name: _stack([state["state"][parameter][name] for state in states]) for name in names}
            for parameter, names in states[0]["state"].items()
        }
        return states[0] | {"state": stacked}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores the moments that ``optimizer_state`` returned, however members were grouped then.

        Its settings are not taken over: these are the configuration's.
        """
        for group in self.groups:
            own = {
                parameter: {name: _take(value, group.members) for name, value in values.items()}
                for parameter, values in state["state"].items()
            }
            group.optimizer.load_state_dict(group.optimizer.state_dict() | {"state": own})


def view_members(ensemble: DynamicsEnsemble, members: slice, linear: Linear) -> DynamicsEnsemble:
    """Returns some members as an ensemble that shares their memory: training it trains them.

    Args:
        ensemble: All members.
        members: Which ones to view.
        linear: The function that the view multiplies with.
    """
    size = len(range(*members.indices(len(ensemble))))
    view = type(ensemble)(ensemble.architecture, ensemble.normalisation, size).to(ensemble.device)
    for own, stacked in zip(view.parameters(), ensemble.parameters(), strict=True):
        own.data = stacked.data[members]
    for network in view.children():
        if isinstance(network, StackedMLP):
            network.linear = linear
    return view


def _take(value: Tensor, members: slice) -> Tensor:
    """Copies some members' moments, or the number of steps: an optimiser changes in place what it has loaded."""
    return (value[members] if value.ndim else value).clone()


def _stack(values: list[Tensor]) -> Tensor:
    """Joins the moments of all groups; the number of steps is the same for all."""
    return torch.cat(values) if values[0].ndim else values[0]
