"""Writes the report of the papers' experiments from the results file.

    python -m examples.studies.cifar.report

Tables and figures come from the results file alone, so that every number in them can be
followed to the run that gave it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from examples import methods
from examples.studies import markdown
from examples.studies.cifar import records
from examples.studies.cifar.experiments import Experiment
from examples.studies.intervals import Difference, forest, welch

matplotlib.use("Agg")  # pictures go to files, also where there is no screen
import matplotlib.pyplot as plt

Record = dict[str, Any]
Key = tuple[str, float, float]  # method, rate and decay
Results = dict[Key, list[Record]]

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
LONG = 10  # epochs from which on curves are drawn

HOW_TO_READ = """
## How to read the figures

* The endpoint was fixed beforehand: the test accuracy of the last epoch.
* A point is the mean over the seeds less SGD's, a line its 95 % interval (Welch's,
  unpaired). Blue is above SGD, orange below. A grey line holds zero: no difference that
  these runs could show, smaller than its farther end. An empty point is of one seed.
* Of twenty intervals one misses the truth by chance.
* `±` is the standard deviation over seeds. The mean over the last third of the epochs,
  less noisy at a fixed rate, was added after looking.
"""
_LINES = {
    "backmatch": "-",
    "backmatch, default": "-.",
    "sgd": ":",
    "backmatch, norms kept": "--",
}
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


class Comparison(NamedTuple):
    """Configurations to compare, and the one that they are compared with."""

    title: str
    reference: Key
    others: list[Key]


def comparisons(final: Results, tuned: dict[str, Key]) -> list[Comparison]:
    """What there is to compare with SGD.

    Args:
      final: the runs with test images.
      tuned: the configuration of each method that held-out images found best.

    Returns:
      One comparison where each method has one weight decay, its best. Else one for each
      decay, and one of what the methods' own tuning chose. Where SGD has several rates,
      the others are compared with the one of the most seeds and then of the highest
      mean, the hardest to beat.
    """

    def against_sgd(title: str, keys: Sequence[Key]) -> list[Comparison]:
        sgd = [key for key in keys if key[0] == "sgd"]
        sgd = [key for key in sgd if len(finals(final[key], "accuracy"))]
        if not sgd or len(keys) < 2:
            return []
        accuracies = {key: finals(final[key], "accuracy") for key in sgd}
        best = max(sgd, key=lambda key: (accuracies[key].size, accuracies[key].mean()))
        return [Comparison(title, best, [key for key in keys if key != best])]

    if not several_decays(final):
        return against_sgd("each at its best rate and decay", list(final))
    found = []
    for decay in sorted({key[2] for key in final}):
        keys = [key for key in final if key[2] == decay]
        found += against_sgd(f"decay {decay:g}", keys)
    chosen = [key for key in tuned.values() if key in final]
    if len({key[2] for key in chosen}) > 1:
        found += against_sgd("rate and decay by its own tuning", chosen)
    return found


def several_decays(final: Results) -> bool:
    """Whether a method was trained at more than one weight decay."""
    return len({(key[0], key[2]) for key in final}) > len({key[0] for key in final})


def best_of_tuning(tuning: Results) -> dict[str, Key]:
    """The configuration of each method with the highest held-out accuracy."""
    best: dict[str, tuple[float, Key]] = {}
    for key, runs in tuning.items():
        score = held_out(runs)
        if score > best.get(key[0], (-1.0, key))[0]:  # which NaN is not
            best[key[0]] = score, key
    return {method: key for method, (_, key) in best.items()}


def held_out(runs: Sequence[Record]) -> float:
    """The mean accuracy of a candidate; NaN where one seed diverged, as in tuning."""
    values = [math.nan if diverged(run) else run["accuracy"][-1] for run in runs]
    return float(np.mean(values))


def differences(
    compared: Comparison, final: Results
) -> dict[Key, tuple[Difference, Difference]]:
    """In test accuracy, points, and in training loss, %, from SGD.

    That of the loss is of its logarithm.
    """

    def values(key: Key, name: str) -> np.ndarray:
        return finals(final[key], name)

    found = {}
    for key in compared.others:
        if not min(values(key, "loss").size, values(compared.reference, "loss").size):
            continue  # every seed diverged, which the table says
        accuracy = welch(
            100 * values(key, "accuracy"), 100 * values(compared.reference, "accuracy")
        )
        loss = welch(
            np.log(values(key, "loss")), np.log(values(compared.reference, "loss"))
        )
        percent = Difference(*(100 * (float(np.exp(end)) - 1) for end in loss))
        found[key] = accuracy, percent
    return found


def table(
    final: Results, compared: Sequence[Comparison], paper: dict[str, float]
) -> list[str]:
    """A row for each method, rate and decay: what its seeds reached at the end."""
    header = ["decay", "method", "rate", "seeds", "training loss", "test accuracy, %"]
    header += ["mean of the last third, %"]
    if paper:
        header.append("paper, %")
    rows = []
    for (method, rate, decay), runs in final.items():
        lost = sum(map(diverged, runs))
        row = [
            f"{decay:g}",
            method,
            f"{rate:g}",
            f"{len(runs)}" + (f", {lost} of them diverged" if lost else ""),
            spread(finals(runs, "loss"), 4),
            spread(100 * finals(runs, "accuracy"), 2),
            spread(100 * over_last_third(runs), 2),
        ]
        if paper:
            row.append(f"{paper[method]:.2f}" if method in paper else "")
        rows.append(row)
    lines = markdown.table(header, rows)
    header = ["compared", "method", "rate", "seeds", "accuracy less SGD's", "95 %"]
    header += ["in words", "training loss over SGD's, %", "95 %"]
    rows = []
    for group in compared:
        for key, (accuracy, loss) in differences(group, final).items():
            seeds = [len(finals(final[k], "loss")) for k in (key, group.reference)]
            rows.append(
                [
                    group.title,
                    key[0],
                    f"{key[1]:g}",
                    f"{seeds[0]} and {seeds[1]}",
                    f"{accuracy.mean:+.2f}",
                    _ends(accuracy, 2),
                    accuracy.words(),
                    f"{loss.mean:+.1f}",
                    _ends(loss, 1),
                ]
            )
    return [*lines, "", *markdown.table(header, rows)] if rows else lines


def _ends(difference: Difference, digits: int) -> str:
    if np.isnan(difference.low):
        return ""
    return f"{difference.low:+.{digits}f} to {difference.high:+.{digits}f}"


def plot_forest(final: Results, compared: Sequence[Comparison], path: Path) -> bool:
    """The differences from SGD with their intervals; False where there are none."""
    rows: list[tuple[str, Difference | None]] = []
    losses: list[tuple[str, Difference | None]] = []
    for group in compared:
        found = differences(group, final)
        if not found:
            continue
        several = len({key[0] for key in found}) < len(found)
        if len(compared) > 1:
            rows.append((group.title, None))
            losses.append(("", None))
        for key, (accuracy, loss) in sorted(found.items(), key=lambda i: -i[1][0].mean):
            rate = f", rate {key[1]:g}" if several else ""
            rows.append((f"{key[0]}{rate}", accuracy))
            losses.append(("", loss))
    if not rows:
        return False
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8, 1 + 0.27 * len(rows)), layout="constrained"
    )
    forest(right, losses, "training loss over SGD's, %")
    forest(left, rows, "test accuracy less SGD's, points")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def tuning_table(results: Results) -> list[str]:
    """Held-out accuracy of every candidate: decays down, rates across."""
    cells: dict[tuple[str, float], dict[float, str]] = defaultdict(dict)
    for (method, rate, decay), runs in results.items():
        score = held_out(runs)
        text = "diverged" if math.isnan(score) else f"{100 * score:.2f}"
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
    return markdown.table(["method", "decay", "rate: held-out accuracy, %"], rows)


def plot_curves(results: Results, path: Path) -> None:
    """Training loss and test accuracy against epochs, a row for each weight decay."""
    decays = sorted({key[2] for key in results})
    figure, axes = plt.subplots(
        len(decays),
        2,
        figsize=(8, 2.7 * len(decays)),
        layout="constrained",
        squeeze=False,
    )
    for (left, right), shown in zip(axes, decays, strict=True):
        drawn: dict[str, int] = defaultdict(int)
        for (method, rate, decay), runs in results.items():
            kept = [record for record in runs if not diverged(record)]
            if decay != shown or not kept:
                continue
            style = ("-", "--", ":")[drawn[method] % 3]  # of its several rates
            drawn[method] += 1
            for axis, name, factor in ((left, "loss", 1), (right, "accuracy", 100)):
                epochs = min(len(record[name]) for record in kept)
                curves = factor * np.array([record[name][:epochs] for record in kept])
                mean, x = curves.mean(0), np.arange(1, epochs + 1)
                colour, label = _COLOURS[method], f"{method}, rate {rate:g}"
                axis.plot(x, mean, style, color=colour, label=label)
                axis.fill_between(
                    x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0
                )
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="test accuracy (%)")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)
        left.set_title(f"weight decay {shown:g}", loc="left")
        right.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_norms(results: Results, path: Path) -> bool:
    """Kernel norms over training, of the first seed; False where there is nothing.

    Of several rates the first, which the curves draw as a whole line.
    """
    shown: dict[tuple[str, float], list[Record]] = {}
    for (method, _, decay), runs in results.items():
        if method in _LINES:
            shown.setdefault((method, decay), runs)
    decays = sorted({decay for _, decay in shown})
    layers = list(dict.fromkeys(p for runs in shown.values() for p in runs[0]["norms"]))
    if not decays or not layers:
        return False
    figure, axes = plt.subplots(
        1, len(decays), figsize=(8, 3.2), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, decay in zip(axes[0], decays, strict=True):
        first = next(runs for (_, d), runs in shown.items() if d == decay)
        for (method, other), runs in shown.items():
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
    kinds = {"-": "line", ":": "dots", "--": "dashes", "-.": "dashes and dots"}
    listed = [f"{kinds[_LINES[method]]}: {method}" for method in sorted(drawn)]
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="\n".join(listed), loc="outside right upper",
        fontsize="small", title_fontsize="small",
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def section(key: str, groups: dict[str, list[Record]], directory: Path) -> list[str]:
    """The report of one protocol of all that there are."""
    found, protocol = groups[key], json.loads(key)
    name = protocol.pop("experiment")
    # What is not as usual tells one protocol from another, in titles and file names.
    unusual = {
        field.name: protocol[field.name]
        for field in dataclasses.fields(Experiment)
        if field.default not in (dataclasses.MISSING, protocol[field.name])
    }
    title = f"{name}: {protocol['model']} on {protocol['dataset']}"
    title += f", {protocol['schedule']} schedule, {protocol['epochs']} epochs"
    title += "".join(f", {k.replace('_', ' ')} {v}" for k, v in unusual.items())
    stem = "_".join(
        [str(protocol[part]) for part in ("model", "dataset", "schedule", "epochs")]
        + [f"{field}_{value}" for field, value in unusual.items()]
    )
    lines = [f"## {title}", ""]
    final = by_numbers(found, tuning=False)
    tuning = by_numbers(found, tuning=True)
    if final:
        tuned = best_of_tuning(tuning or tuned_shorter(key, groups))
        compared = comparisons(final, tuned)
        if plot_forest(final, compared, directory / f"{stem}_forest.png"):
            lines += [f"![Differences from SGD, with intervals]({stem}_forest.png)", ""]
        if protocol["epochs"] >= LONG:
            plot_curves(final, directory / f"{stem}_curves.png")
            lines += [f"![Learning curves]({stem}_curves.png)", ""]
            lines += ["Lines are means over seeds; bands hold every seed.", ""]
            if plot_norms(final, directory / f"{stem}_norms.png"):
                lines += [f"![Norms of the kernels, first seed]({stem}_norms.png)", ""]
        paper = PAPER.get((protocol["dataset"], protocol["model"]), {})
        lines += _folded("Every figure", table(final, compared, paper))
    if tuning:
        title = "Tuning, on a tenth of the training images held out"
        lines += _folded(title, tuning_table(tuning))
    described = ", ".join(
        f"{field.replace('_', ' ')} {value}" for field, value in protocol.items()
    )
    machines = sorted({f"{r['device']}, {r['cores']} cores" for r in found})
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in sorted(r["versions"].items())) for r in found}
    )
    ran = [f"Protocol: {described}.", "", f"{len(found)} runs; {'; '.join(machines)}; "]
    ran[-1] += f"{'; '.join(versions)}."
    return [*lines, *_folded("Protocol and machine", ran)]


def tuned_shorter(key: str, groups: dict[str, list[Record]]) -> Results:
    """The tuning of the same protocol with another number of epochs, the most."""

    def without_epochs(key: str) -> tuple[int, dict[str, Any]]:
        protocol = json.loads(key)
        return protocol.pop("epochs"), protocol

    wanted, found = without_epochs(key)[1], []
    for other, records_ in groups.items():
        epochs, protocol = without_epochs(other)
        tuning = by_numbers(records_, tuning=True)
        if protocol == wanted and tuning:
            found.append((epochs, tuning))
    return max(found, key=lambda pair: pair[0])[1] if found else {}


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    return [
        f"<details><summary>{title}</summary>", "", *lines, "", "</details>", "",
    ]  # fmt: skip


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
    # What a person concludes is written beside the results.
    conclusions = directory / "CONCLUSIONS.md"
    lines = ["# The papers' experiments on real data", ""]
    if conclusions.exists():
        lines += [conclusions.read_text().strip(), ""]
    lines += [*HOW_TO_READ.strip().splitlines(), ""]
    groups = by_protocol(records.load(options.results))

    def place(key: str) -> tuple[bool, bool, int]:
        tested = any(not record["run"]["tuning"] for record in groups[key])
        protocol = json.loads(key)
        return not tested, protocol["dataset"] == "digits", -protocol["epochs"]

    for key in sorted(groups, key=place):
        lines += section(key, groups, directory)
    lines += [
        f"Written by `python -m examples.studies.cifar.report` from "
        f"[{options.results.name}]({options.results.name}), which keeps every run.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n")
    print(f"The report is {directory / 'README.md'}")


if __name__ == "__main__":
    main()
