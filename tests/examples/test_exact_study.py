"""The study of the exact rule, at a size that says little but runs every part."""

import numpy as np

from examples.studies import exact_study


def test_every_part_prints_its_table_and_draws_its_picture(tmp_path, capsys):
    arguments = "--steps 4 --rounds 2 --seeds 1 --train-images 600 --networks mlp"
    chosen = "--methods sgd exact"
    results = exact_study.main(
        [*arguments.split(), *chosen.split(), "--output-dir", str(tmp_path)]
    )
    assert set(results["mlp on digits"]) == {"sgd", "exact"}
    printed = capsys.readouterr().out
    for line in ("| mlp on digits | exact |", "held-out loss, sgd", "test accuracy"):
        assert line in printed
    picture = tmp_path / "exact_training_mlp_digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_directions_of_every_layer_are_compared(tmp_path):
    arguments = "--parts directions --networks lenet --steps 2 --images 416"
    rows = exact_study.main([*arguments.split(), "--output-dir", str(tmp_path)])[
        "directions"
    ]
    assert {row["step"] for row in rows} == {0, 2}
    assert {row["damping"] for row in rows} == set(exact_study.DAMPINGS)
    for row in rows:
        assert list(row["cosines"]) == ["cv1", "cv2", "fc1", "fc2", "fc3"]
        assert all(0 < cosine < 1 for cosine in row["cosines"].values())
        assert np.isfinite(list(row["ratios"].values())).all()
    assert (tmp_path / "exact_directions_digits.png").exists()


def test_a_method_that_does_not_work_here_is_left_out_and_said_so(monkeypatch, capsys):
    def broken(problem):
        raise ImportError("no module named 'kfac_jax'")

    monkeypatch.setattr(exact_study, "KfacMethod", broken)
    assert exact_study.compiled_methods(None, ["kfac"]) == {}  # pyright: ignore
    assert "kfac is left out: ImportError: no module" in capsys.readouterr().out


def test_every_method_is_tuned_with_the_same_budget():
    assert {len(settings) for settings in exact_study.SETTINGS.values()} == {12}
