"""Batches as a function of (seed, sample number): nothing to save, nothing to resume, any host can ask for any row.

A window is `seq_length + 1` tokens of the stream and shares one token with the next, so that in an epoch every token
is a target once. Sample i of a run is window `permutation(i mod n)` of epoch `i div n`: a keyed Feistel network with
cycle walking (Black and Rogaway, 2002), which needs no memory at any number of windows.
"""

import numpy as np

from gpt2_flax.data.packing import Batch, rows_of_windows
from gpt2_flax.data.token_dataset import TokenSplit

_ROUNDS = 6


class Loader:
    """Cuts one split into windows and deals them in the order of a run (`batch`) or of the stream (`in_order`)."""

    def __init__(self, split: TokenSplit, seq_length: int, seed: int):
        self.split, self.seq_length, self.seed = split, seq_length, seed
        self.n_windows = max(1, -(-(split.n_tokens - 1) // seq_length))

    def batch(self, first: int, last: int) -> Batch:
        """Returns the rows of samples [first, last) of the run; a new epoch has a new order."""
        epochs_B, index_B = np.divmod(np.arange(first, last), self.n_windows)
        windows_B = np.empty_like(index_B)
        for epoch in np.unique(epochs_B):
            rows = epochs_B == epoch
            windows_B[rows] = permutation(index_B[rows], self.n_windows, self.seed, int(epoch))
        return self._rows(windows_B)

    def in_order(self, first: int, last: int) -> Batch:
        """Returns windows [first, last) of the stream; those past its end are padding."""
        return self._rows(np.arange(first, last))

    def _rows(self, windows_B: np.ndarray) -> Batch:
        return rows_of_windows(*self.split.windows(windows_B * self.seq_length, self.seq_length + 1))


def permutation(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns where a bijection of [0, size) sends each of `index` (int64, any shape); one for each (seed, epoch).

    The order is a file format: a change would make resumed runs see other rows than they would have.
    """
    half_bits = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    key = _mix(_mix(np.uint64(seed)) + np.uint64(epoch))
    round_keys = [_mix(key + np.uint64(number)) for number in range(_ROUNDS)]
    values = np.asarray(index, np.uint64).reshape(-1).copy()
    todo = np.ones(values.shape, bool)
    while todo.any():  # the network permutes [0, 4 ** half_bits); walk on from what falls outside [0, size)
        left, right = values[todo] >> half_bits, values[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[todo] = left << half_bits | right
        todo = values >= size
    return values.astype(np.int64).reshape(np.shape(index))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., 2014), modulo 2**64 on purpose."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
