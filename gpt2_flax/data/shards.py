"""One shard of a dataset: its tokens and where documents start in them, written, read and verified.

Dimension key: B documents, T tokens.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.data.dataset_info import Shard, TokenType
from gpt2_flax.data.flat_files import FlatFile, NewFile
from gpt2_flax.tokenizers.ragged_ids import token_dtype

OFFSET = np.dtype("<u8")
UNORDERED = "document starts do not ascend from 0 to below the number of tokens"


def shard_paths(folder: Path, split: str, index: int) -> tuple[Path, Path]:
    """Returns our token file and the offset file of a shard."""
    return folder / split / f"tokens-{index:05d}.bin", folder / split / f"offsets-{index:05d}.bin"


class ShardWriter:
    """Writes one shard; the files have temporary names until `close` renames them.

    `dtype` is by default the smallest that holds the vocabulary. With `file` the tokens are there already, in `dtype`
    and from number `first` on: `add` is told of them and writes offsets alone. As a context it closes the files when
    the block fails.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        index: int,
        vocab_size: int,
        unk_id: int | None,
        *,
        dtype: TokenType | None = None,
        file: str | None = None,
        first: int = 0,
    ):
        self._dtype = np.dtype(dtype or token_dtype(vocab_size)).newbyteorder("<")
        self._vocab_size = min(vocab_size, np.iinfo(self._dtype).max + 1)
        self._file, self._first = file, first
        tokens, offsets = shard_paths(folder, split, index)
        offsets.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._tokens = stack.enter_context(NewFile(None if file else tokens))
            self._offsets = stack.enter_context(NewFile(offsets))
            self._open = stack.pop_all()
        self._tally, self._documents, self._characters = _Tally(unk_id), 0, 0

    def add(self, ids_T: np.ndarray, starts_B: np.ndarray, characters: int | None) -> None:
        """Appends tokens of any integer type, and how many characters of text they stand for (None: not known).

        Documents start at the int64 positions `starts_B` of `ids_T`; tokens before the first belong to the last
        document of the previous call. Raises ValueError for an id outside the vocabulary, which numpy would wrap
        silently, and for starts that do not ascend or leave the shard's first token without one.
        """
        self._characters = None if None in (self._characters, characters) else self._characters + characters
        if not len(ids_T):
            return
        low, high = int(ids_T.min()) if ids_T.dtype.kind == "i" else 0, int(ids_T.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token ids {low}..{high} do not fit a vocabulary of {self._vocab_size}")
        ascending = (np.diff(starts_B, prepend=-1, append=len(ids_T)) > 0).all()
        if not ascending or not (self._tally.tokens or (len(starts_B) and starts_B[0] == 0)):
            raise ValueError("document starts must ascend within the ids, and the first token of a shard must be one")
        self._offsets.write((starts_B + self._tally.tokens).astype(OFFSET))
        self._tokens.write(np.ascontiguousarray(ids_T, self._dtype))
        self._tally.add(ids_T, high)
        self._documents += len(starts_B)

    def close(self) -> Shard:
        """Flushes to disk, gives the files their names and returns what dataset.json says of them."""
        return Shard(
            documents=self._documents,
            tokens=self._tally.tokens,
            unknown=self._tally.unknown,
            characters=self._characters,
            max_id=self._tally.max_id,
            tokens_sha256=self._tokens.publish(),
            offsets_sha256=self._offsets.publish(),
            file=self._file,
            first=self._first,
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


class _Tally:
    """Counts of the tokens that it is shown."""

    def __init__(self, unk_id: int | None):
        self._unk_id = unk_id
        self.tokens = self.unknown = self.max_id = 0

    def add(self, ids_T: np.ndarray, high: int) -> None:
        self.tokens, self.max_id = self.tokens + len(ids_T), max(self.max_id, high)
        if self._unk_id is not None:
            self.unknown += int(np.count_nonzero(ids_T == self._unk_id))


class ShardFiles(NamedTuple):
    """The files of one shard."""

    shard: Shard
    tokens: FlatFile
    offsets: FlatFile

    def starts(self, read: Callable[[int], None] = lambda n_bytes: None) -> Iterator[np.ndarray]:
        """Yields the int64 offsets in pieces and tells `read` of their bytes.

        Raises `UserError` (DATA) when they do not ascend from 0 to below the number of tokens, or their sha256 differs.
        """
        last = None
        for starts_B in self.offsets.chunks(read):
            follows = starts_B[0] == 0 if last is None else starts_B[0] > last
            last = starts_B[-1]
            if not follows or last >= self.shard.tokens or (starts_B[1:] <= starts_B[:-1]).any():
                raise self.offsets.damage(UNORDERED)
            yield starts_B.astype(np.int64)

    def lengths(self) -> Iterator[np.ndarray]:
        """Yields the int64 lengths of its documents in pieces; raises as `starts`."""
        before_B = np.zeros(0, np.int64)
        for starts_B in itertools.chain(self.starts(), [np.array([self.shard.tokens])]):
            bounds_B = np.concatenate((before_B, starts_B))
            yield np.diff(bounds_B)
            before_B = bounds_B[-1:]

    def every(self, stride: int) -> np.ndarray:
        """Returns each `stride`-th offset from the first on, int64; raises as `starts`."""
        kept, done = [], 0
        for starts_B in self.starts():
            kept.append(starts_B[-done % stride :: stride].copy())
            done += len(starts_B)
        return np.concatenate(kept)

    def verify(self, vocab_size: int, unk_id: int | None, read: Callable[[int], None] = lambda n_bytes: None) -> None:
        """As `TokenDataset.verify` for one shard; `read` is told of the bytes that are done."""
        tally = _Tally(unk_id)
        for ids_T in self.tokens.chunks(read):
            tally.add(ids_T, int(ids_T.max()))
        if tally.max_id >= vocab_size:
            raise self.tokens.damage(outside(tally.max_id, vocab_size))
        for name in ("max_id", "unknown"):
            found, recorded = getattr(tally, name), getattr(self.shard, name)
            if found != recorded:
                raise self.tokens.damage(f"{name} is {found} where dataset.json says {recorded}")
        for _ in self.starts(read):
            pass


def shard_files(folder: Path, split: str, index: int, shard: Shard, dtype: np.dtype) -> ShardFiles:
    """Returns where the numbers of a shard lie; the tokens are of `dtype`."""
    ours, offsets = shard_paths(folder, split, index)
    place, shared = (folder / shard.file, True) if shard.file else (ours, False)
    tokens = FlatFile(place, dtype, shard.tokens, shard.first, shared, shard.tokens_sha256)
    return ShardFiles(shard, tokens, FlatFile(offsets, OFFSET, shard.documents, sha256=shard.offsets_sha256))


def outside(token: int, vocab_size: int) -> str:
    """Returns what is wrong with an id that is too large."""
    return f"token id {token} outside the vocabulary of {vocab_size}"
