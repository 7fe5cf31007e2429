"""The names people use, how they are called, and what ships with them."""

import ast
import importlib.resources
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec

# Every public callable, with the arguments that may be passed by position.
FUNCTIONS = {
    "backmatch_sgd": ["learning_rate", "spec"],
    "check_spec": ["spec", "params"],
    "compare_scales": ["spec", "params", "fn", "inputs"],
    "describe": ["spec", "params"],
    "infer_spec": ["model", "inputs", "kwargs"],
    "keep_norms": ["inner", "spec"],
    "layer_scales": ["spec", "params"],
    "measure_layer_scales": ["fn", "params", "inputs"],
    "scale_by_backmatch": ["spec"],
    "scale_by_lsalr": [],
    "scale_by_measured_backmatch": [],
    "scale_steps_by_backmatch": ["spec"],
}
MODULES = ["exact", "local_hessian", "plots", "spec"]
RESULTS = [
    "MeasuredLayerScales",
    "ScaleByBackmatchState",
    "ScaleByMeasuredBackmatchState",
    "ScaleComparison",
]
LINKS = {
    "Activation": ["name"],
    "Attention": ["path"],
    "AvgPool": ["window_shape"],
    "BatchNorm": ["path"],
    "Bias": ["path"],
    "Block": ["path"],
    "ClassToken": ["path"],
    "Concatenate": ["branches"],
    "Conv": ["path"],
    "ConvTranspose": ["path"],
    "Dense": ["path"],
    "DenseGeneral": ["path"],
    "DotProductAttention": ["query", "key", "value"],
    "Dropout": ["rate"],
    "Embed": ["path"],
    "Flatten": [],
    "Gate": ["branch", "gate"],
    "GlobalAvgPool": [],
    "GroupNorm": ["path"],
    "Input": ["shape"],
    "LayerChain": ["layers"],
    "LayerNorm": ["path"],
    "LayerScale": ["path"],
    "LogSoftmax": [],
    "MaxPool": ["window_shape"],
    "Memory": ["links", "name"],
    "Outputs": ["branches"],
    "PReLU": ["path"],
    "Queries": ["shape", "path"],
    "RMSNorm": ["path"],
    "Recall": ["shape", "name"],
    "Reshape": ["shape"],
    "Repeat": ["chain", "n"],
    "Residual": ["branch", "shortcut"],
    "Resize": ["shape"],
    "Scale": ["factor"],
    "Shift": ["value"],
    "Slice": ["index"],
    "Softmax": [],
    "Tied": ["links"],
    "Transpose": ["axes"],
    "Unembed": ["path"],
}
CALLABLES: dict[str, Any] = {name: getattr(bmo, name) for name in FUNCTIONS} | {
    f"spec.{name}": getattr(spec, name) for name in LINKS
}
every_callable = pytest.mark.parametrize("public", CALLABLES.values(), ids=CALLABLES)


def parameters(public: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(public).parameters.values())


def docstring(public: Any) -> str:
    return inspect.getdoc(public) or ""


# --- Names ---------------------------------------------------------------------------


def test_package_exports_the_documented_names():
    assert set(bmo.__all__) == {*FUNCTIONS, *RESULTS, *MODULES}


def test_package_shows_nothing_beside_its_exports_but_its_modules():
    shown = {name for name in vars(bmo) if name[0] != "_"}
    modules = {name for name in shown if inspect.ismodule(vars(bmo)[name])}
    assert shown - modules == set(bmo.__all__) - set(MODULES)


def test_spec_exports_the_documented_links_and_their_base():
    assert set(spec.__all__) == {*LINKS, "Link", "Moments", "Positive", "Site"}


# --- Calls ---------------------------------------------------------------------------


@every_callable
def test_all_but_the_leading_arguments_are_keyword_only(public):
    by_position = [
        parameter.name
        for parameter in parameters(public)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert by_position == (FUNCTIONS | LINKS)[public.__name__]


@pytest.mark.parametrize(
    ("link", "flax_layer"),
    [
        (spec.Conv, nn.Conv),
        (spec.ConvTranspose, nn.ConvTranspose),
        (spec.MaxPool, nn.max_pool),
        (spec.AvgPool, nn.avg_pool),
        (spec.GroupNorm, nn.GroupNorm),
    ],
)
def test_options_and_their_defaults_are_flax_own(link, flax_layer):
    flax_defaults = {option.name: option.default for option in parameters(flax_layer)}
    for option in parameters(link):
        if option.kind is inspect.Parameter.KEYWORD_ONLY:
            # Flax also writes a step of 1 as None.
            assert (option.default or 1) == (flax_defaults[option.name] or 1)


# --- Documentation -------------------------------------------------------------------


@every_callable
def test_docstring_shows_an_example(public):
    assert ">>> " in docstring(public)


@pytest.mark.parametrize("name", RESULTS)
def test_docstring_of_a_result_is_written(name):
    # Python gives a NamedTuple one that repeats its fields.
    assert not docstring(getattr(bmo, name)).startswith(f"{name}(")


@every_callable
def test_docstring_explains_every_argument(public):
    for parameter in parameters(public):
        assert re.search(rf"Args:\n(.*\n)*  \*?{parameter.name}: ", docstring(public))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "check_spec"])
def test_docstring_tells_what_a_function_returns(name):
    assert "\nReturns:\n  " in docstring(getattr(bmo, name))


@pytest.mark.parametrize(
    "name", [name for name in CALLABLES if parameters(CALLABLES[name])]
)
def test_docstring_tells_what_is_refused(name):
    # Whatever takes arguments checks them.
    assert "\nRaises:\n  ValueError: " in docstring(CALLABLES[name])


# --- The package ---------------------------------------------------------------------


SOURCES = sorted(Path(bmo.__file__).parent.glob("**/*.py"))


def imported_modules(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_private_modules_of_dependencies_are_not_imported(source):
    for module in imported_modules(ast.walk(ast.parse(source.read_text()))):
        package, *inner = module.split(".")
        if package != "backmatch_optax":
            assert not any(name.startswith("_") for name in inner), module


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_only_dependencies_are_imported_at_the_top(source):
    # Flax may be imported where a function is given one of its models.
    required = {"backmatch_optax", "jax", "numpy", "optax"}
    if source.parent.name == "exact" and source.stem in ("linen", "nnx"):
        required |= {"flax"}  # Flax layers, imported by those who have Flax
    for module in imported_modules(ast.parse(source.read_text()).body):
        assert module.split(".")[0] in required | sys.stdlib_module_names


def test_import_loads_nothing_that_is_optional():
    code = (
        "import sys, backmatch_optax; "
        "print({'flax', 'chex', 'matfree', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"


def test_type_annotations_ship():
    assert importlib.resources.files(bmo).joinpath("py.typed").is_file()
