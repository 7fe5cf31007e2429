"""The examples, run as a user runs them."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backmatch_optax as bmo
from examples import compare, data, methods, models


def run(tmp_path, *arguments):
    return compare.main([*arguments, "--output-dir", str(tmp_path)])


def test_backmatch_learns_the_digits(tmp_path):
    curves = run(tmp_path, "--methods", "backmatch", "--epochs", "8")
    assert curves["backmatch"]["accuracy"][-1] >= 0.95


def test_methods_start_alike_and_end_in_a_table_pictures_and_results(tmp_path, capsys):
    rates = [f"{method}=0" for method in methods.METHODS]
    arguments = ("--epochs", "1", "--batch-size", "256", "--learning-rate", *rates)
    losses = {curve["loss"][0] for curve in run(tmp_path, *arguments).values()}
    # The same weights and batches; each method is a program of its own.
    np.testing.assert_allclose(list(losses), next(iter(losses)), rtol=1e-5)
    printed = capsys.readouterr().out
    for word in (
        *methods.METHODS,
        "train loss",
        "test accuracy",
        "wrong of 360",
        "overhead",
    ):
        assert word in printed
    for name in ("learning_curves.png", "layer_scales.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(saved["curves"]) == set(methods.METHODS)
    assert saved["options"]["batch_size"] == 256


def test_the_same_seed_gives_the_same_curve(tmp_path):
    arguments = ("--methods", "backmatch", "--epochs", "2", "--seed", "3")
    first, second = (run(tmp_path, *arguments)["backmatch"] for _ in range(2))
    assert first["loss"] == second["loss"]
    assert first["scales"] == second["scales"]


def test_a_run_that_diverges_says_so():
    curve = {"loss": [float("nan")], "accuracy": [0.1], "seconds": [1.0, 0.1]}
    assert "diverged" in compare.table({"sgd": curve}, {"sgd": 1e9}, 360)


def test_the_table_counts_the_images_that_are_wrong():
    curve = {"loss": [0.1], "accuracy": [355 / 360], "seconds": [1.0, 0.1]}
    header, row = compare.table({"sgd": curve}, {"sgd": 0.1}, 360).splitlines()
    start = header.index("wrong of 360")
    assert row[start : start + len("wrong of 360")].split() == ["5"]


def test_tuning_looks_at_training_images_only():
    digits = data.load("digits")
    held_out = digits.hold_out(0.2)
    assert len(held_out.train_images) + len(held_out.test_images) == 1437
    pool = {image.tobytes() for image in digits.train_images}
    assert all(image.tobytes() in pool for image in held_out.test_images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "sgd"], "METHOD=NUMBER"),
        (["--learning-rate", "adam=0.1"], "must name one of sgd, lars"),
        (["--learning-rate", "sgd=nan"], "'nan' must be a number of at least 0"),
        (["--epochs", "0"], "--epochs: '0' must be a whole number of at least 1"),
        (["--epochs", "9999999999"], "'9999999999' must be at most 2147483647"),
        (["--seed", "-1"], "--seed: '-1' must be a whole number of at least 0"),
        (["--weight-decay", "nan"], "'nan' must be a number of at least 0"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["--batch-size", "5000"], "is more than the 1437 training images"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *arguments)
    assert message in capsys.readouterr().err + str(error.value)


def test_a_data_set_that_tfds_does_not_have_says_how_to_get_it(tmp_path, monkeypatch):
    class Builder:  # as tensorflow-datasets has it where nothing was downloaded
        data_dir = tmp_path

        def is_prepared(self):
            return False

    tfds = types.ModuleType("tensorflow_datasets")
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: Builder(), raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="download_and_prepare"):
        data.load("cifar10", str(tmp_path))


def test_a_data_set_without_tfds_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[cifar\]'"):
        data.load("cifar10", str(tmp_path))


def test_a_data_set_that_was_read_before_needs_no_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    cache = tmp_path / "backmatch_optax" / "cifar10"
    cache.mkdir(parents=True)
    images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20, dtype="int32")
    for split, count in (("train", 20), ("test", 5)):
        np.savez(cache / f"{split}.npz", images=images[:count], labels=labels[:count])
    dataset = data.load("cifar10")
    assert (len(dataset.train_images), len(dataset.test_images)) == (20, 5)
    assert dataset.num_classes == 20


def test_images_are_standardised_by_the_training_set():
    digits = data.load("digits")
    pixels = digits.standardise(jnp.asarray(digits.train_images))
    np.testing.assert_allclose(pixels.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(pixels.std(), 1, rtol=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("classes", [10, 100])
def test_declared_chains_fit_their_networks(name, classes):
    model, chain = models.MODELS[name](classes, (32, 32, 3))
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(
        lambda key: model.init(key, images, train=False), jax.random.key(0)
    )
    bmo.check_spec(chain, variables["params"])
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    assert len(chain.paths) == len({path[:-1] for path, _ in leaves})  # every module


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13)])
def test_vgg_has_as_many_layers_as_its_name_says(depth, convolutions):
    # The papers keep one of VGG's three dense layers.
    assert len(models.vgg_spec(depth).paths) == convolutions + 1 == depth - 2
