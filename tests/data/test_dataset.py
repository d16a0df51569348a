import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.token_datasets import UNKNOWN, add, flat_shard, publish, starts_of, write_dataset

from gpt2_flax.data import dataset as dataset_module
from gpt2_flax.data import flat_files
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import SPLITS, shard_paths
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.flat_files import KEPT_BYTES
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.ragged_ids import token_dtype

VOCABULARIES = st.sampled_from([300, 2**16, 2**16 + 1, 2**17])


@st.composite
def corpora(draw) -> tuple[int, list[list[list[int]]]]:
    """A vocabulary size and shards of documents; the smallest and largest ids are likely."""
    vocab_size = draw(VOCABULARIES)
    ids = st.one_of(st.integers(0, vocab_size - 1), st.sampled_from([0, UNKNOWN, vocab_size - 1]))
    documents = st.lists(ids, min_size=1, max_size=9)
    return vocab_size, draw(st.lists(st.lists(documents, max_size=5), max_size=5))


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    return write_dataset(tmp_path, 100, [[[2, 5, 3], [2, 6, 7, 3]], [], [[2, 99, 3], [2, 4, 8, 3]]])


@pytest.mark.slow
@settings(max_examples=100)
@given(corpus=corpora(), chunk=st.sampled_from([1, 2, 3, 2**20]), data=st.data())
def test_any_part_of_the_stream_is_read_as_it_was_written(tmp_path_factory, corpus, chunk, data):
    vocab_size, shards = corpus
    dataset = write_dataset(tmp_path_factory.mktemp("dataset"), vocab_size, shards)
    split = dataset.train
    documents = list(itertools.chain.from_iterable(shards))
    stream = list(itertools.chain.from_iterable(documents))
    starts = starts_of(documents)
    assert (split.n_documents, split.n_tokens, split.n_characters) == (len(documents), len(stream), 2 * len(documents))
    assert split.n_unknown == stream.count(UNKNOWN)
    assert [ids.tolist() for ids in split.documents()] == documents
    with mock.patch.object(flat_files, "CHUNK", chunk):
        assert [length for lengths_B in split.document_lengths() for length in lengths_B] == list(map(len, documents))
        dataset.verify()
    bounds = list(itertools.pairwise([*starts, len(stream)]))
    assert [split.bounds(number) for number in range(len(documents))] == bounds

    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream) + 2))
    assert split.read(start, stop).tolist() == stream[start:stop]


@pytest.mark.slow
@settings(max_examples=100)
@given(corpus=corpora(), length=st.integers(1, 12), stride=st.sampled_from([1, 2, 3, 32]), data=st.data())
def test_parts_of_the_stream_are_gathered_with_the_places_where_documents_start(
    tmp_path_factory, corpus, length, stride, data
):
    vocab_size, shards = corpus
    kept = KEPT_BYTES if stride == 1 else 0
    with mock.patch.multiple(dataset_module, KEPT_BYTES=kept, STRIDE=stride):
        split = write_dataset(tmp_path_factory.mktemp("dataset"), vocab_size, shards).train
    documents = list(itertools.chain.from_iterable(shards))
    stream = [*itertools.chain.from_iterable(documents), *[0] * 40]
    starts = data.draw(st.lists(st.integers(0, split.n_tokens + 9), max_size=4))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=len(starts), max_size=len(starts)))
    found = split.gather(np.array(starts, np.int64), np.array(lengths, np.int64))
    assert found.dtype == token_dtype(vocab_size)
    expected = [stream[start : start + size] for start, size in zip(starts, lengths, strict=True)]
    assert found.tolist() == list(itertools.chain.from_iterable(expected))

    windows, places = split.document_starts(np.array(starts, np.int64), length)
    first_tokens = set(starts_of(documents))
    assert list(zip(windows.tolist(), places.tolist(), strict=True)) == [
        (window, place)
        for window, start in enumerate(starts)
        for place in range(length)
        if start + place in first_tokens
    ]


@given(documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6), data=st.data())
def test_a_shard_is_the_same_however_its_tokens_come(tmp_path_factory, documents, data):
    stream = np.array(list(itertools.chain.from_iterable(documents)), np.uint16)
    starts = np.array(starts_of(documents), np.int64)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    folder = tmp_path_factory.mktemp("dataset")
    with ShardWriter(folder, "train", 0, 100, UNKNOWN) as writer:
        for start, stop in itertools.pairwise([0, *cuts, len(stream)]):
            writer.add(stream[start:stop], starts[(starts >= start) & (starts < stop)] - start, 1)
        shard = writer.close()
    assert shard == flat_shard(stream, starts.astype("<u8"), characters=len(cuts) + 1)
    tokens, offsets = shard_paths(folder, "train", 0)
    assert tokens.read_bytes() == stream.astype("<u2").tobytes()
    assert offsets.read_bytes() == starts.astype("<u8").tobytes()


def test_a_shard_whose_characters_are_not_known_leaves_those_of_its_split_unknown(tmp_path):
    with ShardWriter(tmp_path, "train", 0, 100, None) as writer:
        add(writer, [[1, UNKNOWN]], None)
        add(writer, [[1]], 1)
        shard = writer.close()
    assert (shard.characters, shard.unknown) == (None, 0)
    assert publish(tmp_path, {"train": [shard], "validation": []}, 100).train.n_characters is None


def test_the_smallest_type_that_holds_every_id_is_taken():
    assert [token_dtype(size) for size in (1, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("ids", [[-1], [100], [3, 2**16], [3, 2**32], [3, -(2**16)]])
def test_an_id_outside_the_vocabulary_is_never_written(tmp_path, ids):
    with ShardWriter(tmp_path, "train", 0, 100, None) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.add(np.array(ids), np.array([0]), 1)


def test_an_id_that_the_type_does_not_hold_is_never_written(tmp_path):
    with ShardWriter(tmp_path, "train", 0, 2**17, None, dtype="uint16") as writer:
        add(writer, [[2**16 - 1]])
        with pytest.raises(ValueError, match="do not fit"):
            add(writer, [[2**16]])


@pytest.mark.parametrize("starts", [[], [1], [-1, 0], [0, 0], [0, 2, 1], [0, 3]])
def test_documents_that_do_not_start_in_order_inside_their_tokens_are_never_written(tmp_path, starts):
    with ShardWriter(tmp_path, "train", 0, 100, None) as writer, pytest.raises(ValueError, match="must ascend"):
        writer.add(np.array([1, 2, 3]), np.array(starts, np.int64), 1)


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    with ShardWriter(tmp_path, "train", 0, 100, None) as writer:
        add(writer, [[1]])
        assert not any(path.exists() for path in shard_paths(tmp_path, "train", 0))
        writer.close()
    assert all(path.exists() for path in shard_paths(tmp_path, "train", 0))


def test_a_shard_is_on_the_disk_before_it_has_its_name_and_its_name_before_close_returns(tmp_path):
    done = []

    def fsync(descriptor):
        done.append(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), tmp_path))

    with mock.patch("os.fsync", fsync), ShardWriter(tmp_path, "train", 0, 100, None) as writer:
        add(writer, [[1]])
        writer.close()
    assert done == ["train/tokens-00000.bin.tmp", "train", "train/offsets-00000.bin.tmp", "train"]


READ_ALL = """
import resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from gpt2_flax.data.dataset import TokenDataset
dataset = TokenDataset(sys.argv[1])
found = []
def read(step):
    for split in (dataset.train, dataset.validation):
        found.append([split.read(start, start + 2).tolist() for start in range(0, split.n_tokens, 2)][::step])
threads = [threading.Thread(target=read, args=(1,)) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 6 and all(rows == [[index % 100, 1] for index in range(len(rows))] for rows in found)
print(dataset.train.n_documents, len(found[0]))
"""


@pytest.mark.multiprocess
def test_thousands_of_shards_are_read_with_few_open_files(tmp_path):
    records = {}
    for split, count in (("train", 3000), ("validation", 100)):
        (tmp_path / split).mkdir()
        for index in range(count):
            tokens, offsets = np.array([index % 100, 1], "<u2"), np.array([0], "<u8")
            for path, numbers in zip(shard_paths(tmp_path, split, index), (tokens, offsets), strict=True):
                path.write_bytes(numbers.tobytes())
            records.setdefault(split, []).append(flat_shard(tokens, offsets))
    publish(tmp_path, records, 100)
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["3000", "3000"]), done.stderr


def test_verify_passes_on_a_whole_dataset_and_names_a_changed_file(dataset):
    dataset.verify()
    for split, index, which in itertools.product(SPLITS, (0, 2), (0, 1)):
        path = shard_paths(dataset.folder, split, index)[which]
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError) as error:
                dataset.verify()
            assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(path))
        path.write_bytes(whole)


@pytest.mark.parametrize("which", [0, 1])
def test_verify_finds_files_that_were_swapped(dataset, which):
    first, third = (shard_paths(dataset.folder, "train", index)[which] for index in (0, 2))
    spare = first.with_name("spare")
    first.rename(spare)
    third.rename(first)
    spare.rename(third)
    if first.read_bytes() != third.read_bytes():
        with pytest.raises(UserError, match="sha256 differs") as error:
            TokenDataset(dataset.folder).verify()
        assert error.value.where == str(first)


@pytest.mark.parametrize(
    ("tokens", "starts", "changes", "message"),
    [
        ([0, 100, 1], [0], {"max_id": 99}, "token id 100 outside the vocabulary of 100"),
        ([0, 50, 1], [0], {"max_id": 51}, "max_id is 50 where dataset.json says 51"),
        ([0, 4, 1], [0], {"unknown": 2}, "unknown is 1 where dataset.json says 2"),
        ([0, 1, 1], [1], {}, "document starts do not ascend"),
        ([0, 1, 1], [0, 2, 2], {}, "document starts do not ascend"),
        ([0, 1, 1], [0, 2, 1], {}, "document starts do not ascend"),
        ([0, 1, 1], [0, 3], {}, "document starts do not ascend"),
        ([0, 1, 1], [0, 2**63], {}, "document starts do not ascend"),
    ],
)
def test_verify_finds_what_was_wrong_from_the_start(tmp_path, tokens, starts, changes, message):
    tokens, starts = np.array(tokens, "<u2"), np.array(starts, "<u8")
    (tmp_path / "train").mkdir()
    for path, numbers in zip(shard_paths(tmp_path, "train", 0), (tokens, starts), strict=True):
        path.write_bytes(numbers.tobytes())
    dataset = publish(tmp_path, {"train": [flat_shard(tokens, starts, **changes)], "validation": []}, 100)
    with pytest.raises(UserError, match=message) as error:
        dataset.verify()
    assert error.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize("change", ["truncated", "longer", "missing", "empty", "a folder"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("split", SPLITS)
def test_a_shard_of_another_size_is_refused_when_opened(dataset, split, which, change):
    path = shard_paths(dataset.folder, split, 0)[which]
    content = path.read_bytes()
    path.unlink()
    if change == "a folder":
        path.mkdir()
    elif change != "missing":
        path.write_bytes({"truncated": content[:-1], "longer": content + b"x", "empty": b""}[change])
    with pytest.raises(UserError) as error:
        TokenDataset(dataset.folder)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.where == str(path)


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_goes_away_while_it_is_in_use_is_named(dataset, which):
    path = shard_paths(dataset.folder, "train", 0)[which]
    path.unlink()
    for use in (dataset.verify, lambda: dataset.train.document_starts(np.array([0]), 5)):
        with pytest.raises(UserError, match="shard missing") as error:
            use()
        assert error.value.where == str(path)


@pytest.mark.parametrize("token", [100, 2**16 - 1])
def test_an_id_outside_the_vocabulary_is_found_when_read(dataset, token):
    path, _ = shard_paths(dataset.folder, "train", 2)
    path.write_bytes(np.array([2, token, 3, 2, 4, 8, 3], "<u2").tobytes())
    split = TokenDataset(dataset.folder).train
    with pytest.raises(UserError, match=f"token id {token} outside the vocabulary of 100") as error:
        split.read(0, split.n_tokens)
    assert error.value.where == str(path)


def test_an_id_that_no_int32_holds_is_found_when_read(tmp_path):
    dataset = write_dataset(tmp_path, 2**17, [[[2, 5, 3]]])
    path, _ = shard_paths(tmp_path, "train", 0)
    path.write_bytes(np.array([2, 2**32 - 1, 3], "<u4").tobytes())
    with pytest.raises(UserError, match="token id 4294967295 outside the vocabulary"):
        dataset.train.read(0, 3)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    starts=st.lists(st.one_of(st.integers(0, 10), st.integers(2**62, 2**64 - 1)), min_size=1, max_size=6),
    first=st.sampled_from([[], [0]]),
    bounds=st.tuples(st.integers(0, 10), st.integers(0, 10)),
    kept=st.sampled_from([0, KEPT_BYTES]),
    chunk=st.sampled_from([1, 2, 2**20]),
)
@example(starts=[2**63 + 5, 7], first=[0], bounds=(4, 10), kept=0, chunk=1)
@example(starts=[5, 2**63], first=[0], bounds=(4, 10), kept=0, chunk=2)
def test_document_starts_are_in_order_or_refused_whatever_their_file_holds(
    tmp_path_factory, starts, first, bounds, kept, chunk
):
    folder, starts = tmp_path_factory.mktemp("dataset"), first + starts
    tokens, offsets = np.ones(10, "<u2"), np.array(starts, "<u8")
    (folder / "train").mkdir()
    for path, numbers in zip(shard_paths(folder, "train", 0), (tokens, offsets), strict=True):
        path.write_bytes(numbers.tobytes())
    start, stop = sorted(bounds)
    with (
        mock.patch("os.fsync"),
        mock.patch.object(dataset_module, "KEPT_BYTES", kept),
        mock.patch.object(flat_files, "CHUNK", chunk),
    ):
        split = publish(folder, {"train": [flat_shard(tokens, offsets)], "validation": []}, 100).train
        windows = np.array([start, 0]), stop - start
        if starts[0] != 0 or starts[-1] >= 10 or starts != sorted(set(starts)):
            for use in (lambda: split.document_starts(np.array([start % 10]), 1), lambda: split.read(0, 1)):
                with pytest.raises(UserError, match="do not ascend") as error:
                    use()
                assert error.value.where == str(shard_paths(folder, "train", 0)[1])
            return
        found = [
            (window, place - first)
            for window, first in enumerate((start, 0))
            for place in starts
            if first <= place < first + stop - start
        ]
        assert list(zip(*split.document_starts(*windows), strict=True)) == found


@pytest.mark.parametrize("starts", [[0, 2**64 - 1], [0, 7], [3, 0], [3, 3]])
def test_document_starts_out_of_order_are_found_when_read(dataset, starts):
    path = shard_paths(dataset.folder, "train", 2)[1]
    path.write_bytes(np.array(starts, "<u8").tobytes())
    split = TokenDataset(dataset.folder).train
    for use in (lambda: list(split.documents()), lambda: list(split.document_lengths())):
        with pytest.raises(UserError, match="do not ascend") as error:
            use()
        assert error.value.where == str(path)
