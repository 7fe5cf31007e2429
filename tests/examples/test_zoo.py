"""The zoo: how it is run, and that its page and the documentation show its results."""

from pathlib import Path

import pytest

from examples.studies import results_file, zoo
from examples.studies.networks import NETWORKS

RECORDS = results_file.read(zoo.RESULTS / "zoo.jsonl")


def test_a_run_is_recorded_once_and_makes_the_page(tmp_path, capsys):
    path = tmp_path / "zoo.jsonl"
    arguments = ["--networks", "mlp on diabetes", "--candidates", "harmonic"]
    arguments += ["--seeds", "0", "--rates", "-6", "-5", "--results", str(path)]
    zoo.main([*arguments, "--steps", "20"])
    sgd, harmonic = results_file.read(path)
    assert (sgd["rates"], sgd["best"]) == ([2**-6, 2**-5], 2**-5)
    assert len(harmonic["losses"]) == len(harmonic["rates"]) == 5
    table = capsys.readouterr().out
    assert "| harmonic | 1 |" in table
    assert path.with_suffix(".md").read_text() in table
    written = path.read_text()
    zoo.main([*arguments, "--steps", "20"])
    assert path.read_text() == written
    with pytest.raises(SystemExit):
        zoo.main([*arguments, "--steps", "40"])
    assert "holds runs of 20 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "30"], "must be a multiple of 20"),
        (["--steps", "0"], "'0' must be a whole number of at least 1"),
        (["--seeds", "-1"], "'-1' must be a whole number of at least 0"),
        (["--rates", "3", "1"], "LOW must not be above HIGH"),
        (["--networks", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        zoo.main(arguments)
    assert message in capsys.readouterr().err


def test_the_page_has_every_network():
    page = (zoo.RESULTS / "zoo.md").read_text()
    assert page == zoo.report(RECORDS)
    assert "nor have:" not in page
    assert {record["network"] for record in RECORDS} == {*NETWORKS}


@pytest.mark.parametrize(
    ("row", "candidate"),
    [
        ("the default", "harmonic, between 1/2 and 2"),
        ("without the limit", "harmonic"),
        ("papers' scales", "the papers' scales"),
    ],
)
def test_the_documentation_quotes_the_page(row, candidate):
    lines = zoo.summary(RECORDS).splitlines()
    (found,) = (line for line in lines if line.startswith(f"| {candidate} |"))
    _, networks, diverged, near, twice, worst, mean, _ = found.strip("| ").split(" | ")
    worst = "diverged" if worst == "inf" else f"{float(worst):.2f}"
    text = Path("docs/rates.md").read_text()
    assert f"the {networks} networks that all of these rules" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    *cells, last = line.strip("| ").split(" | ")
    assert cells == [row, diverged, near, twice]
    quoted, _, quoted_worst = last.partition(" ")
    assert float(quoted) == pytest.approx(float(mean), abs=0.006)
    assert quoted_worst == f"({worst})"
