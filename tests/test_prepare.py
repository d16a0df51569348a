import errno
import itertools
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_flax.data import prepare as module
from gpt2_flax.data import units
from gpt2_flax.data.dataset_info import SPLITS
from gpt2_flax.data.deduplicate import find_duplicates
from gpt2_flax.data.prepare import prepare
from gpt2_flax.data.token_dataset import TokenDataset
from gpt2_flax.data.units import in_validation
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import documents
from gpt2_flax.text.corpus import CorpusOptions, corpus_units
from gpt2_flax.text.tokenizer import load_tokenizer
from gpt2_flax.text.train_tokenizer import train_wordpiece

DRAW = random.Random(0)
DOCUMENTS = ["".join(DRAW.choices("天地玄黄宇宙洪荒日月盈昃 abc", k=DRAW.randint(1, 40))) for _ in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(DOCUMENTS, 100)


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stream(folder: Path, split: str) -> list[list[int]]:
    return [ids.tolist() for ids in getattr(TokenDataset(folder), split).documents()]


HALF = st.sampled_from([0, 1, 2**63, 2**64 - 1])  # of a hash


def split_of(text: str, fraction: float) -> str:
    return SPLITS[int(in_validation([text], fraction)[0])]


class Unit:
    """Stands in for a unit of a corpus: as soon as it is read, `happens` is called."""

    name, size, files = "a unit", 1, ()

    def __init__(self, happens):
        self.happens = happens

    def batches(self, report):
        self.happens()
        yield documents.Documents(["天地"], 1)


def die() -> None:
    if multiprocessing.parent_process() is None:
        return  # the survey before the work
    os._exit(1)  # as when the system kills a process for memory


def test_every_document_stands_framed_in_the_split_of_its_hash(corpus, tokenizer, tmp_path):
    info = prepare([str(corpus)], tokenizer, tmp_path / "dataset", validation_fraction=0.2)
    for split in SPLITS:
        expected = [text for text in DOCUMENTS if text.strip() and split_of(text, 0.2) == split]
        ids = [[tokenizer.bos_id, *row.tolist(), tokenizer.eos_id] for row in tokenizer.encode_batch(expected)]
        assert stream(tmp_path / "dataset", split) == ids
        assert sum(shard.characters for shard in info.shards[split]) == sum(map(len, expected))
    dataset = TokenDataset(tmp_path / "dataset")
    dataset.verify()
    assert dataset.info == info
    assert info.sources == [str(corpus)]
    assert load_tokenizer(dataset.tokenizer_folder).fingerprint == info.tokenizer_fingerprint == tokenizer.fingerprint
    assert {path.split("/")[0] for path in files_of(tmp_path / "dataset")} == {"dataset.json", "tokenizer", *SPLITS}


def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tokenizer, tmp_path):
    for workers in (1, 2):
        prepare([str(corpus)], tokenizer, tmp_path / str(workers), workers=workers, unit_bytes=4000, deduplicate=True)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_stream_does_not_depend_on_the_size_of_units(corpus, tokenizer, tmp_path):
    for size in (300, 7000, 10**6):
        prepare([str(corpus)], tokenizer, tmp_path / str(size), unit_bytes=size)
    assert len(TokenDataset(tmp_path / "300").info.shards["train"]) > 20
    for split in SPLITS:
        assert (
            stream(tmp_path / "300", split) == stream(tmp_path / "7000", split) == stream(tmp_path / "1000000", split)
        )


def test_a_long_document_that_comes_in_parts_gives_the_tokens_of_the_whole(tokenizer, tmp_path, monkeypatch):
    texts = ["".join(DOCUMENTS[:40]), *DOCUMENTS[40:100], "".join(DOCUMENTS[100:])]
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    prepare([str(tmp_path / "corpus.txt")], tokenizer, tmp_path / "whole", validation_fraction=0.2)
    monkeypatch.setattr(documents, "PART_CHARACTERS", 64)
    unit, *_ = corpus_units([str(tmp_path / "corpus.txt")])
    assert sum(batch.unfinished for batch in unit.batches(None)) > 20
    for deduplicate in (False, True):
        monkeypatch.setattr(units, "in_validation", lambda parts, share: in_validation(wholes(parts, texts), share))
        output = tmp_path / str(deduplicate)
        prepare([str(tmp_path / "corpus.txt")], tokenizer, output, validation_fraction=0.2, deduplicate=deduplicate)
        assert [stream(output, split) for split in SPLITS] == [stream(tmp_path / "whole", split) for split in SPLITS]


def wholes(parts: list[str], texts: list[str]) -> list[str]:
    """What the parts are the beginnings of; of other parts the split has been decided before."""
    return [next((text for text in [part, *texts] if text in texts and text.startswith(part)), "") for part in parts]


def test_the_split_depends_on_the_text_alone_and_follows_the_fraction():
    texts = [str(number) for number in range(4000)]
    small, large = ({text for text in texts if split_of(text, share) == "validation"} for share in (0.05, 0.2))
    assert small < large
    assert 150 < len(small) < 250
    assert 720 < len(large) < 880
    assert [split_of("天地", 0.5), split_of("玄黄", 0.5)] == ["train", "validation"]  # these values are a format
    assert {split_of(text, 0.0) for text in texts} == {"train"}
    assert {split_of(text, 1.0) for text in texts} == {"validation"}


def test_documents_without_tokens_are_left_out(tokenizer, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\u200b\n" + "\n".join(DOCUMENTS))
    info = prepare([str(corpus)], tokenizer, tmp_path / "dataset", validation_fraction=0.5)
    assert tokenizer.encode_batch(["\u200b"])[0].size == 0
    filled = sum(bool(text.strip()) for text in DOCUMENTS)
    assert sum(shard.documents for split in SPLITS for shard in info.shards[split]) == filled


def test_of_equal_documents_the_first_is_kept(tokenizer, tmp_path):
    texts = DOCUMENTS * 2 + [DOCUMENTS[7]] * 3
    random.Random(1).shuffle(texts)
    (tmp_path / "all.txt").write_text("\n".join(texts))
    (tmp_path / "distinct.txt").write_text("\n".join(dict.fromkeys(texts)))
    options = {"validation_fraction": 0.2, "unit_bytes": 500}
    info = prepare([str(tmp_path / "all.txt")], tokenizer, tmp_path / "a", deduplicate=True, **options)
    expected = prepare([str(tmp_path / "distinct.txt")], tokenizer, tmp_path / "b", **options)
    assert [stream(tmp_path / "a", split) for split in SPLITS] == [stream(tmp_path / "b", split) for split in SPLITS]
    filled = [text for text in texts if text.strip()]
    assert info.duplicates.documents == len(filled) - len(set(filled)) > 400
    assert info.duplicates.characters == sum(map(len, filled)) - sum(map(len, set(filled)))
    assert expected.duplicates is None


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from([0, 1, 2**63, 2**64 - 1])] * 2), max_size=20), min_size=1, max_size=5)
)
def test_duplicates_are_found_in_portions_of_any_size(tmp_path_factory, hashes):
    folder = tmp_path_factory.mktemp("hashes")
    paths, seen, expected = [], set(), []
    for index, rows in enumerate(hashes):
        paths.append(folder / f"{index}.npy")
        np.save(paths[-1], np.array(rows, [("high", "<u8"), ("low", "<u8")]))
        expected.append([number for number, row in enumerate(rows) if row in seen or seen.add(row)])
    for portion in (1, 7, 10**6):
        assert [found.tolist() for found in find_duplicates(paths, portion)] == expected


def test_what_cannot_be_read_is_counted_and_the_first_places_are_named(tokenizer, tmp_path):
    lines = [text.encode() for text in DOCUMENTS]
    bad = [number for number in range(400) if number % 3 == 0]
    for number in bad:
        lines[number] = b"\xff" + lines[number]
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"\n".join(lines))
    skip, replace = CorpusOptions(on_error="skip"), CorpusOptions(on_error="replace")
    for workers in (1, 2):
        options = {"workers": workers, "unit_bytes": 1000, "validation_fraction": 0.1}
        info = prepare([str(corpus)], tokenizer, tmp_path / f"skip{workers}", options=skip, **options)
        assert (info.left_out.skipped, info.left_out.replaced) == (len(bad), 0)
        assert [example.line for example in info.left_out.examples] == [number + 1 for number in bad][:100]
        assert info.left_out.examples[0].file == str(corpus)
        assert "0xFF" in info.left_out.examples[0].reason
    assert files_of(tmp_path / "skip1") == files_of(tmp_path / "skip2")
    info = prepare([str(corpus)], tokenizer, tmp_path / "replace", options=replace, validation_fraction=0.1)
    assert (info.left_out.skipped, info.left_out.replaced) == (0, len(bad))


def refused(corpus: Path, tokenizer, output: Path, **options) -> UserError:
    with pytest.raises(UserError) as error:
        prepare([str(corpus)], tokenizer, output, **options)
    assert not output.exists()
    return error.value


def test_an_empty_split_is_an_error_that_says_which_way_to_turn(corpus, tokenizer, tmp_path):
    error = refused(corpus, tokenizer, tmp_path / "dataset", validation_fraction=0.0)
    assert (error.exit_code, error.where) == (ExitCode.DATA, str(corpus))
    assert error.fix.startswith("raise --validation-fraction")
    error = refused(corpus, tokenizer, tmp_path / "dataset", validation_fraction=1.0)
    assert error.fix.startswith("lower --validation-fraction")
    assert not list(tmp_path.glob(".*"))  # other options would not go on with it


def test_a_corpus_of_blank_lines_is_empty(tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n \n\u3000\n")
    error = refused(tmp_path / "corpus.txt", tokenizer, tmp_path / "dataset")
    assert (error.exit_code, error.what) == (ExitCode.DATA, "no text in the corpus")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_line_is_reported_whatever_process_finds_it(corpus, tokenizer, tmp_path, workers):
    with open(corpus, "ab") as file:
        file.write(b"\n\xff\n")
    error = refused(corpus, tokenizer, tmp_path / "dataset", workers=workers, unit_bytes=4000)
    assert (error.exit_code, error.where) == (ExitCode.DATA, f"{corpus}:{len(DOCUMENTS) + 1}")


def test_a_call_that_failed_goes_on_where_it_was(corpus, tokenizer, tmp_path, capfd):
    lines = corpus.read_bytes()
    corpus.write_bytes(lines + b"\n\xff\n")
    options = {"unit_bytes": 1000, "validation_fraction": 0.1}
    refused(corpus, tokenizer, tmp_path / "dataset", **options)
    capfd.readouterr()
    prepare([str(corpus)], tokenizer, tmp_path / "dataset", options=CorpusOptions(on_error="skip"), **options)
    assert capfd.readouterr().err.startswith("going on: ")
    prepare([str(corpus)], tokenizer, tmp_path / "fresh", options=CorpusOptions(on_error="skip"), **options)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh")
    assert not list(tmp_path.glob(".*"))


def test_parts_of_a_file_that_has_changed_are_made_again(corpus, tokenizer, tmp_path):
    damaged = tmp_path / "z.txt"
    damaged.write_bytes(b"\xff")
    sources = [str(corpus), str(damaged)]
    with pytest.raises(UserError):
        prepare(sources, tokenizer, tmp_path / "dataset", unit_bytes=1000, validation_fraction=0.1)
    corpus.write_text("\n".join(reversed(DOCUMENTS)) + "\n地" * 5)
    damaged.write_text("天地")
    for output in ("dataset", "fresh"):
        prepare(sources, tokenizer, tmp_path / output, unit_bytes=1000, validation_fraction=0.1)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh")


def test_unfinished_work_of_another_call_is_not_touched_until_asked(corpus, tokenizer, tmp_path):
    text = corpus.read_bytes()
    corpus.write_bytes(text + b"\n\xff")
    options = {"unit_bytes": 1000, "validation_fraction": 0.1}
    refused(corpus, tokenizer, tmp_path / "dataset", **options)
    corpus.write_bytes(text)
    before = files_of(tmp_path / ".dataset.partial")
    error = refused(corpus, tokenizer, tmp_path / "dataset", **options | {"validation_fraction": 0.2})
    assert (error.exit_code, error.what.rpartition(" ")[2]) == (ExitCode.CANT_CREATE, "validation_fraction")
    del before["lock"]
    assert files_of(tmp_path / ".dataset.partial").items() >= before.items()
    for output in ("dataset", "fresh"):
        other = options | {"validation_fraction": 0.2}
        prepare([str(corpus)], tokenizer, tmp_path / output, overwrite=output == "dataset", **other)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh")


def test_a_full_disk_is_one_sentence_and_what_is_finished_is_kept(corpus, tokenizer, tmp_path, monkeypatch, capfd):
    flushed = itertools.count()
    sync = os.fsync

    def full(descriptor: int) -> None:
        if next(flushed) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = refused(corpus, tokenizer, tmp_path / "dataset", unit_bytes=1000)
    assert (error.exit_code, error.what) == (ExitCode.IO, "disk full")
    prepare([str(corpus)], tokenizer, tmp_path / "dataset", unit_bytes=1000)
    assert "going on: " in capfd.readouterr().err
    prepare([str(corpus)], tokenizer, tmp_path / "fresh", unit_bytes=1000)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh")


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tokenizer, tmp_path):
    texts = ["".join(DRAW.choices(DOCUMENTS, k=20)) for _ in range(4000)]
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    tokenizer_folder = tmp_path / "tokenizer"
    tokenizer_folder.mkdir()
    tokenizer.save(tokenizer_folder)
    code = (
        "import sys, pathlib; from gpt2_flax.data.prepare import prepare;"
        "from gpt2_flax.text.tokenizer import load_tokenizer;"
        "corpus, tokenizer, output = sys.argv[1:];"
        "print('started', flush=True);"
        "prepare([corpus], load_tokenizer(pathlib.Path(tokenizer)), output, unit_bytes=50_000, workers=2)"
    )
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}", str(tmp_path / "corpus.txt")]
    killed = 0
    for attempt in range(20):
        process = subprocess.Popen(
            [*command, str(tokenizer_folder), str(tmp_path / "dataset")], stdout=subprocess.PIPE, start_new_session=True
        )
        process.stdout.readline()
        try:
            assert process.wait(0.8 + 0.2 * attempt) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()  # its workers notice
            process.wait()
            killed += 1
            if (tmp_path / "dataset").exists():  # killed after the last rename, on its way out
                break
    assert killed > 0
    prepare([str(tmp_path / "corpus.txt")], tokenizer, tmp_path / "fresh", unit_bytes=50_000)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh")
    assert not list(tmp_path.glob(".*"))


def test_the_death_of_a_worker_is_an_error_and_not_a_hang(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "corpus_units", lambda *options: [Unit(die), Unit(die)])
    error = refused(corpus, tokenizer, tmp_path / "dataset", workers=2)
    assert (error.exit_code, error.what) == (ExitCode.IO, "a worker process died")


def test_two_calls_do_not_work_on_one_dataset(corpus, tokenizer, tmp_path, monkeypatch):
    def second() -> None:
        error = refused(corpus, tokenizer, tmp_path / "dataset")
        assert (error.exit_code, error.what) == (ExitCode.CANT_CREATE, "another process is making this dataset")
        raise OSError(errno.EIO, "interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(module, "corpus_units", lambda *options: [Unit(second)])
        with pytest.raises(UserError, match="reading or writing failed"):
            prepare([str(corpus)], tokenizer, tmp_path / "dataset")
    prepare([str(corpus)], tokenizer, tmp_path / "dataset")


def test_an_existing_dataset_is_replaced_only_when_asked(corpus, tokenizer, tmp_path):
    output = tmp_path / "dataset"
    prepare([str(corpus)], tokenizer, output)
    before = files_of(output)
    with pytest.raises(UserError) as error:
        prepare([str(corpus)], tokenizer, output, validation_fraction=0.5)
    assert error.value.exit_code == ExitCode.CANT_CREATE
    assert files_of(output) == before
    prepare([str(corpus)], tokenizer, output, validation_fraction=0.5, overwrite=True)
    assert files_of(output) != before


def test_standard_input_gives_what_a_file_gives(corpus, tokenizer, tmp_path, monkeypatch):
    prepare([str(corpus)], tokenizer, tmp_path / "file", unit_bytes=3000)
    with open(corpus, encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        info = prepare(["-"], tokenizer, tmp_path / "stdin", unit_bytes=3000)
    assert info.sources == ["-"]
    assert [stream(tmp_path / "file", split) for split in SPLITS] == [
        stream(tmp_path / "stdin", split) for split in SPLITS
    ]
    assert set(files_of(tmp_path / "file")) == set(files_of(tmp_path / "stdin"))


def test_errors_travel_between_processes_unchanged():
    error = UserError(ExitCode.DATA, "what", Path("where"), "fix")
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert (type(copy), str(copy)) == (UserError, str(error))
