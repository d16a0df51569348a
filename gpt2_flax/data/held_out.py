"""What is kept from training when no document is: the end of the last one, cut at a number of tokens.

Dimension key: B documents, T tokens.
"""

import math
from pathlib import Path

import numpy as np

from gpt2_flax.data.dataset_info import SPLITS, DatasetInfo, Shard, shard_paths
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.flat_files import FlatFile
from gpt2_flax.data.inspect import decoded
from gpt2_flax.data.output_folder import Storage
from gpt2_flax.data.shard_job import record_name
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.tokenizers.tokenizer import Tokenizer

LEAST = 2  # tokens of a split, so that one can be predicted


def check_fraction(fraction: float) -> None:
    """Raises `UserError` (USAGE) unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        fix = "take 0.01 for a hundredth, 0 for none"
        raise UserError(ExitCode.USAGE, f"not a share from 0 to below 1: {fraction:g}", "--validation-fraction", fix)


def tail_tokens(total: int, fraction: float) -> int | None:
    """Returns how many of the last of `total` tokens are for validation; None when these are too few to be shared."""
    held = max(LEAST, math.ceil(total * fraction))
    return held if total - held >= LEAST else None


def hold_out_tail(storage: Storage, tokenizer: Tokenizer, info: DatasetInfo, fraction: float) -> DatasetInfo:
    """Moves the last `fraction` of all tokens to the validation split, when all documents fell into one split.

    A tail that is cut from a document has no `bos_id`. The place of the cut depends on the tokens alone.
    Records of the units whose shards change are removed first, so that a call that is killed here does them again.
    Raises `UserError` (DATA) when there are too few tokens.
    """
    split = next(split for split in SPLITS if any(shard.documents for shard in info.shards[split]))
    total = sum(shard.tokens for shard in info.shards[split])
    if (held := tail_tokens(total, fraction)) is None:
        fix = "bring more text, or take --validation-fraction 0"
        raise UserError(ExitCode.DATA, f"{total} tokens are too few for two splits", ", ".join(info.sources), fix)
    shards = {split: list(shards) for split, shards in info.shards.items()}
    start = 0
    for index, shard in enumerate(info.shards[split]):
        position = min(max(0, total - held - start), shard.tokens)
        if shard.tokens and position != (shard.tokens if split == "train" else 0):
            storage.remove(record_name(index))
            pair = _cut(storage, tokenizer, info, split, index, position)
            for name, part in zip(SPLITS, pair, strict=True):
                shards[name][index] = part
        start += shard.tokens
    return info.model_copy(update={"shards": shards})


def _cut(
    storage: Storage, tokenizer: Tokenizer, info: DatasetInfo, split: str, index: int, position: int
) -> tuple[Shard, Shard]:
    """Writes a shard anew as two, of the tokens before `position` and those from there on."""
    shard = info.shards[split][index]
    tokens, offsets = (path.as_posix() for path in shard_paths(Path(), split, index))
    with (
        storage.fetched(tokens) as tokens_path,
        storage.fetched(offsets) as offsets_path,
        storage.staging() as folder,
        ShardWriter(folder, SPLITS[0], index, info.vocab_size, info.unk_id) as train,
        ShardWriter(folder, SPLITS[1], index, info.vocab_size, info.unk_id) as validation,
    ):
        starts_B = np.union1d(np.fromfile(offsets_path, "<u8").astype(np.int64), position)
        done = characters = 0
        for ids_T in FlatFile(tokens_path, np.dtype(info.dtype).newbyteorder("<"), shard.tokens).open().chunks():
            cut = min(max(0, position - done), len(ids_T))
            for writer, part_T, first in ((train, ids_T[:cut], done), (validation, ids_T[cut:], done + cut)):
                low, high = np.searchsorted(starts_B, (first, first + len(part_T)))
                writer.add(part_T, starts_B[low:high] - first, 0)
            characters += len(decoded(ids_T[cut:], tokenizer))
            done += len(ids_T)
        characters = min(characters, shard.characters) if position else shard.characters
        counts = shard.characters - characters, characters
        pair = train.close(), validation.close()
    return tuple(part.model_copy(update={"characters": count}) for part, count in zip(pair, counts, strict=True))
