"""Processes of one run must be alike in all that counts, and see one run folder."""

import json
import shutil
import socket
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from support.configs import changed
from support.two_processes import ended, start

from gpt2_flax.checkpoint import run_folder
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config.parse import config_keys
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.processes.peers import first_difference
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.training.agreement import agree_on_weights, config_facts

# What is compared


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xy")), min_size=2, max_size=5))
def test_the_first_difference_is_named(facts):
    differing = [name for name in "abcd" if len({values.get(name) for values in facts}) > 1]
    found = first_difference(facts)
    assert (found is None) == (not differing)
    if found:
        name, number = found
        assert name in differing
        assert facts[number].get(name) != facts[0].get(name)
        assert all(values.get(name) == facts[0].get(name) for values in facts[:number])
        known = list(dict.fromkeys(name for values in facts for name in values))
        assert all(known.index(name) <= known.index(other) for other in differing)


def with_value(config, key, value):
    """Returns `config` with any value of a key, also one that it would refuse."""
    *section, name = key.split(".")
    if section:
        name, value = section[0], getattr(config, section[0]).model_copy(update={name: value})
    return config.model_copy(update={name: value})


@pytest.mark.parametrize("key", [key for key in config_keys() if key != "data.dataset"])
@pytest.mark.parametrize("values", [(1, 1.0), (None, "None"), ("x" * 200, "x" * 199 + "y")])
def test_each_key_of_the_config_is_compared(config, key, values):
    mixture = Mixture(config.data.datasets)
    one, other = (config_facts(with_value(config, key, value), mixture, "stages.2.") for value in values)
    assert first_difference([one, dict(one)]) is None
    assert first_difference([one, one, other]) == (f"stages.2.{key}", 2)
    assert all(len(value) < 130 for value in one.values())


def test_datasets_are_compared_by_what_they_hold(config, corpus, tokenizer_folder, tmp_path):
    copy = shutil.copytree(config.data.dataset, tmp_path / "copy")
    other = tmp_path / "other"
    prepare([str(corpus)], load_tokenizer(tokenizer_folder), other, validation_fraction=0.2)

    def facts(dataset):
        changed_config = changed(config, data__dataset=dataset)
        return config_facts(changed_config, Mixture(changed_config.data.datasets))

    one = str(config.data.dataset)
    assert facts(one) == facts(str(copy)) == facts({str(copy): 3})
    assert first_difference([facts(one), facts(str(other))]) == ("data.dataset (training tokens)", 1)
    both = facts({one: 1, str(other): 2})
    assert both == facts({str(copy): 2, str(other): 4})
    for differing in ({one: 1, str(other): 3}, {str(other): 2, one: 1}, {one: 1, str(other): 1, str(copy): 1}):
        assert first_difference([both, facts(differing)]) == ("data.dataset (training tokens)", 1)


@pytest.mark.parametrize("beside", [{}, {"second": 2}])
@pytest.mark.parametrize("part", ["tokenizer", "validation tokens"])
def test_tokenizers_and_validation_tokens_are_compared_too(config, tmp_path, part, beside):
    facts = []
    for name in ("one", "other"):
        weights = {str(tmp_path / name / place): weight for place, weight in {"first": 1, **beside}.items()}
        for folder in weights:
            shutil.copytree(config.data.dataset, folder)
            if name == "one":
                continue
            path = Path(folder) / "dataset.json"
            info = json.loads(path.read_text(encoding="utf-8"))
            if part == "tokenizer":
                info["tokenizer_fingerprint"] = "another"
            else:
                info["shards"]["validation"][-1]["tokens_sha256"] = "0" * 64
            path.write_text(json.dumps(info | {"sha256": None}), encoding="utf-8")
        facts.append(config_facts(config, Mixture(weights)))
    assert first_difference(facts) == (f"data.dataset ({part})", 1)


def test_weights_are_compared_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    facts = []

    def compare(**weights):
        agree_on_weights(weights, SimpleNamespace(agree=facts.append))

    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    compare(a=kernel, b=kernel)
    compare(b=kernel.copy(), a=np.asfortranarray(kernel))
    assert facts[0] == facts[1]
    one_bit = kernel.copy()
    one_bit[1, 2] = np.nextafter(one_bit[1, 2], np.float32(9))
    for others in ({"b": one_bit}, {}, {"b": kernel.T}, {"c": kernel}):
        compare(a=kernel, **others)
        assert facts[-1] != facts[0]


# One run folder


def test_a_folder_that_is_shared_shows_what_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SIGHT", 10.0)
    run = RunFolder(tmp_path / "run")
    seen = []
    other = threading.Thread(target=lambda: seen.append(run.check_shows("of this start")))
    other.start()  # it does not exist yet for this host
    run.create()
    run.token.write_text("of an earlier start, which was killed")
    (run.path / "lock").touch()
    run.create()  # nothing foreign
    time.sleep(0.5)
    assert other.is_alive()
    with run.showing("of this start"):
        other.join(5)
        assert seen == [None]
        with pytest.raises(UserError, match="another process trains in this folder") as error, run.showing("later"):
            pass
        assert error.value.exit_code == ExitCode.CANT_CREATE
        run.check_shows("of this start")
    assert [path.name for path in run.path.iterdir()] == ["lock"]


@pytest.mark.parametrize("there", ["nothing", "a folder", "another start", "a folder of that name"])
def test_a_folder_that_is_not_shared(tmp_path, monkeypatch, there):
    monkeypatch.setattr(run_folder, "SIGHT", 0.3)
    run = RunFolder(tmp_path / "run")
    if there != "nothing":
        run.create()
    if there == "another start":
        run.token.write_text("of an earlier start")
    if there == "a folder of that name":
        run.token.mkdir()
    with pytest.raises(UserError) as error:
        run.check_shows("of this start")
    assert error.value.exit_code == ExitCode.CONFIG
    host = socket.gethostname()
    assert error.value.what == f"run folder is not shared: host {host} does not see what process 0 writes there"
    assert error.value.where == str(run.path)
    assert "storage that all hosts share" in error.value.fix


# Two real processes

QUICK = "import gpt2_flax.checkpoint.run_folder as folder; folder.SIGHT = 1.0"
OTHER_VERSION = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda package: "9.9.9" if package == "optax" else version(package)
"""
OTHER_WEIGHTS = """
import gpt2_flax.checkpoint.source as source_module
load = source_module.load_source
def load_source(*arguments):
    source = load(*arguments)
    source.weights["ln_f/scale"] = source.weights["ln_f/scale"] + 1
    return source
source_module.load_source = load_source
"""
EARLIER_STEP = """
from gpt2_flax.checkpoint.store import CheckpointStore
steps = CheckpointStore.steps
CheckpointStore.steps = lambda self: steps(self)[:-1]
"""


def refusals(processes):
    """Waits for both, which end with CONFIG, and returns the sentence of each; JAX may log before and after it."""
    codes, _, errors = ended(processes)
    assert codes == [ExitCode.CONFIG] * 2, errors
    assert not any("Traceback" in error for error in errors)
    (one,), (other,) = ([line for line in error.splitlines() if line.startswith("error: ")] for error in errors)
    return one, other


def refused(processes):
    """Waits for both, and returns the sentence that both have ended with."""
    one, other = refusals(processes)
    assert one == other
    return one


def differ(processes, name, *values):
    """Returns the expected sentence, with both processes and both values."""
    host = socket.gethostname()
    pairs = zip(processes, values, strict=True)
    has = ", ".join(f"process {i} (host {host}, pid {p.pid}) has {value}" for i, (p, value) in enumerate(pairs))
    fix = "start all with the same config, data, versions and devices"
    return f"error: processes of the run differ in {name}: {has}; {fix}"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("optimizer.learning_rate=0.02", ("0.01", "0.02")),
        ("training.seed=1", ("0", "1")),
        ("model.layers=scanned", ("'auto'", "'scanned'")),
    ],
)
def test_processes_of_different_configs_end(config, tmp_path, override, values):
    processes = start(config, tmp_path, of_1=[override])
    assert refused(processes) == differ(processes, override.split("=")[0], *values)
    assert not RunFolder(config.output).path.exists()


@pytest.mark.multiprocess
def test_processes_of_different_datasets_end(config, tmp_path, corpus, tokenizer_folder):
    other = tmp_path / "other"
    prepare([str(corpus)], load_tokenizer(tokenizer_folder), other, validation_fraction=0.2)
    sums = [Mixture({str(folder): 1}).fingerprints() for folder in (config.data.dataset, other)]
    values = [f"sha256 {found['tokens_fingerprint'][:16]}" for found in sums]
    processes = start(config, tmp_path, of_1=[f"data.dataset={other}"])
    assert refused(processes) == differ(processes, "data.dataset (training tokens)", *values)


@pytest.mark.multiprocess
def test_processes_with_other_devices_end(config, tmp_path):
    processes = start(config, tmp_path, devices_of_1=2)
    assert refused(processes) == differ(processes, "the number of local devices", 1, 2)


@pytest.mark.multiprocess
def test_processes_of_different_versions_end(config, tmp_path):
    processes = start(config, tmp_path, before=("", OTHER_VERSION))
    assert refused(processes) == differ(processes, "the version of optax", version("optax"), "9.9.9")


@pytest.mark.multiprocess
def test_a_run_folder_of_each_host_ends_all(config, tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
    processes = start(changed(config, output="run"), tmp_path, before=(QUICK, QUICK), folders=folders)
    of_0, of_1 = refusals(processes)
    host, place = socket.gethostname(), folders[1] / "run"
    own = (
        f"run folder is not shared: host {host} does not see what process 0 writes there: {place}; "
        "choose an output on storage that all hosts share"
    )
    assert of_1 == f"error: {own}"
    by = f"process 1 (host {host}, pid {processes[1].pid}) of the run has failed"
    assert of_0 == f"error: {by}: gpt2-flax train; it says: {own}"
    assert not (folders[0] / "run").exists()
    assert not place.exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_would_start_from_different_weights_or_steps_end(config, tmp_path):
    mixture, run = Mixture(config.data.datasets), RunFolder(config.output)
    config = changed(config, model__vocab_size=mixture.vocab_size)
    with CheckpointStore(run.checkpoints, keep=2) as store:
        for step in (3, 6):
            store.save(step, GPT2(config.model, rngs=nnx.Rngs(0)), None, {"model": config.model.model_dump()})
    run.write_config(config, mixture.tokenizer_folder)
    again = changed(config, output=str(tmp_path / "second"), init_from=str(run.checkpoints / "3"))
    found = refused(start(again, tmp_path, before=("", OTHER_WEIGHTS)))
    assert "processes of the run differ in the weights of init_from (sha256): process 0 (" in found
    assert not RunFolder(again.output).path.exists()

    processes = start(config, tmp_path, before=("", EARLIER_STEP))
    assert refused(processes) == differ(processes, f"the checkpoints in {run.checkpoints}", "3 6", 3)
