"""What the method costs: updates, training steps, compilation, memory, side by side.

    python -m examples.studies.benchmark
    python -m examples.studies.benchmark --parts depth
    python -m examples.studies.benchmark --device gpu --parts updates

Everything is a ratio to SGD in the same run, the methods taking turns; ratios are
medians of the ratios within a round, so that a machine whose speed drifts favours
nobody. Tracing and compiling take turns too, in seconds of the processor. An update
includes weight decay and momentum, but no gradient.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import cpu, data, language_model, methods, models, training
from examples.arguments import whole

METHODS = ("sgd", "backmatch", "backmatch, default", "lars", "lamb", "adamw", "muon")
PARTS = ("updates", "steps", "refreshes", "depth", "programs", "inference")
DEPTHS = (100, 300, 1000)

# The method as its options have it, for what they cost to compile.
GAINS: dict[str, dict[str, Any]] = {
    "backmatch": {"normalize": False},
    "backmatch, default": {},
    "backmatch, mean field": {"gains": "mean_field", "normalize": False},
}
KINDS = ("plain", "BatchNorm", "residual")


def deep_chain(layers: int, kind: str = "BatchNorm") -> tuple[Any, spec.LayerChain]:
    """Equal dense layers of 32 features; params and spec.

    Args:
      layers: how many; of the residual chain, two in each branch.
      kind: one of `KINDS`; all but plain ones have a BatchNorm after each layer.
    """
    params = {f"Dense_{i}": {"kernel": jnp.full((32, 32), 0.1)} for i in range(layers)}
    relu = spec.Activation("relu")
    links: list[spec.Link] = []
    for path in params:
        links += [spec.Dense(path), *([spec.BatchNorm()] * (kind != "plain")), relu]
    if kind == "residual":  # the last ReLU of a branch follows the sum
        branches = [links[i : i + 6] for i in range(0, len(links), 6)]
        links = [x for branch in branches for x in (spec.Residual(branch[:-1]), relu)]
    return params, spec.LayerChain(links, input_shape=(32,))


def network(name: str) -> tuple[Any, spec.LayerChain]:
    """Initial parameters and spec of one of the examples' networks."""
    model, chain = models.MODELS[name](10, (32, 32, 3))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    return variables["params"], chain


def gpt(size: language_model.Size) -> tuple[Any, spec.LayerChain]:
    """Initial parameters and spec of the example's language model."""
    model = language_model.GPT(size, rngs=nnx.Rngs(0))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), language_model.declared(size)


TREES: dict[str, Callable[[], tuple[Any, spec.LayerChain]]] = {
    "LeNet": lambda: network("lenet"),
    "VGG16": lambda: network("vgg16"),
    "ResNet-50": lambda: network("resnet50"),
    "GPT": lambda: gpt(language_model.Size()),
    "1,000 dense layers": lambda: deep_chain(1000),
}


def optimizer(method: str, chain: spec.LayerChain) -> optax.GradientTransformation:
    """Those of the other examples, LAMB, and the method with other options.

    "own norms" divides each gradient by the squared norm of its kernel, no more: a rule
    that reads norms cannot cost less.
    """
    if method in GAINS or method == "own norms":
        decay, sgd = optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9, nesterov=True)
        scale = (
            bmo.scale_by_backmatch(chain, **GAINS[method])
            if method in GAINS
            else optax.stateless(_by_own_norms)
        )
        return optax.chain(decay, scale, sgd)
    if method == "lamb":
        return optax.lamb(0.1, weight_decay=5e-4)
    return methods.optimizer(method, 0.1, chain, weight_decay=5e-4)


def _by_own_norms(updates: Any, params: Any) -> Any:
    return jax.tree.map(
        lambda g, w: g / jnp.sum(jnp.square(w)) if w.ndim > 1 else g, updates, params
    )


class Program:
    """A compiled program and what it took to make it."""

    def __init__(self, lower: Callable[[], Any]):
        start = time.process_time()
        lowered = lower()
        traced = time.process_time()
        self.compiled = lowered.compile()
        self.trace_seconds = traced - start
        self.compile_seconds = time.process_time() - traced
        text = str(self.compiled.as_text())
        self.hlo_lines = text.count("\n")
        self.kernels = _kernels(text)


class Update(Program):
    """A compiled update."""

    def __init__(self, method: str, params: Any, chain: spec.LayerChain):
        tx = optimizer(method, chain)
        opt_state = tx.init(params)

        def update(gradient, opt_state, params):
            updates, opt_state = tx.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        # Donated, as a training step does: no new buffers for parameters and momentum.
        jitted = jax.jit(update, donate_argnums=(1, 2))
        super().__init__(lambda: jitted.lower(params, opt_state, params))
        self.state = (jax.tree.map(jnp.copy, params), opt_state)
        memory: Any = self.compiled.memory_analysis()
        # What is neither an argument nor, donated, a result in its place.
        self.extra_bytes = memory.temp_size_in_bytes + max(
            memory.output_size_in_bytes - memory.alias_size_in_bytes, 0
        )

    def __call__(self, gradient: Any) -> Any:
        """Takes a step."""
        self.state = self.compiled(gradient, self.state[1], self.state[0])
        return self.state


# What an entry computation lists beside what it has to launch.
_NO_KERNEL = "parameter|constant|tuple|get-tuple-element|bitcast|after-all"


def _kernels(hlo: str) -> int:
    """How many kernels a compiled program launches, loops counted once."""
    entry = hlo[hlo.index("\nENTRY ") :]
    operations = re.findall(r"^  (?:ROOT )?%?\S+ = .*? ([a-z][\w-]*)\(", entry, re.M)
    return sum(not re.fullmatch(_NO_KERNEL, operation) for operation in operations)


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Whose turn it is: each once in a round, and nobody is always first."""
    for turn in tqdm(range(rounds), leave=False):
        for place in range(len(names)):
            yield names[(turn + place) % len(names)]


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, np.ndarray]:
    """Milliseconds of each call, one after another."""
    elapsed = {name: [] for name in calls}
    for name in turns([*calls], rounds + 3):
        start = time.perf_counter()
        jax.block_until_ready(calls[name]())
        elapsed[name].append(1e3 * (time.perf_counter() - start))
    # The first rounds warm up.
    return {name: np.array(values[3:]) for name, values in elapsed.items()}


def updates(trees: Sequence[str], rounds: int) -> Iterator[str]:
    """One update: its time, beside what moving its bytes takes, and its memory."""
    yield (
        "| parameters | method | ms | over SGD | extra memory, of the parameters "
        "| kernels |"
    )
    yield "|---|---|---|---|---|---|"
    for tree in trees:
        params, chain = TREES[tree]()
        gradient = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
        # Muon's iterations for a thousand kernels take minutes to compile.
        small = len(jax.tree.leaves(params)) < 500
        chosen = [method for method in METHODS if small or method != "muon"]
        made = {method: Update(method, params, chain) for method in chosen}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        # Read gradient, momentum and parameters, write the last two: 2.5 times what
        # adding one to an array in place moves.
        add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
        moved = [jnp.ones(size // 4)]

        def pass_once(moved=moved, add_one=add_one):
            moved[0] = add_one(moved[0])
            return moved[0]

        calls = {
            method: functools.partial(update, gradient)
            for method, update in made.items()
        }
        took = in_turn(calls | {"pass": pass_once}, rounds)
        sgd = took["sgd"]
        for method, update in made.items():
            ms, ratio = np.median(took[method]), np.median(took[method] / sgd)
            yield (
                f"| {tree} | {method} | {ms:.3f} | {ratio:.2f} "
                f"| {update.extra_bytes / size:.3f} | {update.kernels} |"
            )
        floor = 2.5 * took["pass"]
        yield (
            f"| {tree} | moving SGD's bytes | {np.median(floor):.3f} "
            f"| {np.median(floor / sgd):.2f} | | |"
        )


def steps(rounds: int) -> Iterator[str]:
    """A whole training step, gradient included."""
    yield "| network | batch | method | ms | over SGD |"
    yield "|---|---|---|---|---|"
    dataset = data.load("digits")
    for name, batch in (("lenet", 128), ("vgg11", 32)):
        model, chain = models.MODELS[name](10, dataset.input_shape)
        compared = ("sgd", "backmatch", "backmatch, default", "lars")
        optimizers = {m: optimizer(m, chain) for m in compared}
        model = cpu.faster(model)
        states = training.create_states(model, optimizers, dataset, jax.random.key(0))
        step = training.make_train_step(dataset)
        images, labels = dataset.train_images[:batch], dataset.train_labels[:batch]

        def train(method, states=states, step=step, images=images, labels=labels):
            states[method], loss = step(states[method], images, labels)
            return loss

        calls = {m: lambda m=m, train=train: train(m) for m in optimizers}
        took = in_turn(calls, rounds)
        for method, ms in took.items():
            ratio = np.median(ms / took["sgd"])
            yield f"| {name} | {batch} | {method} | {np.median(ms):.2f} | {ratio:.3f} |"


def refreshes(rounds: int) -> Iterator[str]:
    """What measuring all scales once costs beside a gradient, in time and memory.

    The last column is what measuring every 20 steps adds to the training time, where a
    step takes no longer than its gradient.
    """
    yield (
        "| network | gradient, ms | measuring, ms | measuring over gradient "
        "| working memory over the gradient's | of training, every 20 steps |"
    )
    yield "|---|---|---|---|---|---|"
    for name, make in MEASURED.items():
        outputs, loss, params = make()
        programs = {
            "gradient": jax.jit(jax.grad(loss)).lower(params).compile(),
            "measuring": jax.jit(
                lambda params, outputs=outputs: bmo.measure_layer_scales(
                    outputs, params, key=jax.random.key(0), num_probes=1
                )
            )
            .lower(params)
            .compile(),
        }
        calls = {
            label: functools.partial(program, params)
            for label, program in programs.items()
        }
        took = in_turn(calls, rounds)
        gradient, measuring = took["gradient"], took["measuring"]
        memory: dict[str, Any] = {
            label: program.memory_analysis() for label, program in programs.items()
        }
        held = {label: of.temp_size_in_bytes for label, of in memory.items()}
        ratio = np.median(measuring / gradient)
        yield (
            f"| {name} | {np.median(gradient):.1f} | {np.median(measuring):.1f} "
            f"| {ratio:.2f} | {held['measuring'] / held['gradient']:.2f} "
            f"| {ratio / 20:.1%} |"
        )


def _resnet_outputs() -> tuple[Any, Any, Any]:
    """Outputs and loss as functions of the parameters, and these: of 8 images."""
    dataset = data.load("digits")
    model, _ = models.MODELS["resnet50"](10, dataset.input_shape)
    images, labels = dataset.train_images[:8], dataset.train_labels[:8]
    variables = model.init(jax.random.key(0), images, train=False)

    def outputs(params: Any) -> jax.Array:
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return logits

    def loss(params: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(outputs(params), labels).mean()

    return outputs, loss, variables["params"]


def _gpt_outputs(size: language_model.Size) -> tuple[Any, Any, Any]:
    """The same of 8 sequences of tokens."""
    graph, params = nnx.split(language_model.GPT(size, rngs=nnx.Rngs(0)), nnx.Param)
    shape = (8, size.context + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.tokens)

    def outputs(params: Any) -> jax.Array:
        return nnx.merge(graph, params)(tokens[:, :-1])

    def loss(params: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(outputs(params), tokens[:, 1:]).mean()

    return outputs, loss, params


MEASURED: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "ResNet-50": _resnet_outputs,
    "GPT": lambda: _gpt_outputs(language_model.Size()),
}


def made_in_turn(
    make: Callable[[str], Program], methods: Sequence[str], compiles: int
) -> Iterator[tuple[str, float, float, float, Program]]:
    """Of each method the seconds to trace and to compile, both over SGD's, a program.

    Medians over the rounds, as everywhere.
    """
    programs, seconds = {}, {method: [] for method in methods}
    make("sgd")  # what only the first one does
    for method in turns(methods, compiles):
        made = programs[method] = make(method)
        seconds[method].append((made.trace_seconds, made.compile_seconds))
    sgd = np.sum(seconds["sgd"], axis=1)
    for method, taken in seconds.items():
        trace, compiled = np.median(taken, axis=0)
        over_sgd = np.median(np.sum(taken, axis=1) / sgd)
        yield method, trace, compiled, over_sgd, programs[method]


def depth(depths: Sequence[int], compiles: int) -> Iterator[str]:
    """Trace and compile time and program size against the number of layers."""
    yield "| chain | layers | method | trace, s | compile, s | over SGD | HLO lines |"
    yield "|---|---|---|---|---|---|---|"
    for kind, layers in itertools.product(KINDS, depths):
        params, chain = deep_chain(layers, kind)
        make = functools.partial(Update, params=params, chain=chain)
        for method, trace, compiled, ratio, made in made_in_turn(
            make, ("sgd", "own norms", *GAINS, "lars"), compiles
        ):
            yield (
                f"| {kind} | {layers} | {method} | {trace:.2f} | {compiled:.2f} "
                f"| {ratio:.2f} | {made.hlo_lines} |"
            )


def programs(compiles: int) -> Iterator[str]:
    """Trace and compile time of a whole training step, gradient included."""
    yield "| network | method | trace, s | compile, s | over SGD |"
    yield "|---|---|---|---|---|"
    for name, lower in (("ResNet-50", _resnet_step), ("GPT, 24 layers", _gpt_step)):

        def make(method, lower=lower):
            return Program(functools.partial(lower, method))

        for method, trace, compiled, ratio, _ in made_in_turn(
            make, ("sgd", "own norms", *GAINS, "adamw", "lars"), compiles
        ):
            yield (
                f"| {name} | {method} | {trace:.2f} | {compiled:.2f} | {ratio:.3f} |"
            )


def _resnet_step(method: str) -> Any:
    dataset = data.load("digits")
    model, chain = models.MODELS["resnet50"](10, dataset.input_shape)
    optimizers = {method: optimizer(method, chain)}
    state = jax.eval_shape(
        lambda: training.create_states(model, optimizers, dataset, jax.random.key(0))
    )[method]
    images, labels = dataset.train_images[:32], dataset.train_labels[:32]
    step: Any = training.make_train_step(dataset)
    return step.lower(state, images, labels)


_DEEP_GPT = language_model.Size(layers=24)


def _abstract_gpt(size: language_model.Size) -> language_model.GPT:
    """The language model with shapes for parameters."""
    return nnx.eval_shape(lambda: language_model.GPT(size, rngs=nnx.Rngs(0)))


def _gpt_step(method: str) -> Any:
    size = _DEEP_GPT
    tx = optimizer(method, language_model.declared(size))
    graph, params = nnx.split(_abstract_gpt(size))

    def step(params: Any, opt_state: Any, tokens: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits, tokens[:, 1:]).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    tokens = jax.ShapeDtypeStruct((8, size.context + 1), jnp.int32)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, jax.eval_shape(tx.init, params), tokens)


def inference() -> Iterator[str]:
    """How long `infer_spec` takes for a batch of 256 images, or of 8 texts."""
    images = jax.ShapeDtypeStruct((256, 32, 32, 3), jnp.float32)
    size = _DEEP_GPT
    tokens = jax.ShapeDtypeStruct((8, size.context), jnp.int32)
    cases: dict[str, tuple[Any, ...]] = {
        name: (*models.MODELS[name](10, (32, 32, 3)), images, {"train": True})
        for name in ("resnet18", "resnet50")
    }
    declared = language_model.declared(size)
    cases["a GPT of 24 layers"] = (_abstract_gpt(size), declared, tokens, {})
    for name, (model, chain, inputs, options) in cases.items():
        start = time.perf_counter()
        inferred = bmo.infer_spec(model, inputs, **options)
        seconds = time.perf_counter() - start
        assert inferred == chain, "the declared chain is what the model does"
        yield f"infer_spec of {name}: {seconds:.2f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.benchmark",
        description="What the method costs beside others.",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--rounds", type=whole(1), default=100, help="times each is timed"
    )
    parser.add_argument(
        "--compiles", type=whole(1), default=3, help="times each is compiled"
    )
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--depths", nargs="+", type=whole(1), default=list(DEPTHS))
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: JAX's own")
    options = parser.parse_args(arguments)
    if options.device:
        jax.config.update("jax_platforms", options.device.replace("gpu", "cuda"))
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}"
    )
    tables = {
        "updates": lambda: updates(options.trees, options.rounds),
        "steps": lambda: steps(options.rounds),
        "refreshes": lambda: refreshes(options.rounds),
        "depth": lambda: depth(options.depths, options.compiles),
        "programs": lambda: programs(options.compiles),
        "inference": inference,
    }
    for part in options.parts:
        print()
        for line in tables[part]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
