"""A dataset that changes, at any moment and in any way, is detected before its results are saved."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import changed
from support.rows import batches_of, rows
from support.token_datasets import starts_of, write_dataset

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.data import dataset as dataset_module
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.inspect import batch_lines, inspection_lines
from gpt2_flax.data.integrity import FirstUse, Watch
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, RowLayout
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.training import loop

FILES = [
    "train/tokens-00000.bin",
    "train/offsets-00000.bin",
    "validation/tokens-00000.bin",
    "validation/offsets-00000.bin",
    "dataset.json",
    "tokenizer/vocab.txt",
]
DAMAGES = {
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "a bit at the end": lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
    "a bit in the middle": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "zeros": lambda content: bytes(len(content)),
    "zeros at the end": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\n",
    "gone": lambda content: None,
}
MOMENTS = ["before it is opened", "when it is opened", "when it is verified", "after a batch", "after everything"]


@pytest.fixture
def dataset(dataset_folder, tmp_path) -> Path:
    return Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))


def damage(path: Path, how: str) -> None:
    """Damage the file in place, so that an open descriptor sees the damage too."""
    content = DAMAGES[how](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def use(folder: Path, packing: str, at: str, change) -> None:
    """Use a dataset as a run does, and call `change` at a moment."""

    def moment(name: str) -> None:
        if name == at:
            change()

    moment("before it is opened")
    mixture = Mixture({str(folder): 1.0})
    moment("when it is opened")
    for opened in mixture.datasets.values():
        opened.tokenizer()
    mixture.verify("first-use")
    moment("when it is verified")
    loader = mixture.batches(RowLayout(16, packing), 0)
    held_out = rows(mixture.datasets[str(folder)].validation, 16, packing)
    loader.batch(0, 8)
    moment("after a batch")
    for number in range(3):
        loader.batch(8 * number, 8 * number + 8)
    held_out.batch(np.arange(held_out.n_rows))
    moment("after everything")
    mixture.wait_until_verified(None)
    mixture.check_unchanged()


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("name", FILES)
def test_no_damage_at_any_moment_is_silent(dataset, name, at, packing):
    whole, unread = (dataset / name).read_bytes(), at in MOMENTS[:2]
    for how in DAMAGES:
        if how == "longer" and unread and not name.endswith(".bin"):
            continue  # another blank line at the end of a text changes nothing
        with pytest.raises(UserError) as error:
            use(dataset, packing, at, lambda how=how: damage(dataset / name, how))
        none = how == "gone" and at == MOMENTS[0] and name == "dataset.json"
        assert error.value.exit_code == (ExitCode.NO_INPUT if none else ExitCode.DATA), how
        where = str(dataset / name)
        assert error.value.where.startswith(where) or (unread and error.value.where == str(Path(where).parent)), how
        (dataset / name).write_bytes(whole)
    use(dataset, packing, at, lambda: None)


@pytest.mark.parametrize("at", MOMENTS)
def test_files_that_are_touched_or_replaced_by_equal_ones_are_no_damage(dataset, at):
    def touch() -> None:
        for name in FILES:
            os.utime(dataset / name, (1, 1))

    def replace() -> None:
        for name in FILES:
            shutil.copyfile(dataset / name, dataset / "other")
            (dataset / "other").replace(dataset / name)

    use(dataset, "stream", at, touch)
    use(dataset, "stream", at, replace)


def test_each_check_after_a_change_compares_anew(dataset):
    mixture, path = Mixture({str(dataset): 1.0}), dataset / "train/tokens-00000.bin"
    whole = path.read_bytes()
    for _ in range(2):
        os.utime(path, (1, 1))
        mixture.check_unchanged()
        damage(path, "first bit")
        for _ in range(2):
            with pytest.raises(UserError, match=r"changed while it was in use: sha256 differs.*bring the file back"):
                mixture.check_unchanged()
        path.write_bytes(whole)
        mixture.check_unchanged()


def test_a_file_is_read_again_only_when_it_seems_changed_and_inodes_that_change_by_themselves_count_once(tmp_path):
    path, reads = tmp_path / "file", []
    path.write_bytes(b"content")
    watch = Watch()
    watch.add(path, lambda: reads.append(1))
    times = path.stat()

    def new_inode() -> None:
        shutil.copyfile(path, tmp_path / "copy")
        os.utime(tmp_path / "copy", ns=(times.st_atime_ns, times.st_mtime_ns))
        (tmp_path / "copy").replace(path)

    watch.check()
    assert len(reads) == 0
    for change in (new_inode, lambda: None, new_inode, new_inode):
        change()
        watch.check()
        assert len(reads) == 1
    os.utime(path, (1, 1))
    watch.check()
    watch.check()
    assert len(reads) == 2


# Reading

DOCUMENTS = st.lists(st.lists(st.integers(0, 2**17 - 1), min_size=1, max_size=12), max_size=6)


@settings(max_examples=60)
@given(shards=st.lists(DOCUMENTS, min_size=1, max_size=4), length=st.integers(1, 9), seed=st.integers(0, 9))
def test_rows_are_what_numpy_reads_from_the_files(tmp_path_factory, shards, length, seed):
    split = write_dataset(tmp_path_factory.mktemp("dataset"), 2**17, shards).train
    parts = [np.fromfile(split.folder / f"train/tokens-{n:05d}.bin", "<u4") for n in range(len(shards))]
    offsets = [np.fromfile(split.folder / f"train/offsets-{n:05d}.bin", "<u8").astype(int) for n in range(len(shards))]
    stream = np.concatenate([*parts, np.zeros(length + 1, "<u4")])
    bases = np.cumsum([0, *map(len, parts)])[:-1]
    starts = set(np.concatenate([base + of_shard for base, of_shard in zip(bases, offsets, strict=True)]).tolist())
    loader = batches_of(split, length, seed)
    batch = loader.batch(0, loader.rows[0].n_rows)
    for sample in range(loader.rows[0].n_rows):
        place = loader.locate(sample, sample + 1)[1][0] * length
        window, used = stream[place : place + length + 1], split.n_tokens - place
        assert batch.tokens_BT[sample].tolist() == window[:-1].tolist()
        assert batch.targets_BT[sample].tolist() == [
            IGNORE if place + column + 1 in starts or column + 1 >= used else window[column + 1]
            for column in range(length)
        ]


CUT = """
import os, sys
import numpy as np
from support.rows import batches_of, rows
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.errors import UserError
split = TokenDataset(sys.argv[1]).train
for packing in ("stream", "best_fit"):
    batches_of(split, 16, 0, packing).batch(0, 2)
for name in ("train/tokens-00000.bin", "train/offsets-00000.bin"):
    os.truncate(os.path.join(sys.argv[1], name), 0)
for packing in ("stream", "best_fit"):
    try:
        batches_of(split, 16, 0, packing).batch(0, 2)
    except UserError as error:
        print(int(error.exit_code), error)
"""


@pytest.mark.multiprocess
def test_a_file_that_is_cut_while_it_is_read_gives_a_sentence_and_no_signal(dataset):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # for the support modules of the tests
    command = [sys.executable, "-c", CUT, str(dataset)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("65 file became shorter while it was in use: ") for line in lines)


def test_offsets_that_are_overwritten_while_they_are_in_use_are_found_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "KEPT_BYTES", 0)
    documents = [[1, 2, 3]] * 100
    split = write_dataset(tmp_path, 100, [documents]).train
    path = tmp_path / "train/offsets-00000.bin"
    whole = path.read_bytes()
    starts = np.array(starts_of(documents))

    def found() -> list[int]:
        return split.document_starts(np.array([120]), 12)[1].tolist()

    assert found() == [start - 120 for start in starts[(starts >= 120) & (starts < 132)]]
    zeros_after = whole[:256] + bytes(len(whole) - 256)
    for content in (bytes(len(whole)), zeros_after, b"\xff" * len(whole), whole[8:] + whole[:8]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="do not ascend") as error:
            found()
        assert error.value.where == str(path)


# A run


@pytest.fixture
def tiny(config, dataset):
    """A run of one block on the copied dataset; it saves at steps 2, 4 and 6."""
    keys = {"model__n_layer": 1, "training__save_every": 2, "training__evaluate_every": 2}
    return changed(config, data__dataset=str(dataset), **keys)


def at_save(monkeypatch, step: int, act) -> None:
    """Call `act` right after a step is saved."""
    save = CheckpointStore.save

    def saved(self, number, *arguments):
        save(self, number, *arguments)
        if number == step:
            act()

    monkeypatch.setattr(CheckpointStore, "save", saved)


def losses(output: str) -> dict[int, float]:
    run = RunFolder(output)
    return {step: run.metrics_at(step).get("train/loss") for step in range(1, 7)}


@pytest.mark.slow
def test_a_run_whose_data_changes_ends_before_it_saves_and_resumes_to_the_same_numbers(tiny, dataset, monkeypatch):
    whole = changed(tiny, output=tiny.output + "-whole")
    loop.train(whole)
    path = dataset / "train/tokens-00000.bin"
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        at_save(patch, 2, lambda: damage(path, "zeros"))
        with pytest.raises(UserError, match="file changed while it was in use") as error:
            loop.train(tiny)
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(path))
    assert RunFolder(tiny.output).last_checkpoint() == 2
    with pytest.raises(UserError, match="sha256 differs"):
        loop.train(tiny)  # nor does it resume on them
    assert RunFolder(tiny.output).last_checkpoint() == 2
    path.write_bytes(content)
    loop.train(tiny)
    assert losses(tiny.output) == losses(whole.output)


@pytest.mark.slow
def test_a_run_goes_on_when_its_data_is_synchronized_again(tiny, dataset, monkeypatch):
    def synchronize() -> None:
        for name in FILES:
            shutil.copyfile(dataset / name, dataset / "other")
            (dataset / "other").replace(dataset / name)

    at_save(monkeypatch, 2, synchronize)
    loop.train(tiny)
    assert RunFolder(tiny.output).last_checkpoint() == 6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["first-use", "full", "off"])
def test_what_is_verified_is_what_the_config_says(tiny, dataset, how, monkeypatch):
    path = dataset / "train/tokens-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[-3] = ids[-4]  # an id of the vocabulary
    ids.tofile(path)
    steps = []
    make = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *arguments: steps.append(1) or make(*arguments))
    config = changed(tiny, data__verify=how)
    if how == "off":
        config = changed(config, training__total_steps=2)
        loop.train(config)
        assert RunFolder(config.output).last_checkpoint() == 2
        return
    with pytest.raises(UserError, match="sha256 differs") as error:
        loop.train(config)
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(path))
    assert bool(steps) == (how == "first-use")
    assert RunFolder(config.output).last_checkpoint() is None


@pytest.mark.parametrize("how", ["first-use", "full"])
def test_validation_data_is_verified_before_training_begins(tiny, dataset, how):
    damage(dataset / "validation/tokens-00000.bin", "a bit at the end")
    with pytest.raises(UserError, match=r"validation/tokens-00000\.bin"):
        loop.train(changed(tiny, data__verify=how))
    assert not RunFolder(tiny.output).path.exists()


def test_the_tokenizer_of_the_data_is_checked_before_training_begins(tiny, dataset):
    damage(dataset / "tokenizer/vocab.txt", "a bit at the end")
    with pytest.raises(UserError, match="tokenizer"):
        loop.train(tiny)
    assert not RunFolder(tiny.output).path.exists()


def test_a_save_waits_for_checksums_but_warns_of_those_that_take_long(capsys):
    checks, go = FirstUse(), threading.Event()
    done = []
    checks.add(lambda: go.wait(60) and done.append(1))
    checks.add(lambda: done.append(2))
    checks.wait(0)
    assert "the sha256 of 2 of 2 shards in use is not checked yet" in capsys.readouterr().err
    go.set()
    checks.wait(None)
    assert done == [1, 2]
    assert capsys.readouterr().err == ""

    def fail() -> None:
        raise UserError(ExitCode.DATA, "sha256 differs", "shard", "prepare the dataset again")

    checks.add(fail)
    for use in (lambda: checks.wait(None), checks.raise_failure):
        with pytest.raises(UserError, match="do not use the checkpoints that were saved since this start"):
            use()


def test_damage_that_is_found_in_the_background_is_raised_where_data_is_read_next(dataset, monkeypatch):
    damage(dataset / "train/tokens-00000.bin", "a bit at the end")
    mixture = Mixture({str(dataset): 1.0})
    mixture.verify("first-use")
    loader = mixture.batches(RowLayout(16), 0)
    with contextlib.suppress(UserError):
        loader.batch(0, 2)
    with pytest.raises(UserError, match="sha256 differs"):
        mixture.wait_until_verified(None)
    for use in (lambda: loader.batch(2, 4), mixture.check_unchanged):
        with pytest.raises(UserError, match="sha256 differs"):
            use()


# Other commands


@pytest.mark.slow
def test_an_evaluation_of_data_that_is_damaged_or_changes_gives_no_figures(tiny, dataset, capsys):
    config = changed(tiny, training__total_steps=1)
    loop.train(config)
    path, lines = dataset / "validation/tokens-00000.bin", dataset / "lines.jsonl"
    whole, read = path.read_bytes(), TokenSplit.gather

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        found = cli.exit_code(["evaluate", config.output, "--batch-size", "8", *arguments])
        out, err = capsys.readouterr()
        assert (found, out) == (ExitCode.DATA, ""), err
        assert not lines.exists()
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert str(path) in err
        return err

    for how, arguments in (("zeros", ()), ("zeros", ("--per-document", str(lines))), ("cut", ()), ("gone", ())):

        def after_first(split, *places, how=how):
            found = read(split, *places)
            if path.exists() and path.read_bytes() == whole:
                damage(path, how)
            return found

        with mock.patch.object(TokenSplit, "gather", after_first):
            assert "while it was in use" in refused(*arguments)
        path.write_bytes(whole)
    damage(path, "a bit at the end")
    assert "sha256 differs" in refused("--data", str(dataset))
    path.write_bytes(whole)
    assert cli.exit_code(["evaluate", config.output]) == 0


def test_what_is_shown_of_a_dataset_that_changes_ends_with_a_sentence(dataset, tiny):
    path = dataset / "train/tokens-00000.bin"
    whole = path.read_bytes()
    for how, show in itertools.product(("zeros", "cut"), ("dataset", "batch")):
        mixture = Mixture({str(dataset): 1.0})
        shown = inspection_lines(mixture.datasets[str(dataset)])
        lines = shown if show == "dataset" else batch_lines(tiny, mixture, 1, 3)
        next(lines)
        damage(path, how)
        with pytest.raises(UserError) as error:
            list(lines)
        assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(path))
        path.write_bytes(whole)
