"""The benchmark of random networks, at reduced size."""

import collections
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backmatch_optax as bmo
from examples import data
from examples.studies import random_networks, random_networks_report, results_file
from examples.studies.random_networks import Method, Network

SMALL = (
    Network(0, "mlp", "relu", norm=True, widths=(8,), imbalance=1.0),
    Network(1, "attention", "tanh", norm=True, widths=(8,), imbalance=0.0),
)
SOME = (
    Method("sgd"),
    Method("sgd", Fraction(1), live=True),
    Method("sgd", Fraction(1), gains="measured"),
    Method("muon"),
    Method("muon", Fraction(1, 2), -Fraction(1, 2), gains="mean_field"),
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_sixty_of_a_hundred_networks_are_to_choose_by():
    drawn = [random_networks.draw(index) for index in range(100)]
    assert drawn == [random_networks.draw(index) for index in range(100)]
    assert sum(network.kept_aside for network in drawn) == 40
    kinds = collections.Counter(network.kind for network in drawn)
    assert kinds == {"mlp": 70, "conv": 10, "residual": 10, "attention": 10}
    aside = collections.Counter(n.kind for n in drawn if n.kept_aside)
    assert aside == {"mlp": 28, "conv": 4, "residual": 4, "attention": 4}


def test_the_convolution_as_a_product():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )
    found = random_networks._conv_as_product(x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_search_ends_with_the_best_rate_between_two_others():
    def train(power):
        return float("nan") if power > 3 else (power - 2) ** 2 / 10

    curve: random_networks.Curve = {}
    while powers := random_networks.next_powers(curve, -1):
        curve |= {power: (train(power), 0.0) for power in powers}
    assert random_networks.best(curve) == 2
    assert {1, 2, 3} <= set(curve)


def test_multipliers_are_those_of_the_package_and_keep_the_mean(digits):
    task = random_networks.make_task(SMALL[0], digits, 10)
    scales = random_networks.initial_log_scales(task)
    sizes = random_networks.sizes(task.params)

    def multipliers(method):
        logs = scales[method.gains]
        rule = random_networks.rule(method, 1.0, logs)
        of = random_networks.log_multipliers(rule, jnp.asarray(logs), task.params)
        return np.exp(of)

    assert task.chain is not None
    tx = bmo.scale_by_backmatch(task.chain, limit=None)
    ones = jax.tree.map(jnp.ones_like, task.params)
    expected, _ = tx.update(ones, tx.init(task.params), task.params)
    np.testing.assert_allclose(
        multipliers(Method("sgd", Fraction(1))),
        [leaf.mean() for leaf in jax.tree.leaves(expected)],
        rtol=1e-4,
    )
    np.testing.assert_allclose(multipliers(Method("sgd")), 1, rtol=1e-5)
    scaled = multipliers(Method("adam", Fraction(1, 2), gains="mean_field"))
    np.testing.assert_allclose(sizes @ scaled / sizes.sum(), 1, rtol=1e-5)


def test_a_stopped_run_goes_on_and_the_report_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(random_networks, "draw", SMALL.__getitem__)
    for module in (random_networks, random_networks_report):
        monkeypatch.setattr(module, "METHODS", SOME)
    monkeypatch.setattr(random_networks_report, "OPTIMIZERS", ("sgd", "muon"))
    monkeypatch.setattr(random_networks, "_TRAIN", 64)
    monkeypatch.setattr(random_networks, "_TEST", 64)
    path = tmp_path / "results.jsonl"
    arguments = ["--dataset", "digits", "--steps", "10", "--results", str(path)]
    random_networks.main([*arguments, "--networks", "1"])
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(SOME)
    # What the file lacks is done again, and nothing else.
    path.write_text("\n".join(lines[:-1]) + "\n")
    random_networks.main([*arguments, "--networks", "2"])
    records = results_file.read(path)
    runs = collections.Counter((r["network"], r.get("method")) for r in records)
    assert set(runs.values()) == {1}
    assert sum(network == 0 for network, _ in runs) == 1 + len(SOME)
    # The attention net has measured scales only.
    assert sum(network == 1 for network, _ in runs) == 1 + len(SOME) - 2
    before = path.read_text()
    random_networks.main([*arguments, "--networks", "2"])
    assert path.read_text() == before
    with pytest.raises(SystemExit, match="choose another file"):
        random_networks.main([*arguments, "--steps", "20"])
    capsys.readouterr()
    random_networks.main([*arguments, "--report"])
    printed = capsys.readouterr().out
    assert "2 networks drawn at random" in printed
    assert path.with_suffix(".md").read_text() in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_explained(capsys):
    with pytest.raises(SystemExit):
        random_networks.main(["--steps", "5"])
    assert "--steps must be a multiple of 10" in capsys.readouterr().err
