"""Token files of other programs become a dataset, read where they lie wherever their layout allows.

* Megatron-LM: `NAME.bin` with `NAME.idx`, which knows where documents start.
* llm.c, modded-nanogpt: `.bin` of 256 int32 (magic number, version, how many tokens) and then ids.
* nanoGPT: `.bin` of ids and nothing else.

In the latter two a special token stands before every document, or after it. uint16, uint32 and int32 (of which no id is
negative) stay in their files; ids of other types, and big-endian ones, are copied.
Dimension key: B documents, T tokens.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.dataset_info import MARKER, SPLITS, DatasetInfo, Shard, TokenType, write_info
from gpt2_flax.data.flat_files import FlatFile
from gpt2_flax.data.held_out import check_fraction, tail_tokens
from gpt2_flax.data.megatron import MegatronIndex
from gpt2_flax.data.shards import ShardWriter
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import new_folder, utf8_name
from gpt2_flax.progress import progress_bar
from gpt2_flax.tokenizers.ragged_ids import token_dtype
from gpt2_flax.tokenizers.tokenizer import Tokenizer

LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Types of ids by magic number and version."""

_LLM_C_HEADER = 1024  # bytes
_LLM_C_EVALUATION = 20240522
_IN_PLACE = {"<u2": "uint16", "<u4": "uint32", "<i4": "uint32"}
_DECODED = 2**18  # tokens decoded at once to count characters
_SAMPLE = 2**16  # numbers looked at to tell types apart


class Mark(NamedTuple):
    """The token between documents, which begins one or ends one."""

    token: int
    begins: bool


@dataclass(frozen=True)
class TokenFile:
    """An opened file: its ids, and its index if it has one."""

    ids: FlatFile
    index: MegatronIndex | None = None
    has_header: bool = False

    def token(self, position: int) -> int:
        return int(next(self.ids._replace(first=self.ids.first + position, count=1).chunks())[0])

    def pieces(self, start: int, stop: int, mark: Mark) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields ids_T of the range in pieces, and the int64 starts_B of documents in each; one starts at `start`."""
        position, begins = start, True
        for ids_T in self.ids._replace(first=self.ids.first + start, count=stop - start).chunks():
            if self.index is not None:
                starts_B = self.index.starts(position, position + len(ids_T)) - position
            else:
                starts_B = np.flatnonzero(ids_T == mark.token) + int(not mark.begins)
            if begins and (not len(starts_B) or starts_B[0] != 0):
                starts_B = np.concatenate(([0], starts_B))
            begins = starts_B[-1:].tolist() == [len(ids_T)]
            yield ids_T, starts_B[:-1] if begins else starts_B
            position += len(ids_T)

    def next_start(self, position: int, mark: Mark) -> int | None:
        """Returns the first token from `position` on, which is not 0, that begins a document, if there is one."""
        done = position - 1  # the token before may end a document
        for ids_T, starts_B in self.pieces(done, self.ids.count, mark):
            starts_B = starts_B + done
            if len(later_B := starts_B[starts_B >= position]):
                return int(later_B[0])
            done += len(ids_T)
        return None


class Part(NamedTuple):
    """Tokens [start, stop) of a file."""

    file: TokenFile
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        return (self.stop - self.start) * self.file.ids.dtype.itemsize

    def place(self, kind: TokenType) -> dict[str, Any]:
        """Returns what `ShardWriter` is told so that the tokens stay in their file, if that has the right type."""
        ids = self.file.ids
        return {"file": str(ids.path), "first": ids.first + self.start} if _IN_PLACE.get(ids.dtype.str) == kind else {}


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
    """Writes the dataset folder `output` and returns what its dataset.json says.

    Files are named by `.bin`, `.idx` or the part before that; `dtype`, by default uint16, is that of files without
    header and index. Without `validation` that split gets the last `validation_fraction` of all tokens, from the next
    beginning of a document on, or the end of the last document if none begins there; of a fraction of 0, nothing.
    Raises `UserError`: NO_INPUT for a missing file, DATA for one that is damaged or has ids outside the vocabulary or
    for a split without tokens to predict, USAGE for a fraction that is none, CANT_CREATE as `new_folder` does.
    """
    check_fraction(validation_fraction)
    given = dict(zip(SPLITS, (train, validation), strict=True))
    files = {split: [_open(name, dtype) for name in names] for split, names in given.items()}
    opened = [file for split in SPLITS for file in files[split]]
    _check_places([file.ids.path for file in opened], output)
    mark, bos_id = _framing(files, tokenizer)
    parts = {split: [Part(file, 0, file.ids.count) for file in files[split]] for split in SPLITS}
    if not validation and validation_fraction:
        parts = _cut(files["train"], validation_fraction, mark)
    with new_folder(output, MARKER, overwrite) as folder:
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        kind = _common_type(opened, tokenizer.vocab_size)
        info = DatasetInfo(
            dtype=kind,
            vocab_size=tokenizer.vocab_size,
            bos_id=bos_id,
            eos_id=tokenizer.eos_id,
            unk_id=tokenizer.unk_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            sources=[utf8_name(name) for name in (*train, *validation)],
            shards=_write_shards(folder, parts, kind, tokenizer, mark),
        )
        _check_splits(info)
        counted = {"validation": _with_characters(folder, info, tokenizer)}
        info = info.model_copy(update={"shards": info.shards | counted})
        write_info(folder, info)
    return info


def _open(name: str, dtype: TokenType | None) -> TokenFile:
    stem = name[:-4] if name.endswith((".bin", ".idx")) else name
    has_index = name.endswith(".idx") or Path(stem + ".idx").is_file()
    path, index = Path(stem + ".bin" if has_index else name), Path(stem + ".idx")
    for needed in (path, index) if has_index else (path,):
        if not needed.exists():
            raise UserError(ExitCode.NO_INPUT, "token file not found", needed, "check the name")
        if not needed.is_file():
            raise UserError(ExitCode.DATA, "not a file", needed, "name a file of tokens")
    try:
        file = _with_index(path.resolve(), index) if has_index else _without_index(path.resolve(), dtype)
    except OSError as error:
        raise io_error(error, path) from None
    if not file.ids.count:
        raise UserError(ExitCode.DATA, "token file without tokens", path, "leave it out")
    return file


def _with_index(path: Path, index_path: Path) -> TokenFile:
    index = MegatronIndex(index_path, path)
    return TokenFile(FlatFile(path, index.dtype, index.count, shared=True), index)


def _without_index(path: Path, dtype: TokenType | None) -> TokenFile:
    if path.suffix == ".npy":
        raise UserError(ExitCode.DATA, "not a plain file of ids", path, "write its array with numpy's tofile")
    size, heads = path.stat().st_size, {order: np.fromfile(path, f"{order}i4", 3).tolist() for order in "<>"}
    magics = {_LLM_C_EVALUATION, *(magic for magic, _ in LLM_C)}
    for order in (order for order, head in heads.items() if len(head) == 3 and head[0] in magics):
        magic, version, count = heads[order]
        if (magic, version) not in LLM_C:
            what = f"llm.c file of another kind: magic number {magic}, version {version}"
            raise UserError(ExitCode.DATA, what, path, "give a file of training or validation tokens")
        kind = np.dtype(LLM_C[magic, version]).newbyteorder(order)
        if size != (expected := _LLM_C_HEADER + count * kind.itemsize):
            what = f"token file has {size} bytes where its header says {expected}"
            raise UserError(ExitCode.DATA, what, path, "bring the file whole")
        return TokenFile(FlatFile(path, kind, count, _LLM_C_HEADER // kind.itemsize, True), has_header=True)
    kind = np.dtype(dtype or "uint16").newbyteorder("<")
    if size % kind.itemsize:
        raise UserError(ExitCode.DATA, f"{size} bytes are not ids of type {kind.name}", path, "check --dtype")
    sample = np.fromfile(path, "<u2", _SAMPLE)
    if dtype is None and len(sample) >= 8 and sample.any() and not sample[1::2].any():
        raise UserError(ExitCode.DATA, "token file looks like 32-bit ids, not uint16", path, "add --dtype uint32")
    return TokenFile(FlatFile(path, kind, size // kind.itemsize, shared=True))


def _check_places(paths: Sequence[Path], output: Path) -> None:
    place = os.path.realpath(output)
    for path, count in Counter(paths).items():
        if count > 1:
            raise UserError(ExitCode.USAGE, "token file given twice", path, "leave one out")
        if path.is_relative_to(place):
            what, fix = "the output would replace a token file", "choose another output"
            raise UserError(ExitCode.CANT_CREATE, what, path, fix)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            what, fix = "file name is not UTF-8, so no dataset.json can refer to it", "rename the file"
            raise UserError(ExitCode.DATA, what, os.fsencode(path), fix) from None


def _framing(files: Mapping[str, Sequence[TokenFile]], tokenizer: Tokenizer) -> tuple[Mark, int | None]:
    """Returns what stands between documents of files without an index, and what documents begin with.

    Shards may be cut anywhere, so only the beginning and the end of a split tell.
    """
    first = [split[0].token(0) for split in files.values() if split]
    last = [split[-1].token(split[-1].ids.count - 1) for split in files.values() if split]
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token in first:
            return Mark(token, begins=True), token
    # Programs that write a header put the token before a document.
    if tokenizer.eos_id not in last and any(file.has_header for split in files.values() for file in split):
        return Mark(tokenizer.bos_id, begins=True), tokenizer.bos_id
    return Mark(tokenizer.eos_id, begins=False), None


def _cut(files: Sequence[TokenFile], fraction: float, mark: Mark) -> dict[str, list[Part]]:
    """Gives the end of the files to the validation split."""
    total = sum(file.ids.count for file in files)
    if (held := tail_tokens(total, fraction)) is None:
        fix = "give more files, or take --validation-fraction 0"
        raise UserError(ExitCode.DATA, f"{total} tokens are too few for two splits", files[-1].ids.path, fix)
    position = total - held
    for number, file in enumerate(files):
        if position < file.ids.count:
            start = file.next_start(position, mark) if position else 0
            if start is None and number == len(files) - 1:
                what = f"no document begins in the last {held:,} of {total:,} tokens"
                print(f"{what}: they are for validation all the same", flush=True)
                start = position
            if start is not None:
                before = [Part(file, 0, file.ids.count) for file in files[:number]]
                after = [Part(file, 0, file.ids.count) for file in files[number + 1 :]]
                ours = [Part(file, 0, start)] if start else []
                return {"train": before + ours, "validation": [Part(file, start, file.ids.count), *after]}
            position = file.ids.count
        position -= file.ids.count
    raise AssertionError(position)


def _common_type(files: Sequence[TokenFile], vocab_size: int) -> TokenType:
    """The type that holds every id and leaves most tokens where they are."""
    if token_dtype(vocab_size) == "uint32" and any(file.ids.dtype.itemsize > 2 for file in files):
        return "uint32"
    kept = Counter()
    for file in files:
        kept[_IN_PLACE.get(file.ids.dtype.str)] += file.ids.count
    return "uint32" if kept["uint32"] > kept["uint16"] else "uint16"


def _write_shards(
    folder: Path, parts: Mapping[str, Sequence[Part]], kind: TokenType, tokenizer: Tokenizer, mark: Mark
) -> dict[str, list[Shard]]:
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    size, unknown = tokenizer.vocab_size, tokenizer.unk_id
    with progress_bar("importing", sum(part.n_bytes for split in SPLITS for part in parts[split]), "B") as advance:
        for split in SPLITS:
            for index, part in enumerate(parts[split]):
                with ShardWriter(folder, split, index, size, unknown, dtype=kind, **part.place(kind)) as writer:
                    for ids_T, starts_B in part.file.pieces(part.start, part.stop, mark):
                        _check_ids(ids_T, size, part.file.ids.path)
                        writer.add(ids_T, starts_B, None)
                        advance(ids_T.nbytes)
                    shards[split].append(writer.close())
    return shards


def _check_ids(ids_T: np.ndarray, vocab_size: int, path: Path) -> None:
    low, high = int(ids_T.min()), int(ids_T.max())
    if low < 0 or high >= vocab_size:
        what = f"token id {low if low < 0 else high} outside the vocabulary of {vocab_size}"
        raise UserError(ExitCode.DATA, what, path, "give the tokenizer that made the file; check the type of its ids")


def _check_splits(info: DatasetInfo) -> None:
    for split, shards in info.shards.items():
        if shards and sum(shard.tokens - shard.documents for shard in shards) == 0:
            what, fix = f"no document of two tokens for the {split} split", "give more files"
            raise UserError(ExitCode.DATA, what, ", ".join(info.sources), fix)


def _with_characters(folder: Path, info: DatasetInfo, tokenizer: Tokenizer) -> list[Shard]:
    """Returns the validation shards with the characters that their tokens decode to; an unknown token is one."""
    split, done, counted = TokenSplit(folder, "validation", info), 0, []
    with progress_bar("counting characters", split.n_tokens, "tokens") as advance:
        for shard in info.shards["validation"]:
            characters = shard.unknown
            for document in range(done, done + shard.documents):
                start, stop = split.bounds(document)
                for first in range(start, stop, _DECODED):
                    ids_T = split.read(first, min(stop, first + _DECODED))
                    known_T = ids_T if tokenizer.unk_id is None else ids_T[ids_T != tokenizer.unk_id]
                    characters += len(tokenizer.decode(known_T.tolist()))
                advance(stop - start)
            counted.append(shard.model_copy(update={"characters": characters}))
            done += shard.documents
    return counted
