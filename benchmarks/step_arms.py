"""Ways to take an optimiser step of a 7-member ensemble ("arms"); ``step_throughput.py`` runs each in its own process.

    python -m benchmarks.step_arms ours '{"kind": "probabilistic", "hidden": "4x200", "batch": 256, "size": "hopper",
                                          "threads": 1, "rounds": 5}'

A step goes from row indices to updated parameters. All arms have the same network, loss, batch and data. An arm is a
generator: one ``next`` is a round, that is, a fixed number of steps. The process runs a round unmeasured, then one for
each line that it reads, and prints after each how long a step took, as JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from benchmarks.plain_loop import plain_member, train_steps, training_flops
from config import LearnConfig
from data.trajectories import Transitions
from dynamics_model import DynamicsEnsemble, member_class
from training.batches import NormalisedRows, draw_order, normalise_rows
from training.build import build_ensemble
from training.fastest_products import fastest_products
from training.loop import train_ensemble
from training.precision import can_round, product_precision
from training.products import Products, has_onednn

MEMBERS = 7
SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6)}  # state_dim, action_dim
_ROUND_FLOPS = 80e9  # a round has about as many steps as these FLOPs pay for, within the next two limits
_MOST_STEPS, _FEWEST_STEPS = 32, 8


@dataclass(frozen=True)
class Case:
    """What arms are compared on.

    Attributes:
        kind: ``deterministic`` or ``probabilistic``.
        hidden: Layers and width, such as ``4x200``.
        batch: Rows per member and step.
        size: Key of ``SIZES``.
        threads: Cores and threads that an arm may use.
        rounds: Measured rounds; the data last for these and one more.
        members: In the ensemble.
    """

    kind: str
    hidden: str
    batch: int
    size: str
    threads: int
    rounds: int
    members: int = MEMBERS

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of a network's layers, input and output included."""
        layers, width = map(int, self.hidden.split("x"))
        state_dim, action_dim = SIZES[self.size]
        return (state_dim + action_dim, *[width] * layers, state_dim * member_class(self.kind).ensemble_class.heads)

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products of a step, all members."""
        return self.members * self.batch * training_flops(self.sizes)

    @property
    def steps(self) -> int:
        """Steps of a round."""
        return min(_MOST_STEPS, max(_FEWEST_STEPS, int(_ROUND_FLOPS / self.flops)))

    @property
    def row_count(self) -> int:
        """Rows of data: enough for all rounds without a second epoch."""
        return max(100_000, self.batch * self.steps * (self.rounds + 1))

    @cached_property
    def config(self) -> LearnConfig:
        """The defaults of ``LearnConfig`` (so the plain likelihood, which all arms train on) with this case's sizes."""
        sizes = {"ensemble_size": self.members, "hidden_size": self.sizes[1:-1], "batch_size": self.batch}
        return LearnConfig(kind=self.kind, **sizes)

    @cached_property
    def transitions(self) -> Transitions:
        """Rows of noise: speed depends on their size only."""
        random = np.random.default_rng(0)
        state_dim, action_dim = SIZES[self.size]
        states, actions, next_states = (
            random.standard_normal((self.row_count, width), dtype=np.float32)
            for width in (state_dim, action_dim, state_dim)
        )
        return Transitions(states, actions, next_states, np.zeros(self.row_count, np.float32))

    @cached_property
    def ensemble(self) -> DynamicsEnsemble:
        """The product's ensemble, untrained."""
        return build_ensemble(self.config, self.transitions)

    @cached_property
    def data(self) -> NormalisedRows:
        """What all arms train on."""
        return normalise_rows(self.ensemble, self.transitions)


# --- The arms ---


def ours(case: Case, way: tuple[str, str] | None = None, **settings: Any) -> Iterator[None]:
    """The product's own training loop; a round is an epoch.

    The rows of that epoch are a view with a stride: like the other arms' rows they lie all over the data, rather than
    in a small table that stays in the processor's cache.

    Args:
        case: What to train.
        way: Library of products and grouping of members; None lets the product try them and choose.
        **settings: Of ``LearnConfig``, where they are not the defaults. These epochs are the first of many, whose
            products round their operands where that is faster, unless ``reduced_precision`` says otherwise.
    """
    count = case.steps * case.batch
    stride = case.row_count // count
    rows = NormalisedRows(*(None if part is None else part[: count * stride : stride] for part in case.data))
    config = dataclasses.replace(case.config, fit_epochs=1000, **settings)
    products = fastest_products(case.ensemble, config, rows) if way is None else Products(*way, case.threads)
    for _ in train_ensemble(case.ensemble, config, rows, score_every=None, products=products):
        yield


def plain(case: Case) -> Iterator[None]:
    """A loop over members with ``nn.Linear`` and Adam, the published way; each member in turn takes a round's steps."""
    members = [plain_member(case.config, case.ensemble, index) for index in range(case.members)]
    optimizers = [torch.optim.Adam(member.parameters(), lr=case.config.fit_lr) for member in members]
    order = draw_order(0, case.members, case.row_count, epoch=0)
    for of_round in order.split(case.steps * case.batch, dim=1):
        for member, optimizer, own in zip(members, optimizers, of_round, strict=True):
            train_steps(member, optimizer, case.data, own, case.batch)
        yield


def mbrl(case: Case) -> Iterator[None]:
    """The ``GaussianMLP`` of mbrl-lib (Pineda et al. 2021) and its own ``update``."""
    from mbrl.models.gaussian_mlp import GaussianMLP

    model = GaussianMLP(
        in_size=case.data.inputs.shape[1],
        out_size=case.data.targets.shape[1],
        device="cpu",
        num_layers=len(case.config.hidden_size),
        ensemble_size=case.members,
        hid_size=case.config.hidden_size[0],
        deterministic=case.kind == "deterministic",
        learn_logvar_bounds=True,
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=case.config.fit_lr)
    order = draw_order(0, case.members, case.row_count, epoch=0)
    for of_round in order.split(case.steps * case.batch, dim=1):
        for batch in of_round.split(case.batch, dim=1):
            inputs, targets, _ = case.data.select(batch)
            model.update(inputs, optimizer, targets)
        yield


def jax(case: Case) -> Iterator[None]:
    """JAX: ``vmap`` over members, ``scan`` over the batches of a round, Flax layers and Optax's Adam."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen

    inputs, targets = jnp.asarray(case.data.inputs.numpy()), jnp.asarray(case.data.targets.numpy())

    class Network(linen.Module):
        @linen.compact
        def __call__(self, hidden: jax.Array) -> jax.Array:
            for width in case.config.hidden_size:
                hidden = linen.silu(linen.Dense(width)(hidden))
            return linen.Dense(case.sizes[-1])(hidden)

    network = Network()

    def loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
        outputs = network.apply(params["network"], inputs[batch])
        if case.kind == "deterministic":
            return jnp.square(outputs - targets[batch]).mean()
        mean, log_variance = jnp.split(outputs, 2, axis=-1)
        log_variance = params["max"] - jax.nn.softplus(params["max"] - log_variance)
        log_variance = params["min"] + jax.nn.softplus(log_variance - params["min"])
        likelihood = jnp.square(mean - targets[batch]) * jnp.exp(-log_variance) + log_variance
        return likelihood.mean() + 0.01 * (params["max"].sum() - params["min"].sum())

    def initialise(key: jax.Array) -> dict[str, Any]:
        bound = jnp.zeros(targets.shape[1])
        return {"network": network.init(key, inputs[:1]), "max": bound + 0.5, "min": bound - 10}

    optimizer = optax.adam(case.config.fit_lr)

    def step(state: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, moments = state
        updates, moments = optimizer.update(jax.vmap(jax.grad(loss))(params, batch), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    @partial(jax.jit, donate_argnums=0)
    def run(state: tuple[Any, Any], batches: jax.Array) -> tuple[Any, Any]:
        return jax.lax.scan(step, state, batches)[0]

    params = jax.vmap(initialise)(jax.random.split(jax.random.key(0), case.members))
    state = (params, optimizer.init(params))
    order = draw_order(0, case.members, case.row_count, epoch=0).numpy()
    for start in range(0, case.row_count, case.steps * case.batch):
        batches = order[:, start : start + case.steps * case.batch].reshape(case.members, case.steps, case.batch)
        state = jax.block_until_ready(run(state, batches.swapaxes(0, 1)))  # (steps, members, batch)
        yield


def rounded(arm: Callable[[Case], Iterator[None]], case: Case) -> Iterator[None]:
    """Another arm, with PyTorch's own switch for products that round their operands, which its users can set, too."""
    torch.set_float32_matmul_precision("medium")
    return arm(case)


def products(case: Case) -> Iterator[None]:
    """The matrix products of a step and nothing else, multiplied and rounded as ours are.

    All members together share each product among cores; apart, each core takes one member at a time.
    """
    way = fastest_products(case.ensemble, dataclasses.replace(case.config, fit_epochs=1000), case.data)
    linear, is_together = way.linear, way.grouping == "together"
    threads, share = (1, case.members) if is_together else (case.threads, 1)
    layers = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(case.sizes)):
        hidden, weight, gradient = (
            torch.randn(case.members, *shape)
            for shape in ((case.batch, fan_in), (fan_in, fan_out), (case.batch, fan_out))
        )
        layers.append((index > 0, hidden, weight, gradient))

    @torch.no_grad()
    def take_steps(first: int) -> None:
        own = slice(first, first + share)
        for _ in range(case.steps):
            for _, hidden, weight, _ in layers:
                linear(hidden[own], weight[own])
            for has_input_gradient, hidden, weight, gradient in reversed(layers):
                linear(hidden[own].mT, gradient[own])
                if has_input_gradient:
                    linear(gradient[own], weight[own].mT)

    threads_each = (case.threads // threads,)
    with (
        product_precision(can_round(is_cuda=False), is_cuda=False),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=threads_each) as pool,
    ):
        while True:
            list(pool.map(take_steps, range(0, case.members, share)))
            yield


def floor(case: Case, is_rounded: bool = False) -> Iterator[dict[str, float]]:
    """The least time a step can take: its FLOPs at the speed of a large product, Adam's traffic at that of a copy.

    The product is that of the faster of PyTorch's two libraries, MKL and oneDNN, which may differ twofold. Adam has to
    read parameters, gradients and two moments and to write all but the gradients. The copy is of as much memory as
    these take, so that it profits from caches as the optimiser may.

    Args:
        case: Whose step.
        is_rounded: Whether the large product rounds its operands as ours do.

    Yields:
        ``ms`` of the step, ``gflops_per_s`` of the product and ``gbytes_per_s`` of the copy.
    """
    large = torch.randn(2048, 2048)
    libraries = [lambda: large @ large]
    if has_onednn():
        libraries.append(lambda: torch.ops.mkldnn._linear_pointwise(large, large, None, "none", [], ""))
    parameters = case.members * sum(fan_out * (fan_in + 1) for fan_in, fan_out in itertools.pairwise(case.sizes))
    traffic = 7 * 4 * parameters  # bytes
    source = torch.randn(2 * parameters)
    copy = torch.empty_like(source)
    copies = max(1, int(2e9 / (8 * len(source))))

    def seconds(function: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - start) / times

    while True:
        with product_precision(is_rounded and can_round(is_cuda=False), is_cuda=False):
            flops_per_s = 2 * len(large) ** 3 / min(seconds(library, 3) for library in libraries)
        bytes_per_s = 2 * 4 * len(source) / seconds(lambda: copy.copy_(source), copies)
        ms = (case.flops / flops_per_s + traffic / bytes_per_s) * 1e3
        yield {"ms": ms, "gflops_per_s": flops_per_s / 1e9, "gbytes_per_s": bytes_per_s / 1e9}


# The ways that training chooses between, but for those with fewer threads.
OWN = {
    f"{library}, {grouping}": partial(ours, way=(library, grouping))
    for library, grouping in itertools.product(("torch", "onednn", "openblas"), ("together", "apart"))
    if (library, grouping) != ("openblas", "together")  # its own threads get in the way of PyTorch's
}
FLOORS: dict[str, Callable[[Case], Iterator[dict[str, float]]]] = {
    "floor": floor,
    "rounded floor": partial(floor, is_rounded=True),
}
ARMS: dict[str, Callable[[Case], Iterator[Any]]] = {
    "ours": ours,
    "full precision": partial(ours, reduced_precision=0.0),
    "plain": plain,
    "plain, rounded": partial(rounded, plain),
    "mbrl": mbrl,
    "mbrl, rounded": partial(rounded, mbrl),
    "jax": jax,
    "products": products,
    **FLOORS,
    **OWN,
}
_MBRL = ("mbrl", "hydra", "omegaconf", "gymnasium")
NEEDS = {"mbrl": _MBRL, "mbrl, rounded": _MBRL, "jax": ("jax", "flax", "optax")}  # packages


def main(argv: list[str]) -> None:
    """Runs one arm until standard input ends."""
    arm, case = argv[0], Case(**json.loads(argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    torch.set_num_threads(case.threads)
    for measured in time_rounds(arm, case):
        print(json.dumps(measured), file=answers, flush=True)
        if not sys.stdin.readline():
            return


def time_rounds(arm: str, case: Case) -> Iterator[dict[str, float]]:
    """Runs an arm round by round, one for each ``next``.

    Yields:
        Milliseconds per step, ``ms``; a floor's is computed, with the speeds that it follows from. The first round is
        a warm-up.
    """
    start = time.perf_counter()
    for speeds in ARMS[arm](case):
        yield {"ms": (time.perf_counter() - start) / case.steps * 1e3} if speeds is None else speeds
        start = time.perf_counter()


def command(arm: str, case: Case) -> list[str]:
    """Returns the command line that runs an arm."""
    return [sys.executable, "-m", "benchmarks.step_arms", arm, json.dumps(dataclasses.asdict(case))]


if __name__ == "__main__":
    main(sys.argv[1:])
