"""The shape of the tests: a helper of several test modules is in tests/support, a fixture in a conftest.py."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
IMPORT = re.compile(r"\b(?:from|import) (?:\w+\.)*test_\w+")  # also in code that a test gives to another process


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module(path):
    found = IMPORT.search(path.read_text(encoding="utf-8"))
    assert found is None, f"{path.name}: {found}"
