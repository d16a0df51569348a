"""A prepared dataset, opened for reading: every token once, in flat files from which any window can be read.

    dataset.json                 counts, dtype, special ids, sha256 of every shard
    tokenizer/                   the tokenizer that made the ids
    train/tokens-00000.bin       ids of whole documents, concatenated: little-endian uint16 or uint32
    train/offsets-00000.bin      the position in that shard at which each document starts: little-endian uint64
    validation/...               the same
    packing/...                  made when a run packs rows, see `row_index`

A prepared document is `bos ids... eos`. The shards of a split form one stream, in the order of their numbers. A shard
that is not empty begins with a document.
Dimension key: B documents, N windows of the stream, P pieces of windows that each lie in one shard, T tokens.
"""

import bisect
import functools
import hashlib
import itertools
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpt2_flax.data.dataset_info import MARKER, OFFSET, SPLITS, DatasetInfo, Shard, read_info, shard_paths, sum_if_known
from gpt2_flax.data.flat_files import KEPT_BYTES, Advance, FlatFile, OpenFile, gather, ignore, ranges
from gpt2_flax.data.integrity import FirstUse, Watch
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.progress import progress_bar

if TYPE_CHECKING:
    from gpt2_flax.tokenizers.tokenizer import Tokenizer

STRIDE = 32  # if all document starts of a split are too many for memory, one of so many is kept there


class ShardFiles(NamedTuple):
    """A shard's entry in dataset.json and its two files."""

    shard: Shard
    tokens: FlatFile
    offsets: FlatFile

    def starts(self, advance: Advance = ignore) -> Iterator[np.ndarray]:
        """Yield the document starts, int64, in arrays of bounded size.

        Raises:
            UserError: DATA if the starts do not ascend from 0 to below the number of tokens, or their sha256 differs.
        """
        last = None
        for starts_B in self.offsets.opened().chunks(advance):
            follows = starts_B[0] == 0 if last is None else starts_B[0] > last
            last = starts_B[-1]
            if not follows or last >= self.shard.tokens or (starts_B[1:] <= starts_B[:-1]).any():
                raise self.unordered()
            yield starts_B.astype(np.int64)

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the document lengths in tokens, int64, in arrays of bounded size; raises as `starts`."""
        before_B = np.zeros(0, np.int64)
        for starts_B in itertools.chain(self.starts(), [np.array([self.shard.tokens])]):
            bounds_B = np.concatenate((before_B, starts_B))
            yield np.diff(bounds_B)
            before_B = bounds_B[-1:]

    def verify(self, vocab_size: int, unk_id: int | None, advance: Advance = ignore) -> None:
        """Read both files whole; raise `UserError` (DATA) if they differ from dataset.json."""
        max_id = unknown = 0
        for ids_T in self.tokens.opened().chunks(advance):
            max_id = max(max_id, int(ids_T.max()))
            unknown += int(np.count_nonzero(ids_T == (-1 if unk_id is None else unk_id)))
        if max_id >= vocab_size:
            raise self.outside(max_id, vocab_size)
        for name, found in (("max_id", max_id), ("unknown", unknown)):
            if found != (recorded := getattr(self.shard, name)):
                raise self.tokens.damage(f"{name} is {found} where dataset.json says {recorded}")
        for _ in self.starts(advance):
            pass

    def unordered(self) -> UserError:
        return self.offsets.damage("document starts do not ascend from 0 to below the number of tokens")

    def outside(self, token: int, vocab_size: int) -> UserError:
        return self.tokens.damage(f"token id {token} outside the vocabulary of {vocab_size}")


class TokenSplit:
    """One split as a stream of `n_tokens` tokens; any number of threads may read it.

    The constructor raises `UserError` (DATA) if a file is missing or its size differs from dataset.json. Every method
    that reads raises it if a file has become shorter, or if the offsets of a shard are damaged when it is first used.
    """

    def __init__(self, folder: Path, name: str, info: DatasetInfo, watch: Watch | None = None):
        self.folder, self.name, self.vocab_size, shards = folder, name, info.vocab_size, info.shards[name]
        self.n_documents = sum(shard.documents for shard in shards)
        self.n_tokens = sum(shard.tokens for shard in shards)
        self.n_unknown = sum(shard.unknown for shard in shards)
        self.n_characters = sum_if_known(shard.characters for shard in shards)
        """None if it is not known."""
        self._unk_id, self._dtype = info.unk_id, np.dtype(info.dtype).newbyteorder("<")
        self.watch = watch or Watch()
        """Watches all files of the split."""
        self.shards: list[ShardFiles] = []
        for index, shard in enumerate(shards):
            tokens, offsets = shard_paths(folder, name, index)
            files = ShardFiles(
                shard,
                FlatFile(tokens, self._dtype, shard.tokens, shard.tokens_sha256),
                FlatFile(offsets, OFFSET, shard.documents, shard.offsets_sha256),
            )
            self.shards.append(files)
            for file in (files.tokens, files.offsets):
                file.check()
                self.watch.add(file.path, file.verify)
        self._filled = [files for files in self.shards if files.shard.tokens]
        self._used: set[int] = set()  # numbers of shards in `_filled`
        self._first_use: FirstUse | None = None
        # The number of tokens and of documents before each shard.
        starts = list(itertools.accumulate((files.shard.tokens for files in self._filled), initial=0))
        self._bounds = np.array([*starts, np.iinfo(np.int64).max])
        self._documents = list(itertools.accumulate((files.shard.documents for files in self._filled), initial=0))
        # Marks: each `_stride`-th document start in the stream. Until a shard is used, all its marks are its own start,
        # which keeps them in order.
        self._counts = np.array([*(files.shard.documents for files in self._filled), 0])
        self._stride = 1 if self.n_documents * OFFSET.itemsize <= KEPT_BYTES else STRIDE
        n_marks = -(-self._counts // self._stride)
        self._first_marks = np.cumsum(n_marks) - n_marks  # the number of marks before each shard
        self._marks = np.append(np.repeat(self._bounds[:-1], n_marks), self.n_tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the int32 ids of the stream from `start` to `stop` or to its end; raises as `gather`."""
        stop = max(start, min(stop, self.n_tokens))
        return self.gather(np.array([start]), np.array([stop - start])).astype(np.int32)

    def gather(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """Return the tokens of N windows of the stream, concatenated, in the dtype of the dataset.

        Tokens past the end of the stream are 0. Raises `UserError` (DATA) for an id outside the vocabulary, which JAX
        would clamp silently.
        """
        if self._first_use is not None:
            self._first_use.raise_failure()
        _, shards_P, starts_P, stops_P = self._pieces(starts_N, starts_N + lengths_N)
        files = {shard: _open(self._filled[shard].tokens) for shard in self._use(shards_P)}
        tokens_T = gather(files, shards_P, starts_P, stops_P, self._dtype)
        if len(tokens_T) and int(highest := tokens_T.max()) >= self.vocab_size:
            wrong = np.searchsorted(np.cumsum(stops_P - starts_P), tokens_T.argmax(), "right")
            raise self._filled[shards_P[wrong]].outside(int(highest), self.vocab_size)
        return tokens_T

    def document_starts(self, starts_N: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the document starts in N windows of `length` tokens that begin at `starts_N`.

        Returns:
            Two int64 arrays, the window of each document start and its position in the window, in ascending order.
        """
        windows_P, shards_P, a_P, b_P = self._pieces(starts_N, starts_N + length)
        used = self._use(shards_P)
        if self._stride == 1:
            low_N, high_N = self._marks[:-1].searchsorted((starts_N, starts_N + length))
            windows = np.repeat(np.arange(len(starts_N)), high_N - low_N)
            return windows, self._marks[ranges(low_N, high_N - low_N)] - starts_N[windows]
        # Read the starts from the last mark before each piece to the first mark after it.
        bases_P, firsts_P, stride = self._bounds[shards_P], self._first_marks[shards_P], self._stride
        marks_P = self._marks.searchsorted(bases_P + a_P, "right") - 1
        low_P = (marks_P - firsts_P) * stride
        high_P = (self._marks.searchsorted(bases_P + b_P) - firsts_P) * stride
        counts_P = np.minimum(high_P, self._counts[shards_P]) - low_P
        files = {shard: _open(self._filled[shard].offsets) for shard in used}
        in_shard = gather(files, shards_P, low_P, low_P + counts_P, OFFSET).view("<i8")
        read_P = counts_P.nonzero()[0]
        firsts = (np.cumsum(counts_P) - counts_P)[read_P]
        ascends = np.ones(len(in_shard), bool)
        ascends[1:] = in_shard[1:] > in_shard[:-1]
        ascends[firsts] = in_shard[firsts] == (self._marks[marks_P] - bases_P)[read_P]
        if not ascends.all():
            wrong = read_P[firsts.searchsorted(ascends.argmin(), "right") - 1]
            raise self._filled[shards_P[wrong]].unordered()
        inside = ((in_shard >= np.repeat(a_P, counts_P)) & (in_shard < np.repeat(b_P, counts_P))).nonzero()[0]
        piece = read_P[firsts.searchsorted(inside, "right") - 1]
        windows = windows_P[piece]
        return windows, in_shard[inside] + bases_P[piece] - starts_N[windows]

    def bounds(self, document: int) -> tuple[int, int]:
        """Return the start and the end in the stream of a document, which is numbered from 0."""
        index = bisect.bisect_right(self._documents, document) - 1
        self._use(np.array([index]))
        files, first, base = self._filled[index], document - self._documents[index], int(self._bounds[index])
        start, *after = _open(files.offsets).read(first, min(first + 2, files.shard.documents)).tolist()
        stop = after[0] if after else files.shard.tokens
        if not start < stop <= files.shard.tokens:
            raise files.unordered()
        return base + start, base + stop

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the int32 ids of each document, special ids included."""
        return (self.read(*self.bounds(number)) for number in range(self.n_documents))

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Yield the int64 lengths_B of all documents in order, in arrays of bounded size."""
        for files in self._filled:
            yield from files.lengths()

    def check_at_first_use(self, first_use: FirstUse) -> None:
        """Let `first_use` verify each shard once, as soon as the shard is used."""
        self._first_use = first_use
        for index in list(self._used):
            self._verify_later(index)

    def _use(self, shards_P: np.ndarray) -> list[int]:
        """Return the shards that exist; verify the offsets of new ones, and take their marks from them.

        Windows past the end of the stream lie in a shard that does not exist.
        """
        shards = [shard for shard in set(shards_P.tolist()) if shard < len(self._filled)]
        for index in shards:
            if index not in self._used:
                self._filled[index].tokens.check()
                first, marks, done = self._first_marks[index], [], 0
                for starts_B in self._filled[index].starts():
                    marks.append(starts_B[-done % self._stride :: self._stride].copy())
                    done += len(starts_B)
                self._marks[first : first + sum(map(len, marks))] = self._bounds[index] + np.concatenate(marks)
                self._used.add(index)
                self._verify_later(index)
        return shards

    def _verify_later(self, index: int) -> None:
        if self._first_use is not None:
            self._first_use.add(functools.partial(self._filled[index].verify, self.vocab_size, self._unk_id))

    def _pieces(self, starts_N: np.ndarray, stops_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """Cut windows of the stream at the bounds of shards.

        Returns:
            Four arrays with an element for each piece: its window, its shard, its start and its stop in the shard. A
            piece past the end of the stream lies in the shard after the last.
        """
        first_N = np.searchsorted(self._bounds, starts_N, "right") - 1
        last_N = np.searchsorted(self._bounds, stops_N, "left") - 1
        windows_P, shards_P = np.arange(len(starts_N)), first_N
        if (last_N != first_N).any():
            counts_N = np.maximum(last_N - first_N + 1, 0)
            windows_P, shards_P = np.repeat(windows_P, counts_N), ranges(first_N, counts_N)
            starts_N, stops_N = starts_N[windows_P], np.minimum(stops_N[windows_P], self._bounds[shards_P + 1])
        bases_P = self._bounds[shards_P]
        return windows_P, shards_P, np.maximum(starts_N - bases_P, 0), stops_N - bases_P


class TokenDataset:
    """A prepared dataset folder, opened for reading; sizes are checked at once, checksums by `verify`.

    Raises `UserError`: NO_INPUT if there is no dataset, DATA if it is damaged.
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
        """Load the tokenizer of the dataset; raises `UserError` (DATA) if it is missing or did not make the dataset."""
        from gpt2_flax.tokenizers.tokenizer import load_tokenizer  # readers of tokens need no tokenizer

        tokenizer = load_tokenizer(self.tokenizer_folder)
        if tokenizer.fingerprint != self.info.tokenizer_fingerprint:
            what = f"tokenizer is not the one that {MARKER} names"
            raise UserError(ExitCode.DATA, what, self.tokenizer_folder, "prepare the dataset again")
        return tokenizer

    def fingerprints(self) -> dict[str, str]:
        """Return sha256 sums that identify the tokenizer, the training tokens and the validation tokens."""
        sums = {"tokenizer_fingerprint": self.info.tokenizer_fingerprint}
        for name, split in (("tokens_fingerprint", "train"), ("validation_fingerprint", "validation")):
            shards = "".join(shard.tokens_sha256 + shard.offsets_sha256 for shard in self.info.shards[split])
            sums[name] = hashlib.sha256(shards.encode()).hexdigest()
        return sums

    def check_unchanged(self) -> None:
        """Raise `UserError` (DATA) for a file that changed since it was opened; unchanged files are not read."""
        self._watch.check()

    def verify(self, *splits: TokenSplit) -> None:
        """Read all shards of some splits (default: both) and check sha256, ids, counts and the order of documents.

        Raises `UserError` (DATA) for the first file that is damaged.
        """
        shards = [files for split in splits or (self.train, self.validation) for files in split.shards]
        total = sum(files.tokens.n_bytes + files.offsets.n_bytes for files in shards)
        with progress_bar("verifying", total, "B") as advance:
            for files in shards:
                files.verify(self.info.vocab_size, self.info.unk_id, advance)


def _most_open_files() -> int:
    """Return half of the descriptors that this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (8192 if limit == resource.RLIM_INFINITY else min(limit, 8192)) // 2


@functools.lru_cache(maxsize=_most_open_files())
def _open(file: FlatFile) -> OpenFile:
    """Return the open file; the most recently used files of all datasets stay open."""
    return file.opened()
