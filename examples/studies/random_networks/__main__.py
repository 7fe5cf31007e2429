"""Which per-layer rule pays? A benchmark of networks drawn at random.

Small networks of many shapes are trained for some hundred steps by every method, from
the same initial weights and on the same batches. Each method's learning rate is tuned
for each network on the powers of 2, by training loss, over a range that grows until
the best rate lies inside. Of five networks two are kept aside: the others serve to
choose a rule, these to say what it is worth.

    python -m examples.studies.random_networks
    python -m examples.studies.random_networks --report
    python -m examples.studies.random_networks --dataset digits --networks 8

Results are appended to a file, a line for each network and method. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from examples import data
from examples.arguments import whole
from examples.studies import results_file
from examples.studies.random_networks import report, training
from examples.studies.random_networks.networks import draw
from examples.studies.random_networks.rules import METHODS

RESULTS = Path(__file__).parents[1] / "results" / "random_networks.jsonl"


def run(options: argparse.Namespace) -> None:
    """Trains what the file of results lacks."""
    dataset = data.load(options.dataset, options.data_dir)
    setting = {"dataset": options.dataset, "steps": options.steps}
    done: dict[int, set[str]] = {}
    for record in results_file.read(options.results):
        if "is" in record:
            if record["setting"] != setting:
                raise SystemExit(
                    f"{options.results} has results of {record['setting']}, not of "
                    f"{setting}: choose another file with --results"
                )
            done.setdefault(record["network"], set())
        else:
            done.setdefault(record["network"], set()).add(record["method"])
    with tqdm(range(options.networks), unit="network") as bar:
        for index in bar:
            network = draw(index)
            bar.set_postfix_str(str(network))
            there = done.get(index, set())
            missing = [m for m in METHODS if str(m) not in there]
            if not any(method.suits(network) for method in missing):
                continue
            for record in training.study(network, dataset, options.steps, missing):
                if "is" not in record:
                    results_file.append([record], options.results)
                elif index not in done:
                    results_file.append(
                        [record | {"setting": setting}], options.results
                    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, or prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.random_networks",
        description="Per-layer rules on networks drawn at random, the learning rate of "
        "each tuned for each network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--networks", type=whole(1), default=100, help="how many")
    parser.add_argument("--steps", type=whole(1), default=300, help="of a run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--report", action="store_true", help="tables and a picture of the results"
    )
    options = parser.parse_args(arguments)
    if options.steps % training.REFRESH:
        parser.error(f"--steps must be a multiple of {training.REFRESH}")
    if options.report:
        report.write(options.results)
    else:
        with results_file.alone_with(options.results):
            run(options)


if __name__ == "__main__":
    main()
