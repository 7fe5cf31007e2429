"""Which model families have a chain, and how far its scales are from measured ones.

Small versions of each, with random weights and random data. The worst ratio is the
largest factor by which a declared scale is off from a measured one, with mean-field
gains: over all kernels, tables and learned arrays, and over those of normalisations.

    python -m examples.studies.which_models
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from examples.studies import families

RESULT = Path(__file__).parent / "results" / "which_models.md"
IMAGES, TOKENS = (16, 16, 3), (16,)
TIME, LABEL = "time", "label"  # a number for each example
PLACE = "place"  # three numbers for each
MODELS: dict[str, tuple[Any, str, tuple[tuple[int, ...] | str, ...]]] = {
    "ResNet (Flax's imagenet)": (families.ResNet(), "Linen", (IMAGES,)),
    "DenseNet": (families.DenseNet(), "Linen", (IMAGES,)),
    "U-Net, nearest": (families.UNet("nearest"), "Linen", (IMAGES,)),
    "U-Net, nearest, 8 features": (families.UNet("nearest", 8), "Linen", (IMAGES,)),
    "U-Net, bilinear": (families.UNet("bilinear"), "Linen", (IMAGES,)),
    "U-Net, transposed": (families.UNet("transposed"), "Linen", (IMAGES,)),
    "diffusion, time and class": (
        families.Diffusion(),
        "Linen",
        (IMAGES, TIME, LABEL),
    ),
    "diffusion, time and text": (
        families.TextToImage(),
        "Linen",
        (IMAGES, TIME, TOKENS),
    ),
    "DiT": (families.DiffusionTransformer(), "Linen", (IMAGES, TIME, LABEL)),
    "text joined to an image": (families.JoinedText(), "Linen", (IMAGES, TOKENS)),
    "FiLM, 6 x 6": (families.Film(), "Linen", ((6, 6, 3), LABEL)),
    "FiLM, 24 x 24": (families.Film(), "Linen", ((24, 24, 3), LABEL)),
    "weights for 8 x 8 positions": (
        families.WeightedPositions(),
        "Linen",
        ((8, 8, 3),),
    ),
    "MobileNetV3": (
        families.MobileNet(nn.hard_swish, nn.hard_sigmoid),
        "Linen",
        (IMAGES,),
    ),
    "EfficientNet": (families.MobileNet(nn.swish, nn.sigmoid), "Linen", (IMAGES,)),
    "ConvNeXt": (families.ConvNext(), "Linen", (IMAGES,)),
    "MLP-Mixer": (families.Mixer(), "Linen", (IMAGES,)),
    "ViT, class token": (families.Vit("token"), "Linen", (IMAGES,)),
    "ViT, mean": (families.Vit("mean"), "Linen", (IMAGES,)),
    "ViT, attention pooling": (families.Vit("attention"), "Linen", (IMAGES,)),
    "attention within windows (Swin)": (families.Windowed(), "Linen", (IMAGES,)),
    "attention along rows and columns": (families.Axial(), "Linen", (IMAGES,)),
    "tokens of a table (FT-Transformer)": (families.FeatureTokens(), "Linen", ((12,),)),
    "Perceiver": (families.Perceiver(), "Linen", (IMAGES,)),
    "DETR": (families.Detector(), "Linen", (IMAGES,)),
    "GPT, SwiGLU, tied head": (families.LinenGpt(), "Linen", (TOKENS,)),
    "GPT, fused kernel, RMSNorm": (families.NnxGpt, "NNX", (TOKENS,)),
    "GPT, attention beside the MLP (PaLM)": (
        families.ParallelGpt(),
        "Linen",
        (TOKENS,),
    ),
    "GPT, scanned layers": (families.ScannedGpt(), "Linen", (TOKENS,)),
    "GPT, a table of distances (T5)": (families.RelativeGpt(), "Linen", (TOKENS,)),
    "GPT, slopes (ALiBi)": (families.RelativeGpt(slopes=True), "Linen", (TOKENS,)),
    "GPT, rotary positions": (families.Rotary(), "Linen", (TOKENS,)),
    "GPT, longer table (Flax's lm1b)": (families.Packed(False), "Linen", (TOKENS,)),
    "GPT, norms by 1 + scale": (families.Packed(True), "Linen", (TOKENS,)),
    "Flax's gemma": (families.Gemma, "NNX", (TOKENS,)),
    "Flax's gemma, one kernel": (
        functools.partial(families.Gemma, shared=4, bounded=True, depth=1),
        "NNX",
        (TOKENS,),
    ),
    "Flax's gemma, queries and keys normalised": (
        functools.partial(families.Gemma, shared=1, normed=True, depth=1),
        "NNX",
        (TOKENS,),
    ),
    "Flax's wmt": (families.Translation(), "Linen", (TOKENS, (12,))),
    "Flax's wmt, one table": (families.Translation(True), "Linen", (TOKENS, (12,))),
    "WaveNet": (families.WaveNet(), "Linen", ((16, 8),)),
    "SIREN": (families.Siren(), "Linen", (PLACE,)),
    "NeRF": (families.RadianceField(), "Linen", (PLACE, PLACE)),
    "two towers": (families.TwoTowers(), "Linen", (IMAGES, TOKENS)),
    "actor and critic (Flax's ppo)": (families.ActorCritic(), "Linen", (IMAGES,)),
    "Flax's mnist": (families.MnistNet, "NNX", (IMAGES,)),
    "Flax's nlp_seq": (families.Tagger(), "Linen", (TOKENS,)),
    "Flax's sst2": (families.Sentiment(), "Linen", (TOKENS,)),
    "Flax's seq2seq": (families.Adder(), "Linen", ((6, 16), (5, 16))),
    "LSTM": (families.Recurrent(), "Linen", (TOKENS,)),
    "variational autoencoder (Flax's vae)": (
        families.Variational(),
        "Linen",
        (IMAGES,),
    ),
}


def links_in(links: Sequence[spec.Link]) -> int:
    """How many links a chain has, those inside others included."""
    inner = (arm for link in links for arm in link.arms.values())
    return len(links) + sum(map(links_in, inner))


def random_inputs(
    shapes: Sequence[tuple[int, ...] | str], batch: int
) -> list[jax.Array]:
    """Normal images; uniform tokens, times and labels."""
    keys = jax.random.split(jax.random.key(1), len(shapes))

    def drawn(shape: tuple[int, ...] | str, key: jax.Array) -> jax.Array:
        if shape == TIME:
            return jax.random.uniform(key, (batch,), maxval=1000)
        if shape == PLACE:
            return jax.random.normal(key, (batch, 3))
        if shape == LABEL:
            return jax.random.randint(key, (batch,), 0, 64)
        assert not isinstance(shape, str)
        if len(shape) == 1:
            return jax.random.randint(key, (batch, *shape), 0, 64)
        return jax.random.normal(key, (batch, *shape))

    return [drawn(shape, key) for shape, key in zip(shapes, keys, strict=True)]


def compared(
    model: Any,
    chain: spec.LayerChain,
    inputs: Sequence[jax.Array],
    told: list[str] | None = None,
) -> dict[str, tuple[float, str]]:
    """The largest factor by which a scale is off, and of which layer, by kind.

    The kinds are `"kernels"`, with tables and learned arrays, and `"norms"`.

    Args:
      model: a Linen module, or the class of an NNX one.
      chain: its chain.
      inputs: a batch.
      told: to which the table of `describe` is added.
    """
    if isinstance(model, nn.Module):
        variables = jax.jit(model.init)(jax.random.key(0), *inputs)
        params = variables["params"]
        others = {name: v for name, v in variables.items() if name != "params"}

        def fn(params: Any, *inputs: Any) -> Any:
            given = {"params": params, **others}
            rngs = {"params": jax.random.key(3)}  # for noise
            return model.apply(given, *inputs, rngs=rngs, mutable=list(others))[0]

    else:
        made = nnx.jit(lambda: model(nnx.Rngs(0)))()
        graphdef, params, others = nnx.split(made, nnx.Param, ...)

        def fn(params: Any, *inputs: Any) -> Any:  # pyright: ignore
            return nnx.merge(graphdef, params, others, copy=True)(*inputs)

    if told is not None:
        told.append(bmo.describe(chain, params, gains="mean_field"))
    ratios = bmo.compare_scales(
        chain, params, fn, *inputs, key=jax.random.key(2)
    ).ratios
    worst: dict[str, tuple[float, str]] = {}
    for path, ratio in ratios.items():
        if ratio:
            kind = "norms" if "norm" in path.lower() else "kernels"
            found = max(ratio, 1 / ratio), path
            worst[kind] = max(worst.get(kind, found), found)
    return worst


def named_blocks(refusal: ValueError) -> str:
    """The blocks that a refusal names, as one would paste them; empty for none."""
    return str(refusal).partition("Pass blocks=")[2].partition(" to make")[0]


def row(name: str, batch: int) -> str:
    """The line of the table for one model."""
    model, library, shapes = MODELS[name]
    inputs = random_inputs(shapes, batch)
    abstract = (
        model if library == "Linen" else nnx.eval_shape(lambda: model(nnx.Rngs(0)))
    )
    start, needs = time.perf_counter(), ""
    try:
        chain = bmo.infer_spec(abstract, *inputs)
        seconds = time.perf_counter() - start
    except ValueError as error:
        seconds = time.perf_counter() - start
        reason = str(error).removeprefix("infer_spec: ").partition(" (")[0]
        reason = reason.partition(". ")[0]
        told = named_blocks(error)
        if not told:
            return (
                f"| {name} | {library} | refused: {reason}; only measured scales | | | "
                f"{seconds:.1f} |"
            )
        needs = f", with `blocks={told}`; else refused: {reason}"
        blocks = eval(told, {"spec": spec})  # as a person would paste it
        chain = bmo.infer_spec(abstract, *inputs, blocks=blocks)
    found = compared(model, chain, inputs)
    links = f"{links_in(chain.layers)}{needs}"
    worst = {kind: f"{factor:.3g} (`{path}`)" for kind, (factor, path) in found.items()}
    return (
        f"| {name} | {library} | {links} | {worst['kernels']} | "
        f"{worst.get('norms', '')} | {seconds:.1f} |"
    )


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Writes the table; returns its lines."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.which_models",
        description="Which model families have a chain, and how good it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    lines = [
        "| model | library | links | worst ratio | of norms | seconds to infer |",
        "|---|---|---|---|---|---|",
    ]
    for name in tqdm(options.models, unit="model"):
        lines.append(row(name, options.batch_size))
        tqdm.write(lines[-1])
    options.output.write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    main()
