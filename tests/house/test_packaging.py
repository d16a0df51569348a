"""The packaging metadata: what the package imports is declared, and what an installation needs is packed."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import gpt2_flax

ROOT = Path(__file__).parents[2]
SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
FILES = sorted((ROOT / "gpt2_flax").rglob("*.py"))


def normalized(name):
    """Return the name of a distribution in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {normalized(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


REQUIRED = names(SETUP["options"]["install_requires"].split("\n")[1:])
INSTALLED = packages_distributions()
OPTIONAL = {extra: names(lines.split("\n")[1:]) for extra, lines in SETUP["options.extras_require"].items()}


def imported(path):
    """Yield the top-level name of each module from elsewhere that `path` imports, and the import statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_imported_distribution_is_declared(path):
    """An import at the top of a module needs a requirement, except in `serve`; an import in a function, an extra."""
    for module, node in imported(path):
        if module in sys.stdlib_module_names or module in ("gpt2_flax", "compression"):  # Python 3.14 has compression
            continue
        declared = set(REQUIRED)
        if path.parent.name == "serve":
            declared |= OPTIONAL["serve"]
        elif node.col_offset > 0:
            declared = declared.union(*OPTIONAL.values())
        distributions = {normalized(name) for name in INSTALLED.get(module, [module])}
        assert distributions & declared, f"{path.name}:{node.lineno} imports {module}: declare one of {distributions}"


def test_the_supported_pythons_are_those_that_the_scripts_accept():
    assert SETUP["options"]["python_requires"] == ">=3.11,<3.14"
    versions = [
        line.rpartition(" ")[2] for line in SETUP["metadata"]["classifiers"].split("\n") if "Python :: 3" in line
    ]
    assert versions == ["3.11", "3.12", "3.13"]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "scripts/environment.sh").read_text()


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "gpt2_flax" / "py.typed").is_file()


def test_the_changelog_and_the_citation_have_the_version_of_the_package():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.M)[1] == gpt2_flax.__version__
    assert f"\nversion: {gpt2_flax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
