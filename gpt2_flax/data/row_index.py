"""The index of rows: which segments of documents make up each row, computed once and kept beside the dataset.

    DATASET/packing/train-best_fit-1024-0123456789abcdef.parts.bin   start (uint64) and tokens (uint32) of each segment
    DATASET/packing/train-best_fit-1024-0123456789abcdef.rows.bin    uint64 first segment of each row, then the total
                                                                     number of segments twice
    DATASET/packing/train-best_fit-1024-0123456789abcdef.sha256      of both files, for `sha256sum -c`; written last

The index depends only on the document starts, and its name contains their checksum. A changed dataset therefore has an
index of another name, and processes that write an index at the same time write the same bytes. A damaged index is
written again.
Dimension key: B rows of a batch, D documents, N segments, R rows.
"""

import contextlib
import hashlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt2_flax.config.schema import Packing
from gpt2_flax.data.best_fit import best_fit_decreasing
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.flat_files import FlatFile, OpenFile
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import cache_folder, file_sha256
from gpt2_flax.interruption import cleaned_up
from gpt2_flax.progress import progress_bar

_VERSION = 1  # increase it if the same documents would be placed in other rows, which changes resumed runs
PORTION = 2**22  # segments that rows are made of at once: bounds memory
PIECE = 2**20  # segments that are computed at once
_SEGMENT = np.dtype([("start", "<u8"), ("tokens", "<u4")])
_FIRST = np.dtype("<u8")


class Plan:
    """The segments of documents that make up rows of `seq_length` positions; any number of threads may read it.

    With an `overlap` of 1, the last token of a segment is only a target; it is also the first token of the document's
    next segment. The constructor raises OSError if there is no index at `path`, ValueError if it is damaged.
    """

    def __init__(self, path: Path, split: TokenSplit, seq_length: int, overlap: int):
        self.path, self.seq_length, self.overlap = path, seq_length, overlap
        self._n_tokens = split.n_tokens
        *files, sums_file = _files(path)
        sums = [file_sha256(file) for file in files]
        if sums_file.read_bytes() != _sum_lines(path, sums):
            raise ValueError(f"damaged plan of rows: {path}")
        self._segments, self._firsts = (
            OpenFile(FlatFile(file, dtype, file.stat().st_size // dtype.itemsize, sha256))
            for file, dtype, sha256 in zip(files, (_SEGMENT, _FIRST), sums, strict=True)
        )
        for opened in (self._segments, self._firsts):
            opened.keep()
            split.watch.add(opened.file.path, opened.verify, opened.descriptor)
        self.n_rows = self._firsts.file.count - 2

    def parts(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the segments of some rows; rows past the last have none.

        Returns:
            int64 arrays: counts_B, the number of segments in each row; starts_N and tokens_N, the position in the
            stream and the number of tokens of each segment.

        Raises:
            UserError: DATA if the files are damaged.
        """
        rows_B = np.minimum(rows_B, self.n_rows)
        low_B, high_B = self._firsts.pieces(rows_B, rows_B + 2).astype(np.int64).reshape(-1, 2).T
        counts_B = high_B - low_B
        if ((low_B < 0) | (counts_B < 0) | (counts_B > self.seq_length) | (high_B > self._segments.file.count)).any():
            raise self.damage()
        segments_N = self._segments.pieces(low_B, high_B)
        starts_N, tokens_N = segments_N["start"].astype(np.int64), segments_N["tokens"].astype(np.int64)
        if ((starts_N < 0) | (tokens_N <= self.overlap) | (starts_N + tokens_N > self._n_tokens)).any():
            raise self.damage()
        return counts_B, starts_N, tokens_N

    def damage(self) -> UserError:
        fix = "run the same command again: a damaged plan is made again"
        return UserError(ExitCode.DATA, "plan of rows changed while it was in use", self.path, fix)


def read_or_make_plan(split: TokenSplit, seq_length: int, packing: Packing) -> Plan:
    """Return the index of rows for packing `best_fit` or `document`; make it if there is none.

    It is kept in the user's cache folder if the dataset is read-only.

    Raises:
        UserError: DATA if document starts are damaged; IO or CANT_CREATE if neither place can be written.
    """
    overlap = int(packing == "best_fit")
    shards = "".join(f" {files.shard.tokens} {files.shard.offsets_sha256}" for files in split.shards)
    name = f"{split.name}-{packing}-{seq_length}-{hashlib.sha256(f'{_VERSION}{shards}'.encode()).hexdigest()[:16]}"
    cache = cache_folder()
    folder = beside = split.folder / "packing"
    folders = [beside, *([cache / "packing"] if cache else [])]
    for folder in folders:
        with contextlib.suppress(OSError):
            try:
                return Plan(folder / name, split, seq_length, overlap)
            except ValueError as error:
                print(f"warning: {error}: it is made again", file=sys.stderr, flush=True)
    for folder in folders:
        try:
            _make(folder / name, split, seq_length, overlap)
            break
        except OSError as error:
            if folder == folders[-1]:
                raise io_error(error, folder) from None
    if folder != beside:
        print(f"{beside} cannot be written: which document goes in which row is kept in {folder}", file=sys.stderr)
    return Plan(folder / name, split, seq_length, overlap)


def _files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.{ending}") for ending in ("parts.bin", "rows.bin", "sha256")]


def _sum_lines(path: Path, sums: Iterable[str]) -> bytes:
    return "".join(f"{sha256}  {file.name}\n" for sha256, file in zip(sums, _files(path), strict=False)).encode()


def _make(path: Path, split: TokenSplit, seq_length: int, overlap: int) -> None:
    """Write the files under names that no other process uses, then rename them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(cleaned_up(lambda: _discard(temporary)))
            files = [stack.enter_context(open(file, "xb")) for file in _files(temporary)]
            segments_file, rows_file, sums_file = files
            advance = stack.enter_context(progress_bar("packing documents in rows", split.n_tokens, "tokens"))
            n_segments = 0
            for segments_N in _portions(_segments(split, seq_length, overlap)):
                rows_N = np.arange(len(segments_N))
                if overlap:
                    rows_N = best_fit_decreasing(segments_N["tokens"] - overlap, seq_length)
                segments_N, counts_R = segments_N[np.argsort(rows_N, kind="stable")], np.bincount(rows_N)
                segments_file.write(segments_N.data)
                rows_file.write((n_segments + np.cumsum(counts_R) - counts_R).astype(_FIRST).data)
                n_segments += len(segments_N)
                advance(int(segments_N["tokens"].sum()))
            rows_file.write(np.array([n_segments, n_segments], _FIRST).data)  # a row without segments after the last
            for file in (segments_file, rows_file):
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


def _segments(split: TokenSplit, seq_length: int, overlap: int) -> Iterator[np.ndarray]:
    """Yield the segments of all documents in the order of the stream, in arrays of bounded size."""
    before, step = 0, seq_length + 1 - overlap
    for lengths_D in split.document_lengths():
        starts_D = before + np.cumsum(lengths_D) - lengths_D
        before += int(lengths_D.sum())
        counts_D = -(-(lengths_D - overlap) // step)
        ends_D = np.cumsum(counts_D)
        for first in range(0, int(counts_D.sum()), PIECE):
            numbers_N = np.arange(first, min(first + PIECE, ends_D[-1]))
            documents_N = np.searchsorted(ends_D, numbers_N, "right")
            skipped_N = (numbers_N - (ends_D - counts_D)[documents_N]) * step
            segments_N = np.empty(len(numbers_N), _SEGMENT)
            segments_N["start"] = starts_D[documents_N] + skipped_N
            segments_N["tokens"] = np.minimum(lengths_D[documents_N] - skipped_N, seq_length + 1)
            yield segments_N


def _portions(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Concatenate arrays of segments until there are `PORTION` segments."""
    waiting, count = [], 0
    for segments_N in pieces:
        waiting.append(segments_N)
        count += len(segments_N)
        if count >= PORTION:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)
