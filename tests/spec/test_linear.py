"""Dense layers and convolutions against the Jacobians of Flax's."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import RTOL, assert_close, curvatures, layer_and_params, measured, signs

import backmatch_optax as bmo
from backmatch_optax import spec

# Dense and Conv. An input of entries +-1 makes the mean of squares that a kernel meets
# exactly one, so nothing is left to chance.


@pytest.mark.parametrize("input_shape", [(5,), (4, 5), (3, 2, 5)])
def test_dense(input_shape):
    x = signs(2, *input_shape)
    apply, params = layer_and_params(nn.Dense(3), x)
    assert_close(
        curvatures(spec.Dense("layer"), params, input_shape), measured(apply, params, x)
    )


EINSUMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "BTNH,NHD->BTD": ((4, 3, 6), (5, 4, 3), {}),
    "BTD,NDH->BTNH": ((4, 6, 3), (5, 6), {"in_axis": 1}),
    "BTD,CNDH->CBTNH": ((2, 4, 6, 3), (5, 6), {"in_axis": 2}),
    "BTNH,HDN->BTD": ((3, 6, 4), (5, 4, 3), {"in_axis": (0, -1)}),
    "BTNH,NHG->BTNG": ((4, 3, 2), (5, 4, 3), {"in_axis": 1, "batch_axis": 0}),
    "BTN,NG->BTNG": ((4, 3), (5, 4), {"in_axis": (), "batch_axis": 0}),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_kernels_of_einsums_in_any_order(equation):
    shape, input_shape, axes = EINSUMS[equation]
    x = signs(2, *input_shape)
    apply, params = layer_and_params(nn.Einsum(shape, equation), x)
    features = (5, x[0, 0].size)  # side by side, for the links around
    link = spec.DenseGeneral("layer", **axes)
    assert eval(repr(link)) == link
    assert_close(curvatures(link, params, features), measured(apply, params, x))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"in_axis": 1}, r"axes \(1,\) of its kernel of shape \(4, 6, 3\) do not make"),
        ({"in_axis": 3}, r"kernel of shape \(4, 6, 3\) lacks one of the axes \(3,\)"),
        ({"in_axis": (0, -3)}, "names an axis of its kernel .* twice"),
        (
            {"in_axis": (0, 0)},
            r"in_axis \(=\(0, 0\)\) must be an int or different ints",
        ),
        ({"in_axis": ()}, r"in_axis \(=\(\)\) needs batch_axis"),
        ({"in_axis": (), "batch_axis": 1}, r"the axes \(1,\) of its kernel"),
        ({"in_axis": 0, "batch_axis": 1.5}, r"batch_axis \(=1.5\) must be"),
        ({"batch_axis": 0}, r"batch_axis \(=0\) needs in_axis"),
    ],
)
def test_axes_that_a_kernel_does_not_have(axes, message):
    with pytest.raises(ValueError, match=message):
        chain = spec.LayerChain([spec.DenseGeneral("d", **axes)], input_shape=(5, 4))
        bmo.check_spec(chain, {"d": {"kernel": jnp.ones((4, 6, 3))}})


# Where every output sees all the taps of its window, the rules are exact.
EXACT_CONVOLUTIONS = {
    "1d": ((7, 2), 3, {"padding": "VALID"}),
    "1d strides": ((8, 2), 3, {"padding": "VALID", "strides": 3}),
    "2d": ((5, 4, 3), (3, 2), {"padding": "VALID"}),
    "2d no padding": ((5, 4, 3), (3, 2), {"padding": 0}),
    "2d strides": ((7, 6, 2), (3, 2), {"padding": "VALID", "strides": (2, 3)}),
    "2d dilation": ((7, 6, 2), (3, 2), {"padding": "VALID", "kernel_dilation": (2, 3)}),
    "2d groups": ((4, 5, 6), (2, 2), {"padding": "VALID", "feature_group_count": 3}),
    "2d depthwise": ((4, 5, 6), (2, 2), {"padding": "VALID", "feature_group_count": 6}),
    "2d circular": ((5, 4, 3), (3, 2), {"padding": "CIRCULAR"}),
    "2d circular strides": ((5, 4, 3), (3, 2), {"padding": "CIRCULAR", "strides": 2}),
    "3d": ((4, 3, 4, 2), (2, 3, 2), {"padding": "VALID"}),
    "3d circular": ((4, 3, 3, 2), (2, 3, 2), {"padding": "CIRCULAR", "strides": 2}),
}


@pytest.mark.parametrize("case", EXACT_CONVOLUTIONS)
def test_conv(case):
    input_shape, window, options = EXACT_CONVOLUTIONS[case]
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.Conv(6, window, **options), x)
    assert_close(
        curvatures(spec.Conv("layer", **options), params, input_shape),
        measured(apply, params, x),
    )


EXACT_TRANSPOSED_CONVOLUTIONS = {
    "1d": ((5, 2), 3, {"padding": "VALID"}),
    "1d strides": ((5, 2), 2, {"padding": "VALID", "strides": 3}),
    "2d": ((3, 4, 2), (3, 2), {"padding": "VALID", "strides": (2, 3)}),
    "2d dilation": ((3, 4, 2), (3, 2), {"padding": "VALID", "kernel_dilation": 2}),
    "2d circular": ((3, 4, 2), (3, 2), {"padding": "CIRCULAR", "strides": (3, 2)}),
    "3d": ((2, 3, 2, 2), (2, 3, 2), {"padding": "VALID"}),
}


@pytest.mark.parametrize("case", EXACT_TRANSPOSED_CONVOLUTIONS)
def test_transposed_conv(case):
    input_shape, window, options = EXACT_TRANSPOSED_CONVOLUTIONS[case]
    if isinstance(options.get("strides"), int):
        flax_options = options | {"strides": (options["strides"],)}
    else:
        flax_options = options
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.ConvTranspose(4, window, **flax_options), x)
    link = spec.ConvTranspose("layer", **options)
    rule, found = curvatures(link, params, input_shape), measured(apply, params, x)
    assert_close(rule, found)


CUT_TRANSPOSED_CONVOLUTIONS = {
    "no padding": ((8, 2), 5, {"padding": 0}),
    "little": ((5, 4, 2), (4, 3), {"strides": (2, 1), "padding": [(1, 2), (0, 1)]}),
    "dilation": ((6, 5, 2), (3, 2), {"padding": 1, "kernel_dilation": 2}),
    "all of it": ((5, 2), 3, {"padding": 2}),
}


@pytest.mark.parametrize("case", CUT_TRANSPOSED_CONVOLUTIONS)
def test_transposed_conv_whose_padding_cuts_its_output(case):
    input_shape, window, options = CUT_TRANSPOSED_CONVOLUTIONS[case]
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.ConvTranspose(4, window, **options), x)
    # Taps of the same size: those at the ends of a window are used less often.
    params = jax.tree.map(jnp.sign, params)
    link = spec.ConvTranspose("layer", **options)
    assert_close(curvatures(link, params, input_shape), measured(apply, params, x))


PADDED_CONVOLUTIONS = {
    "same": ((5, 4, 3), (3, 2), {}),
    "same strides": ((6, 5, 3), (3, 3), {"strides": 2}),
    "same lower": ((6, 5, 3), (2, 2), {"padding": "SAME_LOWER", "strides": 2}),
    "ints": ((5, 4, 3), (3, 2), {"padding": (2, 1)}),
    "pairs": ((6, 3), 3, {"padding": [(2, 0)]}),
    "causal": ((6, 3), 3, {"padding": "CAUSAL"}),
    "same 3d": ((3, 3, 3, 2), (2, 3, 2), {"strides": (1, 2, 1)}),
}


@pytest.mark.parametrize("case", PADDED_CONVOLUTIONS)
def test_conv_counts_padded_positions_like_others(case):
    # As the papers do. What is measured is less by the share of (tap, position) pairs
    # that lie inside the input, here counted by a convolution of ones.
    input_shape, window, options = PADDED_CONVOLUTIONS[case]
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.Conv(6, window, **options), x)
    params["kernel"] = signs(*params["kernel"].shape, seed=2)
    ones = jnp.ones_like(params["kernel"])
    inside = apply({"kernel": ones, "bias": jnp.zeros(6)}, jnp.ones_like(x))
    share = float(inside.mean()) / (ones.size / ones.shape[-1])
    assert 0.3 < share < 1
    found = measured(apply, params, x)
    link = spec.Conv("layer", **options)
    rule = curvatures(link, params, input_shape)
    rule |= {"kernel": rule["kernel"] * share, "input": rule["input"] * share}
    assert_close(rule, found)
    # The other gains leave such pairs out.
    assert_close(curvatures(link, params, input_shape, gains="mean_field"), found)


def test_reflected_positions_are_inputs_like_others():
    # A kernel's own curvature is exact; an input that is reflected counts twice in one
    # output, so m_z holds on the average over the signs of the kernel only.
    input_shape = (6, 3)
    options: Any = {"padding": "REFLECT"}
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.Conv(4, 3, **options), x)
    rule = curvatures(spec.Conv("layer", **options), params, input_shape)
    found = []
    for flips in np.ndindex(2, 2, 2):
        taps = 1 - 2 * jnp.asarray(flips)[:, None, None]
        flipped = params | {"kernel": params["kernel"] * taps}
        found.append(measured(apply, flipped, x))
    mean = {name: float(np.mean([f[name] for f in found])) for name in rule}
    assert_close(rule, mean)


@pytest.mark.parametrize(
    ("link", "layer", "input_shape"),
    [
        (spec.Dense("layer"), nn.Dense(3), (4, 5)),
        (spec.Conv("layer", padding="VALID"), nn.Conv(3, 2, padding="VALID"), (4, 5)),
    ],
    ids=["dense", "conv"],
)
def test_a_kernel_meets_the_size_of_its_input_and_a_bias_does_not(
    link, layer, input_shape
):
    x = 3 * signs(1, *input_shape)
    apply, params = layer_and_params(layer, x)
    assert_close(
        curvatures(link, params, input_shape, moment=9.0), measured(apply, params, x)
    )


@pytest.mark.parametrize(
    ("link", "layer", "input_shape"),
    [
        (spec.Dense("layer"), nn.Dense(3, use_bias=False), (5,)),
        (
            spec.Conv("layer", padding="VALID", strides=2, feature_group_count=2),
            nn.Conv(
                6, 3, padding="VALID", strides=2, feature_group_count=2, use_bias=False
            ),
            (9, 4),
        ),
        (
            spec.ConvTranspose("layer", padding="VALID", strides=2),
            nn.ConvTranspose(3, (3,), padding="VALID", strides=(2,), use_bias=False),
            (5, 4),
        ),
    ],
    ids=["dense", "conv", "transposed conv"],
)
def test_a_kernel_hands_on_its_squared_norm_times_the_moment(link, layer, input_shape):
    # The second moment that a layer above meets, for a white input: the mean over the
    # outputs of the squared norm of a row of the Jacobian.
    x = jnp.zeros((1, *input_shape))
    apply, params = layer_and_params(layer, x)
    jacobian = jax.jacrev(apply, argnums=1)(params, x)
    output = jax.eval_shape(apply, params, x)
    moment = float(jnp.sum(jacobian**2)) / output.size
    above = spec.LayerChain([link, spec.Dense("above")], input_shape=input_shape)
    tree = {"layer": params, "above": {"kernel": jnp.ones((output.shape[-1], 1))}}
    positions = output.size // output.shape[-1]
    scale = float(bmo.layer_scales(above, tree, normalize=False)["above"])
    np.testing.assert_allclose(1 / scale / positions, moment, rtol=RTOL)
