"""The public names: frozen, documented, light to import, and with the defaults of the command line."""

import inspect
import os
import runpy
import subprocess
import sys
import types
import typing
from functools import cached_property
from pathlib import Path

import annotated_types
import jax
import pytest
import typer

import gpt2_flax
from gpt2_flax.cli import app
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes.launch import start_processes
from gpt2_flax.processes.place import Place

ROOT = Path(__file__).parents[2]
NAMES = {
    "Dataset": ["batch", "decode", "documents", "vocab_size"],
    "ExitCode": [],
    "Model": [
        *["config", "decode", "encode", "evaluate", "export", "generate", "logits", "metrics", "origin", "score"],
        *["step", "tokenizer"],
    ],
    "Run": ["config", "export", "load", "records", "steps"],
    "UserError": [],
    "load": None,
    "prepare": None,
    "train": None,
    "train_tokenizer": None,
}
COMMANDS = {
    "tokenizer": gpt2_flax.train_tokenizer,
    "prepare": gpt2_flax.prepare,
    "train": gpt2_flax.train,
    "generate": gpt2_flax.Model.generate,
    "evaluate": gpt2_flax.Model.evaluate,
    "export": gpt2_flax.Model.export,
}
ONLY_IN_THE_SHELL = {"model", "step", "best", "average", "revision", "prompt_file", "json"}  # `load` has the first five
ONLY_IN_PYTHON = {"self", "on_step"}


def literals(hint):
    """Return the values that a type allows, of all its parts."""
    if typing.get_origin(hint) is typing.Literal:
        return {*typing.get_args(hint)}
    return set().union(*map(literals, typing.get_args(hint)))


def python(code, **environment):
    """Run code in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_frozen():
    kinds = property | cached_property | types.FunctionType
    found = {}
    for name in gpt2_flax.__all__:
        value = getattr(gpt2_flax, name)
        members = [one for one, of in vars(value).items() if not one.startswith("_") and isinstance(of, kinds)]
        found[name] = sorted(members) if inspect.isclass(value) else None
    assert found == NAMES
    assert {*gpt2_flax.__all__, "__version__"} <= {*dir(gpt2_flax)}
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        gpt2_flax.lode  # noqa: B018


@pytest.mark.multiprocess
def test_the_import_takes_less_than_a_tenth_of_a_second_and_names_do_not_import_jax():
    code = (
        "import sys, time; before = time.process_time(); import gpt2_flax; print(time.process_time() - before);"
        "print(*[name for name in sys.modules if name.startswith('gpt2_flax')]);"
        "gpt2_flax.load, gpt2_flax.Model, gpt2_flax.train, gpt2_flax.Dataset; print('jax' in sys.modules)"
    )
    seconds, modules, with_jax = python(code).splitlines()
    assert float(seconds) < 0.1
    assert (modules, with_jax) == ("gpt2_flax", "False")


def test_the_document_is_made_from_the_docstrings():
    page = runpy.run_path(str(ROOT / "scripts/python_api.py"))["page"]()
    assert page == (ROOT / "docs/python-api.md").read_text(encoding="utf-8"), "run scripts/python_api.py"
    for name, members in NAMES.items():
        assert f"\n## {name}\n" in page
        assert all(f"\n### {name}.{member}\n" in page for member in members or ())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_is_documented(command):
    described = inspect.getdoc(COMMANDS[command]).partition("Args:")[2].partition("Returns:")[0].partition("Raises:")[0]
    entries = [line[4:].partition(":")[0] for line in described.splitlines() if line[4:5].strip()]
    documented = [name for entry in entries for name in entry.split(", ")]
    assert documented == [name for name in inspect.signature(COMMANDS[command]).parameters if name != "self"]


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_have_the_names_defaults_and_bounds_of_the_command_line(command):
    options = {option.name: option for option in typer.main.get_command(app).commands[command].params}
    arguments = inspect.signature(COMMANDS[command]).parameters
    callback = inspect.unwrap(typer.main.get_command(app).commands[command].callback)
    hints = typing.get_type_hints(callback, include_extras=True)
    assert options.keys() - arguments.keys() - ONLY_IN_THE_SHELL == set()
    assert arguments.keys() - options.keys() - ONLY_IN_PYTHON == set()
    for name in options.keys() & arguments.keys():
        option, argument = options[name], arguments[name]
        if argument.default not in (argument.empty, ()) and name != "stream":  # by default a terminal decides
            assert option.default == argument.default, name
        parts = [argument.annotation, *typing.get_args(argument.annotation)]
        facts = [fact for part in parts for fact in getattr(part, "__metadata__", ())]
        facts = [one for fact in facts for one in getattr(fact, "metadata", [fact])]
        bounds = {type(fact): fact for fact in facts if isinstance(fact, annotated_types.Ge | annotated_types.Le)}
        hint = hints[name]
        (shown,) = hint.__metadata__[:1]
        low, high = bounds.get(annotated_types.Ge), bounds.get(annotated_types.Le)
        assert shown.min in (None, low and low.ge), name
        assert shown.max in (None, high and high.le, 2**32 - 1), name  # seeds are below 2**32
        assert literals(argument.annotation) == literals(hint), name


@pytest.mark.multiprocess
def test_workers_do_not_run_the_script_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('the script')\n"
        "from gpt2_flax.data.workers import run\n"
        "print(len(list(run('local', print, [(0, 'one'), (1, 'two')], 2, lambda *amounts: None))))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the script") == 1
    assert done.stdout.splitlines()[-1] == "2"


@pytest.mark.multiprocess
def test_programs_are_kept_even_if_jax_was_used_before(tmp_path):
    code = (
        "import os, jax, jax.numpy as jnp; jax.jit(lambda x: x + 1)(jnp.ones(3));"
        "from gpt2_flax.api.set_up import set_up_jax; set_up_jax(); jax.jit(lambda x: x * 3)(jnp.ones(3));"
        "print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    seconds = {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], env=kept | seconds, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert [path for path in Path(done.stdout.strip()).iterdir() if "cache" in path.name]


def test_load_and_train_set_up_a_process_as_the_command_line_does(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("gpt2_flax.api.set_up.tune_cpu", lambda: pytest.fail("tuned"))
    for call in (
        lambda: gpt2_flax.load(tmp_path),
        lambda: gpt2_flax.train(
            None, {"data.dataset": "d", "output": str(tmp_path / "run"), "training.total_steps": 1}
        ),
    ):
        with pytest.raises(pytest.fail.Exception, match="tuned"):
            call()


def test_a_process_joins_only_one_run_of_several_processes(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="has joined a run of several processes already") as error:
        start_processes(Place("127.0.0.1:1234", 2, 0))
    assert error.value.exit_code == ExitCode.USAGE
