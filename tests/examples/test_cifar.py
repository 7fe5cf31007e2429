"""The harness of the papers' experiments, on the digits."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import backmatch_optax as bmo
from examples import data, methods, models
from examples.studies import results_file
from examples.studies.cifar import __main__ as cli
from examples.studies.cifar import records, report, trainer
from examples.studies.cifar.experiments import (
    EXPERIMENTS,
    LEARNING_RATES,
    WEIGHT_DECAYS,
    climb,
    learning_rates,
)

# Small enough that a run is mostly its compilation.
FIG2 = ("--experiment", "lenet_fig2")
SMALL = (*FIG2, "--dataset", "digits", "--train-images", "256")


def run(tmp_path, *arguments):
    done = cli.main(
        [
            *SMALL,
            *("--results", str(tmp_path / "runs.jsonl")),
            *("--checkpoints", str(tmp_path / "checkpoints")),
            *arguments,
        ]
    )
    return done, records.load(tmp_path / "runs.jsonl")


def one_run(tmp_path, method="backmatch", *arguments, rate="0.05"):
    fixed = ("--methods", method, "--learning-rate", rate, "--seeds", "0")
    done, (record,) = run(tmp_path, *fixed, *arguments)
    assert done
    return record


@pytest.fixture(scope="module")
def results_of_one_run(tmp_path_factory) -> bytes:
    """The results file that one epoch of SGD leaves."""
    directory = tmp_path_factory.mktemp("one_run")
    one_run(directory, "sgd", "--epochs", "1")
    return (directory / "runs.jsonl").read_bytes()


def test_the_step_schedule_is_that_of_the_paper():
    factor = EXPERIMENTS["vgg_tables"].decay_of_rate(391)  # BM 4: 300 epochs, batch 128
    epochs = np.array([0, 59.9, 60.1, 120.1, 180.1, 240.1, 299.9])
    factors = [float(jnp.asarray(factor(int(epoch * 391)))) for epoch in epochs]
    np.testing.assert_allclose(
        factors, [1, 1, 0.2, 0.04, 0.008, 0.0016, 0.0016], rtol=1e-5
    )


def test_the_plateau_schedule_halves_after_ten_epochs_without_progress():
    experiment = dataclasses.replace(
        EXPERIMENTS["vgg_plateau"], dataset="digits", model="lenet", train_images=256
    )
    (digits, run) = data.load("digits"), trainer.Run("sgd", 1.0, 0.0, 0)
    split = trainer.split(digits, experiment, tuning=False)
    program = trainer.Program(experiment, [run], split)
    params = {"kernel": jnp.ones(())}
    tx = program.optimizer(
        {"learning_rate": jnp.ones(()), "weight_decay": jnp.zeros(())}
    )
    step = jax.jit(tx.update)
    state, sizes = tx.init(params), []
    for _ in range(12 * program.steps):
        updates, state = step(params, state, params, value=jnp.float32(1))
        sizes.append(float(abs(updates["kernel"])))
    # By then the momentum has settled: the updates are those of a constant gradient.
    assert sizes[-1] == pytest.approx(sizes[10 * program.steps] / 2, rel=0.2)


def test_flips_and_rotations_move_pixels_and_keep_what_is_constant():
    images = jax.random.uniform(jax.random.key(0), (16, 32, 32, 3))
    turned = trainer.augment(jax.random.key(1), images)
    assert turned.shape == images.shape
    flipped = images[:, :, ::-1]
    # Around the centre a rotation moves nothing: each image is itself or its mirror.
    centre = np.s_[:, 15:17, 15:17]
    itself, mirrored = (
        np.abs(turned[centre] - other[centre]).max((1, 2, 3)) < 0.3
        for other in (images, flipped)
    )
    assert (itself | mirrored).all() and mirrored.sum() >= 2
    assert float(jnp.abs(turned - images).max()) > 0.3
    same = jnp.full(images.shape, 0.7)
    np.testing.assert_allclose(
        trainer.augment(jax.random.key(2), same), same, rtol=1e-5
    )


def test_a_quarter_turn_is_exact():
    image = jax.random.uniform(jax.random.key(0), (5, 5, 3))
    turned = trainer.rotate(image, np.pi / 2)
    np.testing.assert_allclose(turned, np.rot90(image), atol=1e-5)


def test_methods_share_initial_weights_and_batches():
    experiment = dataclasses.replace(
        EXPERIMENTS["lenet_fig2"], dataset="digits", train_images=256
    )
    split = trainer.split(data.load("digits"), experiment, tuning=False)
    runs = [trainer.Run(m, 0.1, 0.0, seed) for m in ("sgd", "muon") for seed in (0, 1)]
    programs = [trainer.Program(experiment, [run], split) for run in runs]
    starts = [program.init()["params"] for program in programs]
    orders = [np.asarray(program.order(epoch=3)) for program in programs]
    for one, other in ((0, 2), (1, 3)):  # the same seed under both methods
        jax.tree.map(np.testing.assert_array_equal, starts[one], starts[other])
        np.testing.assert_array_equal(orders[one], orders[other])
    assert (orders[0] != orders[1]).any()  # another seed, another order


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    arguments = ("--methods", "backmatch", "--learning-rate", "0.05", "--seeds", "0")
    whole = one_run(tmp_path / "whole", "backmatch", "--epochs", "8")
    directory = tmp_path / "killed"
    command = [
        *(sys.executable, "-m", "examples.studies.cifar", *SMALL, *arguments),
        *("--epochs", "8", "--results", str(directory / "runs.jsonl")),
        *("--checkpoints", str(directory / "checkpoints")),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(directory.glob("checkpoints/*/[1-9]*")):  # some epochs are done
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "runs.jsonl").exists()
    resumed = one_run(directory, "backmatch", "--epochs", "8")
    for name in ("loss", "accuracy", "norms", "layer_scales"):
        assert resumed[name] == whole[name]


def test_a_run_records_its_protocol_versions_curve_and_outcome(tmp_path):
    record = one_run(tmp_path, "backmatch", "--epochs", "2", "--dtype", "bfloat16")
    assert record["outcome"] == "finished"
    assert record["protocol"]["dtype"] == "bfloat16"
    assert record["run"]["learning_rate"] == 0.05
    assert {"jax", "flax", "optax", "backmatch-optax"} <= set(record["versions"])
    assert len(record["loss"]) == len(record["accuracy"]) == 2
    assert record["loss"][1] < record["loss"][0]
    assert set(record["layer_scales"]) == {"cv1", "cv2", "fc1", "fc2", "fc3"}
    (log,) = (tmp_path / "checkpoints").glob("*.csv")
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["loss"]) == pytest.approx(record["loss"][1], rel=1e-4)


def test_what_is_in_the_results_file_is_not_run_again(
    tmp_path, monkeypatch, results_of_one_run
):
    (tmp_path / "runs.jsonl").write_bytes(results_of_one_run)
    (first,) = records.load(tmp_path / "runs.jsonl")
    monkeypatch.setattr(cli, "train", None)  # cannot be called
    assert one_run(tmp_path, "sgd", "--epochs", "1") == first
    # Nor what was recorded before a protocol had all of today's fields.
    older = first | {"protocol": {**first["protocol"]}}
    del older["protocol"]["patience"]
    (tmp_path / "runs.jsonl").write_text(json.dumps(older) + "\n")
    assert one_run(tmp_path, "sgd", "--epochs", "1") == first


def test_a_run_that_diverges_is_kept_and_never_chosen(tmp_path):
    record = one_run(tmp_path, "sgd", "--epochs", "3", rate="1e38")
    assert record["outcome"] == "diverged in epoch 1"
    assert record["loss"] == [None]
    nan = float("nan")
    scores = {(0.1, 0.0): nan, (0.2, 0.0): 0.5, (0.1, 1.0): 0.9, (0.2, 1.0): 0.7}
    assert cli.best(scores, each_decay=False) == [(0.1, 1.0)]
    assert cli.best(scores, each_decay=True) == [(0.2, 0.0), (0.1, 1.0)]


def test_out_of_time_leaves_a_table_that_the_same_command_finishes(tmp_path, capsys):
    arguments = ("--methods", "sgd", "--learning-rate", "0.1", "--epochs", "2")
    done, found = run(tmp_path, *arguments, "--seeds", "0", "--time-limit", "1e-9")
    assert not done and not found
    assert "The same command goes on" in capsys.readouterr().out
    done, found = run(tmp_path, *arguments, "--seeds", "0")
    assert done and len(found) == 1


def test_a_table_tunes_on_held_out_images_then_runs_the_best(tmp_path, monkeypatch):
    monkeypatch.setitem(LEARNING_RATES, "sgd", (1e-6, 0.1))
    arguments = ("--methods", "sgd", "--weight-decays", "0", "--epochs", "2")
    _, found = run(tmp_path, *arguments, "--seeds", "3", "--tuning-epochs", "1")
    tuning, final = found[:2], found[2:]
    assert [r["run"]["tuning"] for r in found] == [True, True, False]
    best = max(tuning, key=lambda record: record["accuracy"][-1])
    assert final[0]["run"]["learning_rate"] == best["run"]["learning_rate"]
    assert (len(tuning[0]["loss"]), len(final[0]["loss"])) == (1, 2)


def test_climbing_takes_the_mean_over_tuning_seeds_and_then_the_best(
    tmp_path, monkeypatch
):
    asked = []

    def accuracies(self, experiment, runs):
        asked.extend(runs)
        best = 0.05, 0.0
        off = [abs(r.learning_rate - best[0]) + r.weight_decay for r in runs]
        return [1 - o + 0.1 * (r.seed - 7.5) for o, r in zip(off, runs, strict=True)]

    monkeypatch.setattr(cli.Runner, "accuracies", accuracies)
    arguments = ("--methods", "sgd", "--climb", "--tuning-seeds", "7", "8")
    run(tmp_path, *arguments, "--seeds", "0", "1")
    tuning = [r for r in asked if r.tuning]
    assert len(set(tuning)) == len(tuning) and {r.seed for r in tuning} == {7, 8}
    final = [r for r in asked if not r.tuning]
    numbers = {(r.learning_rate, r.weight_decay) for r in final}
    assert [r.seed for r in final] == [0, 1] and numbers == {(0.05, 0.0)}


def test_a_table_is_trained_entry_by_entry(tmp_path):
    table = ("--model", "vgg11", "vgg13", "--width", "0.05", "--epochs", "1")
    grid = ("--methods", "sgd", "--learning-rates", "0.01", "--weight-decays", "0")
    done, found = run(tmp_path, *table, *grid, "--tune")
    assert done
    assert [r["protocol"]["model"] for r in found] == ["vgg11", "vgg13"]
    assert {r["run"]["learning_rate"] for r in found} == {0.01}
    for record in found:  # a kernel of 64 features has a norm of 8 at first
        assert record["norms"]["Conv_0"][0] < 4


def test_a_gpu_trains_the_same_a_grid_at_once_and_whole_epochs(tmp_path, monkeypatch):
    table = ["--tune", "--methods", "backmatch", "--weight-decays", "0"]
    table += ["--learning-rates", "0.001", "0.002"]
    table += ["--epochs", "1", "--batch-size", "64", "--augment"]
    _, one_by_one = run(tmp_path / "cpu", *table, "--group", "1")
    # The same program as on a GPU, run by the CPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, at_once = run(tmp_path / "gpu", *table)
    assert [record["runs_at_once"] for record in at_once] == [2, 2]
    for ours, theirs in zip(at_once, one_by_one, strict=True):
        assert ours["run"] == theirs["run"]
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-3)


def test_early_stopping_ends_a_run_that_does_not_improve(tmp_path):
    # At a rate of zero only BatchNorm's averages move, and settle.
    arguments = ("--epochs", "40", "--patience", "2")
    record = one_run(tmp_path, "sgd", *arguments, rate="0")
    trained = len(record["accuracy"])
    assert trained == int(np.argmax(record["accuracy"])) + 3 < 40
    assert record["outcome"] == f"stopped early after epoch {trained}"
    # It does not count as done where the same run is to be trained to the end.
    assert record["protocol"]["patience"] == 2
    assert EXPERIMENTS["lenet_fig2"].patience == 0


def test_every_method_has_a_grid_of_the_same_size():
    assert set(LEARNING_RATES) == set(WEIGHT_DECAYS) == set(methods.ALL)
    assert {len(rates) for rates in LEARNING_RATES.values()} == {5}
    for dataset in data.DATASETS:
        vgg = dataclasses.replace(EXPERIMENTS["vgg_tables"], dataset=dataset)
        assert {len(learning_rates(m, vgg)) for m in methods.ALL} == {5}
    assert {len(decays) for decays in WEIGHT_DECAYS.values()} == {3}


def test_no_two_methods_make_the_same_steps_and_all_move_every_kernel():
    layers = [nn.Dense(16), nn.BatchNorm(True), nn.relu, nn.Dense(4)]
    model, x = nn.Sequential(layers), jax.random.normal(jax.random.key(1), (8, 12))
    chain = bmo.infer_spec(model, x)
    variables = model.init(jax.random.key(0), x)
    params = optax.tree.random_like(jax.random.key(3), variables["params"])
    stats = variables["batch_stats"]
    gradients = [
        optax.tree.random_like(key, params)
        for key in jax.random.split(jax.random.key(2))
    ]

    def outputs(params):
        return model.apply({"params": params, "batch_stats": stats}, x)

    @functools.partial(jax.jit, static_argnums=0)
    def two_steps(method: str) -> optax.Params:
        tx = methods.optimizer(method, 0.1, chain, weight_decay=1e-3)
        changed, state = params, tx.init(params)
        for gradient in gradients:
            arguments = {"outputs_fn": outputs}
            updates, state = tx.update(gradient, state, changed, **arguments)
            changed = optax.apply_updates(changed, updates)
        return jax.tree.map(jnp.subtract, changed, params)

    steps = {}
    for method in methods.ALL:
        moved = two_steps(method)
        for update in jax.tree.leaves(moved):
            assert np.isfinite(update).all() and np.abs(update).max() > 0, method
        steps[method] = np.asarray(ravel_pytree(moved)[0])
    for one, other in itertools.combinations(methods.ALL, 2):
        apart = np.linalg.norm(steps[one] - steps[other])
        assert apart > 1e-4 * np.linalg.norm(steps[one]), (one, other)


def test_climbing_ends_where_no_neighbour_is_better():
    asked = []

    def score(candidates):
        asked.extend(candidates)
        return {
            (rate, decay): float("nan")
            if rate > 0.5
            else -abs(math.log(rate / 0.2)) - abs(math.log((decay or 1e-5) / 5e-3))
            for rate, decay in candidates
        }

    found = climb(score, (0.03, 5e-4))
    assert max(found, key=lambda c: (found[c] == found[c], found[c])) == (0.2, 5e-3)
    assert len(asked) == len(set(asked)) == len(found)  # nothing is trained twice
    beside = {(0.1, 5e-3), (0.5, 5e-3), (0.2, 5e-4), (0.2, 5e-2)}
    assert beside < set(found)
    # No decay is an end of its own: there is nothing below.
    least = climb(lambda c: {key: -key[1] - abs(key[0] - 0.02) for key in c}, (0.02, 1))
    assert (0.02, 0.0) in least


def test_frozen_scales_stay_those_of_the_initial_weights():
    model, chain = models.MODELS["lenet"](10, (32, 32, 1))
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
    params = params["params"]
    tx = methods.optimizer("backmatch, frozen", 0.1, chain)
    gradient, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    first, _ = tx.update(gradient, state, params)
    grown = jax.tree.map(lambda p: 3 * p, params)
    second, _ = tx.update(gradient, state, grown)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_report_prints_means_over_seeds_and_counts_divergences(tmp_path):
    base = {
        "experiment": "lenet_fig2",
        "protocol": dataclasses.asdict(EXPERIMENTS["lenet_fig2"]),
        "versions": {"jax": "0"},
        "device": "cpu",
        "cores": 2,
        "norms": {},
        "layer_scales": {},
        "seconds": [1.0],
        "runs_at_once": 1,
    }
    lines = []
    other = base["protocol"] | {"batch_size": 1024}
    sgd = dataclasses.asdict(trainer.Run("sgd", 0.1, 5e-4, 0))
    end = {"outcome": "finished", "loss": [1.0], "accuracy": [0.5]}
    lines.append(base | end | {"protocol": other, "run": sgd})
    lines.append(base | end | {"run": sgd | {"weight_decay": 0.0}})
    for seed, accuracy in enumerate((0.6, 0.7, 0.1)):
        run_ = dataclasses.asdict(trainer.Run("sgd", 0.1, 5e-4, seed))
        outcome = "diverged in epoch 1" if seed == 2 else "finished"
        loss = [None] if seed == 2 else [1.0]
        lines.append(
            base
            | {"run": run_, "outcome": outcome, "loss": loss, "accuracy": [accuracy]}
        )
    results = tmp_path / "runs.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.main(["--results", str(results), "--output-dir", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "65.00 ± 7.07" in text and "3, 1 of them diverged" in text
    six = {"outcome": "finished", "accuracy": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}
    np.testing.assert_allclose(report.over_last_third([six]), [0.9])
    # Another protocol has tables and pictures of its own.
    assert ", 200 epochs, batch size 1024\n" in text
    assert len(list(tmp_path.glob("lenet_cifar10_constant_200*_curves.png"))) == 2


def test_methods_are_compared_with_sgd_at_its_rate_of_most_seeds():
    def runs(*accuracies: float) -> list[dict[str, Any]]:
        return [{"outcome": "finished", "accuracy": [each]} for each in accuracies]

    often, once = ("sgd", 0.02, 5e-3), ("sgd", 0.005, 5e-3)
    ours, other = ("backmatch", 0.01, 5e-3), ("backmatch", 0.01, 0.0)
    final = {often: runs(0.6, 0.7), once: runs(0.9), ours: runs(0.8), other: runs(0.5)}
    (compared,) = report.comparisons(final, {})
    assert compared.reference == often
    assert compared.others == [once, ours]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "lenet"], "invalid choice: 'lenet'"),
        ([*FIG2, "--epochs", "0"], "--epochs: '0' must be a whole number of at least"),
        ([*FIG2, "--epochs", "3000000000"], "must be at most 2147483647"),
        ([*FIG2, "--group", "0"], "--group: '0' must be a whole number of at least 1"),
        ([*FIG2, "--seeds", "-1"], "--seeds: '-1' must be a whole number of at least"),
        ([*FIG2, "--learning-rate", "nan"], "'nan' must be a number of at least 0"),
        ([*FIG2, "--learning-rates", "0.1", "inf"], "'inf' must be a number of at"),
        ([*FIG2, "--weight-decays", "-1"], "'-1' must be a number of at least 0"),
        ([*FIG2, "--momentum", "1"], "'1' must be a number of at least 0 and below 1"),
        ([*FIG2, "--time-limit", "0"], "'0' must be a number above 0"),
        ([*FIG2, "--width", "nan"], "'nan' must be a number above 0"),
        ([*FIG2, "--methods", "adam"], "invalid choice"),
        ([*FIG2, "--width", "0.5"], "lenet has no width"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="batch of 512 is more than the 256"):
        one_run(tmp_path, "sgd", "--batch-size", "512")


def test_more_training_images_than_there_are_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="--train-images 1438 is more than the 1437"):
        one_run(tmp_path, "sgd", "--train-images", "1438")


def test_the_help_says_what_each_number_of_the_protocol_is(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    printed = capsys.readouterr().out.replace("\n" + " " * 24, "  ")
    described = dict(re.findall(r"^  --([a-z-]+).*?  +(\w.*)", printed, re.MULTILINE))
    experiment = EXPERIMENTS["vgg_plateau"]
    options = [f.name.replace("_", "-") for f in dataclasses.fields(experiment)]
    texts = [described[name] for name in options]
    assert len(set(texts)) == len(texts) - 1  # dataset and model say the same


def test_a_full_disk_leaves_the_results_file_as_it_was(tmp_path, results_of_one_run):
    results, before = tmp_path / "runs.jsonl", results_of_one_run
    results.write_bytes(before)
    (first,) = records.load(results)
    second = first | {"run": first["run"] | {"seed": 1}}
    # What the disk still takes is half a record.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = len(before) + len(before) // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit, match=r"could not be written .* is as it was"):
            results_file.append([second], results)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert results.read_bytes() == before
    assert list(tmp_path.glob("runs.jsonl*")) == [results]
    results_file.append([second], results)
    assert records.load(results) == [first, second]


def test_what_could_not_be_recorded_is_not_trained_again(tmp_path, monkeypatch):
    def full(new, path):
        raise SystemExit("full")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="full"):
        patch.setattr(results_file, "append", full)
        one_run(tmp_path, "sgd", "--epochs", "1")
    monkeypatch.setattr(trainer.Program, "epoch", None)  # cannot be called
    assert one_run(tmp_path, "sgd", "--epochs", "1")["outcome"] == "finished"


@pytest.mark.parametrize("bad", ['{"experiment": "lenet_', '{"run": {}}', "[]", ""])
def test_a_bad_record_names_file_and_line(bad, tmp_path, results_of_one_run):
    results = tmp_path / "runs.jsonl"
    results.write_bytes(results_of_one_run + bad.encode() + b"\n")
    with pytest.raises(SystemExit, match=r"runs\.jsonl, line 2 is no record"):
        records.load(results)


def test_an_unwritable_place_is_noticed_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "train", None)  # cannot be called
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file cannot be written"):
        one_run(tmp_path / "file", "sgd")
    with pytest.raises(SystemExit, match="file cannot be written"):
        one_run(tmp_path, "sgd", "--checkpoints", str(tmp_path / "file"))
    (tmp_path / "runs.jsonl").mkdir()
    with pytest.raises(SystemExit, match=r"results file .* cannot be written"):
        one_run(tmp_path, "sgd")


def test_a_corrupt_checkpoint_names_itself_and_the_remedy(tmp_path, monkeypatch):
    arguments = ("--methods", "sgd", "--learning-rate", "0.1", "--epochs", "2")
    arguments += ("--seeds", "0")

    def stop(*arguments):
        raise trainer.OutOfTime

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_log", stop)  # after the first epoch
        done, _ = run(tmp_path, *arguments)
    assert not done
    (step,) = (tmp_path / "checkpoints").glob("*/1")
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *arguments)
    assert f"The checkpoint {step} cannot be read" in str(error.value)
    assert f"Remove {step.parent}, and the same command" in str(error.value)
    shutil.rmtree(step.parent)
    done, found = run(tmp_path, *arguments)
    assert done and len(found) == 1


def test_two_programs_do_not_share_a_results_file(tmp_path, results_of_one_run):
    results = tmp_path / "runs.jsonl"
    results.write_bytes(results_of_one_run)
    with results_file.alone_with(results):
        with pytest.raises(SystemExit, match=f"in use by process {os.getpid()}"):
            one_run(tmp_path, "sgd", "--epochs", "1")
    assert one_run(tmp_path, "sgd", "--epochs", "1")["outcome"] == "finished"


def test_the_records_of_the_project_keep_their_identity():
    found = records.load(records.RESULTS)
    parts = [{k: r[k] for k in ("experiment", "protocol", "run")} for r in found]
    prints = [records.fingerprint([part]) for part in parts]
    assert len(set(prints)) == len(prints)
    # Of the first record, since it was made.
    first = records.identity(
        "lenet_fig2",
        dataclasses.replace(EXPERIMENTS["lenet_fig2"], epochs=4),
        trainer.Run("sgd", 0.02, 0.0, 100, tuning=True),
    )
    assert prints[0] == records.fingerprint([first]) == "fcb845908f894c02"
