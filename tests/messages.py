"""What every error message of the package is like."""

import pathlib

import pytest


def assert_is_a_message_of_the_package(info: pytest.ExceptionInfo[ValueError]):
    assert info.type is ValueError, "no subclass that JAX or NumPy has defined"
    raised_in = pathlib.Path(str(info.traceback[-1].path))
    assert "backmatch_optax" in raised_in.parts
    # One can read it in a terminal: no dump of parameters.
    assert len(str(info.value)) < 600
