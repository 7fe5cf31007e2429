"""The learning-rate study, at reduced size."""

import json

import numpy as np
import pytest

from examples import data
from examples.studies import transfer


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def losses(digits, method, rates, **network):
    changed = transfer.Network("", **network)
    return transfer.sensitivity(changed, method, digits, rates, [0, 1], 60)["loss"]


def test_the_normalized_scales_learn_at_the_rates_of_sgd(digits):
    # With the papers' scales the best rate of these two differs from SGD's 64-fold.
    rates = tuple(2.0**power for power in range(-9, 0))
    for init in (0.5, 1.0):
        best = {
            method: transfer.best_rate(losses(digits, method, rates, init=init), rates)
            for method in ("sgd", "backmatch, normalized")
        }
        assert 1 / 4 <= best["backmatch, normalized"] / best["sgd"] <= 4


def test_a_rate_that_diverges_is_never_the_best():
    found = np.array([[2.0, 2.0], [1.0, np.nan], [1.5, 1.7]])
    assert transfer.best_rate(found, (0.1, 0.2, 0.3)) == 0.3


def test_the_program_prints_best_rates_and_saves_the_curves(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(transfer, "LEARNING_RATES", (0.01, 0.1))
    panels = {"width": transfer.PANELS["width"][:2]}
    monkeypatch.setattr(transfer, "PANELS", panels)
    found = transfer.main(
        ["--steps", "5", "--seeds", "1", "--output-dir", str(tmp_path)]
    )
    assert "times SGD's" in capsys.readouterr().out
    assert set(found["width"]) == set(transfer.METHODS)
    for name in ("loss", "accuracy"):
        picture = tmp_path / f"transfer_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "transfer.json").read_text())
    assert np.shape(saved["curves"]["width"]["width 32"]["sgd"]["loss"]) == (2, 1)


def test_bad_arguments_are_explained(capsys):
    with pytest.raises(SystemExit):
        transfer.main(["--steps", "0"])
    assert "'0' must be a whole number of at least 1" in capsys.readouterr().err
