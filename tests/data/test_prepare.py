import errno
import functools
import hashlib
import itertools
import math
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.encoded_texts import SIMPLIFIED, marked
from support.fake_units import Unit, die
from support.folders import files_of

from gpt2_flax.data import flat_files, shard_job
from gpt2_flax.data import prepare as module
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import SPLITS
from gpt2_flax.data.deduplicate import find_duplicates
from gpt2_flax.data.inspect import summary_lines
from gpt2_flax.data.prepare import prepare
from gpt2_flax.data.shard_job import in_validation
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text import documents
from gpt2_flax.text.corpus import CorpusOptions, corpus_units
from gpt2_flax.tokenizers import survey
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_wordpiece

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


def stream(folder: Path, split: str) -> list[list[int]]:
    return [ids.tolist() for ids in getattr(TokenDataset(folder), split).documents()]


HALF = st.sampled_from([0, 1, 2**63, 2**64 - 1])  # values of one half of a hash


def split_of(text: str, fraction: float) -> str:
    return SPLITS[int(in_validation([text], fraction)[0])]


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


@pytest.mark.multiprocess
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
    monkeypatch.setattr(documents, "SLICE_CHARACTERS", 64)
    unit, *_ = corpus_units([str(tmp_path / "corpus.txt")])
    assert sum(batch.unfinished for batch in unit.batches(None)) > 20
    for deduplicate in (False, True):
        monkeypatch.setattr(shard_job, "in_validation", lambda parts, share: in_validation(wholes(parts, texts), share))
        output = tmp_path / str(deduplicate)
        prepare([str(tmp_path / "corpus.txt")], tokenizer, output, validation_fraction=0.2, deduplicate=deduplicate)
        assert [stream(output, split) for split in SPLITS] == [stream(tmp_path / "whole", split) for split in SPLITS]


def wholes(parts: list[str], texts: list[str]) -> list[str]:
    """Return the document that begins with each part; the split of the other parts is already decided."""
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


@pytest.mark.multiprocess
@pytest.mark.slow
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


ONE = "".join(DRAW.choices("天地玄黄宇宙洪荒", k=3000))


def expected_tail(documents: list[list[int]], fraction: float) -> list[list[list[int]]]:
    """Return the documents of both splits after the last tokens are cut off, computed in the simplest way."""
    total = sum(map(len, documents))
    position = total - max(2, math.ceil(total * fraction))
    train, held, start = [], [], 0
    for ids in documents:
        cut = min(max(0, position - start), len(ids))
        train += [ids[:cut]] if cut else []
        held += [ids[cut:]] if cut < len(ids) else []
        start += len(ids)
    return [train, held]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fraction", "sides"),
    [
        *itertools.product([0.01, 0.5], [["train"], ["validation"], ["train"] * 3, ["validation"] * 3]),
        (0.01, ["validation", "train", "train"]),
    ],
)
def test_of_too_few_documents_for_two_splits_the_last_tokens_are_for_validation(
    tokenizer, tmp_path, monkeypatch, capsys, fraction, sides
):
    """The cut does not depend on the number of workers or on the ends of units and reading blocks."""
    monkeypatch.setattr(flat_files, "CHUNK", 700)
    by_side: dict[str, list[str]] = {}
    for text in (ONE[number * 2 :] for number in range(10**3)):
        by_side.setdefault(split_of(text, fraction), []).append(text)
    texts = [by_side[side].pop() for side in sides]
    (tmp_path / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    framed = [[tokenizer.bos_id, *row.tolist(), tokenizer.eos_id] for row in tokenizer.encode_batch(texts)]
    found = []
    for workers, unit_bytes in ((1, None), (2, 2000), (1, 10**4)):
        output = tmp_path / f"{workers}-{unit_bytes}"
        options = {"validation_fraction": fraction, "workers": workers, "unit_bytes": unit_bytes}
        info = prepare([str(tmp_path / "corpus.txt")], tokenizer, output, **options)
        TokenDataset(output).verify()
        assert {path.split("/")[0] for path in files_of(output)} == {"dataset.json", "tokenizer", *SPLITS}
        found.append([stream(output, split) for split in SPLITS])
        assert found[-1] == expected_tail(framed, fraction)
        characters = [sum(shard.characters for shard in info.shards[split]) for split in SPLITS]
        assert sum(characters) == sum(map(len, texts))
        assert characters[1] == sum(map(len, found[-1][1])) - sum(
            ids.count(tokenizer.bos_id) + ids.count(tokenizer.eos_id) for ids in found[-1][1]
        )  # each of these characters is a token
    held, total = sum(map(len, found[0][1])), sum(map(len, framed))
    assert f"the last {held:,} of {total:,} tokens are for validation" in capsys.readouterr().out


def test_the_end_is_cut_off_at_an_address_too(tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text(ONE, encoding="utf-8")
    for output in (str(tmp_path / "here"), "memory://held-out/there"):
        prepare([str(tmp_path / "corpus.txt")], tokenizer, output, validation_fraction=0.25)
    fsspec.filesystem("memory").get("/held-out/there", str(tmp_path / "there"), recursive=True)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


@pytest.mark.parametrize("sides", [["train"], ["validation", "train", "train"]])
def test_a_call_that_was_killed_while_it_cut_the_end_off_gives_the_same_bytes(tokenizer, tmp_path, monkeypatch, sides):
    texts = (ONE[number:] for number in range(10**3))
    few = [next(text for text in texts if split_of(text, 0.01) == side) for side in sides]
    (tmp_path / "corpus.txt").write_text("\n".join(few), encoding="utf-8")
    for output in ("whole", "killed"):
        with monkeypatch.context() as patch:
            if output == "killed":
                patch.setattr(module, "write_info", lambda *parts: interrupted())
                with pytest.raises(ZeroDivisionError):
                    prepare([str(tmp_path / "corpus.txt")], tokenizer, tmp_path / output)
        prepare([str(tmp_path / "corpus.txt")], tokenizer, tmp_path / output)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "killed")


def interrupted() -> None:
    raise ZeroDivisionError


def test_too_few_tokens_for_two_splits_are_an_error(tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text("天", encoding="utf-8")
    error = refused(tmp_path / "corpus.txt", tokenizer, tmp_path / "dataset")
    assert (error.exit_code, error.what) == (ExitCode.DATA, "3 tokens are too few for two splits")


def test_of_a_fraction_of_nought_nothing_is_for_validation(corpus, tokenizer, tmp_path):
    info = prepare([str(corpus)], tokenizer, tmp_path / "dataset", validation_fraction=0.0)
    assert sum(shard.documents for shard in info.shards["validation"]) == 0
    assert len(stream(tmp_path / "dataset", "train")) == sum(bool(text.strip()) for text in DOCUMENTS)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_what_is_no_share_is_an_error_of_usage(corpus, tokenizer, tmp_path, fraction):
    error = refused(corpus, tokenizer, tmp_path / "dataset", validation_fraction=fraction)
    assert (error.exit_code, error.where) == (ExitCode.USAGE, "--validation-fraction")


@pytest.mark.multiprocess
@pytest.mark.parametrize("encoding", ["gb18030", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_the_same_text_in_any_encoding_gives_the_same_tokens(corpus, tokenizer, tmp_path, encoding, capsys):
    texts = [text for text in SIMPLIFIED for _ in range(20)]
    sums = {}
    for name in ("utf-8", encoding):
        path = tmp_path / f"{name}.txt"
        path.write_bytes(marked("\n".join(texts), name))
        options = {"validation_fraction": 0.0, "unit_bytes": 3000, "allow_unknown": True}
        info = prepare([str(path)], tokenizer, tmp_path / name, workers=2, **options)
        tokens = np.concatenate([np.array(ids) for ids in TokenDataset(tmp_path / name).train.documents()])
        sums[name] = hashlib.sha256(tokens.tobytes()).hexdigest()
    assert len(set(sums.values())) == 1
    shown = {"utf-8-sig": None, "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)
    assert info.encodings == ({str(path): shown} if shown else {})
    assert TokenDataset(tmp_path / encoding).info == info
    assert (f"read 1 file as {shown}".lower() in capsys.readouterr().out.lower()) == bool(shown)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_vocabulary_that_does_not_fit_stops_before_the_work_begins(corpus, tmp_path, monkeypatch, capsys):
    other = train_wordpiece(["天地玄黄" * 3, "一二三四" * 3], 50)
    texts = DOCUMENTS * 5
    corpus.write_text("\n".join(texts), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(module, "ShardJob", lambda *parts: pytest.fail("it began"))
        error = refused(corpus, other, tmp_path / "dataset")
    assert error.exit_code == ExitCode.DATA
    assert "--allow-unknown" in error.fix
    # The share and the characters, counted in the simplest way.
    known, texts = set("天地玄黄"), [text for text in texts if text.strip()]
    words = list(itertools.chain.from_iterable(re.findall(r"[a-z]+|[^a-z\s]", text) for text in texts))
    unknown = [word for word in words if not known.issuperset(word)]
    assert error.what.startswith(f"{len(unknown) / len(words):.1%} of the tokens")
    counts = Counter("".join(texts))
    shown = error.what.rpartition("most often ")[2].split(" ")
    assert shown == [one for one, _ in counts.most_common() if one not in known and one.strip()][:10]
    for workers in (1, 2):
        capsys.readouterr()
        options = {"workers": workers, "unit_bytes": 30_000, "allow_unknown": True}
        info = prepare([str(corpus)], other, tmp_path / str(workers), **options)
        out = capsys.readouterr().out
        assert f"warning: {error.what}\n" in out
        assert info.unknown_share == len(unknown) / len(words)
        assert f"warning: unknown tokens: {len(unknown):,} " in "\n".join(summary_lines("dataset", info))


@pytest.mark.slow
def test_what_the_sample_does_not_show_stops_at_the_end_and_is_kept(tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(survey, "CHARACTERS", 100)
    texts = ["一二三四五六七八九十" if index % 45 else "天地玄黄宇宙洪荒日月" for index in range(450)]
    (tmp_path / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    error = refused(tmp_path / "corpus.txt", tokenizer, tmp_path / "dataset")
    assert (error.exit_code, error.what.partition("% of")[2]) == (ExitCode.DATA, " the tokens are unknown")
    prepare([str(tmp_path / "corpus.txt")], tokenizer, tmp_path / "dataset", allow_unknown=True)
    assert "resuming: 1 of 1 shards" in capfd.readouterr().err


def test_few_unknown_tokens_are_no_warning(corpus, tokenizer, tmp_path, capsys):
    info = prepare([str(corpus)], tokenizer, tmp_path / "dataset")
    assert "warning" not in capsys.readouterr().out
    assert "unknown tokens: 0 (0.00%)" in list(summary_lines("dataset", info))


def test_files_that_are_read_and_passed_over_are_named(corpus, tokenizer, tmp_path, capsys):
    folder = tmp_path / "folder"
    for name in ("a.pdf", ".git/config", "made/dataset.json", "empty.txt", "b.txt", "c.MD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty.txt" else corpus.read_text(encoding="utf-8"), encoding="utf-8")
    prepare([str(folder)], tokenizer, tmp_path / "dataset", validation_fraction=0.1)
    first, second, *_ = capsys.readouterr().out.split("\n")
    assert first == "reading 2 files"
    start, _, listed = second.partition(": ")
    assert start == "passed over 4"
    assert sorted(listed.split(", ")) == sorted(
        f"{folder}/{name}"
        for name in (
            "a.pdf (of no known kind)",
            ".git (hidden)",
            "made (of a prepared dataset or a tokenizer)",
            "empty.txt (empty)",
        )
    )
    for number in range(50):
        (folder / f"{number}.doc").touch()
    prepare([str(folder)], tokenizer, tmp_path / "again", validation_fraction=0.1)
    _, second, *_ = capsys.readouterr().out.split("\n")
    assert second.startswith("passed over 54: ")
    assert second.endswith("), ...")
    assert second.count("(") == 10


def test_files_whose_lines_look_like_paragraphs_are_noted(tokenizer, tmp_path, capsys):
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("\n\n".join(DOCUMENTS[number * 50 : number * 50 + 50]), encoding="utf-8")
    for output, separator in (("line", "line"), ("file", "file"), ("blank", "blank-line")):
        options = CorpusOptions(separator=separator)
        info = prepare([str(folder)], tokenizer, tmp_path / output, options=options, validation_fraction=0.2)
        out = capsys.readouterr().out
        assert ("--separator file" in out) == (separator == "line")
        if separator == "file":
            assert sum(shard.documents for split in SPLITS for shard in info.shards[split]) in (4, 5)  # one may be cut
    prepare([str(folder / "0.txt")], tokenizer, tmp_path / "one", validation_fraction=0.2)
    assert "--separator" not in capsys.readouterr().out


def test_few_validation_tokens_are_a_warning(corpus, tokenizer, tmp_path):
    info = prepare([str(corpus)], tokenizer, tmp_path / "dataset", validation_fraction=0.1)
    held = sum(shard.tokens for shard in info.shards["validation"])
    assert f"warning: the validation split has {held:,} tokens, below 20,000: its figures will be noisy" in list(
        summary_lines("dataset", info)
    )
    (shard, *_), shards = info.shards["validation"], info.shards
    enough = shard.model_copy(update={"tokens": 20_000})
    assert "noisy" not in "".join(
        summary_lines("dataset", info.model_copy(update={"shards": shards | {"validation": [enough]}}))
    )
    none = info.model_copy(update={"shards": shards | {"validation": []}})
    assert list(summary_lines("dataset", none))[-1].startswith("no validation split")


def test_a_corpus_of_blank_lines_is_empty(tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n \n\u3000\n")
    error = refused(tmp_path / "corpus.txt", tokenizer, tmp_path / "dataset")
    assert (error.exit_code, error.what) == (ExitCode.DATA, "no text in the corpus")


@pytest.mark.multiprocess
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
    assert capfd.readouterr().err.startswith("resuming: ")
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
    assert "resuming: " in capfd.readouterr().err
    prepare([str(corpus)], tokenizer, tmp_path / "fresh", unit_bytes=1000)
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "fresh")


@pytest.mark.multiprocess
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tokenizer, tmp_path):
    texts = ["".join(DRAW.choices(DOCUMENTS, k=20)) for _ in range(4000)]
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    tokenizer_folder = tmp_path / "tokenizer"
    tokenizer_folder.mkdir()
    tokenizer.save(tokenizer_folder)
    code = (
        "import sys, pathlib; from gpt2_flax.data.prepare import prepare;"
        "from gpt2_flax.tokenizers.tokenizer import load_tokenizer;"
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
            assert process.wait(None if attempt == 19 else 0.8 + 0.2 * attempt) == 0
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


@pytest.mark.multiprocess
def test_the_death_of_a_worker_is_an_error_and_not_a_hang(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "corpus_units", lambda *options: [Unit(functools.partial(die, os.getpid()))] * 2)
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
