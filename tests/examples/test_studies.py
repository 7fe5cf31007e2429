"""The small studies, at a size that runs every part of them."""

import jax
import pytest

from examples import data, language_model
from examples.studies import (
    benchmark,
    local_hessian_cost,
    predicted_scales,
    transformer,
    which_models,
)


def test_mean_field_gains_predict_lenets_scales(tmp_path, capsys):
    output = tmp_path / "ratios.png"
    arguments = ["--networks", "LeNet", "--images", "64", "--output", str(output)]
    ratios = predicted_scales.main(arguments)["LeNet"]["mean_field"].ratios
    assert max(ratios.values()) / min(ratios.values()) < 1.5
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "mean_field gains: cv1" in capsys.readouterr().out


@pytest.mark.parametrize("method", transformer.CANDIDATES)
def test_the_transformer_learns_a_little_in_two_epochs(method):
    rate = {"sgd": 0.03, "adam": 0.003, "measured backmatch": 0.003}[method]
    _, accuracy = transformer.train(method, rate, data.load("digits"), 0, epochs=2)
    assert accuracy > 0.3  # of ten digits


def test_the_benchmark_prints_a_row_for_each_method(capsys):
    parts = ("--parts", "updates", "depth", "--trees", "LeNet", "--depths", "3")
    benchmark.main([*parts, "--rounds", "2", "--compiles", "1"])
    printed = capsys.readouterr().out
    for method in benchmark.METHODS:
        assert f"| LeNet | {method} |" in printed
    for kind in benchmark.KINDS:
        for method in benchmark.GAINS:
            assert f"| {kind} | 3 | {method} |" in printed


def test_the_benchmark_says_what_measuring_costs_beside_a_gradient(monkeypatch):
    size = language_model.Size(layers=1, width=8, heads=2, context=8)
    networks = {"GPT": lambda: benchmark._gpt_outputs(size)}
    monkeypatch.setattr(benchmark, "MEASURED", networks)
    *_, row = benchmark.refreshes(rounds=2)
    name, *figures = row.strip("| ").split(" | ")
    assert name == "GPT"
    gradient, measuring, ratio, memory, share = (float(f.rstrip("%")) for f in figures)
    assert min(gradient, measuring, ratio, memory) > 0
    assert share == pytest.approx(100 * ratio / 20, abs=0.1)


def test_backmatch_takes_no_parameter_sized_memory():
    params, chain = benchmark.TREES["LeNet"]()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    extra = {
        method: benchmark.Update(method, params, chain).extra_bytes
        for method in ("sgd", "backmatch")
    }
    assert extra["backmatch"] - extra["sgd"] < size / 100


def test_the_cost_of_local_hessians_has_a_row_for_each_program(capsys):
    local_hessian_cost.main(["--features", "2", "--batch", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    for program in ("gradient", "mean diagonal", "spectrum", "condition number"):
        assert f"| 2 | 2,048 | {program}" in printed


def test_the_table_of_models_says_how_good_a_chain_is_or_why_there_is_none(tmp_path):
    output = tmp_path / "table.md"
    arguments = ["--models", "two towers", "LSTM", "--output", str(output)]
    *_, towers, recurrent = which_models.main(arguments)
    assert output.read_text().endswith(f"{towers}\n{recurrent}\n")
    ratio = float(towers.split(" | ")[3].partition(" (")[0])
    assert ratio < 2
    assert "refused: in module 'RNN_0': scan is a loop" in recurrent
    assert "[spec.Block('LSTMCell_0')]" in recurrent
