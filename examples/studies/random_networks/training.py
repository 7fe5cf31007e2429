"""Trains a network by many rules at once, each at the rate that is best for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from examples import data
from examples.studies.random_networks import rules, search
from examples.studies.random_networks.networks import BATCH, Network, Task, make_task
from examples.studies.random_networks.rules import Method, Rule

REFRESH = 10  # steps between two looks at the weights where scales are live
_AT_ONCE = 8  # runs side by side in one program


class Final(NamedTuple):
    """How runs ended."""

    train: jax.Array  # mean loss of the last tenth of the steps
    test: jax.Array  # loss on test images


Trainer = Callable[[Rule], Final]


def make_trainer(task: Task, optimizers: Sequence[str]) -> Trainer:
    """A compiled program that trains by `_AT_ONCE` rules of some optimizers at once.

    The rate falls linearly to zero, so that the end tells more than the noise of the
    last steps.
    """
    tree = jax.tree.structure(task.params)
    if "muon" in optimizers:
        start, unravel, spread = task.params, lambda params: params, tree.unflatten
    else:
        # Parameters as one vector, since XLA compiles a loop for every array.
        start, unravel = ravel_pytree(task.params)
        array_of = np.repeat(np.arange(tree.num_leaves), rules.sizes(task.params))

        def spread(multipliers: jax.Array) -> jax.Array:
            return multipliers[array_of]

    txs = [rules.transformation(optimizer) for optimizer in optimizers]
    some_live = "sgd" in optimizers and task.chain is not None
    steps = len(task.order)
    refresh = REFRESH if some_live else steps

    def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = task.apply(unravel(params), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def log_scales_now(of: Rule, params: Any) -> jax.Array:
        if not some_live or task.chain is None:
            return of.initial
        paper, mean_field = (
            rules.declared_log_scales(unravel(params), task.chain, gains)
            for gains in rules.DECLARED
        )
        now = jnp.where(of.mean_field, mean_field, paper)
        return jnp.where(of.live, now, of.initial)

    def train(of: Rule, params: Any, arrays: dict[str, jax.Array]) -> Final:
        def period(state, numbers_and_chosen):
            logs = rules.log_multipliers(of, log_scales_now(of, state[0]), task.params)
            before = spread(jnp.exp(jnp.where(of.by_trace, logs, 0)))
            after = spread(jnp.exp(jnp.where(of.by_trace, 0, logs)))

            def step(state, number_and_chosen):
                params, opt_states = state
                number, chosen = number_and_chosen
                x, y = arrays["images"][chosen], arrays["labels"][chosen]
                loss, gradient = jax.value_and_grad(loss_of)(params, x, y)
                gradient = jax.tree.map(jnp.multiply, before, gradient)
                updates, opt_states = zip(
                    *(
                        tx.update(gradient, opt_state, params)
                        for tx, opt_state in zip(txs, opt_states, strict=True)
                    ),
                    strict=True,
                )
                rate = of.rate * (1 - number / steps)
                params = jax.tree.map(
                    lambda leaf, multiplier, *options: (
                        leaf
                        + rate * multiplier * jax.lax.select_n(of.optimizer, *options)
                    ),
                    params,
                    after,
                    *updates,
                )
                return (params, opt_states), loss

            return jax.lax.scan(step, state, numbers_and_chosen)

        numbers = jnp.arange(steps).reshape(-1, refresh)
        chosen = arrays["order"].reshape(-1, refresh, BATCH)
        state = params, tuple(tx.init(params) for tx in txs)
        (params, _), losses = jax.lax.scan(period, state, (numbers, chosen))
        test = loss_of(params, arrays["test_images"], arrays["test_labels"])
        return Final(losses.ravel()[-max(steps // 10, 1) :].mean(), test)

    compiled = jax.jit(jax.vmap(train, in_axes=(0, None, None)))
    names = ("images", "labels", "test_images", "test_labels", "order")
    arrays = jax.device_put({name: getattr(task, name) for name in names})
    return lambda rules: compiled(rules, start, arrays)


def tune(
    trainer: Trainer,
    first: Mapping[Method, int],
    initial: Callable[[Method], np.ndarray],
) -> dict[Method, search.Curve]:
    """Loss by rate around the best rate of every method, all of one program.

    Args:
      trainer: the program.
      first: the methods, and where the search for the best rate begins.
      initial: logarithms of a method's initial scales.
    """
    curves: dict[Method, search.Curve] = {method: {} for method in first}
    while True:
        tried = [
            (method, power)
            for method, curve in curves.items()
            for power in search.next_powers(curve, first[method])
        ]
        if not tried:
            return curves
        for start in range(0, len(tried), _AT_ONCE):
            batch = tried[start : start + _AT_ONCE]
            # The last one again, so that there is one program only.
            filled = batch + batch[-1:] * (_AT_ONCE - len(batch))
            each = [rules.rule(m, 2.0**power, initial(m)) for m, power in filled]
            final = trainer(jax.tree.map(lambda *values: np.stack(values), *each))
            losses = zip(*map(np.asarray, final), strict=True)
            for (method, power), (train, test) in zip(batch, losses, strict=False):
                curves[method][power] = (float(train), float(test))


def study(
    network: Network,
    dataset: data.Dataset,
    steps: int,
    methods: Collection[Method],
) -> Iterator[dict[str, Any]]:
    """Records of a network: of itself, then of each method."""
    task = make_task(network, dataset, steps)
    scales = rules.initial_log_scales(task)
    yield {
        "network": network.index,
        "is": dataclasses.asdict(network),
        "arrays": rules.paths(task.params),
        "sizes": rules.sizes(task.params).tolist(),
        "fan_ins": rules.fan_ins(task.params).tolist(),
        "input_fan_ins": rules.input_fan_ins(task.params).tolist(),
        "log_scales": {
            gains: np.round(logs.astype(float), 3).tolist()
            for gains, logs in scales.items()
        },
    }

    def initial(method: Method) -> np.ndarray:
        return scales[method.gains] if method.scale else scales["measured"]

    for program in rules.PROGRAMS:
        chosen = [
            method
            for method in methods
            if method.optimizer in program and method.suits(network)
        ]
        if not chosen:
            continue
        trainer = make_trainer(task, program)
        plain = {method.plain: rules.FIRST[method.optimizer] for method in chosen}
        # The others begin at the best rate of the plain optimizer.
        tuned = tune(trainer, plain, initial)
        others = {m: search.best(tuned[m.plain]) for m in chosen if m != m.plain}
        tuned |= tune(trainer, others, initial)
        for method in chosen:
            curve = tuned[method]
            yield {
                "network": network.index,
                "method": str(method),
                "best": search.best(curve),
                "losses": {
                    str(power): [search.rounded(loss) for loss in losses]
                    for power, losses in sorted(curve.items())
                },
            }
