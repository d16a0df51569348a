"""The shape of the package: who may import whom, how long a file may be, and what no file may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gpt2_flax"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    "cpu",
    "nvidia",
    "accelerators",
    "errors",
    "interruption",
    "crash_log",
    "memory",
    "progress",
    "folders",
    "input_files",
    "compilation_cache",
    "config",
    "text",
    "tokenizers",
    "data",
    "parallel",
    "processes",
    "model",
    "formats.registry",
    "checkpoint",
    "report",
    "export",
    "formats",
    "inference",
    "training",
    "plan",
    "doctor",
    "serve",
    "api",
    "cli",
    "__main__",
]
JAX_FREE = [*LAYERS[: LAYERS.index("parallel")], "report", "api", "cli", "__main__"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node


def layer_of(module):
    """The layer of a module named by its dotted path below the package."""
    return module if module == "formats.registry" else module.split(".")[0]


def layer(path):
    return layer_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path.name == "__init__.py":
        return
    for module, _ in imports(path):
        if module.startswith("gpt2_flax."):
            target = layer_of(module.removeprefix("gpt2_flax."))
            assert LAYERS.index(target) <= LAYERS.index(layer(path)), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_formats_are_reached_through_their_registry_only(path):
    if layer(path) == "formats":
        return
    for module, node in imports(path):
        is_format = module.startswith("gpt2_flax.formats") and module != "gpt2_flax.formats.registry"
        assert not is_format, f"{path.name}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_and_transformers_are_imported_inside_functions_only(path):
    for module, node in imports(path):
        if module.split(".")[0] in ("torch", "transformers"):
            assert node.col_offset > 0, f"{path.name}:{node.lineno}"
        if module.split(".")[0] in ("jax", "flax", "optax", "orbax") and layer(path) in JAX_FREE:
            raise AssertionError(f"{path.name}:{node.lineno} imports {module}")


def test_contributing_lists_the_package_in_the_order_of_the_layers():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    names = re.findall(r"^  (\w+)(?:/|\.py) +\S", tree, re.MULTILINE)
    assert names == [name for name in LAYERS[::-1] if "." not in name]
    assert set(names) == {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lengths.values()) <= 350
    assert lengths[PACKAGE / "model" / "gpt2.py"] <= 200
    assert sum(lengths.values()) <= 25_550, "take something away before you add"


@pytest.mark.multiprocess
def test_a_reader_of_the_training_loop_needs_a_third_of_the_package():
    code = "import sys, gpt2_flax.training.loop; print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    files = [file for file in FILES if str(file) in done.stdout.split()]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 7_970


def test_nothing_is_unpickled_or_run_from_a_file():
    unsafe = re.compile(
        r"pickle\.load|weights_only=False|allow_pickle=True|trust_remote_code|yaml\.load\(|\beval\(|\bexec\("
    )
    for path in FILES:
        found = unsafe.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_is_utf8_whatever_the_locale(path):
    """Each call that opens a file names its encoding, or opens bytes."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", None))
        if name not in ("open", "read_text", "write_text", "fdopen", "TemporaryFile", "NamedTemporaryFile"):
            continue
        modes = [word.value for word in call.args if isinstance(word, ast.Constant)]
        is_bytes = any(isinstance(mode, str) and "b" in mode for mode in modes)
        says = any(keyword.arg in ("encoding", None) for keyword in call.keywords)
        is_system = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", None) in ("os", "system")
        assert is_bytes or says or is_system, f"{path.name}:{call.lineno}"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "module",
    [
        "gpt2_flax.cli",
        "gpt2_flax.data.prepare",
        "gpt2_flax.data.batches",
        "gpt2_flax.checkpoint.huggingface",
        "gpt2_flax.report.page",
    ],
)
def test_what_needs_no_jax_does_not_import_it(module):
    code = f"import {module}, sys; sys.exit(bool({{'jax', 'torch', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
