"""Every lesson works with the transformation, and learns the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from examples import data
from examples.studies import lecture_notes
from examples.studies.lecture_notes import LESSONS, Lesson


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("name", LESSONS)
def test_every_lesson_learns_with_the_scales(name, digits):
    rate = 0.001 if LESSONS[name].adam else 0.01
    accuracy, _ = lecture_notes.train(
        LESSONS[name], True, rate, digits, seed=0, epochs=6
    )
    assert accuracy >= 0.85


def test_the_momentum_follows_its_schedule():
    model = lecture_notes.MLP()
    chain = bmo.infer_spec(model, jnp.zeros((1, 64)), train=False)
    params = model.init(jax.random.key(0), jnp.zeros((1, 64)), train=False)["params"]
    tx = lecture_notes.optimizer(Lesson(momentum=None), True, 0.1, chain)
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(251):
        _, state = update(params, state, params)
        hyperparams: dict = optax.tree.get(state, "hyperparams")
        seen.append(float(hyperparams["decay"]))
    assert (seen[0], seen[249], seen[250]) == (0.5, 0.5, 0.75)


def test_early_stopping_keeps_the_best_and_ends(digits):
    lesson = Lesson(patience=2)
    # At a rate of zero nothing improves after the first epoch.
    _, epochs = lecture_notes.train(lesson, True, 0.0, digits, seed=0, epochs=20)
    assert epochs == 3


@pytest.mark.parametrize("name", lecture_notes.INITIALIZERS)
def test_initial_weights_have_the_size_the_lesson_says(name):
    model = lecture_notes.MLP((400, 200), initializer=name)
    params = model.init(jax.random.key(0), jnp.zeros((1, 300)), train=False)["params"]
    kernel = np.asarray(params["Dense_1"]["kernel"])
    wanted = {"xavier": 2 / (400 + 200), "kaiming": 2 / 400, "orthogonal": 1 / 400}
    assert kernel.var() == pytest.approx(wanted[name], rel=0.05)
    if name == "orthogonal":
        np.testing.assert_allclose(kernel.T @ kernel, np.eye(200), atol=1e-4)


def test_the_program_prints_both_methods(capsys, monkeypatch):
    monkeypatch.setattr(lecture_notes, "LEARNING_RATES", (0.01,))
    monkeypatch.setattr(lecture_notes, "TUNING_SEEDS", (100,))
    monkeypatch.setattr(lecture_notes, "TEST_SEEDS", (0, 1))
    found = lecture_notes.main(["--epochs", "1", "--lessons", "orthogonal"])
    printed = capsys.readouterr().out
    assert "orthogonal" in printed and "backmatch" in printed
    assert {len(tested) for tested in found["orthogonal"].values()} == {2}
