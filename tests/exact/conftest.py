"""Fixtures of the tests of the exact rule."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """For comparisons with NumPy in float64."""
    with jax.enable_x64(True):
        yield
