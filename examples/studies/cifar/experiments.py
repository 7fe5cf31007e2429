"""The papers' protocols (BM 3.3, BM 4, LH 4.1), as plain configurations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import optax

Schedule = Literal["constant", "linear", "step", "plateau"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is the same for every run of an experiment.

    Attributes:
      dataset: of `examples.data.DATASETS`.
      model: of `examples.models.MODELS`.
      epochs: passes over the training images.
      schedule: of the learning rate: constant; linear, to 0 at the end; step, times 0.2
        after each fifth of the epochs; plateau, halved when an epoch's training loss
        has not improved for 10 epochs (LH 4.1 watches the validation accuracy).
      augment: random flips and rotations.
      batch_size: images a step.
      momentum: of every method but AdamW, Lion and Muon, Nesterov's.
      dtype: what the network computes in; parameters are float32.
      train_images: the first so many only; 0 for all.
      patience: stop once the best accuracy of every run is so many epochs old; 0 to
        train to the end.
      width: what a VGG's numbers of features are multiplied by.
    """

    dataset: str
    model: str
    epochs: int
    schedule: Schedule
    augment: bool = False
    batch_size: int = 128
    momentum: float = 0.9
    dtype: str = "float32"
    train_images: int = 0
    patience: int = 0
    width: float = 1.0

    def decay_of_rate(self, steps_per_epoch: int) -> optax.Schedule:
        """What the learning rate is multiplied by at a step."""
        steps = self.epochs * steps_per_epoch
        match self.schedule:
            case "linear":
                return optax.linear_schedule(1.0, 0.0, steps)
            case "step":
                boundaries = [steps * fifth // 5 for fifth in range(1, 5)]
                return optax.piecewise_constant_schedule(
                    1.0, dict.fromkeys(boundaries, 0.2)
                )
        return optax.constant_schedule(1.0)


EXPERIMENTS = {
    # LeNet at a fixed rate.
    "lenet_fig2": Experiment("cifar10", "lenet", 200, "constant"),
    # VGG with a step schedule; --model and --dataset give the entries of the tables.
    "vgg_tables": Experiment("cifar100", "vgg11", 300, "step", augment=True),
    # VGG13 with a plateau schedule.
    "vgg_plateau": Experiment("cifar10", "vgg13", 300, "plateau", augment=True),
}

# The same number of learning rates for every method: the papers' for SGD and backmatch
# (BM 3.3, 4), about the papers' for LARS and LSALR, and for methods that they do not
# have around what their authors recommend. Muon's and the own norm's were moved once,
# towards where their best rate was.
LEARNING_RATES = {
    "sgd": (0.02, 0.05, 0.1, 0.2, 0.5),
    "lars": (1.0, 2.0, 5.0, 10.0, 20.0),
    "lsalr": (0.006, 0.02, 0.05, 0.1, 0.2),
    "backmatch": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, default": (0.02, 0.05, 0.1, 0.2, 0.5),
    "adamw": (0.0001, 0.0003, 0.001, 0.003, 0.01),
    "lion": (0.00003, 0.0001, 0.0003, 0.001, 0.003),
    "muon": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "adamw, steps": (0.005, 0.01, 0.02, 0.05, 0.1),
    "lion, steps": (0.002, 0.005, 0.01, 0.02, 0.05),
    "muon, steps": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, decay after": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, mean field": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, measured": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, frozen": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, norms kept": (0.005, 0.01, 0.02, 0.05, 0.1),
    "backmatch, normalized": (0.02, 0.05, 0.1, 0.2, 0.5),
    "own norm": (0.002, 0.005, 0.01, 0.02, 0.05),
    "fan-in": (0.2, 0.5, 1.0, 2.0, 5.0),
}

# For VGGs the papers took 0.002 on CIFAR-10 and 0.1 on CIFAR-100 (BM 4): the head's
# shape enters every scale, unless it is normalized.
_VGG_LEARNING_RATES = {
    "cifar10": (0.0005, 0.001, 0.002, 0.005, 0.01),
    "cifar100": (0.02, 0.05, 0.1, 0.2, 0.5),
}


def learning_rates(method: str, experiment: Experiment) -> tuple[float, ...]:
    """The rates that the tuning of a method tries, five for each."""
    normalized = ("backmatch, normalized", "backmatch, default")
    by_head = method.startswith("backmatch") and method not in normalized
    if by_head and experiment.model.startswith("vgg"):
        return _VGG_LEARNING_RATES.get(experiment.dataset, LEARNING_RATES[method])
    return LEARNING_RATES[method]


# The papers' 0, 5e-4 and 5e-3 (BM 4.2, LH 4.1): the scale multiplies the decay too, so
# that a comparison at one fixed decay compares decays. AdamW, Lion and Muon multiply
# the decay by their rate, which is a hundred times smaller.
WEIGHT_DECAYS = dict.fromkeys(LEARNING_RATES, (0.0, 5e-4, 5e-3)) | {
    "adamw": (0.0, 5e-2, 5e-1),
    "lion": (0.0, 5e-2, 5e-1),
    "muon": (0.0, 5e-2, 5e-1),
    "adamw, steps": (0.0, 5e-3, 5e-2),
    "lion, steps": (0.0, 5e-3, 5e-2),
    "muon, steps": (0.0, 5e-3, 5e-2),
}

Candidate = tuple[float, float]  # rate and decay


def worth(score: float) -> float:
    """The score, to compare; that of a run that diverged is the least."""
    return -math.inf if math.isnan(score) else score


def climb(
    score: Callable[[Sequence[Candidate]], Mapping[Candidate, float]], start: Candidate
) -> dict[Candidate, float]:
    """From a candidate to the best of its neighbours, until none is better.

    So the best has a neighbour on every side, and there is no edge. Rates go by 1, 2,
    5, 10. Decays go by factors of 10, and below the start there is 0 alone.

    Args:
      score: the scores of candidates, where NaN is worst.
      start: rate and decay to begin with, rounded to the rates above.

    Returns:
      The score of every candidate that was tried.
    """
    rates = [digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)]
    rates = [float(f"{rate:g}") for rate in rates]
    decays = [0.0, *(float(f"{start[1] * 10**power:g}") for power in range(4))]
    here = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / start[0]))), 1
    found: dict[Candidate, float] = {}

    def value(place: tuple[int, int]) -> float:
        return worth(found[rates[place[0]], decays[place[1]]])

    while True:
        beside = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
        places = [(here[0] + rate, here[1] + decay) for rate, decay in beside]
        places = [(rate, decay) for rate, decay in places if decay >= 0]
        named = [(rates[rate], decays[decay]) for rate, decay in places]
        found |= score([name for name in named if name not in found])
        best = max(places, key=value)
        if value(best) <= value(here):
            return found
        here = best
