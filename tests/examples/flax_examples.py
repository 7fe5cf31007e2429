"""Networks built as in the examples that Flax ships, with fewer features.

Of `mnist`, `vae`, `ppo`, `imagenet`, `sst2` and `seq2seq`. Which layers there are, how
they are nested and called, and what the models take and put out is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class MnistNet(nnx.Module):
    """Two convolutions with BatchNorm, average pooling, and two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(64, 64, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025)
        self.linear2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = self.dropout1(self.conv1(images), rngs=rngs)
        x = self.pool(nnx.relu(self.norm1(x)))
        x = self.pool(nnx.relu(self.norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x), rngs=rngs))
        return self.linear2(x)


class VaeEncoder(nn.Module):
    """Mean and logarithm of the variance of the latents."""

    latents: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(nn.Dense(100, name="fc1")(x))
        mean = nn.Dense(self.latents, name="fc2_mean")(x)
        return mean, nn.Dense(self.latents, name="fc2_logvar")(x)


class VaeDecoder(nn.Module):
    """Logits of the pixels."""

    pixels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        z = nn.relu(nn.Dense(100, name="fc1")(z))
        return nn.Dense(self.pixels, name="fc2")(z)


class Vae(nn.Module):
    """A variational autoencoder, which draws its latents itself."""

    latents: int = 8
    pixels: int = 64

    def setup(self) -> None:
        self.encoder = VaeEncoder(self.latents)
        self.decoder = VaeDecoder(self.pixels)

    def __call__(self, x: jax.Array, key: jax.Array) -> Any:
        mean, log_variance = self.encoder(x)
        noise = jax.random.normal(key, log_variance.shape)
        z = mean + noise * jnp.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


class ActorCritic(nn.Module):
    """Convolutions of frames of a game, with a policy and a value on top."""

    actions: int

    @nn.compact
    def __call__(self, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = frames.astype(jnp.float32) / 255.0
        x = nn.relu(nn.Conv(8, (8, 8), strides=(4, 4), name="conv1")(x))
        x = nn.relu(nn.Conv(16, (4, 4), strides=(2, 2), name="conv2")(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=(1, 1), name="conv3")(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(64, name="hidden")(x))
        logits = nn.Dense(self.actions, name="logits")(x)
        return nn.log_softmax(logits), nn.Dense(1, name="value")(x)


class Bottleneck(nn.Module):
    """Three convolutions, whose last normalisation starts at zero, and a shortcut."""

    features: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = self.conv(self.features, (3, 3), self.strides)(y)
        y = self.conv(4 * self.features, (1, 1))(nn.relu(self.norm()(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            project = self.conv(
                4 * self.features, (1, 1), self.strides, name="conv_proj"
            )
            x = self.norm(name="norm_proj")(project(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet of bottlenecks, whose BatchNorms average over devices."""

    stages: Sequence[int] = (1, 1)
    features: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            axis_name="batch",
        )
        x = conv(
            self.features, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init"
        )(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                count = self.features * 2**stage
                x = Bottleneck(count, conv=conv, norm=norm, strides=strides)(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class WordDropout(nn.Module):
    """Random words become the unknown one."""

    rate: float
    unknown: int

    @nn.compact
    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic:
            return tokens
        mask = jax.random.bernoulli(self.make_rng("dropout"), self.rate, tokens.shape)
        return jnp.where(mask, jnp.array([self.unknown]), tokens)


class Embedder(nn.Module):
    """A table of its own, with both kinds of dropout."""

    words: int
    features: int

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.1), (self.words, self.features)
        )
        self.word_dropout = WordDropout(rate=0.1, unknown=1)
        self.dropout = nn.Dropout(rate=0.5)

    def __call__(self, tokens: jax.Array, deterministic: bool) -> jax.Array:
        tokens = self.word_dropout(tokens, deterministic)
        return self.dropout(self.embedding[tokens], deterministic=deterministic)


class ScannedLstm(nn.Module):
    """A recurrent cell that is scanned over the words."""

    features: int

    @functools.partial(
        nn.transforms.scan,
        variable_broadcast="params",
        in_axes=1,
        out_axes=1,
        split_rngs={"params": False},
    )
    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> Any:
        return nn.OptimizedLSTMCell(self.features)(carry, x)

    def start(self, shape: tuple[int, ...]) -> Any:
        cell = nn.OptimizedLSTMCell(self.features, parent=None)
        return cell.initialize_carry(jax.random.key(0), shape)


@jax.vmap
def turned(inputs: jax.Array, length: jax.Array) -> jax.Array:
    """A padded sequence, back to front."""
    return jnp.flip(jnp.roll(inputs, len(inputs) - length, axis=0), axis=0)


class BothWays(nn.Module):
    """An LSTM in either direction."""

    features: int

    def setup(self) -> None:
        self.forward_lstm = ScannedLstm(self.features)
        self.backward_lstm = ScannedLstm(self.features)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        start = self.forward_lstm.start(x[:, 0].shape)
        _, ahead = self.forward_lstm(start, x)
        _, back = self.backward_lstm(start, turned(x, lengths))
        return jnp.concatenate([ahead, turned(back, lengths)], -1)


class KeysOnlyAttention(nn.Module):
    """Weights of the words, from each of them alone."""

    features: int

    @nn.compact
    def __call__(self, keys: jax.Array, mask: jax.Array) -> jax.Array:
        energy = nn.tanh(nn.Dense(self.features, use_bias=False, name="keys")(keys))
        scores = nn.Dense(1, use_bias=False, name="energy")(energy).squeeze(-1)
        return nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


class Head(nn.Module):
    """A hidden layer of tanh and an output without bias."""

    features: int

    def setup(self) -> None:
        self.intermediate_layer = nn.Dense(self.features)
        self.output_layer = nn.Dense(1, use_bias=False)
        self.dropout = nn.Dropout(rate=0.5)

    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        x = nn.tanh(self.intermediate_layer(x))
        return self.output_layer(self.dropout(x, deterministic=deterministic))


class AttentionClassifier(nn.Module):
    """The weighted mean of the words, classified."""

    features: int

    def setup(self) -> None:
        self.dropout = nn.Dropout(rate=0.5)
        self.keys_only_mlp_attention = KeysOnlyAttention(self.features)
        self.mlp = Head(self.features)

    def __call__(
        self, x: jax.Array, lengths: jax.Array, deterministic: bool
    ) -> jax.Array:
        x = self.dropout(x, deterministic=deterministic)
        mask = jnp.arange(x.shape[1])[None] < lengths[:, None]
        weights = self.keys_only_mlp_attention(x, mask)
        context = (jnp.expand_dims(weights, 1) @ x).squeeze(1)
        context = self.dropout(context, deterministic=deterministic)
        return self.mlp(context, deterministic)


class TextClassifier(nn.Module):
    """Embedded words, an LSTM in both directions, attention, and a logit."""

    words: int
    features: int

    def setup(self) -> None:
        self.embedder = Embedder(self.words, self.features)
        self.encoder = BothWays(self.features)
        self.classifier = AttentionClassifier(self.features)

    def __call__(
        self, tokens: jax.Array, lengths: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        x = self.encoder(self.embedder(tokens, deterministic), lengths)
        return self.classifier(x, lengths, deterministic)


class DecoderCell(nn.RNNCellBase):
    """An LSTM whose next input may be its own last output."""

    features: int
    teacher_force: bool
    words: int

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> Any:
        state, last = carry
        x = x if self.teacher_force else last
        state, y = nn.LSTMCell(self.features)(state, x)
        logits = nn.Dense(self.words)(y)
        word = jax.random.categorical(self.make_rng("lstm"), logits)
        prediction = jax.nn.one_hot(word, self.words)
        return (state, prediction), (logits, prediction)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Seq2Seq(nn.Module):
    """An LSTM that reads and one that writes, over letters as unit vectors."""

    teacher_force: bool
    features: int
    words: int
    end: int = 1

    @nn.compact
    def __call__(self, read: jax.Array, written: jax.Array) -> Any:
        encoder = nn.RNN(nn.LSTMCell(self.features), return_carry=True, name="encoder")
        decoder = nn.RNN(
            DecoderCell(self.features, self.teacher_force, self.words),
            split_rngs={"params": False, "lstm": True},
            name="decoder",
        )
        lengths = jnp.argmax(jnp.argmax(read, axis=-1) == self.end, axis=-1)
        state, _ = encoder(read, seq_lengths=lengths)
        carry = (state, written[:, 0])
        logits, predictions = decoder(written[:, :-1], initial_carry=carry)
        return logits, predictions
