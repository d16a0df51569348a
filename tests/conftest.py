"""Eight simulated CPU devices, quick compilation, and one small corpus, tokenizer and dataset for all tests."""

import collections
import gc
import logging
import os
import random
import tempfile
import warnings
from pathlib import Path

from gpt2_flax.compilation_cache import keep_compiled_programs

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # The first as in training; the second halves the time to compile, and so does what XLA made before.
    " --xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true,xla_cpu_disable_new_fusion_emitters=true"
)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compile time is most of what tests wait for
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Else a part of torch's first tanh may come out 1e-4 off: https://github.com/pytorch/pytorch/issues/188792
os.environ["MKL_CBWR"] = "AVX2"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Many tests compile the same programs; of a run of the tests alone, for all its processes.
    _compiled = tempfile.TemporaryDirectory(prefix="gpt2_flax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    keep_compiled_programs()  # all settings: JAX mixes up a folder that only some of its processes keep below a size

import hypothesis
import jax
import pytest
from support.configs import CHARACTERS

# A machine may be busy; and what a gate tries must not depend on chance.
hypothesis.settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that all processes of `pytest -n` end at about the same time."""
    seconds = collections.Counter()
    for item in items:
        slow, multiprocess = item.get_closest_marker("slow"), item.get_closest_marker("multiprocess")
        seconds[item.path] += slow.args[0] if slow and slow.args else 3 if slow or multiprocess else 0.1
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish():
    """Keep the garbage collector from what was imported: it took a fifteenth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text file of 400 documents of 1 to 60 characters, with a pattern that a model can learn."""
    draw = random.Random(0)
    lines = []
    for _ in range(400):
        start, length = draw.randrange(len(CHARACTERS)), draw.randint(1, 60)
        lines.append("".join(CHARACTERS[(start + i) % len(CHARACTERS)] for i in range(length)))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path):
    """A function that writes bytes to a file of the test and returns its path."""

    def write(content: bytes, name: str = "a.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory):
    from gpt2_flax.tokenizers.train import train_wordpiece

    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(corpus.read_text(encoding="utf-8").splitlines(), vocab_size=100).save(folder)
    return folder


@pytest.fixture(scope="session")
def dataset_folder(corpus, tokenizer_folder, tmp_path_factory):
    from gpt2_flax.data.prepare import prepare
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("dataset") / "dataset"
    prepare([str(corpus)], load_tokenizer(tokenizer_folder), folder, validation_fraction=0.1)
    return folder


@pytest.fixture
def config(dataset_folder, tmp_path):
    """A run of a tiny model on the small corpus, in float32 and with AdamW."""
    from gpt2_flax.config.parse import parse_config

    values = {
        "output": str(tmp_path / "run"),
        "model": {"n_positions": 32, "n_layer": 2, "n_head": 8, "n_embd": 32, "dtype": "float32"},
        "data": {"dataset": str(dataset_folder), "seq_length": 16, "global_batch_size": 16},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2},  # compiles in half of Muon's time
        "training": {"total_steps": 6, "log_every": 1, "save_every": 3, "evaluate_every": 3, "evaluation_batches": 1},
    }
    return parse_config(values, "conftest.py")


@pytest.fixture
def silence(caplog):
    """Fails the test when transformers warns, in either way it has."""
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    transformers.utils.logging.enable_propagation()
    logging.Logger.warning_once.cache_clear()  # what an earlier test was told, too
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    transformers.utils.logging.disable_propagation()
    # Of the call: by now `caplog.records` has begun anew.
    assert [one.message for one in caplog.get_records("call") if one.name.startswith("transformers")] == []


@pytest.fixture
def interpreted(monkeypatch):
    """Interprets the Pallas kernels of attention, so that they run on a CPU."""

    from gpt2_flax.model import attention

    monkeypatch.setattr(attention, "INTERPRET", True)
    jax.clear_caches()
    yield
    jax.clear_caches()
