"""Trains a small GPT on Python's own standard library, with one optimizer of many.

    python -m examples.language_model --method "backmatch, no limit" --learning-rate 0.1
    python -m examples.language_model --method muon --learning-rate 0.01 --mlp swiglu

The text is every module at the top of the standard library, a tenth of the files kept
for validation. A run prints losses, then a sample of what the model writes. With
--checkpoints it can be stopped at any time: the same command goes on where it was.

`declared` is the model's chain. The scales of "backmatch" are computed from it, those
of "measured" come from the model itself. Those of the chain that `infer_spec` finds are
the declared ones, so they are no method of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.tree_util import KeyPath
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.parameters import text as path_text
from examples.arguments import positive, whole

# One token for the end of a line, one for each printable ASCII character, and one for
# everything else.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
OTHER = len(CHARACTERS)
TOKENS = OTHER + 1

METHODS = (
    "sgd",
    "backmatch",  # the defaults: the papers' gains, no scale above 2 or below 1/2
    "backmatch, mean field",
    "backmatch, no limit",
    "backmatch, no limit, mean field",
    "backmatch, first scales",  # the same, kept as they are at the first step
    "measured",  # every 20 steps, no limit
    "measured, first scales",
    "adamw",
    "lion",
    "muon",
)


class Text(NamedTuple):
    """What a model learns from, as tokens."""

    train: np.ndarray  # dtype=np.uint8
    validation: np.ndarray
    source: dict[str, Any]  # what was read, for the record


def encode(text: str) -> np.ndarray:
    """The tokens of a text.

    >>> encode("if é:")
    array([74, 71,  1, 96, 27], dtype=uint8)
    """
    table = {character: token for token, character in enumerate(CHARACTERS)}
    return np.array([table.get(c, OTHER) for c in text], np.uint8)


def decode(tokens: np.ndarray) -> str:
    """The text of tokens.

    >>> decode(encode("if é:")) == "if " + chr(0xFFFD) + ":"
    True
    """
    return "".join((CHARACTERS + "\ufffd")[token] for token in tokens)


def read_text(directory: str | Path | None = None) -> Text:
    """The modules at the top of a directory, every tenth file for validation.

    Args:
      directory: where they lie; by default Python's own standard library.

    Raises:
      SystemExit: where there are fewer than ten.
    """
    directory = Path(directory or sysconfig.get_path("stdlib"))
    files = sorted(directory.glob("*.py"), key=lambda file: file.name)
    if len(files) < 10:
        raise SystemExit(f"{directory} has {len(files)} modules, but 10 are needed")
    digest = hashlib.sha256()
    parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for index, file in enumerate(files):
        content = file.read_bytes()
        digest.update(file.name.encode() + b"\0" + content + b"\0")
        tokens = encode(content.decode(errors="replace"))
        parts[index % 10 == 9].append(tokens)
    train, validation = map(np.concatenate, parts)
    source = {
        "python": platform.python_version(),
        "files": len(files),
        "train_tokens": len(train),
        "validation_tokens": len(validation),
        "sha256": digest.hexdigest(),
    }
    return Text(train, validation, source)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model: about a million parameters as it is."""

    layers: int = 5
    width: int = 128
    heads: int = 4
    context: int = 128
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    embedding: float = 1.0  # standard deviation of its initial entries
    tokens: int = TOKENS

    @property
    def hidden(self) -> int:
        """Units inside an MLP. SwiGLU has three kernels for GELU's two."""
        return 4 * self.width if self.mlp == "gelu" else 8 * self.width // 3


class Block(nnx.Module):
    """Attention, then an MLP, each added to its input and normalised before."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        norm = nnx.RMSNorm if size.norm == "rms" else nnx.LayerNorm
        dense = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        # As in GPT-2: all branches together add what one would add.
        last = nnx.initializers.variance_scaling(
            1 / (2 * size.layers), "fan_in", "truncated_normal"
        )
        self.norm1, self.norm2 = (
            norm(size.width, rngs=rngs),
            norm(size.width, rngs=rngs),
        )
        self.attention = nnx.MultiHeadAttention(
            size.heads,
            size.width,
            use_bias=False,
            decode=False,
            keep_rngs=False,
            out_kernel_init=last,
            rngs=rngs,
        )
        self.up = dense(size.width, size.hidden)
        self.gate = dense(size.width, size.hidden) if size.mlp == "swiglu" else None
        self.down = dense(size.hidden, size.width, kernel_init=last)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The same shape, (batch, positions, width)."""
        x = x + self.attention(self.norm1(x), mask=mask)
        y = self.norm2(x)
        if self.gate is None:
            return x + self.down(nnx.gelu(self.up(y)))
        return x + self.down(self.up(y) * nnx.silu(self.gate(y)))


class GPT(nnx.Module):
    """A decoder without biases, whose positions are learned."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(size.embedding)
        self.embed = nnx.Embed(
            size.tokens, size.width, embedding_init=normal, rngs=rngs
        )
        shape = (size.context, size.width)
        self.positions = nnx.Param(normal(rngs.params(), shape) / 5)
        self.blocks = nnx.List([Block(size, rngs=rngs) for _ in range(size.layers)])
        norm = nnx.RMSNorm if size.norm == "rms" else nnx.LayerNorm
        self.norm = norm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, size.tokens, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every next token, shape (batch, context, tokens)."""
        x = self.embed(tokens) + self.positions[...]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def declared(size: Size) -> spec.LayerChain:
    """The chain of a `GPT`.

    >>> declared(Size(layers=1)).paths
    ('embed', 'positions', 'blocks/0/norm1', 'blocks/0/attention/query',
     'blocks/0/attention/key', 'blocks/0/attention/value', 'blocks/0/attention/out',
     'blocks/0/norm2', 'blocks/0/up', 'blocks/0/down', 'norm', 'head')
    """
    norm = spec.RMSNorm if size.norm == "rms" else spec.LayerNorm
    links: list[spec.Link] = [spec.Embed("embed"), spec.Bias("positions")]
    for index in range(size.layers):
        block = f"blocks/{index}"
        up: list[spec.Link] = [spec.Dense(f"{block}/up"), spec.Activation("gelu")]
        if size.mlp == "swiglu":
            gate = [spec.Dense(f"{block}/gate"), spec.Activation("silu")]
            up = [spec.Gate([spec.Dense(f"{block}/up")], gate)]
        attention = spec.Attention(f"{block}/attention", causal=True)
        links += [
            spec.Residual([norm(f"{block}/norm1"), attention]),
            spec.Residual([norm(f"{block}/norm2"), *up, spec.Dense(f"{block}/down")]),
        ]
    links += [norm("norm"), spec.Dense("head")]
    return spec.LayerChain(links, input_shape=(size.context,))


def optimizer(
    method: str, rate: optax.ScalarOrSchedule, chain: spec.LayerChain
) -> optax.GradientTransformationExtraArgs:
    """An optimizer by its name, without weight decay.

    "measured" needs `outputs_fn` with each update.
    """
    sgd = optax.sgd(rate, momentum=0.9, nesterov=True)
    declared_scales = functools.partial(bmo.scale_by_backmatch, chain)
    measured_scales = functools.partial(
        bmo.scale_by_measured_backmatch, key=jax.random.key(0), limit=None
    )
    match method:
        case "sgd":
            return optax.with_extra_args_support(sgd)
        case "backmatch":
            return optax.chain(declared_scales(), sgd)
        case "backmatch, mean field":
            return optax.chain(declared_scales(gains="mean_field"), sgd)
        case "backmatch, no limit":
            return optax.chain(declared_scales(limit=None), sgd)
        case "backmatch, no limit, mean field":
            scale = declared_scales(gains="mean_field", limit=None)
            return optax.chain(scale, sgd)
        case "backmatch, first scales":
            scale = declared_scales(gains="mean_field", limit=None, refresh=False)
            return optax.chain(scale, sgd)
        case "measured":
            return optax.chain(measured_scales(refresh_every=20), sgd)
        case "measured, first scales":
            return optax.chain(measured_scales(refresh_every=None), sgd)
        case "adamw":
            return optax.adamw(rate, weight_decay=0.0)
        case "lion":
            return optax.lion(rate, weight_decay=0.0)
        case "muon":
            muon = optax.contrib.muon(
                rate, muon_weight_dimension_numbers=matrices, consistent_rms=0.2
            )
            return optax.with_extra_args_support(muon)
    known = ", ".join(map(repr, METHODS))
    raise ValueError(f"method (={method!r}) must be one of {known}")


def matrices(params: optax.Params) -> optax.Params:
    """Kernels as matrices; None leaves embedding, positions, norms and head to Adam."""

    def numbers(path: KeyPath, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_text(path)
        if not name.startswith("blocks/") or leaf.ndim < 2:
            return None
        last = leaf.ndim - 1
        # The kernels of queries, keys and values have (heads, features) as outputs.
        inputs = range(last) if name.endswith("attention/out/kernel") else range(1)
        outputs = range(len(inputs), leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))

    return jax.tree_util.tree_map_with_path(numbers, params)


MakeOptimizer = Callable[
    [str, optax.ScalarOrSchedule, spec.LayerChain],
    optax.GradientTransformationExtraArgs,
]
State = dict[str, Any]


@dataclasses.dataclass
class History:
    """Losses in nats per character; NaN where training has not come or stopped."""

    train: np.ndarray  # of every step; shape=(steps,)
    validation: np.ndarray  # before the first step, and after every so many

    @property
    def diverged(self) -> bool:
        """Whether the last loss is no number, or above the first."""
        return not self.validation[-1] < self.validation[0]


class Trainer:
    """Trains models of one size by one optimizer; rates and seeds share a program.

    The rate rises over the first twentieth of the steps and then falls linearly to
    zero. Batches are a function of seed and step, so that a run can be resumed.

    Args:
      size: of the model.
      method: the optimizer's name.
      text: what to train on.
      steps: how many.
      batch_size: sequences in a step.
      every: how many steps lie between validations; it must divide `steps`.
      make_optimizer: of the name, a schedule and the model's chain.
    """

    def __init__(
        self,
        size: Size,
        method: str,
        text: Text,
        *,
        steps: int,
        batch_size: int,
        every: int,
        make_optimizer: MakeOptimizer = optimizer,
    ):
        if steps % every:
            raise ValueError(f"every (={every}) must divide steps (={steps})")
        self.size, self.steps, self.every = size, steps, every
        self.chain = declared(size)
        self._make_optimizer = functools.partial(make_optimizer, method)
        self._batch_size = batch_size
        self._identity = {
            "method": method,
            "steps": steps,
            "batch_size": batch_size,
            "every": every,
            **dataclasses.asdict(size),
            "sha256": text.source["sha256"],
        }
        self._train = jnp.asarray(text.train)
        self.validation = windows(text.validation, size.context, 64)
        abstract = nnx.eval_shape(lambda: GPT(size, rngs=nnx.Rngs(0)))
        self._graph = nnx.graphdef(abstract)
        self._init_params = jax.jit(self._params_of)
        self._init_optimizer = jax.jit(self._optimizer(0.0).init)
        self._step = jax.jit(self._step_of, donate_argnums=0)
        self.validation_loss = jax.jit(
            lambda params: self._loss(params, self.validation)
        )
        self._next = jax.jit(self._next_token)

    def init(self, seed: int) -> State:
        """Parameters and the optimizer's state before the first step."""
        params = self._init_params(seed)
        return {"params": params, "opt_state": self._init_optimizer(params)}

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Of the next token at every position."""
        return nnx.merge(self._graph, params)(tokens)

    def run(
        self, rate: float, seed: int, directory: Path | None = None
    ) -> tuple[State, History]:
        """Trains a model from its seed, or from its checkpoint.

        Args:
          rate: the learning rate at its highest.
          seed: of initial weights and batches.
          directory: for checkpoints, one after each validation; None for none.

        Raises:
          SystemExit: where the directory has checkpoints of another run.
        """
        blank = functools.partial(np.full, fill_value=np.nan)
        history = History(blank(self.steps), blank(self.steps // self.every + 1))
        state, done = self.init(seed), 0
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False
        )
        checkpoints = None
        if directory is not None:
            _claim(directory, self._identity | {"rate": rate, "seed": seed})
            checkpoints = ocp.CheckpointManager(
                directory.absolute() / "steps", options=options
            )
            done = checkpoints.latest_step() or 0
        if checkpoints and done:
            template = {"state": state, "history": dataclasses.asdict(history)}
            saved = checkpoints.restore(done, args=ocp.args.StandardRestore(template))
            state, history = saved["state"], History(**saved["history"])
        else:
            history.validation[0] = self.validation_loss(state["params"])
        losses: list[jax.Array] = []
        with tqdm(total=self.steps, initial=done, unit="step", leave=False) as bar:
            for step in range(done, self.steps):
                state, loss = self._step(state, rate, seed, step)
                losses.append(loss)
                bar.update()
                if (step + 1) % self.every:
                    continue
                history.train[step + 1 - len(losses) : step + 1] = losses
                losses = []
                found = float(self.validation_loss(state["params"]))
                history.validation[(step + 1) // self.every] = found
                bar.set_postfix(validation=f"{found:.3f}")
                if not np.isfinite(found):
                    break
                if checkpoints:
                    saved = {"state": state, "history": dataclasses.asdict(history)}
                    checkpoints.save(step + 1, args=ocp.args.StandardSave(saved))
        if checkpoints:
            checkpoints.close()
        return state, history

    def sample(
        self,
        params: Any,
        count: int,
        *,
        key: jax.Array,
        prompt: str = "\nclass ",
        temperature: float = 0.8,
    ) -> str:
        """The prompt and so many characters more, drawn one after the other."""
        given = encode(prompt)[-self.size.context :]
        # What is before a text is empty lines.
        window = np.pad(given, (self.size.context - len(given), 0)).astype(np.int32)
        tokens = []
        for each in jax.random.split(key, count):
            token = int(self._next(params, window, each, temperature))
            tokens.append(token)
            window = np.append(window[1:], np.int32(token))
        return prompt + decode(np.array(tokens, np.uint8))

    def _optimizer(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        warm_up = max(self.steps // 20, 1)
        shape = optax.join_schedules(
            [
                optax.linear_schedule(1 / warm_up, 1.0, warm_up),
                optax.linear_schedule(1.0, 0.0, self.steps - warm_up),
            ],
            [warm_up],
        )
        return self._make_optimizer(lambda count: rate * shape(count), self.chain)

    def _params_of(self, seed: Any) -> Any:
        rngs = nnx.Rngs(params=jax.random.key(seed))
        return nnx.state(GPT(self.size, rngs=rngs), nnx.Param)

    def _loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        logits = self.logits(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def _step_of(
        self, state: State, rate: Any, seed: Any, step: Any
    ) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), step)
        length = self.size.context + 1
        starts = jax.random.randint(
            key, (self._batch_size, 1), 0, len(self._train) - length + 1
        )
        tokens = self._train[starts + jnp.arange(length)].astype(jnp.int32)
        params = state["params"]
        loss, gradient = jax.value_and_grad(self._loss)(params, tokens)
        updates, opt_state = self._optimizer(rate).update(
            gradient,
            state["opt_state"],
            params,
            outputs_fn=lambda params: self.logits(params, tokens[:, :-1]),
        )
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state}, loss

    def _next_token(
        self, params: Any, window: jax.Array, key: jax.Array, temperature: Any
    ) -> jax.Array:
        logits = self.logits(params, window[None])[0, -1]
        return jax.random.categorical(key, logits / temperature)


def _claim(directory: Path, identity: Mapping[str, Any]) -> None:
    """Writes down whose checkpoints a directory has, or sees that they are the same."""
    file = directory / "run.json"
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(identity, indent=1) + "\n")
        return
    found = json.loads(file.read_text())
    other = [
        f"{name} {found.get(name)} instead of {value}"
        for name, value in identity.items()
        if found.get(name) != value
    ]
    if other:
        raise SystemExit(
            f"{directory} has the checkpoints of another run, with {', '.join(other)}. "
            "Give another directory, or remove it."
        )


def windows(tokens: np.ndarray, context: int, most: int) -> jax.Array:
    """At most so many stretches of a text, evenly spaced, with their next tokens."""
    count = min(most, (len(tokens) - 1) // context)
    if not count:
        raise SystemExit(
            f"the validation text has {len(tokens)} characters, but {context + 1} are "
            "needed"
        )
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(int)
    return jnp.asarray(tokens[starts[:, None] + np.arange(context + 1)], jnp.int32)


def count_parameters(params: Mapping[str, Any]) -> int:
    """How many numbers a model learns.

    >>> size = Size()
    >>> model = nnx.eval_shape(lambda: GPT(size, rngs=nnx.Rngs(0)))
    >>> count_parameters(nnx.state(model, nnx.Param))
    1025664
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def add_size(parser: argparse.ArgumentParser, default: Size) -> None:
    """The arguments that `size_of` reads."""
    add = parser.add_argument_group("the model").add_argument
    add("--layers", type=whole(1), default=default.layers, help="attention and MLP")
    add("--width", type=whole(1), default=default.width, help="features")
    add("--heads", type=whole(1), default=default.heads, help="of attention")
    add("--context", type=whole(2), default=default.context, help="characters")
    add("--norm", choices=("rms", "layer"), default=default.norm)
    add("--mlp", choices=("gelu", "swiglu"), default=default.mlp)
    add(
        "--embedding",
        type=positive,
        default=default.embedding,
        help="standard deviation of its initial entries",
    )


def size_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Size:
    """The size that was asked for; an error of the parser where it is none."""
    names = {field.name for field in dataclasses.fields(Size)} & vars(options).keys()
    size = Size(**{name: getattr(options, name) for name in names})
    if size.width % size.heads:
        parser.error(f"--heads {size.heads} must divide --width {size.width}")
    return size


def main(arguments: Sequence[str] | None = None) -> History:
    """Trains, and prints losses and a sample; returns the losses."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.language_model",
        description="A small GPT on the standard library's own source.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="backmatch, first scales")
    add("--learning-rate", type=positive, default=0.2, help="at its highest")
    add("--steps", type=whole(1), default=2000, help="of training")
    add("--batch-size", type=whole(1), default=32, help="sequences in a step")
    add("--every", type=whole(1), default=100, help="steps between validations")
    add("--seed", type=whole(0), default=0, help="of initial weights and batches")
    add("--checkpoints", type=Path, help="a directory; with it, a run can be resumed")
    add("--text", type=Path, help="a directory of modules; default: Python's own")
    add("--sample", type=whole(0), default=400, help="characters to write at the end")
    add("--prompt", default="\nclass ", help="what they follow")
    add("--temperature", type=positive, default=0.8, help="of the sample")
    add_size(parser, Size())
    options = parser.parse_args(arguments)
    size = size_of(options, parser)
    if options.steps % options.every:
        parser.error(f"--every {options.every} must divide --steps {options.steps}")
    text = read_text(options.text)
    print(", ".join(f"{name} {value}" for name, value in text.source.items()))
    trainer = Trainer(
        size,
        options.method,
        text,
        steps=options.steps,
        batch_size=options.batch_size,
        every=options.every,
    )
    state, history = trainer.run(
        options.learning_rate, options.seed, options.checkpoints
    )
    params = state["params"]
    for index, loss in enumerate(history.validation):
        print(f"step {index * options.every}: validation loss {loss:.4f}")
    outcome = "diverged" if history.diverged else "ended"
    print(f"{count_parameters(params):,} parameters, {options.method}: {outcome}")
    if options.sample and not history.diverged:
        print(
            trainer.sample(
                params,
                options.sample,
                key=jax.random.key(options.seed),
                prompt=options.prompt,
                temperature=options.temperature,
            )
        )
    return history


if __name__ == "__main__":
    main()
