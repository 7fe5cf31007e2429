"""Settings of Sphinx: `sphinx-build -W docs docs/_build`."""

import os
import re
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "backmatch_optax"
author = PROJECT["authors"][0]["name"]
copyright = author
version = release = PROJECT["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # equations also where there is no network
]
exclude_patterns = ["_build", "jupyter_execute"]
nitpicky = True

# --- Pages and notebooks -------------------------------------------------------------

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
# [log](repo:examples/studies/results/transfer.txt) is a file of the repository.
myst_url_schemes = {
    "http": None,
    "https": None,
    "repo": {"url": f"{REPOSITORY}/blob/main/{{{{path}}}}", "title": "{{path}}"},
}
nb_execution_mode = "off"  # the outputs are those that were committed
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# --- Docstrings ----------------------------------------------------------------------

# `layer_scales` in a docstring is a link where it names something, else code.
default_role = "py:obj"
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Trees refer to themselves, which nothing can evaluate.
autodoc_type_aliases = {
    name: name
    for name in (
        "jax.typing.ArrayLike",
        "optax.OptState",
        "optax.Params",
        "optax.Updates",
    )
}
napoleon_use_ivar = True
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    # What Sphinx makes of an alias in a union.
    ("py:class", r"TypeAliasForwardRef|'(jax\.typing|optax)\.\w+'"),
    ("py:class", r"backmatch_optax\.spec\.link\._Known"),  # a type variable
    # Other projects' names, which only a build with a network can look up.
    ("py:.*", r"(builtins|collections|flax|jax|matplotlib|numpy|optax|typing)\..*"),
]

# --- Look ----------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the side bar has the search
}

# --- What other files hold -----------------------------------------------------------

# Sphinx reads nothing outside its folder.
for notebook in sorted((HERE.parent / "examples").glob("*.ipynb")):
    (HERE / "notebooks").mkdir(exist_ok=True)
    shutil.copy(notebook, HERE / "notebooks" / notebook.name)

# Addresses of other projects' names come over the network, which not every build has.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }


def escape(app, what, name, obj, options, lines):
    """Docstrings are written for `help()`; three of their habits trip Sphinx."""
    if what == "property":  # what stands before a colon would be its type
        lines[0] = lines[0].replace(": ", "\N{RATIO} ")
    for index, line in enumerate(lines):
        line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)  # the plural `Array`s
        lines[index] = re.sub(r"(?<![*`\w])\*(?=\w)", r"\\*", line)  # (batch, *window)


def setup(app):
    app.connect("autodoc-process-docstring", escape, priority=400)
