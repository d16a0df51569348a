import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_flax.data.token_dataset import (
    MARKER,
    SPLITS,
    DatasetInfo,
    ShardWriter,
    TokenDataset,
    shard_paths,
    token_dtype,
    write_info,
)
from gpt2_flax.errors import ExitCode, UserError

VOCABULARIES = st.sampled_from([300, 2**16, 2**16 + 1, 2**17])


@st.composite
def corpora(draw) -> tuple[int, list[list[list[int]]]]:
    """A vocabulary size and shards of documents; ids are drawn with their extremes."""
    vocab_size = draw(VOCABULARIES)
    ids = st.one_of(st.integers(0, vocab_size - 1), st.sampled_from([0, vocab_size - 1]))
    documents = st.lists(ids, min_size=1, max_size=9)
    return vocab_size, draw(st.lists(st.lists(documents, max_size=5), max_size=5))


def write_dataset(folder, vocab_size: int, shards: list[list[list[int]]]) -> TokenDataset:
    records = {split: [] for split in SPLITS}
    for index, documents in enumerate(shards):
        for split in SPLITS:
            with ShardWriter(folder, split, index, vocab_size) as writer:
                for document in documents if split == "train" else []:
                    writer.add(np.array(document), characters=2)
                records[split].append(writer.close())
    info = DatasetInfo(
        dtype=token_dtype(vocab_size),
        vocab_size=vocab_size,
        bos_id=0,
        eos_id=1,
        tokenizer_fingerprint="none",
        shards=records,
    )
    write_info(folder, info)
    return TokenDataset(folder)


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    return write_dataset(tmp_path, 100, [[[2, 5, 3], [2, 6, 7, 3]], [], [[2, 99, 3]]])


@settings(max_examples=100)
@given(corpus=corpora(), data=st.data())
def test_any_part_of_the_stream_is_read_as_it_was_written(tmp_path_factory, corpus, data):
    vocab_size, shards = corpus
    split = write_dataset(tmp_path_factory.mktemp("dataset"), vocab_size, shards).train
    documents = list(itertools.chain.from_iterable(shards))
    stream = list(itertools.chain.from_iterable(documents))
    starts = [0, *itertools.accumulate(map(len, documents))][:-1] if documents else []
    assert (split.n_documents, split.n_tokens, split.n_characters) == (len(documents), len(stream), 2 * len(documents))
    assert [ids.tolist() for ids in split.documents()] == documents

    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert split.read(start, stop).tolist() == stream[start:stop]
    assert split.document_starts(start, stop).tolist() == [place for place in starts if start <= place < stop]


@settings(max_examples=100)
@given(corpus=corpora(), length=st.integers(1, 12), data=st.data())
def test_windows_number_their_documents_from_one_and_fill_the_end_with_zero(tmp_path_factory, corpus, length, data):
    vocab_size, shards = corpus
    split = write_dataset(tmp_path_factory.mktemp("dataset"), vocab_size, shards).train
    owner = [n for n, document in enumerate(itertools.chain.from_iterable(shards)) for _ in document]
    stream = [token for document in itertools.chain.from_iterable(shards) for token in document]
    positions = st.lists(st.integers(0, max(0, len(stream) - 1)), max_size=4) if stream else st.just([])
    starts = data.draw(positions)
    tokens_BS, segments_BS = split.windows(np.array(starts, np.int64), length)
    assert tokens_BS.shape == segments_BS.shape == (len(starts), length)
    assert tokens_BS.dtype == segments_BS.dtype == np.int32
    for start, tokens_S, segments_S in zip(starts, tokens_BS.tolist(), segments_BS.tolist(), strict=True):
        window, owners = stream[start : start + length], owner[start : start + length]
        padding = [0] * (length - len(window))
        assert tokens_S == window + padding
        assert segments_S == [document - owners[0] + 1 for document in owners] + padding


def test_the_smallest_type_that_holds_every_id_is_taken():
    assert [token_dtype(size) for size in (1, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("ids", [[-1], [100], [3, 2**16], [3, 2**32]])
def test_an_id_outside_the_vocabulary_is_never_written(tmp_path, ids):
    with ShardWriter(tmp_path, "train", 0, 100) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.add(np.array(ids), characters=1)


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    with ShardWriter(tmp_path, "train", 0, 100) as writer:
        writer.add(np.array([1]), characters=1)
        assert not any(path.exists() for path in shard_paths(tmp_path, "train", 0))
        writer.close()
    assert all(path.exists() for path in shard_paths(tmp_path, "train", 0))


def test_verify_passes_on_a_whole_dataset_and_names_a_changed_file(dataset):
    dataset.verify()
    for path in shard_paths(dataset.folder, "train", 2):
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(UserError, match="sha256 differs") as error:
            dataset.verify()
        assert error.value.where == str(path)
        path.write_bytes(whole)


@pytest.mark.parametrize("change", ["truncated", "longer", "missing"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_shard_of_another_size_is_refused_when_opened(dataset, change, which):
    path = shard_paths(dataset.folder, "train", 0)[which]
    content = path.read_bytes()
    path.unlink() if change == "missing" else path.write_bytes(
        content[:-1] if change == "truncated" else content + b"x"
    )
    with pytest.raises(UserError) as error:
        TokenDataset(dataset.folder)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == str(path)


def test_an_id_outside_the_vocabulary_is_found_when_read(dataset):
    path, _ = shard_paths(dataset.folder, "train", 2)
    path.write_bytes(np.array([2, 100, 3], "<u2").tobytes())
    split = TokenDataset(dataset.folder).train
    with pytest.raises(UserError, match="token id 100 outside the vocabulary of 100"):
        split.read(0, split.n_tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "another"},
        {"dtype": "float32"},
        {"vocab_size": "100"},
        {"vocab_size": -1},
        {"vocab_size": 99},
        {"shards": {"train": []}},
        {"surprise": 1},
        {"bos_id": None},
    ],
)
def test_a_damaged_dataset_json_is_refused(dataset, change):
    path = dataset.folder / MARKER
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        TokenDataset(dataset.folder)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == str(path)


def test_a_folder_without_dataset_json_is_no_dataset(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="dataset not found") as error:
            TokenDataset(folder)
        assert error.value.exit_code == ExitCode.NO_INPUT
