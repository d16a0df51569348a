"""docs/reliability.md and scripts/mutants.py name tests that exist, and code that is there."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def load_mutants():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module.MUTANTS


MUTANTS = load_mutants()


def exists(test):
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assigned = {target.id for target in targets if isinstance(target, ast.Name)}
    return name in functions | assigned


def test_every_fault_has_a_test_that_exists():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 30
    for row in rows:
        tests = re.findall(r"`((?:\w+/)?test_\w+\.py::\w+)`", row.split(" | ")[-1])
        assert tests, row
        for test in tests:
            assert exists(test), test


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_is_there_and_so_is_its_test(mutant):
    source = (ROOT / "gpt2_flax" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert exists(mutant.test)


def test_there_are_a_dozen_mutants():
    assert len({mutant.name for mutant in MUTANTS}) >= 12
