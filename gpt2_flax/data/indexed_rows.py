"""Rows whose segments are listed in a row index: the rows of the packings `best_fit` and `document`.

Dimension key: B rows, T seq_length, R segments of all rows (the padding of a row counts as one).
"""

import numpy as np

from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.packing import IGNORE, Batch, RowLayout, Rows, spread
from gpt2_flax.data.row_index import read_or_make_plan


class IndexedRows(Rows):
    """The rows of one split; the constructor raises `UserError` (DATA) if the index of document starts is damaged."""

    def __init__(self, split: TokenSplit, layout: RowLayout):
        super().__init__(split, layout)
        self.plan = read_or_make_plan(split, layout.seq_length, layout.packing)
        self.n_rows = max(1, self.plan.n_rows)

    def _segmented(self, rows_B: np.ndarray) -> Batch:
        starts_R, lengths_R, numbers_R, goes_on_R = self._segments(rows_B)
        # Read each segment with the token after it, which may be the target of its last position.
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
        segments_BT, positions_BT = spread(numbers_R, firsts_R, shape)
        targets_BT = targets_T.reshape(shape)
        np.putmask(targets_BT, segments_BT == 0, IGNORE)
        return Batch(tokens_T.reshape(shape), targets_BT, segments_BT, positions_BT)

    def starts(self, row: int) -> np.ndarray:
        _, starts_N, _ = self.plan.parts(np.array([row]))
        return starts_N

    def _segments(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return for each segment: start in the stream, length, number, and whether the last token has a target.

        The last segment of each row is its padding, possibly of length 0. Padding is read from past the stream's end.
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
