"""Small datasets of given documents."""

import hashlib
import itertools
from unittest import mock

import numpy as np

from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import SPLITS, DatasetInfo, Shard, write_info
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.tokenizers.ragged_ids import token_dtype

UNKNOWN = 4


def starts_of(documents: list[list[int]]) -> list[int]:
    return list(itertools.accumulate(map(len, documents), initial=0))[:-1]


def add(writer: ShardWriter, documents: list[list[int]], characters: int | None = 0) -> None:
    flat = np.array(list(itertools.chain.from_iterable(documents)), np.uint32)
    writer.add(flat, np.array(starts_of(documents), np.int64), characters)


def write_dataset(folder, vocab_size: int, shards: list[list[list[int]]]) -> TokenDataset:
    """Write a dataset; its validation split has the first document of each training shard."""
    records = {split: [] for split in SPLITS}
    with mock.patch("os.fsync"):  # hundreds of datasets of a few bytes need not survive a power failure
        for index, split in itertools.product(range(len(shards)), SPLITS):
            chosen = shards[index] if split == "train" else shards[index][:1]
            with ShardWriter(folder, split, index, vocab_size, UNKNOWN) as writer:
                add(writer, chosen, 2 * len(chosen))
                records[split].append(writer.close())
    return publish(folder, records, vocab_size)


def publish(folder, records: dict[str, list[Shard]], vocab_size: int, dtype: str | None = None) -> TokenDataset:
    info = DatasetInfo(
        dtype=dtype or token_dtype(vocab_size),
        vocab_size=vocab_size,
        bos_id=0,
        eos_id=1,
        unk_id=UNKNOWN,
        tokenizer_fingerprint="none",
        shards=records,
    )
    write_info(folder, info)
    return TokenDataset(folder)


def flat_shard(tokens: np.ndarray, starts: np.ndarray, **changes) -> Shard:
    """Return the entry of dataset.json for these arrays, computed from its definition."""
    values = {
        "documents": len(starts),
        "tokens": len(tokens),
        "unknown": tokens.tolist().count(UNKNOWN),
        "characters": 0,
        "max_id": int(tokens.max()),
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "offsets_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
    }
    return Shard(**values | changes)
