"""The project's files: what they say of it, of each other, and of its address."""

import ast
import graphlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import backmatch_optax as bmo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
DOCUMENTATION = PROJECT["urls"]["Documentation"]
OWNER_AND_NAME = REPOSITORY.removeprefix("https://github.com/")
README = (ROOT / "README.md").read_text()


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return sorted(path for path in paths if path.exists())


@pytest.mark.parametrize("path", tracked("*.ipynb"), ids=lambda path: path.stem)
def test_notebooks_were_run_from_top_to_bottom(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}


def test_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert bmo.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    date = re.search(r"date-released: (\S+)", citation)
    assert f"\nversion: {version}\n" in citation
    assert date is not None
    assert f"\n## {version} ({date[1]})\n" in (ROOT / "CHANGELOG.md").read_text()


# --- The address ---------------------------------------------------------------------

# Where a file of the repository is shown, as a page, as it is, or as a notebook.
ADDRESSES = (
    f"https://github.com/{OWNER_AND_NAME}",
    f"https://raw.githubusercontent.com/{OWNER_AND_NAME}",
    f"https://colab.research.google.com/github/{OWNER_AND_NAME}",
    DOCUMENTATION,
)
OURS = re.compile(
    r"https://(?:[\w.-]+/)*[\w.-]*backmatch[-_]?optax[\w./-]*", re.IGNORECASE
)
TEXTS = tracked("*.md", "*.py", "*.ipynb", "*.toml", "*.cff", "*.yml", "*.yaml")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_mention_of_the_address_is_that_of_pyproject(path):
    for address in OURS.findall(path.read_text()):
        assert address.startswith(ADDRESSES), address


def files_linked(text: str) -> list[str]:
    """Files of the repository that a text links to by an absolute address."""
    starts = "|".join(
        re.escape(start)
        for start in (
            f"{ADDRESSES[0]}/blob/main/",
            f"{ADDRESSES[1]}/main/",
            f"{ADDRESSES[2]}/blob/main/",
        )
    )
    return re.findall(rf"(?:{starts}|\]\(repo:)([\w./-]+)", text)


def pages_linked(text: str) -> list[str]:
    """Pages of the documentation that a text links to."""
    return re.findall(rf"{re.escape(DOCUMENTATION)}/en/latest/([\w/]+)\.html", text)


def relative_links(path: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    return [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]


def test_links_are_found():
    assert len(pages_linked(README)) >= 8
    assert len(files_linked(README)) >= 2
    assert relative_links(ROOT / "examples" / "README.md")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_linked_is_there(path):
    text = path.read_text()
    for name in files_linked(text):
        assert (ROOT / name).exists(), name
    for page in pages_linked(text):
        assert (ROOT / "docs" / f"{page}.md").exists(), page
    # Sphinx checks the links of its pages.
    if path.suffix == ".md" and not path.is_relative_to(ROOT / "docs"):
        for link in relative_links(path):
            assert (path.parent / link).exists(), link


# --- The README ----------------------------------------------------------------------


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1000


def test_readme_shows_on_a_package_index():
    # There a relative address leads nowhere.
    assert not relative_links(ROOT / "README.md")
    assert README.count("![") == 1


def setup_commands() -> list[str]:
    blocks = re.findall(r"<!-- ci: setup -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_readme_has_two_set_up_commands_that_ci_finds():
    assert len(setup_commands()) == 2
    found = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == setup_commands()


# --- The code -------------------------------------------------------------------------

PACKAGE = ROOT / "backmatch_optax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_by(module: str) -> set[str]:
    """The modules of the package that one names, those for type checking included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = []
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner in MODULES or f"{inner}.__init__" in MODULES
                names.append(inner if is_module else node.module)
        else:
            continue
        for name in names:
            found |= {name, f"{name}.__init__"} & MODULES.keys()
    return found


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imported_by(module) for module in MODULES}
    assert graph["backmatch_optax.scales"] >= {"backmatch_optax.recursion"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


EQUATIONS = {"BM": range(1, 38), "LH": range(1, 25)}


@pytest.mark.parametrize("paper", EQUATIONS)
def test_every_equation_of_the_papers_is_found_by_its_number(paper):
    one = r"\((\d+)\)"
    listed = rf"{paper} ((?:{one}(?:, | and | to )?)+)"
    found = set()
    for path in MODULES.values():
        text = re.sub(r"\s+#?\s*", " ", path.read_text())
        for match in re.finditer(listed, text):
            found |= set(map(int, re.findall(one, match[1])))
            for first, last in re.findall(rf"{one} to {one}", match[1]):
                found |= set(range(int(first), int(last) + 1))
    assert sorted(set(EQUATIONS[paper]) - found) == []
