"""How the token stream becomes rows to train on.

A row is a sequence of segments, and then padding. A segment is a run of tokens of one document. Each position of a row
holds an input token and its target, the next token of the document. The first token of a document is never a target.

    stream     the stream, cut every T tokens; only the last row has padding
    best_fit   documents in as few segments as their lengths allow, combined so that rows are full (`best_fit`)
    document   one segment a row, of at most T + 1 tokens, then padding: the layout of UER-py, for comparison

With `stream` and `best_fit`, every token except the first of a document is a target once an epoch. With `document`, the
first token of each later segment of a document is not a target either.
Dimension key: B rows, T seq_length, R segments of all rows (the padding of a row counts as one).
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from gpt2_flax.config.schema import Config, Packing
from gpt2_flax.data.dataset import TokenSplit

Array = TypeVar("Array")

IGNORE = -1
"""The target of a position that is not trained on, such as padding."""


class Batch(NamedTuple, Generic[Array]):
    """Rows for the model: four int32 arrays of shape (B, T), of numpy on the host or of JAX on devices.

    A target is the next token, or IGNORE. Attention stays inside a segment; segments are numbered from 1, and 0 is
    padding. Positions count from 0 in each segment.
    """

    tokens_BT: Array
    targets_BT: Array
    segments_BT: Array
    positions_BT: Array


class RowLayout(NamedTuple):
    """How to cut a split into rows."""

    seq_length: int
    """Positions of a row."""
    packing: Packing = "stream"
    attend_across_documents: bool = False
    """Whether attention and positions run through the whole row."""


def row_layout(config: Config) -> RowLayout:
    """Return the row layout that a run trains and evaluates with."""
    return RowLayout(config.data.seq_length, config.data.packing, config.model.attend_across_documents)


class Rows(ABC):
    """The rows of one split, in the order of the stream."""

    n_rows: int

    def __init__(self, split: TokenSplit, layout: RowLayout):
        self.split, self.layout = split, layout

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the int64 numbers rows_B; a row from `n_rows` on is all padding."""
        batch = self._segmented(rows_B)
        return across_documents(batch) if self.layout.attend_across_documents else batch

    @abstractmethod
    def starts(self, row: int) -> np.ndarray:
        """Return the position in the stream where each segment of a row begins, int64, without padding."""

    @abstractmethod
    def _segmented(self, rows_B: np.ndarray) -> Batch: ...


def across_documents(batch: Batch) -> Batch:
    """Return the batch with attention and positions that run through the whole row, and with the same targets."""
    positions_BT = np.broadcast_to(np.arange(batch.tokens_BT.shape[1], dtype=np.int32), batch.tokens_BT.shape)
    return batch._replace(segments_BT=(batch.segments_BT != 0).astype(np.int32), positions_BT=positions_BT)


def cut_rows(batch: Batch[Any], seq_length: int) -> Batch[Any]:
    """Return the rows of a batch, each cut into rows of `seq_length` positions.

    If a cut falls inside a document, the rest of the document begins the next row, at position 0. The arrays of the
    batch may be arrays of numpy or of JAX.
    """
    cut = Batch(*(x_BT.reshape(-1, seq_length) for x_BT in batch))
    # A position minus the first position in its row is the column while the first segment lasts, and less behind it.
    first_B1 = cut.positions_BT[:, :1]
    in_first_BT = cut.positions_BT - first_B1 == np.arange(seq_length, dtype=np.int32)
    return cut._replace(positions_BT=cut.positions_BT - in_first_BT * first_B1)


class StreamRows(Rows):
    """Windows of T + 1 tokens of the stream; each window shares one token with the next window."""

    def __init__(self, split: TokenSplit, layout: RowLayout):
        super().__init__(split, layout)
        self.n_rows = max(1, -(-(split.n_tokens - 1) // layout.seq_length))

    def _segmented(self, rows_B: np.ndarray) -> Batch:
        length, starts_B = self.layout.seq_length, rows_B * self.layout.seq_length
        windows_BS = self.split.gather(starts_B, np.full_like(starts_B, length + 1)).reshape(-1, length + 1)
        targets_BT = windows_BS[:, 1:].astype(np.int32)
        rows, columns = self.split.document_starts(starts_B + 1, length)  # column 0 is that of the first target
        targets_BT[rows, columns] = IGNORE
        inner = columns < length - 1
        # A segment begins with every row, and with every document that starts inside a row.
        firsts_R = np.sort(np.concatenate((np.arange(len(rows_B)) * length, (rows * length + columns + 1)[inner])))
        numbers_R = np.arange(1, len(firsts_R) + 1) - np.searchsorted(firsts_R, firsts_R // length * length)
        segments_BT, positions_BT = spread(numbers_R, firsts_R, targets_BT.shape)
        left_B = self.split.n_tokens - starts_B
        for row in np.flatnonzero(left_B <= length):
            used = max(0, int(left_B[row]))
            targets_BT[row, max(0, used - 1) :] = IGNORE
            segments_BT[row, used:], positions_BT[row, used:] = 0, np.arange(length - used)
        return Batch(windows_BS[:, :-1].astype(np.int32), targets_BT, segments_BT, positions_BT)

    def starts(self, row: int) -> np.ndarray:
        start = row * self.layout.seq_length
        _, places = self.split.document_starts(np.array([start]), self.layout.seq_length)
        return start + np.union1d(0, places)


def spread(numbers_R: np.ndarray, firsts_R: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 segment numbers and positions, both of `shape` (B, T).

    Args:
        numbers_R: the number of each segment in its row.
        firsts_R: where each segment begins in all rows together, ascending.
        shape: rows, and positions of a row.
    """
    size = shape[0] * shape[1]
    lengths_R = np.append(firsts_R[1:], size) - firsts_R
    segments_T = np.repeat(numbers_R.astype(np.int32), lengths_R)
    positions_T = np.arange(size, dtype=np.int32) - np.repeat(firsts_R.astype(np.int32), lengths_R)
    return segments_T.reshape(shape), positions_T.reshape(shape)
