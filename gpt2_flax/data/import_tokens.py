"""Import of token files of other programs: their tokens are copied into a new dataset.

Dimension key: B documents, T tokens.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.dataset_info import MARKER, SPLITS, DatasetInfo, Shard, TokenType, write_info
from gpt2_flax.data.dataset_writer import ShardWriter
from gpt2_flax.data.foreign_files import Mark, TokenFile, open_token_file
from gpt2_flax.data.held_out import check_fraction, tail_tokens
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import new_folder, utf8_name
from gpt2_flax.progress import progress_bar
from gpt2_flax.tokenizers.ragged_ids import token_dtype
from gpt2_flax.tokenizers.tokenizer import Tokenizer

DECODED = 2**18  # tokens that are decoded at once to count characters


class Slice(NamedTuple):
    """Tokens [start, stop) of a file, which become one shard."""

    file: TokenFile
    start: int
    stop: int


def import_tokens(
    train: Sequence[str],
    validation: Sequence[str],
    tokenizer: Tokenizer,
    output: Path,
    *,
    dtype: TokenType | None = None,
    validation_fraction: float = 0.01,
    overwrite: bool = False,
) -> DatasetInfo:
    """Copy token files into the dataset folder `output` and return the content of its dataset.json.

    Args:
        train: Files of the training split, each named by its `.bin`, its `.idx` or their common stem.
        validation: Files of the validation split. Without any, the split gets the last tokens of the training files.
        tokenizer: The tokenizer that made the ids.
        output: The folder to make.
        dtype: The type of ids in files without header and index; None means uint16.
        validation_fraction: The share of all tokens that goes to validation when `validation` is empty; it begins with
            a document if one begins there. 0 means no validation split.
        overwrite: Whether `output` may replace a dataset.

    Raises:
        UserError: NO_INPUT for a missing file; DATA for a damaged file, an id outside the vocabulary, or a split
            without tokens to predict; USAGE for a wrong fraction or a file given twice; CANT_CREATE as `new_folder`.
    """
    check_fraction(validation_fraction)
    given = dict(zip(SPLITS, (train, validation), strict=True))
    files = {split: [open_token_file(name, dtype) for name in names] for split, names in given.items()}
    every_file = [file for split in SPLITS for file in files[split]]
    _check_places([file.ids.path.resolve() for file in every_file], output)
    mark, bos_id = _framing(files, tokenizer)
    slices = {split: [Slice(file, 0, file.ids.count) for file in files[split]] for split in SPLITS}
    if not validation and validation_fraction:
        slices = _split_tail(files["train"], validation_fraction, mark)
    kind = _token_type(every_file, tokenizer.vocab_size)
    with new_folder(output, MARKER, overwrite) as folder:
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        info = DatasetInfo(
            dtype=kind,
            vocab_size=tokenizer.vocab_size,
            bos_id=bos_id,
            eos_id=tokenizer.eos_id,
            unk_id=tokenizer.unk_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            sources=[utf8_name(name) for name in (*train, *validation)],
            shards=_copy(folder, slices, kind, tokenizer, mark),
        )
        for split, shards in info.shards.items():
            if shards and sum(shard.tokens - shard.documents for shard in shards) == 0:
                what, fix = f"no document of two tokens for the {split} split", "give more files"
                raise UserError(ExitCode.DATA, what, ", ".join(info.sources), fix)
        counted = {"validation": _with_characters(folder, info, tokenizer)}
        info = info.model_copy(update={"shards": info.shards | counted})
        write_info(folder, info)
    return info


def _check_places(paths: Sequence[Path], output: Path) -> None:
    place = os.path.realpath(output)
    for path, count in Counter(paths).items():
        if count > 1:
            raise UserError(ExitCode.USAGE, "token file given twice", path, "leave one out")
        if path.is_relative_to(place):
            what, fix = "the output would replace a token file", "choose another output"
            raise UserError(ExitCode.CANT_CREATE, what, path, fix)


def _framing(files: Mapping[str, Sequence[TokenFile]], tokenizer: Tokenizer) -> tuple[Mark, int | None]:
    """Return the mark between documents in files without an index, and the token that documents begin with, if any.

    Other programs cut files anywhere, so only the first and the last token of a split are evidence.
    """
    first = [split[0].ids.at(0) for split in files.values() if split]
    last = [split[-1].ids.at(split[-1].ids.count - 1) for split in files.values() if split]
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token in first:
            return Mark(token, begins=True), token
    # Programs that write a header put the token before a document.
    if tokenizer.eos_id not in last and any(file.has_header for split in files.values() for file in split):
        return Mark(tokenizer.bos_id, begins=True), tokenizer.bos_id
    return Mark(tokenizer.eos_id, begins=False), None


def _split_tail(files: Sequence[TokenFile], fraction: float, mark: Mark) -> dict[str, list[Slice]]:
    """Cut the training files in two: the last tokens go to the validation split."""
    total = sum(file.ids.count for file in files)
    if (held := tail_tokens(total, fraction)) is None:
        fix = "give more files, or take --validation-fraction 0"
        raise UserError(ExitCode.DATA, f"{total} tokens are too few for two splits", files[-1].ids.path, fix)
    wholes, before = [Slice(file, 0, file.ids.count) for file in files], 0
    for number, file in enumerate(files):
        position = max(0, total - held - before)
        before += file.ids.count
        if position >= file.ids.count:
            continue
        start = file.next_start(position, mark) if position else 0
        if start is None and number == len(files) - 1:
            what = f"no document begins in the last {held:,} of {total:,} tokens"
            print(f"{what}: they are for validation all the same", flush=True)
            start = position
        if start is not None:
            train = [*wholes[:number], *([Slice(file, 0, start)] if start else [])]
            return {"train": train, "validation": [Slice(file, start, file.ids.count), *wholes[number + 1 :]]}
    raise AssertionError(total)


def _token_type(files: Sequence[TokenFile], vocab_size: int) -> TokenType:
    """Return the type in which most tokens come, unless it may be too small for some id.

    Earlier versions chose so to leave most tokens in their files. The choice stays, so that a dataset that is imported
    again keeps its fingerprints.
    """
    if token_dtype(vocab_size) == "uint32" and any(file.ids.dtype.itemsize > 2 for file in files):
        return "uint32"
    tokens = Counter[int]()
    for file in files:
        tokens[file.ids.dtype.itemsize] += file.ids.count
    return "uint32" if tokens[4] > tokens[2] else "uint16"


def _copy(
    folder: Path, slices: Mapping[str, Sequence[Slice]], kind: TokenType, tokenizer: Tokenizer, mark: Mark
) -> dict[str, list[Shard]]:
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    size, total = tokenizer.vocab_size, sum(stop - start for split in SPLITS for _, start, stop in slices[split])
    with progress_bar("importing", total, "tokens") as advance:
        for split in SPLITS:
            for index, (file, start, stop) in enumerate(slices[split]):
                with ShardWriter(folder, split, index, size, tokenizer.unk_id, dtype=kind) as writer:
                    for ids_T, starts_B in file.pieces(start, stop, mark):
                        _check_ids(ids_T, size, file.ids.path)
                        writer.add(ids_T, starts_B, None)
                        advance(len(ids_T))
                    shards[split].append(writer.close())
    return shards


def _check_ids(ids_T: np.ndarray, vocab_size: int, path: Path) -> None:
    low, high = int(ids_T.min()), int(ids_T.max())
    if low < 0 or high >= vocab_size:
        what = f"token id {low if low < 0 else high} outside the vocabulary of {vocab_size}"
        raise UserError(ExitCode.DATA, what, path, "give the tokenizer that made the file; check the type of its ids")


def _with_characters(folder: Path, info: DatasetInfo, tokenizer: Tokenizer) -> list[Shard]:
    """Return the validation shards with the number of characters of their text; an unknown token counts as one."""
    split, done, counted = TokenSplit(folder, "validation", info), 0, []
    with progress_bar("counting characters", split.n_tokens, "tokens") as advance:
        for shard in info.shards["validation"]:
            characters = shard.unknown
            for document in range(done, done + shard.documents):
                start, stop = split.bounds(document)
                for first in range(start, stop, DECODED):
                    ids_T = split.read(first, min(stop, first + DECODED))
                    known_T = ids_T if tokenizer.unk_id is None else ids_T[ids_T != tokenizer.unk_id]
                    characters += len(tokenizer.decode(known_T.tolist()))
                advance(stop - start)
            counted.append(shard.model_copy(update={"characters": characters}))
            done += shard.documents
    return counted
