"""Out of memory: one sentence with the requested and the available memory and a fix, and exit code 71."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import changed

from gpt2_flax import __main__ as cli
from gpt2_flax import memory
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.memory import out_of_memory
from gpt2_flax.processes.watchdog import exit_code_of
from gpt2_flax.training import loop

ROOT = Path(__file__).parents[1]
GIB = 2**30


def raised(function):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        function()
    return error.value


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (raised(lambda: jnp.zeros(2**44, jnp.uint8)), "out of memory (16 TiB asked, this machine has 3 GiB)"),
        (raised(lambda: np.zeros(2**46)), "out of memory (512 TiB asked, this machine has 3 GiB)"),
        (raised(lambda: bytearray(2**60)), "out of memory (this machine has 3 GiB)"),
        (RuntimeError("std::bad_alloc"), "out of memory (this machine has 3 GiB)"),
        (OSError(12, "Cannot allocate memory"), "out of memory (this machine has 3 GiB)"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.\nBuffer"),
            "out of memory (4 GiB asked, this machine has 3 GiB)",
        ),
        (
            RuntimeError(
                "RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0"
            ),
            "out of memory (2.99 GiB asked, this machine has 3 GiB)",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.97G of 15.48G hbm."),
            "out of memory (22 GiB asked, a device has 15.5 GiB)",
        ),
        (
            RuntimeError(
                "RESOURCE_EXHAUSTED: Attempting to allocate 180.50M. That was not possible. There are 1M free"
            ),
            "out of memory (180 MiB asked, this machine has 3 GiB)",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1048576 bytes. Error code 12"
            ),
            "out of memory (1 MiB asked, this machine has 3 GiB)",
        ),
    ],
    ids=range(10),
)
def test_what_was_asked_and_what_there_is(monkeypatch, error, what):
    monkeypatch.setattr(memory, "host_bytes", lambda: 3 * GIB)
    failure = out_of_memory(error, "here", "less")
    assert (failure.exit_code, failure.what, str(failure)) == (71, what, f"{what}: here; less")
    assert exit_code_of(error) == 71  # the code that the processes of a run exchange


def test_the_memory_of_an_accelerator_is_its_own(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 60 * GIB})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.")
    assert out_of_memory(error, "", "").what == "out of memory (4 GiB asked, a device has 60 GiB)"
    assert "this machine" in out_of_memory(MemoryError(), "", "").what  # of the host, also with devices


@pytest.mark.parametrize(
    "error", [ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"), RuntimeError("else")]
)
def test_other_errors_are_none_of_memory(error):
    assert out_of_memory(error, "", "") is None
    assert exit_code_of(error) == ExitCode.BUG


def test_the_memory_of_the_machine_is_at_most_what_the_system_has():
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < memory.host_bytes() <= int(total.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "model.remat=full, training.accumulation_steps=2, mesh.fsdp=8, data.global_batch_size below 32"),
        ({"model__remat": "full", "mesh__fsdp": 8}, "training.accumulation_steps=2, data.global_batch_size below 32"),
        (
            {"mesh__fsdp": 2, "mesh__tensor": 2, "training__accumulation_steps": 8},
            "model.remat=full, mesh.fsdp=4, data.global_batch_size below 32",
        ),
    ],
)
@pytest.mark.parametrize("where", ["make_train_step", "start_or_resume"])
def test_training_names_the_cheapest_changes_first(config, monkeypatch, changes, named, where):
    def greedy(*arguments):
        jax.block_until_ready(jnp.zeros(2**44, jnp.uint8))

    monkeypatch.setattr(loop, where, greedy)
    with pytest.raises(UserError, match="16 TiB asked, this machine has ") as error:
        loop.train(changed(config, data__global_batch_size=32, **changes))
    assert error.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert error.value.where == config.output
    assert error.value.fix.endswith(f": {named}")


def greedy_program(arguments, body):
    """Return the exit code and stderr of the program when one of its functions allocates too much."""
    code = (
        "import gpt2_flax.__main__ as program; run = program.exit_code\n"
        f"def prepared(arguments):\n    {body}\n    return run(arguments)\n"
        "program.exit_code = prepared; program.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "function", "fix"),
    [
        ("tokenizer {corpus} --output {new}", "gpt2_flax.tokenizers.train.sample_documents", "lower --vocab-size"),
        ("evaluate {corpus}", "gpt2_flax.checkpoint.source.load_source", "lower --batch-size or --seq-length"),
        ("generate {corpus} --prompt x", "gpt2_flax.checkpoint.source.load_source", "lower --max-new-tokens"),
        ("export {corpus} {new}", "gpt2_flax.checkpoint.source.load_source", "use a machine with more memory"),
    ],
)
def test_every_command_ends_with_71_and_one_line(capsys, monkeypatch, corpus, tmp_path, command, function, fix):
    monkeypatch.setattr(function, lambda *arguments, **options: np.zeros(2**46))
    monkeypatch.setattr(memory, "host_bytes", lambda: 3 * GIB)
    arguments = command.format(corpus=corpus, new=tmp_path / "new").split()
    assert cli.exit_code(arguments) == 71
    expected = f"error: out of memory (512 TiB asked, this machine has 3 GiB): gpt2-flax {arguments[0]}; {fix}\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_a_worker_of_prepare_says_it_through_its_parent(corpus, tokenizer_folder, tmp_path):
    (tmp_path / "greedy.py").write_text(
        "import numpy as np\n"
        "class Unit:\n"
        "    name, size, files = 'a unit', 1, ()\n"
        "    def batches(self, report):\n"
        "        yield np.zeros(2**46)\n",
        encoding="utf-8",
    )
    body = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import greedy; import gpt2_flax.data.prepare as p; "
        "p.corpus_units = lambda *options: [greedy.Unit(), greedy.Unit()]"
    )
    arguments = ["prepare", corpus, "--tokenizer", tokenizer_folder, "--output", tmp_path / "new", "--workers", "2"]
    code, err = greedy_program(arguments, body)
    assert (code, err.count("\n")) == (71, 1), err
    assert err.startswith("error: out of memory (512 TiB asked, this machine has ")
    assert err.endswith("): gpt2-flax prepare; lower --workers\n")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_real_limit_is_met_and_named(dataset_folder, config, tmp_path):
    """Return a config with more activations than the process may allocate."""
    from gpt2_flax.config.parse import dump_config

    path = tmp_path / "config.toml"
    path.write_text(dump_config(changed(config, data__global_batch_size=2**18)), encoding="utf-8")
    body = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))"
    code, err = greedy_program(["train", path], body)
    assert (code, err.count("\n")) == (71, 1), err
    assert err.startswith("error: out of memory (")
    assert "this machine has 6 GiB): " in err
    assert "model.remat=full, training.accumulation_steps=2, data.global_batch_size below 262144" in err
