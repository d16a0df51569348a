import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpt2_flax.data import prepare as module
from gpt2_flax.data.prepare import prepare, split_of
from gpt2_flax.data.token_dataset import SPLITS, TokenDataset
from gpt2_flax.errors import ExitCode, UserError
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


@dataclass(frozen=True)
class DyingUnit:
    """A unit whose worker ends without a word, as when the system kills it for memory."""

    name: str = "dying"
    size: int = 1

    def documents(self):
        os._exit(1)


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


def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tokenizer, tmp_path):
    for workers in (1, 2):
        prepare([str(corpus)], tokenizer, tmp_path / str(workers), workers=workers, unit_bytes=4000)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_stream_does_not_depend_on_the_size_of_units(corpus, tokenizer, tmp_path):
    for size in (300, 7000, 10**6):
        prepare([str(corpus)], tokenizer, tmp_path / str(size), unit_bytes=size)
    assert len(TokenDataset(tmp_path / "300").info.shards["train"]) > 20
    for split in SPLITS:
        assert (
            stream(tmp_path / "300", split) == stream(tmp_path / "7000", split) == stream(tmp_path / "1000000", split)
        )


def test_the_split_depends_on_the_text_alone_and_follows_the_fraction():
    texts = [str(number) for number in range(4000)]
    small, large = ({text for text in texts if split_of(text, share) == "validation"} for share in (0.05, 0.2))
    assert small < large
    assert 150 < len(small) < 250
    assert 720 < len(large) < 880
    assert [split_of("天地", 0.5), split_of("玄黄", 0.5)] == ["train", "validation"]  # these values are a format


def test_documents_without_tokens_are_left_out(tokenizer, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\u200b\n" + "\n".join(DOCUMENTS))
    info = prepare([str(corpus)], tokenizer, tmp_path / "dataset", validation_fraction=0.5)
    assert tokenizer.encode_batch(["\u200b"])[0].size == 0
    filled = sum(bool(text.strip()) for text in DOCUMENTS)
    assert sum(shard.documents for split in SPLITS for shard in info.shards[split]) == filled


def refused(corpus: Path, tokenizer, output: Path, **options) -> UserError:
    with pytest.raises(UserError) as error:
        prepare([str(corpus)], tokenizer, output, **options)
    assert not output.exists()
    assert not list(output.parent.glob(".*"))  # nothing half-made is left
    return error.value


def test_an_empty_split_is_an_error_that_says_which_way_to_turn(corpus, tokenizer, tmp_path):
    error = refused(corpus, tokenizer, tmp_path / "dataset", validation_fraction=0.0)
    assert (error.exit_code, error.where) == (ExitCode.DATA, str(corpus))
    assert error.fix.startswith("raise --validation-fraction")
    error = refused(corpus, tokenizer, tmp_path / "dataset", validation_fraction=1.0)
    assert error.fix.startswith("lower --validation-fraction")


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


def test_the_death_of_a_worker_is_an_error_and_not_a_hang(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "corpus_units", lambda *options: [DyingUnit(), DyingUnit()])
    error = refused(corpus, tokenizer, tmp_path / "dataset", workers=2)
    assert (error.exit_code, error.what) == (ExitCode.IO, "a worker process died")


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


def test_errors_travel_between_processes_unchanged():
    error = UserError(ExitCode.DATA, "what", Path("where"), "fix")
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert (type(copy), str(copy)) == (UserError, str(error))
