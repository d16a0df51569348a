"""The prepared dataset: every token once, as flat numpy files that any window length can be cut from.

    dataset.json                 counts, dtype, special ids, sha256 of every shard
    tokenizer/                   the tokenizer that made the ids
    train/tokens-00000.bin       ids of whole documents one after the other, little-endian uint16 or uint32
    train/offsets-00000.bin      where each document starts in that shard, little-endian uint64
    validation/...               the same

A prepared document is `bos ids... eos`. Shards join in order of their numbers into one stream a split, and each that is
not empty begins with a document. The tokens of a shard may lie in a file that is not ours: `Shard.file`.
Dimension key: B rows or documents, S tokens of a window, T tokens.
"""

import bisect
import functools
import hashlib
import itertools
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2_flax.data.dataset_info import SPLITS, DatasetInfo, read_info
from gpt2_flax.data.shards import UNORDERED, outside, shard_files
from gpt2_flax.progress import progress_bar


class TokenSplit:
    """One split as a stream of `n_tokens` tokens, memory-mapped; any number of threads may read.

    Raises `UserError` (DATA) when a file is missing or has another size than dataset.json says.
    """

    def __init__(self, folder: Path, name: str, info: DatasetInfo):
        self.name, self.vocab_size, shards = name, info.vocab_size, info.shards[name]
        self.n_documents = sum(shard.documents for shard in shards)
        self.n_tokens = sum(shard.tokens for shard in shards)
        self.n_unknown = sum(shard.unknown for shard in shards)
        characters = [shard.characters for shard in shards]
        self.n_characters = None if None in characters else sum(characters)
        """None: not known."""
        dtype = np.dtype(info.dtype).newbyteorder("<")
        self.pairs = [shard_files(folder, name, index, shard, dtype) for index, shard in enumerate(shards)]
        for _, *files in self.pairs:
            for file in files:
                file.check()
        self._filled = [pair for pair in self.pairs if pair.shard.tokens]
        # Tokens and documents before each shard.
        self._starts = list(itertools.accumulate((pair.shard.tokens for pair in self._filled), initial=0))
        self._documents = list(itertools.accumulate((pair.shard.documents for pair in self._filled), initial=0))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns int32 ids of the stream from `start` up to `stop`.

        Raises `UserError` (DATA) for an id outside the vocabulary: JAX would clamp it silently.
        """
        parts = []
        for index, a, b in self._pieces(start, stop):
            ids_T = _mapped(self, index)[0][a:b]
            if int(ids_T.max()) >= self.vocab_size:
                raise self._filled[index].tokens.damage(outside(int(ids_T.max()), self.vocab_size))
            parts.append(ids_T)
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Returns the int64 stream positions in [start, stop) where a document starts, ascending."""
        found = []
        for index, a, b in self._pieces(start, stop):
            offsets_B = _mapped(self, index)[1]
            low, high = np.searchsorted(offsets_B, np.array((a, b), np.uint64))
            starts_B = offsets_B[low:high]  # the search has seen that its ends lie in [a, b)
            if (starts_B[1:] <= starts_B[:-1]).any():
                raise self._filled[index].offsets.damage(UNORDERED)
            found.append(starts_B.astype(np.int64) + self._starts[index])
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

    def bounds(self, document: int) -> tuple[int, int]:
        """Returns where in the stream the document of that number, from 0, starts and stops."""
        index = bisect.bisect_right(self._documents, document) - 1
        offsets_B, base = _mapped(self, index)[1], self._starts[index]
        start, *rest = offsets_B[document - self._documents[index] :][:2].tolist()
        stop = rest[0] if rest else self._filled[index].shard.tokens
        if not start < stop <= self._filled[index].shard.tokens:
            raise self._filled[index].offsets.damage(UNORDERED)
        return base + start, base + stop

    def documents(self) -> Iterator[np.ndarray]:
        """Yields the int32 ids of each document, special ids included."""
        return (self.read(*self.bounds(number)) for number in range(self.n_documents))

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Yields the int64 lengths_B of all documents in order, in pieces."""
        for pair in self._filled:
            yield from pair.lengths(pair.offsets.chunks())

    def map(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens and the offsets of a shard that is not empty, memory-mapped."""
        return self._filled[index].tokens.map(), self._filled[index].offsets.map()

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The (shard, start in it, stop in it) that make up [start, stop) of the stream; none is empty."""
        pieces = []
        index = bisect.bisect_right(self._starts, start) - 1
        while start < min(stop, self.n_tokens):
            base, end = self._starts[index], min(stop, self._starts[index + 1])
            pieces.append((index, start - base, end - base))
            index, start = index + 1, end
        return pieces


class TokenDataset:
    """A prepared dataset folder, opened for reading; sizes are checked at once, checksums by `verify`.

    Raises `UserError`: NO_INPUT when there is none, DATA when it is damaged.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.info = read_info(self.folder)
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
        """Reads everything and compares it with dataset.json: sha256, ids, counts, the order of documents.

        Raises `UserError` (DATA) naming the first file that is wrong.
        """
        pairs = self.train.pairs + self.validation.pairs
        total = sum(pair.tokens.n_bytes + pair.offsets.n_bytes for pair in pairs)
        with progress_bar("verifying", total, "B") as advance:
            for pair in pairs:
                pair.verify(self.info.vocab_size, self.info.unk_id, advance)


def _descriptors() -> int:
    """How many files this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 8192 if limit == resource.RLIM_INFINITY else min(limit, 8192)


# A mapped file keeps a descriptor, and a dataset may have thousands: all datasets together take half of what there are.
_mapped = functools.lru_cache(_descriptors() // 4)(TokenSplit.map)
