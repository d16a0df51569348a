"""Which parts of documents make up each row, worked out once and kept beside the dataset.

    DATASET/packing/train-best_fit-1024-0123456789abcdef.parts.bin   where parts start (uint64), their tokens (uint32)
    DATASET/packing/train-best_fit-1024-0123456789abcdef.rows.bin    uint64 first part of each row, all parts twice
    DATASET/packing/train-best_fit-1024-0123456789abcdef.sha256      of both, as `sha256sum -c` reads it; written last

A plan is a function of where documents start, of which the name has a checksum: any process may write it, several at
once write the same bytes, and that of a changed dataset has another name. A damaged one is made again.
Dimension key: B rows of a batch, D documents, N parts, R rows.
"""

import contextlib
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt2_flax.config import Packing
from gpt2_flax.data.best_fit import best_fit_decreasing
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.flat_files import FlatFile, OpenFile
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import cache_folder, file_sha256
from gpt2_flax.interruption import cleaned_up
from gpt2_flax.progress import progress_bar

_VERSION = 1  # of plans: one more when the same documents would come in other rows, which changes resumed runs
_PORTION = 2**22  # parts that rows are made of at once: bounds memory
_PIECE = 2**20  # parts that are worked out at once
_PART = np.dtype([("start", "<u8"), ("tokens", "<u4")])
_FIRST = np.dtype("<u8")
_PATIENCE = 2.0  # seconds without a progress bar


class Plan:
    """The parts of documents that rows of `seq_length` positions consist of, opened for reading by any thread.

    With an `overlap` of 1 the last token of a part is a target only, and the first of the next part of the document.
    Raises OSError when there is no plan at `path`, ValueError when it is damaged.
    """

    def __init__(self, path: Path, split: TokenSplit, seq_length: int, overlap: int):
        self.path, self.seq_length, self.overlap = path, seq_length, overlap
        self._n_tokens = split.n_tokens
        *files, sums_file = _files(path)
        sums = [file_sha256(file) for file in files]
        if sums_file.read_bytes() != _sum_lines(path, sums):
            raise ValueError(f"damaged plan of rows: {path}")
        self._parts, self._firsts = (
            OpenFile(FlatFile(file, dtype, file.stat().st_size // dtype.itemsize, sha256=sha256))
            for file, dtype, sha256 in zip(files, (_PART, _FIRST), sums, strict=True)
        )
        for opened in (self._parts, self._firsts):
            opened.keep()
            split.watch.add(opened.file.path, opened.verify, opened.descriptor)
        self.n_rows = self._firsts.file.count - 2

    def parts(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns how many parts each row has, and where they start in the stream and how many tokens they are.

        All int64; rows past the last have none. Raises `UserError` (DATA) when the files are damaged.
        """
        rows_B = np.minimum(rows_B, self.n_rows)
        low_B, high_B = self._firsts.pieces(rows_B, rows_B + 2).astype(np.int64).reshape(-1, 2).T
        counts_B = high_B - low_B
        if ((low_B < 0) | (counts_B < 0) | (counts_B > self.seq_length) | (high_B > self._parts.file.count)).any():
            raise self.damage()
        parts_N = self._parts.pieces(low_B, high_B)
        starts_N, tokens_N = (parts_N[name].astype(np.int64) for name in _PART.names)
        if ((starts_N < 0) | (tokens_N <= self.overlap) | (starts_N + tokens_N > self._n_tokens)).any():
            raise self.damage()
        return counts_B, starts_N, tokens_N

    def damage(self) -> UserError:
        fix = "run the same command again: a damaged plan is made again"
        return UserError(ExitCode.DATA, "plan of rows changed while it was in use", self.path, fix)


def read_or_make_plan(split: TokenSplit, seq_length: int, packing: Packing) -> Plan:
    """Returns the plan of packing `best_fit` or `document`, kept in the user's cache where the dataset is read-only.

    Raises `UserError`: DATA when document starts are damaged, IO when no place can be written.
    """
    overlap = int(packing == "best_fit")
    name = f"{split.name}-{packing}-{seq_length}-{_checksum(split)}"
    cache = cache_folder()
    folders = [split.folder / "packing", *([cache / "packing"] if cache else [])]
    for folder in folders:
        with contextlib.suppress(OSError):
            try:
                return Plan(folder / name, split, seq_length, overlap)
            except ValueError as error:
                print(f"warning: {error}: it is made again", file=sys.stderr, flush=True)
    for folder in folders:
        try:
            _make(folder / name, split, seq_length, overlap)
        except OSError as error:
            failure = io_error(error, folder)
            continue
        if folder != folders[0]:
            print(
                f"{folders[0]} cannot be written: which document goes in which row is kept in {folder}", file=sys.stderr
            )
        return Plan(folder / name, split, seq_length, overlap)
    raise failure


def _checksum(split: TokenSplit) -> str:
    """Of all that a plan depends on, where documents start and the code."""
    shards = "".join(f" {pair.shard.tokens} {pair.shard.offsets_sha256}" for pair in split.pairs)
    return hashlib.sha256(f"{_VERSION}{shards}".encode()).hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.{ending}") for ending in ("parts.bin", "rows.bin", "sha256")]


def _sum_lines(path: Path, sums: Iterable[str]) -> bytes:
    return "".join(f"{sha256}  {file.name}\n" for sha256, file in zip(sums, _files(path), strict=False)).encode()


def _make(path: Path, split: TokenSplit, seq_length: int, overlap: int) -> None:
    """Writes the files under names of this process alone, then gives them theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(cleaned_up(lambda: _discard(temporary)))
            files = [stack.enter_context(open(file, "xb")) for file in _files(temporary)]
            parts_file, rows_file, sums_file = files
            advance = stack.enter_context(_late_bar("packing documents in rows", split.n_tokens, "tokens"))
            n_parts = 0
            for parts_N in _portions(_parts(split, seq_length, overlap)):
                rows_N = np.arange(len(parts_N))
                if overlap:
                    rows_N = best_fit_decreasing(parts_N["tokens"] - overlap, seq_length)
                parts_N, counts_R = parts_N[np.argsort(rows_N, kind="stable")], np.bincount(rows_N)
                parts_file.write(parts_N)
                rows_file.write((n_parts + np.cumsum(counts_R) - counts_R).astype(_FIRST))
                n_parts += len(parts_N)
                advance(int(parts_N["tokens"].sum()))
            rows_file.write(np.array([n_parts, n_parts], _FIRST))  # a row after the last, of no parts
            for file in (parts_file, rows_file):
                file.flush()
            sums_file.write(_sum_lines(path, map(file_sha256, _files(temporary)[:-1])))
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for file, name in zip(_files(temporary), _files(path), strict=True):
            file.replace(name)
    finally:
        _discard(temporary)


def _discard(path: Path) -> None:
    for file in _files(path):
        file.unlink(missing_ok=True)


def _parts(split: TokenSplit, seq_length: int, overlap: int) -> Iterator[np.ndarray]:
    """Yields the parts of all documents in the order of the stream."""
    before, step = 0, seq_length + 1 - overlap
    for lengths_D in split.document_lengths():
        starts_D = before + np.cumsum(lengths_D) - lengths_D
        before += int(lengths_D.sum())
        counts_D = -(-(lengths_D - overlap) // step)
        ends_D = np.cumsum(counts_D)
        for first in range(0, int(counts_D.sum()), _PIECE):
            numbers_N = np.arange(first, min(first + _PIECE, ends_D[-1]))
            documents_N = np.searchsorted(ends_D, numbers_N, "right")
            skipped_N = (numbers_N - (ends_D - counts_D)[documents_N]) * step
            parts_N = np.empty(len(numbers_N), _PART)
            parts_N["start"] = starts_D[documents_N] + skipped_N
            parts_N["tokens"] = np.minimum(lengths_D[documents_N] - skipped_N, seq_length + 1)
            yield parts_N


def _portions(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    waiting, count = [], 0
    for parts_N in parts:
        waiting.append(parts_N)
        count += len(parts_N)
        if count >= _PORTION:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


@contextlib.contextmanager
def _late_bar(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """As `progress_bar`, for work that is mostly done before anyone would look at it."""
    begin, done = time.monotonic(), 0
    advance: Callable[..., None] | None = None
    with contextlib.ExitStack() as stack:

        def tell(amount: int) -> None:
            nonlocal advance, done
            done += amount
            if advance is not None:
                advance(amount)
            elif time.monotonic() - begin > _PATIENCE:
                advance = stack.enter_context(progress_bar(description, total, unit))
                advance(done)

        yield tell
