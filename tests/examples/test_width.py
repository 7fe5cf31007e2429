"""The study of widths and depths, at reduced size."""

import json

import pytest

from examples.studies import width


def test_a_stopped_run_goes_on_and_the_page_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(width, "OPTIMIZERS", ("adam",))
    monkeypatch.setattr(width, "NETWORKS", {"small": (1, 8)})
    path = tmp_path / "width.jsonl"
    arguments = ["--dataset", "digits", "--steps", "10", "--seeds", "1"]
    arguments += ["--results", str(path)]
    width.main(arguments)
    lines = path.read_text().splitlines()
    assert len(lines) == 4  # with BatchNorm and without, scaled and not
    for losses in (json.loads(line)["losses"] for line in lines):
        powers = sorted(map(int, losses))
        best = min(powers, key=lambda power: losses[str(power)])
        assert powers[0] < best < powers[-1]
    path.write_text("\n".join(lines[:3]) + "\n")
    width.main(arguments)
    assert path.read_text().splitlines() == lines
    assert "| small | 2^" in path.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        width.main([*arguments, "--steps", "20"])
    assert "another setting" in capsys.readouterr().err
