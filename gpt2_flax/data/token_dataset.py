"""The prepared dataset: every token once, as flat numpy files that any window length can be cut from.

    dataset.json                 counts, dtype, special ids, sha256 of every shard
    tokenizer/                   the tokenizer that made the ids
    train/tokens-00000.bin       ids of whole documents one after the other, little-endian uint16 or uint32
    train/offsets-00000.bin      where each document starts in that shard, little-endian uint64
    validation/...               the same

Every document is `bos ids... eos`. Shards join in order of their numbers into one stream a split.
Dimension key: B rows, S tokens of a window.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import file_sha256

FORMAT = "gpt2_flax token dataset"
MARKER = "dataset.json"
SPLITS = ("train", "validation")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One pair of files; `max_id` is the largest token id inside."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    characters: int = Field(ge=0)
    max_id: int = Field(ge=0)
    tokens_sha256: str
    offsets_sha256: str


class DatasetInfo(_Record):
    """What dataset.json holds. `characters` are Unicode code points of the text, without special tokens."""

    format: Literal["gpt2_flax token dataset"] = FORMAT
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(gt=0, le=2**32)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    tokenizer_fingerprint: str
    sources: list[str] = []
    shards: dict[str, list[Shard]]


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Returns the smallest type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_paths(folder: Path, split: str, index: int) -> tuple[Path, Path]:
    """Returns the token file and the offset file of a shard."""
    return folder / split / f"tokens-{index:05d}.bin", folder / split / f"offsets-{index:05d}.bin"


class ShardWriter:
    """Writes one shard; the files have temporary names until `close` renames them.

    Raises ValueError for an id outside the vocabulary: numpy would wrap it silently. As a context it closes the files
    when the block fails.
    """

    def __init__(self, folder: Path, split: str, index: int, vocab_size: int):
        self._dtype, self._vocab_size = np.dtype(token_dtype(vocab_size)).newbyteorder("<"), vocab_size
        self._paths = shard_paths(folder, split, index)
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(open(_temporary(path), "wb")) for path in self._paths]
            self._open = stack.pop_all()
        self._hashes = [hashlib.sha256(), hashlib.sha256()]
        self._documents = self._tokens = self._characters = self._max_id = 0

    def add(self, ids: np.ndarray, characters: int) -> None:
        """Appends one whole document, special ids included; `characters` is the length of its text."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token ids {low}..{high} do not fit a vocabulary of {self._vocab_size}")
        self._write(1, np.array(self._tokens, "<u8").tobytes())
        self._write(0, ids.astype(self._dtype).tobytes())
        self._documents, self._tokens = self._documents + 1, self._tokens + len(ids)
        self._characters, self._max_id = self._characters + characters, max(self._max_id, high)

    def close(self) -> Shard:
        """Flushes to disk, gives the files their names and returns what dataset.json says of them."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._open.close()
        for path in self._paths:
            _temporary(path).rename(path)
        return Shard(
            documents=self._documents,
            tokens=self._tokens,
            characters=self._characters,
            max_id=self._max_id,
            tokens_sha256=self._hashes[0].hexdigest(),
            offsets_sha256=self._hashes[1].hexdigest(),
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _write(self, which: int, data: bytes) -> None:
        self._files[which].write(data)
        self._hashes[which].update(data)


class TokenSplit:
    """One split as a stream of `n_tokens` tokens, memory-mapped."""

    def __init__(self, folder: Path, name: str, info: DatasetInfo):
        self.name, self.vocab_size, shards = name, info.vocab_size, info.shards[name]
        self.n_documents = sum(shard.documents for shard in shards)
        self.n_characters = sum(shard.characters for shard in shards)
        self.n_tokens = sum(shard.tokens for shard in shards)
        paths = [shard_paths(folder, name, index) for index in range(len(shards))]
        filled = [(shard, *pair) for shard, pair in zip(shards, paths, strict=True) if shard.tokens]
        dtype = np.dtype(info.dtype).newbyteorder("<")
        self._paths = [tokens for _, tokens, _ in filled]
        self._tokens = [_map(path, dtype, shard.tokens) for shard, path, _ in filled]
        self._offsets = [_map(path, np.dtype("<u8"), shard.documents) for shard, _, path in filled]
        self._starts = np.cumsum([0] + [shard.tokens for shard, *_ in filled])  # of shards, in the stream

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns int32 ids of the stream from `start` up to `stop`.

        Raises `UserError` (DATA) for an id outside the vocabulary: JAX would clamp it silently.
        """
        parts = [self._tokens[shard][a:b] for shard, a, b in self._pieces(start, stop)]
        ids = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
        if len(ids) and int(ids.max()) >= self.vocab_size:
            shard = self._pieces(start, stop)[0][0]
            what = f"token id {int(ids.max())} outside the vocabulary of {self.vocab_size}"
            raise UserError(ExitCode.DATA, what, self._paths[shard], "the file is damaged: prepare the dataset again")
        return ids

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Returns the int64 stream positions in [start, stop) where a document starts, ascending."""
        found = []
        for shard, a, b in self._pieces(start, stop):
            low, high = np.searchsorted(self._offsets[shard], np.array((a, b), np.uint64))
            found.append(self._offsets[shard][low:high].astype(np.int64) + self._starts[shard])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 tokens_BS and segments_BS of the windows that begin at `starts` (B,) and are `length` long.

        A segment is a document's part of the window, numbered from 1; what lies past the stream's end is token 0
        in segment 0.
        """
        tokens_BS = np.zeros((len(starts), length), np.int32)
        segments_BS = np.zeros((len(starts), length), np.int32)
        for row, start in enumerate(starts.tolist()):
            stop = max(start, min(start + length, self.n_tokens))
            tokens_BS[row, : stop - start] = self.read(start, stop)
            segments_BS[row, self.document_starts(start + 1, stop) - start] = 1
            segments_BS[row, : stop - start] = np.cumsum(segments_BS[row, : stop - start]) + 1
        return tokens_BS, segments_BS

    def documents(self) -> Iterator[np.ndarray]:
        """Yields the int32 ids of each document, special ids included."""
        bounds = np.append(self.document_starts(0, self.n_tokens), self.n_tokens).tolist()
        for start, stop in itertools.pairwise(bounds):
            yield self.read(start, stop)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The (shard, start in it, stop in it) that make up [start, stop) of the stream."""
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        pieces = []
        for shard in range(first, len(self._tokens)):
            base, end = int(self._starts[shard]), int(self._starts[shard + 1])
            if base >= stop:
                break
            pieces.append((shard, max(start, base) - base, min(stop, end) - base))
        return pieces


class TokenDataset:
    """A prepared dataset folder, opened for reading; sizes are checked at once, checksums by `verify`.

    Raises `UserError`: NO_INPUT when there is none, DATA when it is damaged.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.info = _read_info(self.folder)
        self.train, self.validation = (TokenSplit(self.folder, name, self.info) for name in SPLITS)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def fingerprints(self) -> dict[str, str]:
        """Returns sha256 sums that tell datasets apart: of the tokenizer and of the training tokens."""
        shards = "".join(shard.tokens_sha256 + shard.offsets_sha256 for shard in self.info.shards["train"])
        tokens = hashlib.sha256(shards.encode()).hexdigest()
        return {"tokenizer_fingerprint": self.info.tokenizer_fingerprint, "tokens_fingerprint": tokens}

    def verify(self) -> None:
        """Reads everything and compares sha256; raises `UserError` (DATA) naming the first file that differs."""
        for split, shards in self.info.shards.items():
            for index, shard in enumerate(shards):
                expected = (shard.tokens_sha256, shard.offsets_sha256)
                for path, sha256 in zip(shard_paths(self.folder, split, index), expected, strict=True):
                    if file_sha256(path) != sha256:
                        raise UserError(ExitCode.DATA, "sha256 differs", path, "prepare the dataset again")


def write_info(folder: Path, info: DatasetInfo) -> None:
    """Writes dataset.json, the last file of a dataset."""
    (folder / MARKER).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _read_info(folder: Path) -> DatasetInfo:
    path = folder / MARKER
    try:
        info = DatasetInfo.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(ExitCode.NO_INPUT, "dataset not found", path, "make it with `gpt2-flax prepare`") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(ExitCode.DATA, "damaged dataset", path, f"{where}: {first['msg']}; prepare it again") from None
    except ValueError as error:
        raise UserError(ExitCode.DATA, "damaged dataset", path, f"{error}; prepare it again") from None
    if set(info.shards) != set(SPLITS):
        raise UserError(ExitCode.DATA, "damaged dataset", path, f"shards must have the splits {', '.join(SPLITS)}")
    for split, shards in info.shards.items():
        largest = max((shard.max_id for shard in shards), default=0)
        if largest >= info.vocab_size:
            what = f"token id {largest} in the {split} split outside the vocabulary of {info.vocab_size}"
            raise UserError(ExitCode.DATA, what, path, "prepare the dataset again")
    return info


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(ExitCode.DATA, "shard missing", path, "prepare the dataset again") from None
    if size != count * dtype.itemsize:
        what = f"shard has {size} bytes where dataset.json says {count * dtype.itemsize}"
        raise UserError(ExitCode.DATA, what, path, "prepare the dataset again")
    return np.memmap(path, dtype, mode="r")


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
