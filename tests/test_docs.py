"""The reference holds every public name; Sphinx itself checks the rest."""

import importlib
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "api"
PAGES = {  # the page of each public module
    "backmatch_optax": "backmatch_optax.md",
    "backmatch_optax.exact": "exact.md",
    "backmatch_optax.exact.linen": "exact.md",
    "backmatch_optax.exact.nnx": "exact.md",
    "backmatch_optax.local_hessian": "local_hessian.md",
    "backmatch_optax.plots": "plots.md",
    "backmatch_optax.spec": "spec.md",
}


@pytest.mark.parametrize("module", PAGES)
def test_reference_has_every_public_name(module):
    page = (REFERENCE / PAGES[module]).read_text()
    if re.search(rf"automodule:: {re.escape(module)}\n +:members:", page):
        return  # Sphinx takes the names from `__all__`
    public = set(importlib.import_module(module).__all__)
    listed = re.findall(r"\.\. auto(?:class|function):: (\w+)", page)
    modules = {name.rpartition(".")[2] for name in PAGES}
    assert sorted(listed) == sorted(public - modules)
