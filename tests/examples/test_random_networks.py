"""The benchmark of random networks, at reduced size."""

import collections
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backmatch_optax as bmo
from examples import data
from examples.studies import results_file
from examples.studies.random_networks import (
    __main__,
    networks,
    report,
    rules,
    search,
)
from examples.studies.random_networks.networks import Network
from examples.studies.random_networks.rules import Method

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
    drawn = [networks.draw(index) for index in range(100)]
    assert drawn == [networks.draw(index) for index in range(100)]
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
    found = networks._conv_as_product(x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_search_ends_with_the_best_rate_between_two_others():
    def train(power):
        return float("nan") if power > 3 else (power - 2) ** 2 / 10

    curve: search.Curve = {}
    while powers := search.next_powers(curve, -1):
        curve |= {power: (train(power), 0.0) for power in powers}
    assert search.best(curve) == 2
    assert {1, 2, 3} <= set(curve)


def test_the_search_ends_where_no_rate_learns():
    curve: search.Curve = {}
    while powers := search.next_powers(curve, -1):
        curve |= dict.fromkeys(powers, (9.0, 9.0))
    assert search.best(curve) == min(curve)


def test_multipliers_are_those_of_the_package_and_keep_the_mean(digits):
    task = networks.make_task(SMALL[0], digits, 10)
    scales = rules.initial_log_scales(task)
    sizes = rules.sizes(task.params)

    def multipliers(method):
        logs = scales[method.gains]
        of = rules.rule(method, 1.0, logs)
        of = rules.log_multipliers(of, jnp.asarray(logs), task.params)
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
    monkeypatch.setattr(__main__, "draw", SMALL.__getitem__)
    for module in (__main__, report):
        monkeypatch.setattr(module, "METHODS", SOME)
    monkeypatch.setattr(report, "OPTIMIZERS", ("sgd", "muon"))
    monkeypatch.setattr(networks, "_TRAIN", 64)
    monkeypatch.setattr(networks, "_TEST", 64)
    path = tmp_path / "results.jsonl"
    arguments = ["--dataset", "digits", "--steps", "10", "--results", str(path)]
    __main__.main([*arguments, "--networks", "1"])
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + len(SOME)
    # What the file lacks is done again, and nothing else.
    path.write_text("\n".join(lines[:-1]) + "\n")
    __main__.main([*arguments, "--networks", "2"])
    records = results_file.read(path)
    runs = collections.Counter((r["network"], r.get("method")) for r in records)
    assert set(runs.values()) == {1}
    assert sum(network == 0 for network, _ in runs) == 1 + len(SOME)
    # The attention net has measured scales only.
    assert sum(network == 1 for network, _ in runs) == 1 + len(SOME) - 2
    before = path.read_text()
    __main__.main([*arguments, "--networks", "2"])
    assert path.read_text() == before
    with pytest.raises(SystemExit, match="choose another file"):
        __main__.main([*arguments, "--steps", "20"])
    capsys.readouterr()
    __main__.main([*arguments, "--report"])
    printed = capsys.readouterr().out
    assert "2 networks drawn at random" in printed
    assert path.with_suffix(".md").read_text() in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_explained(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--steps", "5"])
    assert "--steps must be a multiple of 10" in capsys.readouterr().err
