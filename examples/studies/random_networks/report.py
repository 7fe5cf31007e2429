"""Tables and a picture of the benchmark of random networks, from its results alone.

    python -m examples.studies.random_networks --report

A gain is a difference of final losses on the same network, positive where the method's
is lower, each method at its own best rate. Intervals are Student's, 95 %, over
networks.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import scipy.stats

from examples.studies import markdown, results_file
from examples.studies.random_networks.networks import Network
from examples.studies.random_networks.rules import EXPONENTS, METHODS, Method

matplotlib.use("Agg")  # pictures go to files, also where there is no screen
import matplotlib.pyplot as plt

OPTIMIZERS = tuple(dict.fromkeys(method.optimizer for method in METHODS))
# The rules whose gain might be foreseen from the scales.
_PREDICTED = tuple(
    method
    for method in METHODS
    if method.scale
    and not method.papers
    and (method.size or method.optimizer == "sgd" or 2 * method.scale == 1)
)
_SHOWN = 0.1  # the largest gain or loss that the picture has room for
_COLOURS = dict(zip(OPTIMIZERS, ("C7", "C0", "C2", "C3"), strict=True))


class Ended(NamedTuple):
    """A method at its best rate for a network."""

    train: float
    test: float
    power: int  # of 2, the rate


@dataclasses.dataclass
class Result:
    """What a network came to."""

    network: Network
    sizes: np.ndarray
    fan_ins: np.ndarray
    input_fan_ins: np.ndarray
    log_scales: dict[str, np.ndarray]
    ended: dict[Method, Ended]

    def gain(self, method: Method, over: Method, loss: str = "train") -> float | None:
        """The difference of two methods' losses; None where there is no such run."""
        if method not in self.ended or over not in self.ended:
            return None
        values = [getattr(self.ended[m], loss) for m in (over, method)]
        return values[0] - values[1] if all(map(math.isfinite, values)) else None

    def imbalance(self, method: Method) -> float | None:
        """The deviation of the logarithms of a method's first multipliers.

        Over all entries of all kernels: 0 is one rate for all.
        """
        counts = {
            "size": self.sizes,
            "fan_in": self.fan_ins,
            "inputs": self.input_fan_ins,
        }
        logs = np.zeros(len(self.sizes))
        for factor, numbers in counts.items():
            logs += float(getattr(method, factor)) * np.log(numbers)
        if method.scale:
            if method.gains not in self.log_scales:
                return None
            logs += float(method.scale) * self.log_scales[method.gains]
        kernels = self.fan_ins > 1
        weights = self.sizes[kernels] / self.sizes[kernels].sum()
        mean = weights @ logs[kernels]
        return float(np.sqrt(weights @ (logs[kernels] - mean) ** 2))


def results_of(records: Iterable[Mapping[str, Any]]) -> list[Result]:
    """The results of the networks that have some of every optimizer."""
    by_name = {str(method): method for method in METHODS}
    found: dict[int, Result] = {}
    for record in records:
        if "is" in record:
            fields: dict[str, Any] = dict(record["is"])
            fields["widths"] = tuple(fields["widths"])
            network = Network(**fields)
            found[network.index] = Result(
                network,
                np.array(record["sizes"]),
                np.array(record["fan_ins"]),
                np.array(record["input_fan_ins"]),
                {gains: np.array(s) for gains, s in record["log_scales"].items()},
                {},
            )
        elif record["method"] in by_name:
            power = record["best"]
            train, test = record["losses"][str(power)]
            ended = Ended(
                math.nan if train is None else train,
                math.nan if test is None else test,
                power,
            )
            found[record["network"]].ended[by_name[record["method"]]] = ended
    plain = {Method(optimizer) for optimizer in OPTIMIZERS}
    return [r for _, r in sorted(found.items()) if plain <= set(r.ended)]


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over networks and half its interval."""

    mean: float
    half: float
    wins: int
    count: int

    def __str__(self) -> str:
        """As tables have it."""
        if not self.count:
            return "-"
        return f"{self.mean:+.4f} ± {self.half:.4f} ({self.wins}/{self.count})"


def mean_of(values: Iterable[float | None]) -> Mean:
    """The mean of those that are there."""
    there = np.array([value for value in values if value is not None])
    n = len(there)
    if n < 2:
        return Mean(float(there.mean()) if n else math.nan, math.nan, 0, n)
    low, high = scipy.stats.ttest_1samp(there, 0).confidence_interval(0.95)
    return Mean(float(there.mean()), (high - low) / 2, int((there > 0).sum()), n)


def gains(
    results: Iterable[Result], method: Method, over: Method, loss: str = "train"
) -> Mean:
    """A method's mean gain over another."""
    return mean_of(result.gain(method, over, loss) for result in results)


def split(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Those to choose by, and those kept aside."""
    return (
        [result for result in results if not result.network.kept_aside],
        [result for result in results if result.network.kept_aside],
    )


def name(method: Method) -> str:
    """A method for tables."""
    return str(method).replace("mean_field", "mean field").replace("_", "-")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, as a paragraph."""
    return "\n".join(markdown.table(header, rows)) + "\n"


def against(results: Sequence[Result], optimizer: str) -> str:
    """Every rule of an optimizer against the plain one."""
    chosen, aside = split(results)
    plain = Method(optimizer)
    rows = []
    for method in METHODS:
        if method.optimizer != optimizer or method == plain:
            continue
        powers = [
            result.ended[method].power - result.ended[plain].power
            for result in results
            if method in result.ended
        ]
        if not powers:
            continue
        low, middle, high = np.percentile(powers, [10, 50, 90])
        rates = f"{2**middle:.2g} ({2**low:.2g} to {2**high:.2g})"
        rows.append(
            (
                name(method),
                gains(chosen, method, plain),
                gains(aside, method, plain),
                gains(results, method, plain),
                gains(results, method, plain, "test"),
                rates,
            )
        )
    header = (
        f"against {optimizer}",
        "to choose by",
        "kept aside",
        "all",
        "all, test loss",
        "best rate over its",
    )
    return table(header, rows)


def optimizers(results: Sequence[Result]) -> str:
    """The plain optimizers against SGD."""
    _, aside = split(results)
    sgd = Method("sgd")
    rows = [
        (
            optimizer,
            gains(aside, Method(optimizer), sgd),
            gains(results, Method(optimizer), sgd),
            gains(results, Method(optimizer), sgd, "test"),
        )
        for optimizer in OPTIMIZERS
        if optimizer != "sgd"
    ]
    return table(("plain, against SGD", "kept aside", "all", "all, test loss"), rows)


def best_of(results: Sequence[Result], optimizer: str, measured: bool) -> Method:
    """The rule of the highest mean gain.

    Measured scales are a choice of their own: a chain does without a batch of data.
    """
    plain = Method(optimizer)
    candidates = [
        method
        for method in METHODS
        if method.optimizer == optimizer
        and (method.gains == "measured") == measured
        and gains(results, method, plain).count > 1
    ]
    return max(candidates, key=lambda m: gains(results, m, plain).mean)


def final_word(results: Sequence[Result]) -> str:
    """Of each optimizer the rule chosen by some networks, on the others."""
    chosen, aside = split(results)
    rows = []
    for optimizer in OPTIMIZERS:
        plain, sgd = Method(optimizer), Method("sgd")
        method = best_of(chosen, optimizer, measured=False)
        rows.append(
            (
                name(method),
                gains(chosen, method, plain),
                gains(aside, method, plain),
                gains(aside, method, plain, "test"),
                gains(aside, method, sgd),
            )
        )
    header = (
        "chosen rule",
        "where chosen",
        "kept aside",
        "kept aside, test loss",
        "kept aside, against SGD",
    )
    return table(header, rows)


def contrast(results: Iterable[Result], pairs: Sequence[tuple[Method, Method]]) -> Mean:
    """The mean gain of the first over the second, over all pairs of a network."""
    values = []
    for result in results:
        there = [result.gain(*pair) for pair in pairs]
        known = [value for value in there if value is not None]
        values.append(float(np.mean(known)) if known else None)
    return mean_of(values)


def _pairs(
    optimizer: str, these: Mapping[str, object], those: Mapping[str, object]
) -> list[tuple[Method, Method]]:
    """All pairs of methods that differ by what is given and are alike otherwise."""
    pairs = []
    for method in METHODS:
        if method.optimizer != optimizer or method.papers:
            continue
        if any(getattr(method, field) != value for field, value in these.items()):
            continue
        other = dataclasses.replace(method, **dict(those))
        if not other.scale:
            other = dataclasses.replace(other, gains="paper", live=False)
        if other in METHODS and other != method:
            pairs.append((method, other))
    return pairs


def contrasts(results: Sequence[Result]) -> str:
    """What each choice is worth, other choices alike."""
    _, aside = split(results)
    quarter, half, one = EXPONENTS
    chain = {"size": 0, "fan_in": 0, "inputs": 0}
    rows = []
    for optimizer in OPTIMIZERS:
        comparisons: dict[str, tuple[dict[str, object], dict[str, object]]] = {
            "mean field over paper": ({"gains": "mean_field"}, {"gains": "paper"}),
            "live over frozen": ({"live": True}, {"live": False}),
            "measured over paper": ({"gains": "measured"}, {"gains": "paper"}),
            "scale^(1/4) over scale^(1/2)": (
                {"scale": quarter, **chain},
                {"scale": half},
            ),
            "scale^(1/2) over scale": ({"scale": half, **chain}, {"scale": one}),
            "size^(-1/2) beside a scale": (
                {"size": -half, "scale": half},
                {"size": 0},
            ),
            "scale^(1/2) beside size^(-1/2)": (
                {"size": -half, "scale": half},
                {"scale": 0},
            ),
        }
        for what, (these, those) in comparisons.items():
            pairs = _pairs(optimizer, these, those)
            if optimizer == "sgd" and what.startswith("measured"):
                these = {**these, "live": False}
                pairs = _pairs(optimizer, these, those)
            both = contrast(aside, pairs), contrast(results, pairs)
            if both[1].count:
                rows.append((f"{optimizer}: {what}", *both))
    return table(("other choices alike", "kept aside", "all"), rows)


def leaders(results: Sequence[Result]) -> list[Method]:
    """The rules that the tables of details are about."""
    chosen, _ = split(results)
    found = [
        Method("sgd", EXPONENTS[2], live=True),
        *(best_of(chosen, optimizer, measured=False) for optimizer in OPTIMIZERS),
    ]
    return list(dict.fromkeys(found))


def by_kind(results: Sequence[Result]) -> str:
    """The gain of some rules on some sorts of networks, all of them."""
    sorts: dict[str, Callable[[Network], bool]] = {
        "balanced": lambda n: not n.imbalance,
        "unbalanced": lambda n: n.imbalance > 0,
        "plain": lambda n: not n.norm,
        "normalised": lambda n: n.norm,
        "ReLU": lambda n: n.activation == "relu",
        "tanh": lambda n: n.activation == "tanh",
        "MLP": lambda n: n.kind == "mlp",
        "convolutional": lambda n: n.kind == "conv",
        "residual": lambda n: n.kind == "residual",
        "attention": lambda n: n.kind == "attention",
    }
    methods = leaders(results)
    rows = []
    for sort, belongs in sorts.items():
        some = [result for result in results if belongs(result.network)]
        rows.append((sort, *(gains(some, method, method.plain) for method in methods)))
    return table(("gain over its optimizer", *map(name, methods)), rows)


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval, by Fisher's transformation."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """As tables have it."""
        if math.isnan(self.value):
            return "-"
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> Correlation:
    """Spearman's, its standard error that of Bonett and Wright (2000)."""
    n = len(pairs)
    if n < 5:
        return Correlation(math.nan, math.nan, math.nan, n)
    predicted, gained = np.asarray(pairs).T
    result: Any = scipy.stats.spearmanr(predicted, gained)
    value = float(result.statistic)
    error = math.sqrt((1 + value**2 / 2) / (n - 3))
    centre = math.atanh(max(-0.999, min(0.999, value)))
    low, high = (math.tanh(centre + sign * 1.96 * error) for sign in (-1, 1))
    return Correlation(value, low, high, n)


def predictability(results: Sequence[Result]) -> str:
    """Does the imbalance at initialisation tell the gain beforehand?"""
    chosen, aside = split(results)

    def cell(some: Iterable[Result], method: Method) -> Correlation:
        pairs = []
        for result in some:
            gain = result.gain(method, method.plain)
            imbalance = result.imbalance(method)
            if gain is not None and imbalance is not None:
                pairs.append((imbalance, gain))
        return rank_correlation(pairs)

    rows = []
    for method in METHODS:
        if method in (*leaders(results)[2:], *_PREDICTED):
            cells = [cell(some, method) for some in (chosen, aside, results)]
            if cells[-1].count:
                rows.append((name(method), *cells))
    header = ("imbalance against gain", "to choose by", "kept aside", "all")
    return table(header, rows)


def draw(results: Sequence[Result], path: Path) -> None:
    """Every rule's gain over its optimizer with interval, on those kept aside."""
    chosen, aside = split(results)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7.5, 13), layout="constrained", height_ratios=(1, 1.1)
    )
    rules: dict[str, dict[str, Method]] = defaultdict(dict)
    for method in METHODS:
        if method == method.plain:
            continue
        short = name(method).removeprefix(f"{method.optimizer} * ")
        if method.optimizer != "sgd":
            short = short.removesuffix(", frozen")
        side = "sgd" if method.optimizer == "sgd" else "others"
        rules[f"{side}:{short}"][method.optimizer] = method
    for axis, side in ((upper, "sgd"), (lower, "others")):
        names = [rule for rule in rules if rule.startswith(f"{side}:")]
        for row, rule in enumerate(names):
            methods = rules[rule]
            for place, (optimizer, method) in enumerate(methods.items()):
                y = row + (place - (len(methods) - 1) / 2) * 0.24
                colour = _COLOURS[optimizer] if side == "others" else "C0"
                word = gains(aside, method, method.plain)
                if word.count > 1:
                    axis.errorbar(
                        word.mean, y, xerr=word.half, fmt="o", ms=4, color=colour
                    )
                before = gains(chosen, method, method.plain).mean
                axis.plot(before, y, "o", ms=4, mfc="none", mec=colour)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(names)), [rule.split(":")[1] for rule in names])
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel("gain in training loss")
        # A rule that fails would leave no room for the rest.
        low, high = axis.get_xlim()
        axis.set_xlim(max(low, -_SHOWN), min(high, _SHOWN))
        for row, rule in enumerate(names):
            means = [gains(aside, m, m.plain).mean for m in rules[rule].values()]
            if max(means) < -_SHOWN:
                axis.plot(-_SHOWN, row, "<", color="C0", clip_on=False)
        axis.locator_params(axis="x", nbins=5)
    upper.set_title("over SGD")
    lower.set_title("over Adam, Lion and Muon")
    for optimizer in OPTIMIZERS[1:]:
        lower.plot([], [], "o", color=_COLOURS[optimizer], label=optimizer)
    for axis, colour in ((upper, "C0"), (lower, "black")):
        axis.plot([], [], "o", color=colour, label="kept aside, 95 %")
        axis.plot([], [], "o", mfc="none", mec=colour, label="to choose by")
        axis.legend(loc="upper right", bbox_to_anchor=(1, -0.08), ncols=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(results: Sequence[Result], picture: str) -> str:
    """The tables, in Markdown."""
    chosen, aside = split(results)
    parts = [
        "# Which per-layer rule pays?\n",
        f"{len(results)} networks drawn at random, {len(chosen)} of them to choose a "
        f"rule by and {len(aside)} kept aside. Gains are differences of final training "
        "loss on the same network, positive where the method's is lower: mean ± half "
        "of the 95 % interval over networks (networks where it wins / all). "
        "`python -m examples.studies.random_networks` runs the study, with `--report` "
        "it writes this page.\n",
        f"![Gain of every rule over its optimizer, with intervals]({picture})\n",
        "## The final word\n",
        "For each optimizer the declared rule of the highest mean gain where it was "
        "chosen, on the networks kept aside.\n",
        final_word(results),
        optimizers(results),
        "## Every rule\n",
        *(against(results, optimizer) for optimizer in OPTIMIZERS),
        "The last column is the median of the best rates over the plain optimizer's, "
        "and in parentheses the range of 80 % of the networks.\n",
        "## One choice at a time\n",
        contrasts(results),
        "## By sort of network\n",
        by_kind(results),
        "## Is the gain foreseeable?\n",
        "Rank correlation of a rule's gain with the deviation of the logarithms of its "
        "multipliers at initialisation, over all entries of kernels, with its 95 % "
        "interval.\n",
        predictability(results),
    ]
    return "\n".join(parts)


def write(path: Path) -> None:
    """Prints the report, and writes it and the picture beside the results."""
    results = results_of(results_file.read(path))
    if len(results) < 2:
        raise SystemExit(f"{path} has no two networks with results of every optimizer")
    picture = path.with_suffix(".png")
    text = report(results, picture.name)
    draw(results, picture)
    path.with_suffix(".md").write_text(text)
    print(text)
