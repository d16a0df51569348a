"""A corpus is prepared on a Ray cluster, here of two workers on this machine."""

import functools
import os
import random
import sys

import pytest
from support.fake_units import Unit, die
from support.folders import files_of

from gpt2_flax.data import prepare as module
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.corpus import CorpusOptions
from gpt2_flax.tokenizers.train import train_wordpiece

ray = pytest.importorskip("ray")

DRAW = random.Random(0)
DOCUMENTS = ["".join(DRAW.choices("天地玄黄宇宙洪荒 abc", k=DRAW.randint(2, 40))) for _ in range(300)]


@pytest.fixture(scope="module")
def cluster():
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}  # so that workers find these tests too
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(DOCUMENTS, 100)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(DOCUMENTS * 2))
    return str(path)


OPTIONS = {"unit_bytes": 2000, "validation_fraction": 0.1, "deduplicate": True}


@pytest.mark.multiprocess
@pytest.mark.parametrize("remote", [False, True])
def test_a_cluster_writes_the_same_bytes(cluster, corpus, tokenizer, tmp_path, remote):
    prepare([corpus], tokenizer, tmp_path / "local", **OPTIONS)
    output = f"file://{tmp_path}/ray" if remote else tmp_path / "ray"
    info = prepare([corpus], tokenizer, output, engine="ray", workers=2, **OPTIONS)
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")
    assert info.duplicates.documents >= len(DOCUMENTS)


@pytest.mark.multiprocess
def test_a_url_is_taken_up_where_it_was(cluster, corpus, tokenizer, tmp_path, capfd):
    options = OPTIONS | {"deduplicate": False}
    with open(corpus, "ab") as file:
        file.write(b"\n\xff\n")
    output = f"file://{tmp_path}/ray"
    with pytest.raises(UserError) as error:
        prepare([corpus], tokenizer, output, engine="ray", workers=2, **options)
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, f"{corpus}:601")
    assert not (tmp_path / "ray/dataset.json").exists()
    skip = CorpusOptions(on_error="skip")
    prepare([corpus], tokenizer, output, engine="ray", options=skip, **options)
    assert "resuming: " in capfd.readouterr().err
    prepare([corpus], tokenizer, tmp_path / "local", options=skip, **options)
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")
    with pytest.raises(UserError) as error:
        prepare([corpus], tokenizer, output, options=skip, **options)
    assert error.value.exit_code == ExitCode.CANT_CREATE
    prepare([corpus], tokenizer, output, options=skip, overwrite=True, **options)
    assert files_of(tmp_path / "local") == files_of(tmp_path / "ray")


def test_a_url_that_holds_something_else_is_left_alone(corpus, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("a cat")
    for overwrite in (False, True):
        with pytest.raises(UserError) as error:
            prepare([corpus], tokenizer, f"file://{tmp_path}/mine", overwrite=overwrite)
        assert error.value.exit_code == ExitCode.CANT_CREATE
    assert files_of(tmp_path / "mine") == {"photo.jpg": b"a cat"}


@pytest.mark.multiprocess
def test_the_death_of_a_worker_is_one_sentence(cluster, corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "corpus_units", lambda *options: [Unit(functools.partial(die, os.getpid()))] * 2)
    with pytest.raises(UserError) as error:
        prepare([corpus], tokenizer, tmp_path / "dataset", engine="ray", workers=2)
    assert (error.value.exit_code, error.value.what) == (ExitCode.IO, "a worker process died")
    assert "\n" not in str(error.value)
