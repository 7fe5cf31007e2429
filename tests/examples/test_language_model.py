"""The language model and its study, tiny."""

import dataclasses
import functools
import hashlib
import json
import platform
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import backmatch_optax as bmo
from backmatch_optax.parameters import text as path_text
from examples import language_model as lm
from examples.methods import direction
from examples.studies import language_model as study
from examples.studies import results_file

TINY = lm.Size(layers=1, width=16, heads=2, context=16)
ARGUMENTS = (
    *("--layers", "1", "--width", "16", "--heads", "2", "--context", "16"),
    *("--batch-size", "2", "--every", "2", "--sample", "0"),
)


@pytest.fixture(scope="module")
def text():
    return lm.read_text()


def trainer(text, method="sgd", size=TINY, steps=4):
    numbers = {"steps": steps, "batch_size": 2, "every": 2}
    return lm.Trainer(size, method, text, make_optimizer=study.optimizer, **numbers)


def params_of(size):
    return nnx.state(lm.GPT(size, rngs=nnx.Rngs(0)), nnx.Param)


def test_what_was_read_is_recorded(tmp_path):
    digest = hashlib.sha256()
    for index in range(20):
        content = f"# é {index}\n".encode()
        (tmp_path / f"m{index:02}.py").write_bytes(content)
        digest.update(f"m{index:02}.py".encode() + b"\0" + content + b"\0")
    (tmp_path / "not_read.txt").write_text("?")
    text = lm.read_text(tmp_path)
    assert lm.decode(text.validation) == "# \ufffd 9\n# \ufffd 19\n"
    assert lm.decode(text.train).startswith("# \ufffd 0\n# \ufffd 1\n")
    assert text.source == {
        "python": platform.python_version(),
        "files": 20,
        "train_tokens": len(text.train),
        "validation_tokens": len(text.validation),
        "sha256": digest.hexdigest(),
    }
    with pytest.raises(SystemExit, match=r"has 0 modules, but 10 are needed"):
        lm.read_text(tmp_path / "nowhere")


@pytest.mark.parametrize(("norm", "mlp"), [("rms", "swiglu"), ("layer", "gelu")])
def test_the_declared_chain_is_that_of_the_model(text, norm, mlp):
    size = lm.Size(layers=2, width=32, heads=2, context=32, norm=norm, mlp=mlp)
    params, chain = params_of(size), lm.declared(size)
    bmo.check_spec(chain, params)  # nothing is left out
    graph = nnx.graphdef(lm.GPT(size, rngs=nnx.Rngs(0)))
    compared = bmo.compare_scales(
        chain,
        params,
        lambda params, tokens: nnx.merge(graph, params)(tokens),
        lm.windows(text.train, size.context, 64)[:, :-1],
        key=jax.random.key(0),
        gains="mean_field",
    )
    for path, ratio in compared.ratios.items():
        assert 1 / 3 < ratio < 3, (path, ratio)


@pytest.mark.parametrize(("norm", "mlp"), [("rms", "gelu"), ("layer", "swiglu")])
def test_inferred_scales_are_the_declared_ones(norm, mlp):
    size = dataclasses.replace(TINY, norm=norm, mlp=mlp)
    model = lm.GPT(size, rngs=nnx.Rngs(0))
    inferred = bmo.infer_spec(model, jax.numpy.zeros((1, size.context), int))
    params = nnx.state(model, nnx.Param)
    expected = bmo.layer_scales(lm.declared(size), params, normalize=False)
    found = bmo.layer_scales(inferred, params, normalize=False)
    assert found.keys() == expected.keys()
    for path, scale in expected.items():
        assert float(found[path]) == pytest.approx(float(scale), rel=1e-5), path


def test_a_position_sees_nothing_that_follows():
    model = lm.GPT(TINY, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, 16), 0, lm.TOKENS)
    changed = tokens.at[0, 10].set((tokens[0, 10] + 1) % lm.TOKENS)
    difference = np.abs(model(tokens) - model(changed)).max(-1)[0]
    assert (difference[:10] == 0).all()
    assert (difference[10:] > 1e-4).all()


# Of methods that differ by a number or a gain, one.
KINDS = ("sgd", "backmatch", "backmatch, first scales", "measured", "adamw", "lion")


@pytest.mark.parametrize("method", [*KINDS, "muon"])
def test_every_kind_of_method_trains(text, method):
    # Momentum and warm-up leave little of four steps: the first loss is the highest.
    rate = 0.003 if method in ("adamw", "lion", "muon") else 0.1
    state, history = trainer(text, method).run(rate, seed=0)
    assert not history.diverged
    assert np.isfinite(history.train).all()
    assert history.validation[-1] < history.validation[0]
    before = trainer(text).init(0)["params"]
    for old, new in zip(*map(jax.tree.leaves, (before, state["params"])), strict=True):
        assert (old != new).any()


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"method \(='adam'\) must be one of 'sgd'"):
        lm.optimizer("adam", 0.1, lm.declared(TINY))


def test_muon_is_given_the_matrices_of_the_blocks():
    params = params_of(TINY)
    numbers = lm.matrices(params)
    is_leaf = lambda leaf: isinstance(leaf, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    found = {
        path_text(path): numbers
        for path, numbers in jax.tree_util.tree_leaves_with_path(
            numbers, is_leaf=is_leaf
        )
    }
    first = ((0,), (1,))
    expected: dict[str, tuple] = {
        f"blocks/0/attention/{name}/kernel": ((0,), (1, 2))
        for name in ("query", "key", "value")
    }
    expected["blocks/0/attention/out/kernel"] = ((0, 1), (2,))
    expected |= {f"blocks/0/{name}/kernel": first for name in ("up", "down")}
    assert {
        path: (numbers.reduction_axis, numbers.output_axis)
        for path, numbers in found.items()
    } == expected


@pytest.mark.parametrize("method", ["measured", "backmatch, first scales"])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(
    text, method, tmp_path, monkeypatch
):
    rate = 0.01
    whole_state, whole_history = trainer(text, method, steps=6).run(rate, 0)
    stopped = trainer(text, method, steps=6)
    step = stopped._step

    def until_third(state, rate, seed, index):
        if index == 3:
            raise KeyboardInterrupt
        return step(state, rate, seed, index)

    monkeypatch.setattr(stopped, "_step", until_third)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(rate, 0, tmp_path)
    state, history = trainer(text, method, steps=6).run(rate, 0, tmp_path)
    np.testing.assert_array_equal(history.train, whole_history.train)
    np.testing.assert_array_equal(history.validation, whole_history.validation)
    for a, b in zip(*map(jax.tree.leaves, (state, whole_state)), strict=True):
        if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_checkpoints_of_another_run_are_named(text, tmp_path):
    trainer(text).run(0.01, 0, tmp_path)
    wider = trainer(text, size=dataclasses.replace(TINY, width=32))
    message = r"of another run, with width 16 instead of 32, rate 0.01 instead of 0.02"
    with pytest.raises(SystemExit, match=message):
        wider.run(0.02, 0, tmp_path)


def test_a_run_ends_where_its_loss_is_no_number(text):
    history = trainer(text, steps=40).run(1e6, 0)[1]
    assert history.diverged
    assert np.isnan(history.validation[-1])


def test_the_program_prints_losses_and_writes_text(capsys, tmp_path):
    directory = ("--checkpoints", str(tmp_path))
    first = lm.main([*ARGUMENTS, "--steps", "4", *directory])
    printed = capsys.readouterr().out
    assert f"python {platform.python_version()}" in printed
    assert "step 4: validation loss" in printed
    again = lm.main([*ARGUMENTS, "--steps", "4", *directory, "--sample", "12"])
    np.testing.assert_array_equal(first.validation, again.validation)
    written = capsys.readouterr().out.split(": ended\n")[1]
    assert written.startswith("\nclass ")
    assert len(written) == len("\nclass ") + 12 + 1


def test_a_sample_is_drawn_from_the_model(text):
    # A head that has learned one character writes it.
    fit = trainer(text)
    params = fit.init(0)["params"]
    params["norm"]["scale"] = params["norm"]["scale"].replace(jax.numpy.zeros(16))
    sample = functools.partial(fit.sample, params, 8, key=jax.random.key(0))
    free = sample(prompt="def ")
    assert free.startswith("def ")
    assert len(set(free[4:])) > 1  # uniform logits
    assert sample(prompt="def ") == free
    params = fit.init(0)["params"]
    greedy = functools.partial(fit.sample, params, 8, temperature=1e-6)
    assert greedy(key=jax.random.key(0)) == greedy(key=jax.random.key(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "3"), "--heads 3 must divide --width 128"),
        (("--steps", "150"), "--every 100 must divide --steps 150"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        lm.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_scales_after_an_optimizer_keep_its_mean_rate(exponent):
    params, chain = params_of(TINY), lm.declared(TINY)
    name = {0.25: "scales^1/4", 0.5: "scales^1/2"}[exponent]
    plain = lm.optimizer("adamw", 0.1, chain)
    scaled = study.optimizer(f"adamw, {name}", 0.1, chain)
    gradient = jax.tree.map(jax.numpy.ones_like, params)
    before, after = (
        tx.update(gradient, tx.init(params), params)[0] for tx in (plain, scaled)
    )
    factors = {
        path_text(path): np.unique(ratio)
        for path, ratio in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: np.round(a / b, 4), after, before)
        )
    }
    sizes = {
        path_text(p): x.size for p, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert all(len(values) == 1 for values in factors.values())
    total = sum(float(factors[path][0]) * size for path, size in sizes.items())
    assert total / sum(sizes.values()) == pytest.approx(1, abs=1e-3)
    scales = bmo.layer_scales(chain, params, gains="mean_field", limit=None)
    for a, b in (("up", "down"), ("attention/query", "attention/value")):
        a, b = f"blocks/0/{a}", f"blocks/0/{b}"
        ratio = float(factors[f"{a}/kernel"][0] / factors[f"{b}/kernel"][0])
        assert ratio == pytest.approx(
            float(scales[a] / scales[b]) ** exponent, rel=1e-3
        )


def factors_of(method):
    """What a method multiplies the update of each array by."""
    params, chain = params_of(TINY), lm.declared(TINY)
    state: Any = study.optimizer(method, 0.1, chain).init(params)
    leaves = jax.tree_util.tree_leaves_with_path(state[-1])
    return {path_text(path): float(factor) for path, factor in leaves}


def test_blockwise_rates_are_those_of_the_paper():
    factors = factors_of("muon, blockwise")
    base = factors["norm/scale"]
    of_role = {
        study.role(path.rpartition("/")[0] or path): factor / base
        for path, factor in factors.items()
    }
    expected = study.BLOCKWISE | {"norm": 1, "last norm": 1, "head": 1, "positions": 1}
    expected.pop("gate")
    assert of_role == pytest.approx(expected)


def test_the_adam_group_of_muon_has_steps_of_its_own():
    params, chain = params_of(TINY), lm.declared(TINY)
    kernels = {
        path_text(path)
        for path, kernel in jax.tree_util.tree_leaves_with_path(
            study.are_kernels(params)
        )
        if kernel
    }
    assert {path.partition("/")[0] for path in kernels} == {"blocks"}
    times_four = factors_of("muon, group x4")
    assert {path for path, factor in times_four.items() if factor == 1} == kernels
    assert {times_four[path] for path in times_four.keys() - kernels} == {4}

    tx = bmo.scale_steps_by_backmatch(chain)
    steps = tx.update(
        jax.tree.map(jax.numpy.ones_like, params), tx.init(params), params
    )
    steps = {
        path_text(path): float(step.mean())
        for path, step in jax.tree_util.tree_leaves_with_path(steps[0])
    }
    factors = factors_of("muon, group by steps")
    assert {factors[path] for path in kernels} == {1}
    # A fifth of Adam's entries, as Muon's are, at Muon's rate in geometric mean.
    mean = np.exp(np.mean([np.log(steps[path]) for path in kernels]))
    others = factors.keys() - kernels
    assert {path: factors[path] for path in others} == pytest.approx(
        {path: 0.2 * steps[path] / mean for path in others}, rel=1e-4
    )


@pytest.mark.parametrize("base", ["adamw", "lion", "muon"])
def test_steps_come_after_an_optimizer_with_entries_near_one(base):
    params, chain = params_of(TINY), lm.declared(TINY)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    gradient = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    tx = study.optimizer(f"{base}, steps", 0.1, chain)
    alone = direction(base, lm.matrices)
    updates, _ = tx.update(gradient, tx.init(params), params)
    plain, _ = alone.update(gradient, alone.init(params), params)
    for entries in jax.tree.leaves(plain):
        # Muon's own Adam looks ahead, and so begins with 1.47.
        assert 0.8 < np.sqrt(np.mean(entries**2)) < 1.5
    scale = bmo.scale_steps_by_backmatch(chain)
    expected, _ = scale.update(plain, scale.init(params), params)
    for found, step in zip(
        jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, -0.1 * step, rtol=1e-5)


class Losses(study.Study):
    """A study whose losses are a function of the rate alone."""

    def __init__(self, least):
        self.least, self.tried = least, []

    def loss(self, method, rate, seed):
        self.tried.append(rate)
        return abs(np.log2(rate) - self.least)


@pytest.mark.parametrize("off", [-2.0, -1.0, 0.0, 0.5, 1.5])
def test_a_grid_goes_on_where_its_best_is_at_an_end(off):
    middle = study.MIDDLES["sgd"]
    losses = Losses(middle + off)
    assert losses.tuned("sgd")[0] == pytest.approx(2.0 ** (middle + off))
    powers = sorted(np.log2(losses.tried) - middle)
    expected = np.arange(min(-1.0, off - 0.5), max(1.0, off + 0.5) + 0.1, 0.5)
    np.testing.assert_allclose(powers, expected)


def test_the_next_best_rate_is_taken_where_a_seed_diverges():
    def record(rate, seed, last):
        diverged = last is None
        validation = [5.0, last]
        run = {"method": "sgd", "rate": rate, "seed": seed}
        return run | {"diverged": diverged, "validation": validation}

    runs = [record(rate, 100, 2 - rate) for rate in (0.1, 0.2, 0.3)]
    runs += [record(0.3, 0, 1.5), record(0.3, 1, None)]
    found = study.summaries(runs)["sgd"]
    assert (found.rate, found.given_up, found.diverged) == (0.3, [], 1)
    assert found.last.tolist() == [1.5, np.inf]
    runs += [record(0.2, 0, 1.7), record(0.2, 1, 1.9)]
    found = study.summaries(runs)["sgd"]
    assert (found.rate, found.given_up, found.diverged) == (0.2, [0.3], 1)
    assert found.last.tolist() == [1.7, 1.9]


def test_a_grid_ends_some_time():
    losses = Losses(100.0)
    losses.tuned("sgd")
    assert len(losses.tried) == study.MOST_RATES


def test_blocks_of_the_paper_are_pooled_by_curvature():
    roles = ("embedding", "query", "key", "value", "output", "up", "down", "norm")
    scales = (1 / 8, 1.0, 1 / 3, 1.0, 1 / 9, 1.0, 1 / 5, 1 / 4)
    layers = {
        f"layer_{index}": {"role": name, "paper": scale}
        for index, (name, scale) in enumerate(zip(roles, scales, strict=True))
    }
    expected = {"QK": 2, "FFN": 3, "Norm": 4, "VO": 5, "Emb": 8}
    found = study.pooled(layers, "paper")
    assert list(found) == list(expected)
    assert found == pytest.approx(expected)


def test_when_a_curve_reaches_a_loss():
    curve = np.array([4.0, 3.0, 1.0])
    assert study.steps_to(curve, 2.0, 10) == pytest.approx(15)
    assert study.steps_to(curve, 5.0, 10) == 0
    assert np.isnan(study.steps_to(curve, 0.5, 10))


def test_the_study_records_resumes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RATES", 2)
    monkeypatch.setattr(study, "MOST_RATES", 2)
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    larger = dataclasses.replace(TINY, tokens=200)
    small = {"tiny": TINY, "after training": TINY, "larger": larger}
    monkeypatch.setattr(study, "PICTURED", small)
    directory = tmp_path / "results" / "language_model"
    arguments = [
        *ARGUMENTS[:-2],
        *("--steps", "4", "--methods", "sgd", "muon"),
        *("--results", str(directory)),
    ]
    study.main(arguments)
    runs = results_file.read(directory / "runs.jsonl")
    assert len(runs) == 2 * (2 + 2)
    assert {run["sha256"] for run in runs} == {lm.read_text().source["sha256"]}
    page = (directory / "README.md").read_text()
    assert "| sgd | " in page
    assert "Steps to plain Muon's final loss" in page
    for name in ("scales", "losses"):
        picture = directory.parent / f"language_model_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    scales = json.loads((directory / "scales.json").read_text())
    assert "measured" in scales["tiny"]["head"]
    assert scales["larger"]["head"]["measured"] > 0
    assert scales["tiny"] != scales["after training"]
    monkeypatch.setattr(study.Study, "_train", None)  # nothing is trained again
    study.main(arguments)
    assert results_file.read(directory / "runs.jsonl") == runs
    with pytest.raises(SystemExit, match=r"holds runs of another protocol"):
        study.main([*arguments, "--steps", "6"])
