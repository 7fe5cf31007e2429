"""Numbers on the command line: `type=` for argparse, which then says what is wrong."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

_LARGEST = 2**31 - 1  # what a 32-bit integer of JAX holds


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` to 2^31 - 1.

    >>> whole(1)("12")
    12
    >>> whole(1)("0")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: '0' must be a whole number of at least 1
    """

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number of at least {least}"
            )
        if number > _LARGEST:
            raise argparse.ArgumentTypeError(f"{text!r} must be at most {_LARGEST}")
        return number

    return read


def not_negative(text: str, *, below: float = math.inf) -> float:
    """A number of at least 0 and below `below`, infinity at most.

    >>> not_negative("5e-4")
    0.0005
    >>> not_negative("nan")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: 'nan' must be a number of at least 0
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < below:  # also where it is not a number
        limit = "" if below == math.inf else f" and below {below:g}"
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of at least 0{limit}"
        )
    return value


def positive(text: str) -> float:
    """A number above 0.

    >>> positive("0")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: '0' must be a number above 0
    """
    try:
        return not_negative(text) or not_negative("")
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0") from None
