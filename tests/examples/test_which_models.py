"""Each family of models: scales within the factor promised, or said to be rough."""

import pytest
from flax import nnx

import backmatch_optax as bmo
from examples.studies import which_models

REFUSED = ("LSTM", "Flax's sst2")
# What is never read, and what the next BatchNorm takes away again: docs/models.md.
KNOWN = {
    "text joined to an image": 4.0,
    "MobileNetV3": 10.0,
    "EfficientNet": 40.0,
}
WITHOUT = "Flax's seq2seq"  # two signals in a loop, for which there is no block


@pytest.mark.parametrize(
    "name", [n for n in which_models.MODELS if n not in (*REFUSED, WITHOUT)]
)
def test_scales_are_within_a_factor_or_said_to_be_approximate(name):
    model, library, shapes = which_models.MODELS[name]
    inputs = which_models.random_inputs(shapes, 16)
    linen = library == "Linen"
    abstract = model if linen else nnx.eval_shape(lambda: model(nnx.Rngs(0)))
    chain = bmo.infer_spec(abstract, *inputs)
    tables: list[str] = []
    worst = which_models.compared(model, chain, inputs, tables)
    rough = "approximate: " in tables[0]
    limits = {"kernels": 3.0, "norms": 4.0}  # single features, where a few say much
    for kind, (factor, path) in worst.items():
        assert factor < KNOWN.get(name, limits[kind]) or rough, (factor, path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_a_block_that_works(name):
    model, _, shapes = which_models.MODELS[name]
    inputs = which_models.random_inputs(shapes, 4)
    with pytest.raises(ValueError, match="Pass blocks=") as refusal:
        bmo.infer_spec(model, *inputs)
    blocks = eval(which_models.named_blocks(refusal.value), {"spec": bmo.spec})
    assert bmo.infer_spec(model, *inputs, blocks=blocks).layers


def test_what_has_only_measured_scales_says_so():
    model, _, shapes = which_models.MODELS[WITHOUT]
    with pytest.raises(ValueError, match=r"scan is a loop.* Use measured scales"):
        bmo.infer_spec(model, *which_models.random_inputs(shapes, 4))
