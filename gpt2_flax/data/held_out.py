"""A validation split without whole documents: the last tokens of the last document.

Dimension key: B documents, T tokens.
"""

import math
from pathlib import Path

import numpy as np

from gpt2_flax.data.dataset_info import SPLITS, DatasetInfo, Shard, shard_paths
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.flat_files import FlatFile
from gpt2_flax.data.inspect import decoded
from gpt2_flax.data.output_folder import OutputFolder
from gpt2_flax.data.shard_job import record_name
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.tokenizer import Tokenizer

LEAST = 2  # tokens of a split, so that one can be predicted


def check_fraction(fraction: float) -> None:
    """Raise `UserError` (USAGE) unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        fix = "take 0.01 for a hundredth, 0 for none"
        raise UserError(ExitCode.USAGE, f"not a share from 0 to below 1: {fraction:g}", "--validation-fraction", fix)


def tail_tokens(total: int, fraction: float) -> int | None:
    """Return how many of the last of `total` tokens are for validation; None if there are too few for two splits."""
    held = max(LEAST, math.ceil(total * fraction))
    return held if total - held >= LEAST else None


def hold_out_tail(output: OutputFolder, tokenizer: Tokenizer, info: DatasetInfo, fraction: float) -> DatasetInfo:
    """Move the last `fraction` of all tokens to the validation split, if all documents are in one split.

    The second half of a document that is cut has no `bos_id`. The position of the cut depends only on the tokens. The
    records of shards that change are removed first, so if this call is killed, the next one makes them again.
    Raises `UserError` (DATA) if there are too few tokens.
    """
    split = next(split for split in SPLITS if any(shard.documents for shard in info.shards[split]))
    total = info.n_tokens(split)
    if (held := tail_tokens(total, fraction)) is None:
        fix = "bring more text, or take --validation-fraction 0"
        raise UserError(ExitCode.DATA, f"{total} tokens are too few for two splits", ", ".join(info.sources), fix)
    shards = {split: list(shards) for split, shards in info.shards.items()}
    start = 0
    for index, shard in enumerate(info.shards[split]):
        position = min(max(0, total - held - start), shard.tokens)
        if shard.tokens and position != (shard.tokens if split == "train" else 0):
            output.remove(record_name(index))
            for name, half in zip(SPLITS, _cut(output, tokenizer, info, split, index, position), strict=True):
                shards[name][index] = half
        start += shard.tokens
    return info.model_copy(update={"shards": shards})


def _cut(
    output: OutputFolder, tokenizer: Tokenizer, info: DatasetInfo, split: str, index: int, position: int
) -> list[Shard]:
    """Write a shard again as a training shard of its first `position` tokens and a validation shard of the others."""
    shard, unk_id = info.shards[split][index], info.unk_id
    tokens, offsets = (path.as_posix() for path in shard_paths(Path(), split, index))
    with (
        output.fetched(tokens) as tokens_path,
        output.fetched(offsets) as offsets_path,
        output.staging() as folder,
        ShardWriter(folder, SPLITS[0], index, info.vocab_size, unk_id) as train,
        ShardWriter(folder, SPLITS[1], index, info.vocab_size, unk_id) as validation,
    ):
        starts_B = np.union1d(np.fromfile(offsets_path, "<u8").astype(np.int64), position)
        done = held_characters = 0
        for ids_T in FlatFile(tokens_path, np.dtype(info.dtype).newbyteorder("<"), shard.tokens).opened().chunks():
            cut = min(max(0, position - done), len(ids_T))
            for writer, half_T, first in ((train, ids_T[:cut], done), (validation, ids_T[cut:], done + cut)):
                low, high = np.searchsorted(starts_B, (first, first + len(half_T)))
                writer.add(half_T, starts_B[low:high] - first, 0)
            held_characters += len(decoded(ids_T[cut:], tokenizer))
            done += len(ids_T)
        characters = shard.characters or 0
        held_characters = min(held_characters, characters) if position else characters
        halves = ((train, characters - held_characters), (validation, held_characters))
        return [writer.close().model_copy(update={"characters": count}) for writer, count in halves]
