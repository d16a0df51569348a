"""The prepared dataset: every token once, as flat numpy files that any window length can be cut from.

    dataset.json                 counts, dtype, special ids, sha256 of every shard
    tokenizer/                   the tokenizer that made the ids
    train/tokens-00000.bin       ids of whole documents one after the other, little-endian uint16 or uint32
    train/offsets-00000.bin      where each document starts in that shard, little-endian uint64
    validation/...               the same
    packing/...                  made when rows are packed, see `plans`

A prepared document is `bos ids... eos`. Shards join in order of their numbers into one stream a split, and each that is
not empty begins with a document. The tokens of a shard may lie in a file that is not ours: `Shard.file`.
Dimension key: B documents, N parts of the stream, P pieces of them that each lie in one shard, T tokens.
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
        self.folder, self.name, self.vocab_size, shards = folder, name, info.vocab_size, info.shards[name]
        self.n_documents = sum(shard.documents for shard in shards)
        self.n_tokens = sum(shard.tokens for shard in shards)
        self.n_unknown = sum(shard.unknown for shard in shards)
        characters = [shard.characters for shard in shards]
        self.n_characters = None if None in characters else sum(characters)
        """None: not known."""
        self._dtype = np.dtype(info.dtype).newbyteorder("<")
        self.pairs = [shard_files(folder, name, index, shard, self._dtype) for index, shard in enumerate(shards)]
        for _, *files in self.pairs:
            for file in files:
                file.check()
        self._filled = [pair for pair in self.pairs if pair.shard.tokens]
        # Tokens and documents before each shard.
        starts = list(itertools.accumulate((pair.shard.tokens for pair in self._filled), initial=0))
        self._bounds = np.array([*starts, np.iinfo(np.int64).max])
        self._documents = list(itertools.accumulate((pair.shard.documents for pair in self._filled), initial=0))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns int32 ids of the stream from `start` up to `stop` or its end; raises as `gather`."""
        stop = max(start, min(stop, self.n_tokens))
        return self.gather(np.array([start]), np.array([stop - start])).astype(np.int32)

    def gather(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """Returns the tokens of N parts of the stream one after another, in the type of the dataset.

        Past the stream's end is token 0. Raises `UserError` (DATA) for an id outside the vocabulary: JAX would clamp
        it silently.
        """
        _, shards_P, *bounds = self._pieces(starts_N, starts_N + lengths_N)
        shards = {shard: _mapped(self, shard)[0] for shard in set(shards_P.tolist()) - {len(self._filled)}}
        parts = [
            shards[shard][start:stop] if shard in shards else np.zeros(stop - start, self._dtype)
            for shard, start, stop in zip(shards_P.tolist(), *(bound.tolist() for bound in bounds), strict=True)
        ]
        tokens_T = np.concatenate(parts) if parts else np.zeros(0, self._dtype)
        if len(tokens_T) and int(tokens_T.max()) >= self.vocab_size:
            highest = [int(part.max(initial=0)) for part in parts]
            wrong = int(np.argmax(highest))
            raise self._filled[shards_P[wrong]].tokens.damage(outside(highest[wrong], self.vocab_size))
        return tokens_T

    def document_starts(self, starts_N: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where documents start in N windows of `length` tokens that begin at `starts_N`.

        Two int64 arrays, the window and the place in it, in ascending order.
        """
        parts_P, shards_P, a_P, b_P = self._pieces(starts_N, starts_N + length)
        offsets, low_P, high_P = self._search(shards_P, a_P, b_P)
        if (high_P < low_P).any():
            raise self._filled[shards_P[np.argmax(high_P < low_P)]].offsets.damage(UNORDERED)
        spans = zip(shards_P.tolist(), low_P.tolist(), high_P.tolist(), strict=True)
        found = [offsets[shard][low:high] for shard, low, high in spans if high > low]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        in_shard = np.concatenate(found).astype(np.int64)
        piece = np.repeat(np.arange(len(parts_P)), high_P - low_P)
        wrong = (in_shard < a_P[piece]) | (in_shard >= b_P[piece])
        wrong[1:] |= (in_shard[1:] <= in_shard[:-1]) & (piece[1:] == piece[:-1])
        if wrong.any():
            raise self._filled[shards_P[piece[np.argmax(wrong)]]].offsets.damage(UNORDERED)
        windows = parts_P[piece]
        return windows, in_shard + self._bounds[shards_P[piece]] - starts_N[windows]

    def bounds(self, document: int) -> tuple[int, int]:
        """Returns where in the stream the document of that number, from 0, starts and stops."""
        index = bisect.bisect_right(self._documents, document) - 1
        offsets_B, base = _mapped(self, index)[1], int(self._bounds[index])
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

    def _search(
        self, shards_P: np.ndarray, a_P: np.ndarray, b_P: np.ndarray
    ) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
        """The offsets of shards, and which of them, from and up to, lie in each piece if they are in order."""
        order_P = np.argsort(shards_P, kind="stable")
        ordered_P, sought = shards_P[order_P], np.array((a_P, b_P), np.uint64)[:, order_P]
        firsts = np.flatnonzero(np.concatenate(([True], ordered_P[1:] != ordered_P[:-1]))[: len(ordered_P)]).tolist()
        offsets, found = {}, np.zeros(sought.shape, np.int64)
        for first, last in itertools.pairwise([*firsts, len(ordered_P)]):
            shard = int(ordered_P[first])
            if shard < len(self._filled):
                offsets[shard] = _mapped(self, shard)[1]
                found[:, first:last] = offsets[shard].searchsorted(sought[:, first:last])
        restored = np.empty_like(found)
        restored[:, order_P] = found
        return offsets, *restored

    def _pieces(self, starts_N: np.ndarray, stops_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """What parts of the stream are made of: the number of the part, a shard, start and stop in it, in order.

        The shard after the last is what lies past the stream's end.
        """
        first_N = np.searchsorted(self._bounds, starts_N, "right") - 1
        last_N = np.searchsorted(self._bounds, stops_N, "left") - 1
        parts_P, shards_P = np.arange(len(starts_N)), first_N
        if (last_N != first_N).any():
            counts_N = np.maximum(last_N - first_N + 1, 0)
            parts_P, shards_P = np.repeat(parts_P, counts_N), ranges(first_N, counts_N)
            starts_N, stops_N = starts_N[parts_P], np.minimum(stops_N[parts_P], self._bounds[shards_P + 1])
        bases_P = self._bounds[shards_P]
        return parts_P, shards_P, np.maximum(starts_N - bases_P, 0), stops_N - bases_P


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
        """Returns sha256 sums that tell datasets apart: of the tokenizer, the training and the validation tokens."""
        sums = {"tokenizer_fingerprint": self.info.tokenizer_fingerprint}
        for name, split in (("tokens_fingerprint", "train"), ("validation_fingerprint", "validation")):
            shards = "".join(shard.tokens_sha256 + shard.offsets_sha256 for shard in self.info.shards[split])
            sums[name] = hashlib.sha256(shards.encode()).hexdigest()
        return sums

    def verify(self) -> None:
        """Reads everything and compares it with dataset.json: sha256, ids, counts, the order of documents.

        Raises `UserError` (DATA) naming the first file that is wrong.
        """
        pairs = self.train.pairs + self.validation.pairs
        total = sum(pair.tokens.n_bytes + pair.offsets.n_bytes for pair in pairs)
        with progress_bar("verifying", total, "B") as advance:
            for pair in pairs:
                pair.verify(self.info.vocab_size, self.info.unk_id, advance)


def ranges(starts_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """Returns the numbers from each of `starts_N` on, as many as `counts_N` says, one after another."""
    shifts_N = starts_N - (np.cumsum(counts_N) - counts_N)
    return np.repeat(shifts_N, counts_N) + np.arange(counts_N.sum())


def _descriptors() -> int:
    """How many files this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 8192 if limit == resource.RLIM_INFINITY else min(limit, 8192)


# A mapped file keeps a descriptor, and a dataset may have thousands: all datasets together take half of what there are.
_mapped = functools.lru_cache(_descriptors() // 4)(TokenSplit.map)
