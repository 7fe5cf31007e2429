"""Writes the report of the papers' experiments from the results file.

    python -m examples.studies.cifar.report

Tables and figures come from the results file alone, so that every number in them can be
followed to the run that gave it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from examples import methods
from examples.studies.cifar import records
from examples.studies.cifar.experiments import Experiment

matplotlib.use("Agg")  # pictures go to files, also where there is no screen
import matplotlib.pyplot as plt

Record = dict[str, Any]
Results = dict[tuple[str, float, float], list[Record]]  # by method, rate and decay

# BM Tables 1 and 2, test accuracy in %; of Table 2, the best of five trials.
PAPER: dict[tuple[str, str], dict[str, float]] = {
    (dataset, f"vgg{depth}"): dict(
        zip(("sgd", "lars", "lsalr", "backmatch"), row, strict=True)
    )
    for dataset, rows in {
        "cifar100": (
            (71.47, 67.26, 70.75, 73.39),
            (74.01, 70.21, 73.74, 75.32),
            (72.86, 69.90, 72.56, 74.46),
            (71.35, 69.52, 70.76, 72.90),
        ),
        "cifar10": (
            (92.63, 91.81, 92.58, 92.69),
            (93.90, 93.20, 93.81, 94.08),
            (93.72, 94.00, 94.00, 94.22),
            (93.66, 93.48, 93.46, 93.98),
        ),
    }.items()
    for depth, row in zip((11, 13, 16, 19), rows, strict=True)
}
_LINES = {"backmatch": "-", "sgd": ":", "backmatch, norms kept": "--"}
# The same colour for a method in every picture.
_COLOURS = {m: plt.get_cmap("tab20")(2 * i % 19) for i, m in enumerate(methods.ALL)}


def by_protocol(found: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by the experiment's name and its protocol, as one text."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        key = {"experiment": record["experiment"], **record["protocol"]}
        groups[json.dumps(key, sort_keys=True)].append(record)
    return groups


def by_numbers(found: Iterable[Record], *, tuning: bool) -> Results:
    """Records by method, learning rate and weight decay; the rest are seeds."""
    groups: Results = defaultdict(list)
    for record in found:
        run = record["run"]
        if run["tuning"] == tuning:
            key = (run["method"], run["learning_rate"], run["weight_decay"])
            groups[key].append(record)
    return dict(sorted(groups.items(), key=lambda item: (item[0][2], item[0][0])))


def diverged(record: Record) -> bool:
    """Whether a loss was not a finite number."""
    return record["outcome"].startswith("diverged")


def finals(runs: Sequence[Record], name: str) -> np.ndarray:
    """The last value of every run that did not diverge."""
    return np.array([record[name][-1] for record in runs if not diverged(record)])


def over_last_third(runs: Sequence[Record]) -> np.ndarray:
    """The mean accuracy of the last third of the epochs, of what did not diverge.

    At a fixed learning rate a last epoch is one draw of a noisy curve.
    """
    curves = [record["accuracy"] for record in runs if not diverged(record)]
    return np.array([np.mean(curve[-max(1, len(curve) // 3) :]) for curve in curves])


def spread(values: np.ndarray, digits: int) -> str:
    """Mean and standard deviation over seeds; the mean alone where there is one."""
    if not len(values):
        return ""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def table(results: Results, paper: dict[str, float]) -> list[str]:
    """A row for each method, rate and decay: what its seeds reached at the end."""
    header = ["decay", "method", "rate", "training loss", "test accuracy, %"]
    header += ["its mean over the last third, %", "seeds"]
    if paper:
        header.append("paper, %")
    rows = []
    for (method, rate, decay), runs in results.items():
        lost = sum(map(diverged, runs))
        seeds = ", ".join(str(s) for s in sorted(r["run"]["seed"] for r in runs))
        row = [
            f"{decay:g}",
            method,
            f"{rate:g}",
            spread(finals(runs, "loss"), 4),
            spread(100 * finals(runs, "accuracy"), 2),
            spread(100 * over_last_third(runs), 2),
            seeds + (f" ({lost} of {len(runs)} diverged)" if lost else ""),
        ]
        if paper:
            row.append(f"{paper[method]:.2f}" if method in paper else "")
        rows.append(row)
    return _markdown(header, rows)


def tuning_table(results: Results) -> list[str]:
    """Held-out accuracy of every candidate: decays down, rates across."""
    cells: dict[tuple[str, float], dict[float, str]] = defaultdict(dict)
    for (method, rate, decay), runs in results.items():
        values = finals(runs, "accuracy")
        text = f"{100 * values.mean():.2f}" if len(values) else "diverged"
        cells[method, decay][rate] = text
    rows = []
    for (method, decay), row in sorted(cells.items()):
        scores = {r: float(t) for r, t in row.items() if t != "diverged"}
        best = max(scores, key=lambda rate: scores[rate]) if scores else None
        listed = [
            f"{rate:g}: {f'**{text}**' if rate == best else text}"
            for rate, text in sorted(row.items())
        ]
        rows.append([method, f"{decay:g}", ", ".join(listed)])
    return _markdown(["method", "decay", "rate: held-out accuracy, %"], rows)


def plot_curves(results: Results, path: Path) -> None:
    """Training loss and test accuracy against epochs.

    A row for each weight decay; one for all where every method has its own best alone.
    """
    decays: dict[str, set[float]] = defaultdict(set)
    for method, _, decay in results:
        decays[method].add(decay)
    every = set().union(*decays.values())
    apart = any(len(of_method) > 1 for of_method in decays.values())
    rows = [{decay} for decay in sorted(every)] if apart else [every]
    figure, axes = plt.subplots(
        len(rows),
        2,
        figsize=(9 if apart else 12, 3.2 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for (left, right), shown in zip(axes, rows, strict=True):
        drawn: dict[str, int] = defaultdict(int)
        for (method, rate, decay), runs in results.items():
            kept = [record for record in runs if not diverged(record)]
            if decay not in shown or not kept:
                continue
            style = ("-", "--", ":")[drawn[method] % 3]  # of its several rates
            drawn[method] += 1
            label = f"{method}, rate {rate:g}" + ("" if apart else f", decay {decay:g}")
            for axis, name, factor in ((left, "loss", 1), (right, "accuracy", 100)):
                epochs = min(len(record[name]) for record in kept)
                curves = factor * np.array([record[name][:epochs] for record in kept])
                colour = _COLOURS[method]
                mean, x = curves.mean(0), np.arange(1, epochs + 1)
                axis.plot(x, mean, style, color=colour, label=label)
                axis.fill_between(
                    x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0
                )
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="test accuracy (%)")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
        if apart:
            left.set_title(f"weight decay {next(iter(shown)):g}", loc="left")
            right.legend(fontsize="small")
        else:
            handles, labels = right.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_norms(results: Results, path: Path) -> bool:
    """Kernel norms over training, of the first seed; False where there is nothing."""
    shown = {k: v for k, v in results.items() if k[0] in _LINES}
    decays = sorted({decay for _, _, decay in shown})
    layers = list(dict.fromkeys(p for runs in shown.values() for p in runs[0]["norms"]))
    if not decays or not layers:
        return False
    figure, axes = plt.subplots(
        1, len(decays), figsize=(4.5 * len(decays), 3.4), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, decay in zip(axes[0], decays, strict=True):
        first = next(runs for (_, _, d), runs in shown.items() if d == decay)
        for (method, _, other), runs in shown.items():
            if other != decay:
                continue
            for number, layer in enumerate(layers):
                norms = [v for v in runs[0]["norms"][layer] if v is not None]
                axis.plot(
                    np.arange(1, len(norms) + 1),
                    norms,
                    color=f"C{number}",
                    linestyle=_LINES[method],
                    label=layer if runs is first else None,
                )
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="epoch", yscale="log", title=f"weight decay {decay:g}")
    axes[0, 0].set_ylabel("Frobenius norm of the kernel")
    drawn = {method for method, *_ in shown}
    kinds = {"-": "line", ":": "dots", "--": "dashes"}
    listed = [f"{kinds[_LINES[method]]}: {method}" for method in sorted(drawn)]
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="\n".join(listed), loc="outside right upper",
        fontsize="small", title_fontsize="small",
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def section(key: str, found: Sequence[Record], directory: Path) -> list[str]:
    """The report of one protocol."""
    protocol = json.loads(key)
    name = protocol.pop("experiment")
    title = f"{name}: {protocol['model']} on {protocol['dataset']}"
    # What is not as usual tells one protocol from another, in titles and file names.
    unusual = {
        field.name: protocol[field.name]
        for field in dataclasses.fields(Experiment)
        if field.default not in (dataclasses.MISSING, protocol[field.name])
    }
    title += f", {protocol['schedule']} schedule, {protocol['epochs']} epochs"
    title += "".join(f", {k.replace('_', ' ')} {v}" for k, v in unusual.items())
    described = ", ".join(
        f"{field.replace('_', ' ')} {value}" for field, value in protocol.items()
    )
    machines = sorted({f"{r['device']}, {r['cores']} cores" for r in found})
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in sorted(r["versions"].items())) for r in found}
    )
    stem = "_".join(
        [str(protocol[part]) for part in ("model", "dataset", "schedule", "epochs")]
        + [f"{field}_{value}" for field, value in unusual.items()]
    )
    lines = [f"## {title}", "", f"Protocol: {described}.", ""]
    final = by_numbers(found, tuning=False)
    if final:
        paper = PAPER.get((protocol["dataset"], protocol["model"]), {})
        lines += [*table(final, paper), ""]
        plot_curves(final, directory / f"{stem}_curves.png")
        lines += [f"![Learning curves]({stem}_curves.png)", ""]
        lines += [
            "Lines are means over seeds, bands run from the least to the largest.",
            "",
        ]
        if plot_norms(final, directory / f"{stem}_norms.png"):
            lines += [f"![Norms of the kernels, first seed]({stem}_norms.png)", ""]
    tuning = by_numbers(found, tuning=True)
    if tuning:
        lines += ["Tuning, on a tenth of the training images held out:", ""]
        lines += [*tuning_table(tuning), ""]
    lines += [f"{len(found)} runs; {'; '.join(machines)}; {'; '.join(versions)}.", ""]
    return lines


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes README.md and its figures."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.cifar.report",
        description="Write tables and figures from the results file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument(
        "--output-dir", type=Path, help="default: where the results file is"
    )
    options = parser.parse_args(arguments)
    directory = options.output_dir or options.results.parent
    directory.mkdir(parents=True, exist_ok=True)
    # What a person concludes from the tables is written beside them.
    conclusions = directory / "CONCLUSIONS.md"
    lines = ["# The papers' experiments on real data", ""]
    if conclusions.exists():
        lines += [conclusions.read_text().strip(), ""]
    for key, found in by_protocol(records.load(options.results)).items():
        lines += section(key, found, directory)
    lines += [
        f"Written by `python -m examples.studies.cifar.report` from "
        f"[{options.results.name}]({options.results.name}), which keeps every run.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n")
    print(f"The report is {directory / 'README.md'}")


if __name__ == "__main__":
    main()
