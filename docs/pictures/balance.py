"""Draws `balance.png`, the README's picture, from the transfer study's results.

python docs/pictures/balance.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "examples" / "studies" / "results" / "transfer.json"
TITLES = {
    "sgd": "SGD",
    "backmatch, default": "SGD with the line",
    "backmatch, normalized": "SGD with the line, limit=None",
}


def main() -> None:
    """One panel for each method: loss against learning rate."""
    study = json.loads(RESULTS.read_text())
    rates = np.array(study["rates"])
    figure, all_axes = plt.subplots(
        1, 3, figsize=(10, 2.9), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (method, title) in zip(all_axes, TITLES.items(), strict=True):
        for change, curves in study["curves"]["balance of layers"].items():
            factor = change.removeprefix("times ").partition(",")[0]
            losses = np.array(curves[method]["loss"], float).mean(1)
            label = "balanced" if factor == "1" else f"out of balance, {factor}"
            axes.semilogx(rates, losses, "o-", ms=3, label=label)
        axes.set(title=title, xlabel="learning rate", ylim=(1.35, 2.35))
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("training loss")
    all_axes[0].legend(frameon=False)
    figure.savefig(HERE / "balance.png", dpi=150)


if __name__ == "__main__":
    main()
