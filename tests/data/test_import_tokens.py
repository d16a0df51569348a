import hashlib
import itertools
import math
import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign_files import (
    BOS,
    EOS,
    UNKNOWN,
    Letters,
    contents,
    flatten,
    imported,
    refused,
    write_ids,
    write_llm_c,
    write_megatron,
)

from gpt2_flax.data import foreign_files
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.import_tokens import import_tokens
from gpt2_flax.errors import ExitCode, UserError

sequences = st.lists(st.integers(0, 99), max_size=4)
text = st.lists(st.integers(3, 99), max_size=6)
small_chunks = st.sampled_from([1, 2, 3, 5, 2**20])


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(sequences, min_size=1, max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(["uint8", "int16", "int32", "int64", "uint16"]),
    chunk=small_chunks,
)
def test_documents_of_megatron_are_those_of_its_index(tmp_path_factory, documents, dtype, chunk):
    folder = tmp_path_factory.mktemp("megatron")
    documents = [*documents, [[7, 8]]]
    stem = write_megatron(folder / "text_document", documents, dtype)
    held = write_megatron(folder / "held", [[[5, 6], [2]]], "uint16")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with mock.patch.object(foreign_files, "CHUNK", chunk):
        dataset = imported(folder, [stem], [f"{held}.idx"])
    assert contents(dataset.train) == [flatten(document) for document in documents if flatten(document)]
    assert contents(dataset.validation) == [[5, 6, 2]]
    assert (dataset.train.n_characters, dataset.validation.n_characters) == (None, 3)
    assert dataset.train.n_unknown == flatten(map(flatten, documents)).count(UNKNOWN)
    assert {path: path.read_bytes() for path in before} == before


@settings(max_examples=60)
@given(
    documents=st.lists(text, min_size=1, max_size=6),
    style=st.sampled_from(["before", "after", "around"]),
    kind=st.sampled_from(["nanogpt", "llm.c"]),
    chunk=small_chunks,
)
def test_documents_of_plain_files_are_told_by_their_special_token(tmp_path_factory, documents, style, kind, chunk):
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = Letters(100) if style == "around" else Letters(100, bos_id=EOS)
    before, after = ([] if style == "after" else [tokenizer.bos_id], [] if style == "before" else [EOS])
    framed = [before + ids + after for ids in [[9], *documents]]
    write = write_ids if kind == "nanogpt" else write_llm_c
    train, held = (write(folder / name, flatten(framed)) for name in ("train.bin", "val.bin"))
    with mock.patch.object(foreign_files, "CHUNK", chunk):
        dataset = imported(folder, [train], [held], tokenizer)
    assert contents(dataset.train) == contents(dataset.validation) == framed
    assert dataset.info.bos_id == (None if style == "after" else tokenizer.bos_id)
    assert dataset.validation.n_characters == len(flatten(documents)) + 1


@pytest.mark.slow
@settings(max_examples=60)
@given(
    files=st.lists(st.lists(text, min_size=1, max_size=5), min_size=1, max_size=3),
    kind=st.sampled_from(["megatron", "nanogpt", "llm.c"]),
    fraction=st.sampled_from([0.125, 0.25, 0.5, 0.75]),
    chunk=small_chunks,
)
def test_without_validation_files_the_end_of_the_others_is_for_it(tmp_path_factory, files, kind, fraction, chunk):
    folder = tmp_path_factory.mktemp("cut")
    first, last = ([EOS], []) if kind == "llm.c" else ([], [EOS])
    framed = [[[*first, 5, *ids, *last] for ids in documents] for documents in files]
    names = []
    for number, documents in enumerate(framed):
        if kind == "megatron":
            names.append(write_megatron(folder / str(number), [[document] for document in documents]))
        else:
            write = write_ids if kind == "nanogpt" else write_llm_c
            names.append(write(folder / f"{number}.bin", flatten(documents)))
    documents = flatten(framed)
    starts = list(itertools.accumulate(map(len, documents), initial=0))
    total = starts.pop()
    position = total - max(2, math.ceil(total * fraction))
    kept = [number for number, start in enumerate(starts) if start >= position]
    tokenizer = Letters(100, bos_id=EOS)
    with mock.patch.object(foreign_files, "CHUNK", chunk):
        if position < 2:
            assert "too few" in str(refused(folder, names, (), tokenizer, validation_fraction=fraction))
            return
        dataset = imported(folder, names, (), tokenizer, validation_fraction=fraction)
    if not kept:  # the end of the last document
        cut = position - starts[-1]
        assert contents(dataset.train) == [*documents[:-1], documents[-1][:cut]]
        assert contents(dataset.validation) == [documents[-1][cut:]]
        assert dataset.validation.n_characters == len(documents[-1][cut:]) - documents[-1][cut:].count(EOS)
        return
    assert contents(dataset.train) == documents[: kept[0]]
    assert contents(dataset.validation) == documents[kept[0] :]
    assert dataset.validation.n_characters == sum(len(document) - 1 for document in documents[kept[0] :])


def test_a_shard_that_was_cut_inside_a_document_is_read_like_the_others(tmp_path):
    tokenizer = Letters(100, bos_id=EOS)
    train = write_llm_c(tmp_path / "train_1.bin", [7, 8, EOS, 9, 9, EOS, 5])
    held = write_llm_c(tmp_path / "val_0.bin", [EOS, 3, 4, EOS, 6])
    dataset = imported(tmp_path, [train], [held], tokenizer)
    assert contents(dataset.train) == [[7, 8], [EOS, 9, 9], [EOS, 5]]
    assert contents(dataset.validation) == [[EOS, 3, 4], [EOS, 6]]
    # Without the other file, only the header shows that a token begins documents.
    alone = imported(tmp_path, [train], [], tokenizer, validation_fraction=0.3, overwrite=True)
    assert contents(alone.train) == [[7, 8], [EOS, 9, 9]]
    assert alone.info.bos_id == EOS


def test_llama_files_of_llm_c_hold_ids_of_32_bits(tmp_path):
    ids = [BOS, 70_000, 5, BOS, 6]
    name = write_llm_c(tmp_path / "llama.bin", ids, 20240801, 7)
    held = write_llm_c(tmp_path / "held.bin", ids, 20240801, 7)
    dataset = imported(tmp_path, [name], [held], Letters(100_000))
    assert contents(dataset.train) == [[BOS, 70_000, 5], [BOS, 6]]
    assert dataset.info.dtype == "uint32"


@pytest.mark.parametrize(
    ("types", "vocab_size", "dtype"),
    [
        (["uint16"], 100, "uint16"),
        (["uint16"], 70_000, "uint16"),
        (["int32"], 100, "uint32"),
        (["int32"], 70_000, "uint32"),
        (["int64"], 100, "uint16"),
        (["int64"], 70_000, "uint32"),
        (["uint8", "int16"], 70_000, "uint16"),
        (["uint16", "int64"], 70_000, "uint32"),
        (["uint16", "int32"], 70_000, "uint32"),
        (["uint16", "int32"], 100, "uint16"),
        (["uint16", "int32", "int32"], 100, "uint32"),
    ],
)
def test_the_ids_of_a_dataset_have_the_type_of_most_tokens_that_holds_them_all(tmp_path, types, vocab_size, dtype):
    wide = vocab_size > 2**16
    ids = [[66_000, 5] if wide and np.dtype(kind).itemsize > 2 else [50, 5] for kind in types]
    names = [
        write_megatron(tmp_path / str(n), [[one]], kind) for n, (one, kind) in enumerate(zip(ids, types, strict=True))
    ]
    held = write_megatron(tmp_path / "held", [[[3, 4]]], {"uint16": "uint16", "uint32": "int32"}[dtype])
    dataset = imported(tmp_path, names, [held], Letters(vocab_size))
    assert dataset.info.dtype == dtype
    assert contents(dataset.train) == ids


def test_a_dataset_does_not_need_the_files_that_it_was_imported_from(tmp_path):
    name = write_ids(tmp_path / "train.bin", [5, 6, EOS] * 4)
    held = write_ids(tmp_path / "val.bin", [5, EOS])
    content = (tmp_path / "train.bin").read_bytes()
    dataset = imported(tmp_path, [name], [held])
    assert (dataset.folder / "train" / "tokens-00000.bin").read_bytes() == content
    assert dataset.info.shards["train"][0].tokens_sha256 == hashlib.sha256(content).hexdigest()
    (tmp_path / "train.bin").unlink()
    TokenDataset(dataset.folder).verify()


def test_a_file_that_becomes_shorter_while_it_is_copied_is_named(tmp_path):
    name = write_ids(tmp_path / "train.bin", [5, 6, EOS] * 4)
    opened = foreign_files.open_token_file(name, None)
    os.truncate(name, 8)
    with pytest.raises(UserError, match="became shorter") as error:
        list(opened.pieces(0, 12, foreign_files.Mark(EOS, begins=False)))
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, name)


def test_characters_of_validation_are_counted_by_decoding(tmp_path):
    name = write_ids(tmp_path / "train.bin", [5, UNKNOWN, EOS, 7, 8, EOS])
    with mock.patch("gpt2_flax.data.import_tokens.DECODED", 2):
        dataset = imported(tmp_path, [name], [write_ids(tmp_path / "val.bin", [5, UNKNOWN, 6, EOS, 7, EOS])])
    assert [shard.characters for shard in dataset.info.shards["validation"]] == [4]
    assert dataset.train.n_characters is None
    assert (dataset.train.n_unknown, dataset.validation.n_unknown) == (1, 1)


def test_an_output_is_replaced_only_when_asked_and_never_when_it_holds_a_source(tmp_path):
    name, held = write_ids(tmp_path / "a.bin", [5, 6, EOS] * 2), write_ids(tmp_path / "b.bin", [5, EOS])
    folder = imported(tmp_path, [name], [held]).folder
    with pytest.raises(UserError, match="output folder exists"):
        import_tokens([name], [held], Letters(100), folder)
    inside = write_ids(folder / "c.bin", [5, 6, EOS])
    with pytest.raises(UserError, match="would replace a token file"):
        import_tokens([inside], [held], Letters(100), folder, overwrite=True)
    assert imported(tmp_path, [name], [held], overwrite=True).train.n_documents == 2


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
@pytest.mark.parametrize("head", ["<", ">"])
def test_big_endian_files_of_megatron_are_copied_in_our_order(tmp_path, dtype, head):
    documents = [[[5, 6, 7], [8]], [[9] * 90], [[3, 99]]]
    plain = write_megatron(tmp_path / "plain", documents, dtype)
    swapped = write_megatron(tmp_path / "swapped", documents, dtype, head, ">")
    held = write_megatron(tmp_path / "held", [[[4, 5]]], dtype, head, ">")
    dataset = imported(tmp_path, [swapped], [held])
    assert contents(dataset.train) == list(map(flatten, documents))
    assert contents(dataset.validation) == [[4, 5]]
    assert contents(imported(tmp_path, [plain], [held], overwrite=True).train) == list(map(flatten, documents))


@pytest.mark.parametrize(("magic", "version", "big"), [(20240520, 1, 99), (20240801, 7, 70_000)])
def test_big_endian_files_of_llm_c_are_copied_in_our_order(tmp_path, magic, version, big):
    ids = [EOS, 5, big, 7, EOS, 8, 9]
    name = write_llm_c(tmp_path / "a.bin", ids, magic, version, ">")
    dataset = imported(tmp_path, [name], [], Letters(100_000, bos_id=EOS), validation_fraction=0.3)
    assert (contents(dataset.train), contents(dataset.validation)) == ([ids[:4]], [ids[4:]])
    assert "of another kind" in str(refused(tmp_path / "new", [write_llm_c(tmp_path / "b.bin", ids, magic, 3, ">")]))


def test_tokens_without_ends_are_one_document_whose_end_is_for_validation(tmp_path, capsys):
    ids = [3 + number % 90 for number in range(5000)]
    dataset = imported(tmp_path, [write_ids(tmp_path / "novel.bin", ids)], [])
    assert contents(dataset.train) == [ids[:4950]]
    assert contents(dataset.validation) == [ids[4950:]]
    assert capsys.readouterr().out.startswith("no document begins in the last 50 of 5,000 tokens: they are for valid")


def test_of_a_fraction_of_nought_nothing_is_for_validation(tmp_path):
    name = write_ids(tmp_path / "a.bin", [5, 6, EOS] * 2)
    dataset = imported(tmp_path, [name], [], validation_fraction=0.0)
    assert contents(dataset.train) == [[5, 6, EOS]] * 2
    assert dataset.info.shards["validation"] == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_what_is_no_share_is_an_error_of_usage(tmp_path, fraction):
    name = write_ids(tmp_path / "a.bin", [5, 6, EOS] * 2)
    error = refused(tmp_path, [name], [], code=ExitCode.USAGE, validation_fraction=fraction)
    assert error.where == "--validation-fraction"


# Refused files


def test_missing_files_and_folders_are_refused(tmp_path):
    held = write_ids(tmp_path / "val.bin", [5, EOS])
    missing = str(tmp_path / "missing.bin")
    assert refused(tmp_path, [missing], [held], code=ExitCode.NO_INPUT).where == missing
    index = write_megatron(tmp_path / "lonely", [[[1, 2]]])
    (tmp_path / "lonely.bin").unlink()
    assert refused(tmp_path, [f"{index}.idx"], [held], code=ExitCode.NO_INPUT).where == f"{index}.bin"
    assert refused(tmp_path, [f"{index}.bin"], [held], code=ExitCode.NO_INPUT).where == f"{index}.bin"
    assert refused(tmp_path, [missing[:-4] + ".idx"], [held], code=ExitCode.NO_INPUT)
    assert "not a file" in str(refused(tmp_path, [str(tmp_path)], [held]))


@pytest.mark.parametrize("kind", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("worst", [100, -1])
def test_ids_outside_the_vocabulary_are_refused_by_file_and_id(tmp_path, kind, worst):
    if kind == "uint16" and worst < 0:
        worst = 2**16 - 1
    held = write_ids(tmp_path / "val.bin", [5, EOS])
    name = write_megatron(tmp_path / "bad", [[[5, worst, 7]]], kind)
    error = refused(tmp_path, [name], [held])
    assert f"token id {worst} outside the vocabulary of 100" in str(error)
    assert error.where == f"{name}.bin"


@pytest.mark.parametrize(
    ("magic", "version", "message"),
    [(20240520, 2, "of another kind"), (20240522, 1, "of another kind"), (20240801, 1, "of another kind")],
)
def test_files_of_llm_c_of_another_kind_are_refused(tmp_path, magic, version, message):
    name = write_llm_c(tmp_path / "a.bin", [EOS, 5, 6], magic, version)
    assert message in str(refused(tmp_path, [name]))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"ab", lambda data: data[:900]])
def test_a_file_of_llm_c_of_another_size_than_its_header_says_is_refused(tmp_path, change):
    name = write_llm_c(tmp_path / "a.bin", [EOS, 5, 6])
    path = tmp_path / "a.bin"
    path.write_bytes(change(path.read_bytes()))
    assert "where its header says 1030" in str(refused(tmp_path, [name]))


def test_a_type_of_ids_that_cannot_be_is_refused(tmp_path):
    wide = write_ids(tmp_path / "wide.bin", [5, 6, 7, EOS] * 4, "<u4")
    held = write_ids(tmp_path / "held.bin", [5, EOS], "<u4")
    assert "--dtype uint32" in str(refused(tmp_path, [wide]))
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"123")
    assert "3 bytes are not ids of type uint16" in str(refused(tmp_path, [str(odd)]))
    narrow = write_ids(tmp_path / "narrow.bin", [5, 6, EOS, 7])
    assert "outside the vocabulary" in str(refused(tmp_path, [narrow], [held], dtype="uint32"))
    np.save(tmp_path / "array.npy", np.arange(9, dtype=np.uint16))
    assert "not a plain file of ids" in str(refused(tmp_path, [str(tmp_path / "array.npy")]))
    assert contents(imported(tmp_path, [wide], [held], dtype="uint32").train) == [[5, 6, 7, EOS]] * 4


def test_splits_without_anything_to_predict_are_refused(tmp_path):
    (tmp_path / "empty.bin").touch()
    assert "without tokens" in str(refused(tmp_path, [str(tmp_path / "empty.bin")]))
    one = write_ids(tmp_path / "one.bin", [EOS])
    good = write_ids(tmp_path / "good.bin", [5, 6, EOS])
    assert "for the validation split" in str(refused(tmp_path, [good], [one]))
    assert "for the train split" in str(refused(tmp_path, [one], [good]))
    assert "3 tokens are too few for two splits" in str(refused(tmp_path, [good]))
    assert "given twice" in str(refused(tmp_path, [good], [good], code=ExitCode.USAGE))


def test_a_file_name_that_is_not_utf_8_is_escaped_in_the_sources(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.bin"
    with open(path, "wb") as file:
        file.write(np.array([5, 6, EOS] * 2, "<u2").tobytes())
    dataset = imported(tmp_path, [os.fsdecode(path)], [], validation_fraction=0.5)
    assert dataset.info.sources == [f"{tmp_path}/\\xff.bin"]
