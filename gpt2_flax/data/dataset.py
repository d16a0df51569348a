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
from typing import TYPE_CHECKING

import numpy as np

from gpt2_flax.data.dataset_info import MARKER, SPLITS, DatasetInfo, read_info
from gpt2_flax.data.flat_files import KEPT_BYTES, OpenFile, gather, ranges
from gpt2_flax.data.integrity import FirstUse, Watch
from gpt2_flax.data.shards import OFFSET, UNORDERED, outside, shard_files
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.progress import progress_bar

if TYPE_CHECKING:
    from gpt2_flax.tokenizers.tokenizer import Tokenizer

_STRIDE = 32  # of so many document starts one is kept in memory, where all of a split are too many


class TokenSplit:
    """One split as a stream of `n_tokens` tokens; any number of threads may read.

    Raises `UserError` (DATA) when a file is missing or has another size than dataset.json says; all that reads raises
    it when a file has become shorter, and when the offsets of a shard that is used first are damaged.
    """

    def __init__(self, folder: Path, name: str, info: DatasetInfo, watch: Watch | None = None):
        self.folder, self.name, self.vocab_size, shards = folder, name, info.vocab_size, info.shards[name]
        self.n_documents = sum(shard.documents for shard in shards)
        self.n_tokens = sum(shard.tokens for shard in shards)
        self.n_unknown = sum(shard.unknown for shard in shards)
        characters = [shard.characters for shard in shards]
        self.n_characters = None if None in characters else sum(characters)
        """None: not known."""
        self._dtype = np.dtype(info.dtype).newbyteorder("<")
        self.pairs = [shard_files(folder, name, index, shard, self._dtype) for index, shard in enumerate(shards)]
        self.watch = watch or Watch()
        """Of all files that are read."""
        for _, *files in self.pairs:
            for file in files:
                file.check()
                self.watch.add(file.path, file.verify)
        self._unk_id, self._first_use = info.unk_id, None
        self._filled = [pair for pair in self.pairs if pair.shard.tokens]
        # Tokens and documents before each shard.
        starts = list(itertools.accumulate((pair.shard.tokens for pair in self._filled), initial=0))
        self._bounds = np.array([*starts, np.iinfo(np.int64).max])
        self._documents = list(itertools.accumulate((pair.shard.documents for pair in self._filled), initial=0))
        # Each `_stride`-th start of a document in the stream, and how many of them are before each shard. Until a shard
        # is used they are where it begins, which keeps the order.
        self._counts = np.array([*(pair.shard.documents for pair in self._filled), 0])
        self._stride = 1 if self.n_documents * OFFSET.itemsize <= KEPT_BYTES else _STRIDE
        n_marks = -(-self._counts // self._stride)
        self._first_marks = np.cumsum(n_marks) - n_marks
        self._marks = np.append(np.repeat(self._bounds[:-1], n_marks), self.n_tokens)
        self._used: set[int] = set()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns int32 ids of the stream from `start` up to `stop` or its end; raises as `gather`."""
        stop = max(start, min(stop, self.n_tokens))
        return self.gather(np.array([start]), np.array([stop - start])).astype(np.int32)

    def gather(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """Returns the tokens of N parts of the stream one after another, in the type of the dataset.

        Past the stream's end is token 0. Raises `UserError` (DATA) for an id outside the vocabulary: JAX would clamp
        it silently.
        """
        if self._first_use is not None:
            self._first_use.raise_failure()
        _, shards_P, starts_P, stops_P = self._pieces(starts_N, starts_N + lengths_N)
        opened = {shard: files[0] for shard, files in self._opened(shards_P).items()}
        tokens_T = gather(opened, shards_P, starts_P, stops_P, self._dtype)
        if len(tokens_T) and int(highest := tokens_T.max()) >= self.vocab_size:
            wrong = np.searchsorted(np.cumsum(stops_P - starts_P), tokens_T.argmax(), "right")
            raise self._filled[shards_P[wrong]].tokens.damage(outside(int(highest), self.vocab_size))
        return tokens_T

    def document_starts(self, starts_N: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where documents start in N windows of `length` tokens that begin at `starts_N`.

        Two int64 arrays, the window and the place in it, in ascending order.
        """
        parts_P, shards_P, a_P, b_P = self._pieces(starts_N, starts_N + length)
        opened = {shard: files[1] for shard, files in self._opened(shards_P).items()}
        if self._stride == 1:
            low_N, high_N = self._marks[:-1].searchsorted((starts_N, starts_N + length))
            windows = np.repeat(np.arange(len(starts_N)), high_N - low_N)
            return windows, self._marks[ranges(low_N, high_N - low_N)] - starts_N[windows]
        bases_P, firsts_P, stride = self._bounds[shards_P], self._first_marks[shards_P], self._stride
        marks_P = self._marks.searchsorted(bases_P + a_P, "right") - 1
        low_P = (marks_P - firsts_P) * stride
        high_P = (self._marks.searchsorted(bases_P + b_P) - firsts_P) * stride
        counts_P = np.minimum(high_P, self._counts[shards_P]) - low_P
        in_shard = gather(opened, shards_P, low_P, low_P + counts_P, OFFSET).view("<i8")
        read_P = counts_P.nonzero()[0]
        firsts = (np.cumsum(counts_P) - counts_P)[read_P]
        ascends = np.ones(len(in_shard), bool)
        ascends[1:] = in_shard[1:] > in_shard[:-1]
        ascends[firsts] = in_shard[firsts] == (self._marks[marks_P] - bases_P)[read_P]
        if not ascends.all():
            wrong = read_P[firsts.searchsorted(ascends.argmin(), "right") - 1]
            raise self._filled[shards_P[wrong]].offsets.damage(UNORDERED)
        inside = ((in_shard >= np.repeat(a_P, counts_P)) & (in_shard < np.repeat(b_P, counts_P))).nonzero()[0]
        piece = read_P[firsts.searchsorted(inside, "right") - 1]
        windows = parts_P[piece]
        return windows, in_shard[inside] + bases_P[piece] - starts_N[windows]

    def bounds(self, document: int) -> tuple[int, int]:
        """Returns where in the stream the document of that number, from 0, starts and stops."""
        index = bisect.bisect_right(self._documents, document) - 1
        shard, first, base = self._filled[index].shard, document - self._documents[index], int(self._bounds[index])
        start, *rest = _open(self, index)[1].read(first, min(first + 2, shard.documents)).tolist()
        stop = rest[0] if rest else shard.tokens
        if not start < stop <= shard.tokens:
            raise self._filled[index].offsets.damage(UNORDERED)
        return base + start, base + stop

    def documents(self) -> Iterator[np.ndarray]:
        """Yields the int32 ids of each document, special ids included."""
        return (self.read(*self.bounds(number)) for number in range(self.n_documents))

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Yields the int64 lengths_B of all documents in order, in pieces."""
        for pair in self._filled:
            yield from pair.lengths()

    def check_at_first_use(self, first_use: FirstUse) -> None:
        """From now on `first_use` verifies each shard that is used, once."""
        self._first_use = first_use
        for index in list(self._used):
            self._verify_later(index)

    def open_shard(self, index: int) -> tuple[OpenFile, OpenFile]:
        """Opens the tokens and the offsets of a shard that is not empty, whose offsets are verified if it is new."""
        pair = self._filled[index]
        files = pair.tokens.opened(), pair.offsets.opened()
        if index not in self._used:
            first = self._first_marks[index]
            marks = self._bounds[index] + pair.every(self._stride)
            self._marks[first : first + len(marks)] = marks
            self._used.add(index)
            self._verify_later(index)
        return files

    def _verify_later(self, index: int) -> None:
        if self._first_use is not None:
            self._first_use.add(functools.partial(self._filled[index].verify, self.vocab_size, self._unk_id))

    def _opened(self, shards_P: np.ndarray) -> dict[int, tuple[OpenFile, OpenFile]]:
        """The files of shards; what lies past the stream's end has none."""
        return {shard: _open(self, shard) for shard in set(shards_P.tolist()) if shard < len(self._filled)}

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
        self._watch = Watch()
        self._watch.add_content(self.folder / MARKER)
        for path in sorted(self.tokenizer_folder.glob("*")):
            if path.is_file():
                self._watch.add_content(path)
        self.train, self.validation = (TokenSplit(self.folder, name, self.info, self._watch) for name in SPLITS)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def tokenizer(self) -> "Tokenizer":
        """Return the tokenizer of the dataset; raise `UserError` (DATA) when it is missing or is another tokenizer."""
        from gpt2_flax.tokenizers.tokenizer import load_tokenizer  # readers of tokens need no tokenizer

        tokenizer = load_tokenizer(self.tokenizer_folder)
        if tokenizer.fingerprint != self.info.tokenizer_fingerprint:
            what = f"tokenizer is not the one that {MARKER} names"
            raise UserError(ExitCode.DATA, what, self.tokenizer_folder, "prepare the dataset again")
        return tokenizer

    def fingerprints(self) -> dict[str, str]:
        """Returns sha256 sums that tell datasets apart: of the tokenizer, the training and the validation tokens."""
        sums = {"tokenizer_fingerprint": self.info.tokenizer_fingerprint}
        for name, split in (("tokens_fingerprint", "train"), ("validation_fingerprint", "validation")):
            shards = "".join(shard.tokens_sha256 + shard.offsets_sha256 for shard in self.info.shards[split])
            sums[name] = hashlib.sha256(shards.encode()).hexdigest()
        return sums

    def check_unchanged(self) -> None:
        """Raises `UserError` (DATA) that names a file which changed since it was opened; reads none that did not."""
        self._watch.check()

    def verify(self, *splits: TokenSplit) -> None:
        """Reads all of some splits, by default both, and compares: sha256, ids, counts, the order of documents.

        Raises `UserError` (DATA) naming the first file that is wrong.
        """
        pairs = [pair for split in splits or (self.train, self.validation) for pair in split.pairs]
        total = sum(pair.tokens.n_bytes + pair.offsets.n_bytes for pair in pairs)
        with progress_bar("verifying", total, "B") as advance:
            for pair in pairs:
                pair.verify(self.info.vocab_size, self.info.unk_id, advance)


def _descriptors() -> int:
    """How many files this process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 8192 if limit == resource.RLIM_INFINITY else min(limit, 8192)


# A dataset may have thousands of files: all datasets together keep half of the descriptors that there are.
_open = functools.lru_cache(_descriptors() // 4)(TokenSplit.open_shard)
