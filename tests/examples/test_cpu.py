"""Convolutions and pooling for CPUs are those of JAX and Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import cpu, models
from examples.training import loss_and_gradient

NAMES = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("image", "kernel", "strides", "padding", "way"),
    [
        ((12, 16, 1), (5, 3), (1, 1), "VALID", "blocks of 2"),
        ((12, 16, 3), (5, 3), (1, 1), [(0, 0), (0, 0)], "blocks of 2"),
        ((12, 16, 8), (5, 5), (1, 1), "VALID", "blocks of 2"),
        ((12, 16, 3), (5, 5), (1, 1), "VALID", "blocks of 4"),
        ((2, 2, 5), (3, 3), (1, 1), "SAME", "product"),
        ((1, 1, 5), (3, 3), (1, 1), "SAME", "product"),
        ((2, 3, 5), (4, 3), (2, 1), [(2, 1), (0, 3)], "product"),
        ((3, 3, 5), (3, 3), (1, 1), "SAME", "XLA"),
        ((13, 16, 3), (5, 3), (1, 1), "VALID", "XLA"),
        ((12, 16, 3), (5, 3), (2, 2), "VALID", "XLA"),
        ((12, 16, 3), (5, 3), (1, 1), "SAME", "XLA"),
    ],
)
def test_convolutions_on_cpu_are_the_convolutions(
    image, kernel, strides, padding, way, monkeypatch
):
    x = jax.random.normal(jax.random.key(0), (2, *image))
    weights = jax.random.normal(jax.random.key(1), (*kernel, image[-1], 4))

    def value_and_pullback(conv):
        def fn(x, weights):
            return conv(x, weights, strides, padding, dimension_numbers=NAMES)

        y, pull = jax.vjp(fn, x, weights)
        return y, *pull(jax.random.normal(jax.random.key(2), y.shape))

    xlas = value_and_pullback(jax.lax.conv_general_dilated)
    taken = []
    in_blocks, as_product = cpu.in_blocks, cpu.as_product

    def blocks(lhs, rhs, size):
        taken.append(f"blocks of {size}")
        return in_blocks(lhs, rhs, size)

    def product(*arguments):
        taken.append("product")
        return as_product(*arguments)

    monkeypatch.setattr(cpu, "in_blocks", blocks)
    monkeypatch.setattr(cpu, "as_product", product)
    for got, expected in zip(value_and_pullback(cpu.conv), xlas, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert (taken or ["XLA"]) == [way]


@pytest.mark.parametrize(
    "options",
    [{"rhs_dilation": (2, 1)}, {"lhs_dilation": (1, 2)}, {"feature_group_count": 2}],
)
def test_dilations_and_groups_are_left_to_xla(options):
    x = jax.random.normal(jax.random.key(0), (2, 2, 2, 4))
    channels = 4 // options.get("feature_group_count", 1)
    weights = jax.random.normal(jax.random.key(1), (3, 3, channels, 6))
    arguments = (x, weights, (1, 1), [(2, 2), (1, 1)])
    options["dimension_numbers"] = NAMES
    ours = cpu.conv(*arguments, **options)
    xlas = jax.lax.conv_general_dilated(*arguments, **options)
    np.testing.assert_array_equal(ours, xlas)


@pytest.mark.parametrize("name", ["lenet", "vgg11"])
def test_a_network_on_cpu_has_the_same_loss_and_gradients(name):
    model, _ = models.MODELS[name](10, (32, 32, 3))
    if name == "vgg11":
        model = model.clone(width=1 / 16)
    faster = cpu.faster(model)
    assert faster != model
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    labels = jnp.arange(8)
    variables = model.init(jax.random.key(1), images[:1], train=False)
    args = (variables["params"], variables["batch_stats"], images, labels)
    jitted = jax.jit(loss_and_gradient, static_argnums=0)
    (loss, stats), gradient = jitted(model.apply, *args)
    (ours, our_stats), our_gradient = jitted(faster.apply, *args)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    for tree, reference in ((our_gradient, gradient), (our_stats, stats)):
        for got, leaf in zip(*map(jax.tree.leaves, (tree, reference)), strict=True):
            np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-4 * abs(leaf).max())


def test_no_convolution_of_vgg_swaps_image_and_kernel_on_cpu():
    # XLA swaps them where the kernel is the larger.
    model = cpu.faster(models.VGG(11, width=1 / 16))
    images = jnp.zeros((4, 32, 32, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    shapes = []
    original = jax.lax.conv_general_dilated

    def watched(lhs, rhs, *args, **options):
        shapes.append((lhs.shape, rhs.shape))
        return original(lhs, rhs, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "conv_general_dilated", watched)
        model.apply(variables, images, train=False)
    assert len(shapes) == 6
    assert all(np.prod(x[1:3]) >= np.prod(k[:2]) for x, k in shapes)


def test_pooling_on_cpu_is_the_pooling():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 3)).round()  # many tie
    wanted = jax.random.normal(jax.random.key(1), (2, 3, 4, 3))
    ours, pull = jax.vjp(lambda x: cpu.max_pool(x, (2, 2), strides=(2, 2)), x)
    flax, flax_pull = jax.vjp(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)), x)
    np.testing.assert_array_equal(ours, flax)
    np.testing.assert_array_equal(*pull(wanted), *flax_pull(wanted))
    lost = x.at[0, 0, 0, 0].set(jnp.nan).at[1, 1, 1, 1].set(jnp.nan)
    assert np.isnan(cpu.max_pool(lost, (2, 2), strides=(2, 2))).sum() == 2
    with pytest.raises(ValueError, match="must tile the image"):
        cpu.max_pool(x, (4, 4), strides=(4, 4))
