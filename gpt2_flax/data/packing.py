"""How windows of the token stream become rows to train on.

Dimension key: B rows, T seq_length, S = T + 1 tokens of a window.
"""

from typing import NamedTuple

import numpy as np

IGNORE = -1
"""The target of a position that is not trained on."""


class Batch(NamedTuple):
    """Rows for the model, all int32 (B, T).

    A target is the next token, or IGNORE: the first token of a document is never one. Attention stays inside equal
    segment numbers (0 is padding); positions count from 0 in each segment.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray


def rows_of_windows(tokens_BS: np.ndarray, segments_BS: np.ndarray) -> Batch:
    """Returns the rows of int32 windows and their segment numbers."""
    segments_BT = segments_BS[:, :-1]
    trained_BT = (segments_BT == segments_BS[:, 1:]) & (segments_BT != 0)
    targets_BT = np.where(trained_BT, tokens_BS[:, 1:], IGNORE).astype(np.int32)
    column_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    starts_BT = np.diff(segments_BT, axis=1, prepend=-1) != 0
    first_columns_BT = np.maximum.accumulate(np.where(starts_BT, column_T, 0), axis=1)
    return Batch(tokens_BS[:, :-1], targets_BT, segments_BT, column_T - first_columns_BT)
