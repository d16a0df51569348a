"""How the token stream becomes rows to train on.

A row is a sequence of segments, each a part of one document, and of padding. A position is a pair of an input token and
its target, the next token of the document; the first token of a document is never a target.

    stream     the stream cut every T tokens, whatever lies there: no padding but at its end
    best_fit   documents in as few parts as their lengths allow, put together so that rows are full (`best_fit`)
    document   one part of a document a row, rows of T + 1 tokens, padded: the layout of UER-py, for comparison

In the first two every token but the first of a document is a target once an epoch. In the third the first token of each
further part of a document is not one either.
Dimension key: B rows, T seq_length, R segments of all rows, padding being one.
"""

from typing import NamedTuple, Protocol

import numpy as np

from gpt2_flax.config import Packing
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.row_index import Plan, read_or_make_plan

IGNORE = -1
"""The target of a position that is not trained on."""


class Batch(NamedTuple):
    """Rows for the model, all int32 (B, T).

    A target is the next token, or IGNORE. Attention stays inside equal segment numbers (0 is padding); positions count
    from 0 in each segment.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray


class Rows(Protocol):
    """The rows of an epoch, in the order of the stream."""

    n_rows: int

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Returns rows by their int64 numbers; those from `n_rows` on are padding."""

    def starts(self, row: int) -> np.ndarray:
        """Returns where in the stream each segment of a row begins, int64, padding left out."""


def rows_of(split: TokenSplit, seq_length: int, packing: Packing) -> Rows:
    """Returns the rows that `packing` makes; raises `UserError` (DATA) when document starts are damaged."""
    if packing == "stream":
        return StreamRows(split, seq_length)
    return PlannedRows(split, read_or_make_plan(split, seq_length, packing))


def across_documents(batch: Batch) -> Batch:
    """Returns the batch with attention and positions that run through the whole row; targets stay what they were."""
    positions_BT = np.broadcast_to(np.arange(batch.tokens_BT.shape[1], dtype=np.int32), batch.tokens_BT.shape)
    return batch._replace(segments_BT=(batch.segments_BT != 0).astype(np.int32), positions_BT=positions_BT)


class StreamRows:
    """Windows of T + 1 tokens of the stream, each of which shares one token with the next."""

    def __init__(self, split: TokenSplit, seq_length: int):
        self.split, self.seq_length = split, seq_length
        self.n_rows = max(1, -(-(split.n_tokens - 1) // seq_length))

    def batch(self, rows_B: np.ndarray) -> Batch:
        length, starts_B = self.seq_length, rows_B * self.seq_length
        windows_BS = self.split.gather(starts_B, np.full_like(starts_B, length + 1)).reshape(-1, length + 1)
        targets_BT = windows_BS[:, 1:].astype(np.int32)
        rows, columns = self.split.document_starts(starts_B + 1, length)  # column 0 is that of the first target
        targets_BT[rows, columns] = IGNORE
        inner = columns < length - 1
        # Every row begins a segment, every document that starts in a row another.
        firsts_R = np.sort(np.concatenate((np.arange(len(rows_B)) * length, (rows * length + columns + 1)[inner])))
        numbers_R = np.arange(1, len(firsts_R) + 1) - np.searchsorted(firsts_R, firsts_R // length * length)
        segments_BT, positions_BT = _spread(numbers_R, firsts_R, targets_BT.shape)
        left_B = self.split.n_tokens - starts_B
        for row in np.flatnonzero(left_B <= length):
            used = max(0, int(left_B[row]))
            targets_BT[row, max(0, used - 1) :] = IGNORE
            segments_BT[row, used:], positions_BT[row, used:] = 0, np.arange(length - used)
        return Batch(windows_BS[:, :-1].astype(np.int32), targets_BT, segments_BT, positions_BT)

    def starts(self, row: int) -> np.ndarray:
        start = row * self.seq_length
        _, places = self.split.document_starts(np.array([start]), self.seq_length)
        return start + np.union1d(0, places)


class PlannedRows:
    """Rows made of parts of documents as a plan says."""

    def __init__(self, split: TokenSplit, plan: Plan):
        self.split, self.plan = split, plan
        self.n_rows = max(1, plan.n_rows)

    def batch(self, rows_B: np.ndarray) -> Batch:
        starts_R, lengths_R, numbers_R, goes_on_R = self._segments(rows_B)
        # Each segment is read with the token after it, the target of its last position if the part has one.
        after_R = np.cumsum(lengths_R + 1) - 1
        read_T = self.split.gather(starts_R, lengths_R + 1)
        is_input_T = np.ones(len(read_T), bool)
        is_input_T[after_R] = False
        tokens_T = read_T[is_input_T].astype(np.int32)
        targets_T = np.empty_like(tokens_T)
        targets_T[:-1] = tokens_T[1:]
        firsts_R, filled_R = np.cumsum(lengths_R) - lengths_R, lengths_R > 0
        last_targets_R = np.where(goes_on_R, read_T[after_R].astype(np.int32), IGNORE)
        targets_T[(firsts_R + lengths_R - 1)[filled_R]] = last_targets_R[filled_R]
        shape = (len(rows_B), self.plan.seq_length)
        segments_BT, positions_BT = _spread(numbers_R, firsts_R, shape)
        targets_BT = targets_T.reshape(shape)
        np.putmask(targets_BT, segments_BT == 0, IGNORE)
        return Batch(tokens_T.reshape(shape), targets_BT, segments_BT, positions_BT)

    def starts(self, row: int) -> np.ndarray:
        _, starts_N, _ = self.plan.parts(np.array([row]))
        return starts_N

    def _segments(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where in the stream segments start, their lengths, their numbers, and whether the last token has a target.

        The last segment of each row is its padding, of no tokens or more, which is what lies past the stream's end.
        """
        counts_B, parts_starts, parts_tokens = self.plan.parts(rows_B)
        paddings_B = np.cumsum(counts_B + 1) - 1
        is_part_R = np.ones(len(parts_starts) + len(rows_B), bool)
        is_part_R[paddings_B] = False
        starts_R, tokens_R = np.full(len(is_part_R), self.split.n_tokens), np.zeros(len(is_part_R), np.int64)
        starts_R[is_part_R], tokens_R[is_part_R] = parts_starts, parts_tokens
        lengths_R = np.clip(tokens_R - self.plan.overlap, 0, self.plan.seq_length)
        lengths_R[paddings_B] = self.plan.seq_length - np.add.reduceat(lengths_R, paddings_B - counts_B)
        if (lengths_R < 0).any():
            raise self.plan.damage()
        numbers_R = np.arange(len(is_part_R)) - np.repeat(paddings_B - counts_B - 1, counts_B + 1)
        return starts_R, lengths_R, np.where(is_part_R, numbers_R, 0), tokens_R > lengths_R


def _spread(numbers_R: np.ndarray, firsts_R: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The int32 segment numbers and positions of rows, given where in all rows together segments begin, ascending."""
    size = shape[0] * shape[1]
    lengths_R = np.append(firsts_R[1:], size) - firsts_R
    segments_T = np.repeat(numbers_R.astype(np.int32), lengths_R)
    positions_T = np.arange(size, dtype=np.int32) - np.repeat(firsts_R.astype(np.int32), lengths_R)
    return segments_T.reshape(shape), positions_T.reshape(shape)
