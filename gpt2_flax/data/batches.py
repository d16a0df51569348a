"""Batches of training rows as a function of (seed, sample number): nothing to save, nothing to restore.

A sample is one row of a run. `deal` computes from the shares alone which dataset a sample belongs to, and its number
among the samples of that dataset, so each dataset has epochs of its own. Sample i of a dataset is row
`permutation(i mod n)` of the n rows in epoch `i div n`. The permutation is a keyed Feistel network with cycle walking
(Black and Rogaway, 2002), which needs no memory at any number of rows. Any host can ask for any row.
Dimension key: B rows, T sequence.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.packing import Batch, RowLayout, Rows, StreamRows

_ROUNDS = 6
_BLOCK = 2**13  # samples whose row numbers are computed at once: a few cost as much


class Batches:
    """The training rows of one or several splits, dealt in fixed shares.

    Args:
        splits: the training split of each dataset.
        shares: the shares that `shares_of_rest` gives, one for each split.
        layout: how to cut the splits into rows.
        seed: seed of the order, below 2**32.

    Raises:
        UserError: DATA, when the index of document starts is damaged.
    """

    def __init__(self, splits: Sequence[TokenSplit], shares: Sequence[Fraction], layout: RowLayout, seed: int):
        self.rows = [rows_of(split, layout) for split in splits]
        # The number of the dataset keeps the orders of two copies of one dataset apart.
        self._orders = [EpochOrder(rows.n_rows, seed + (number << 32)) for number, rows in enumerate(self.rows)]
        self._shares, self._seq_length = shares, layout.seq_length

    def batch(self, first: int, last: int) -> Batch:
        """Return the rows of samples [first, last) of the run, four int32 arrays of shape (B, T)."""
        datasets_B, rows_B = self.locate(first, last)
        batch = Batch(*(np.empty((last - first, self._seq_length), np.int32) for _ in Batch._fields))
        for number in np.unique(datasets_B):
            of_dataset_B = datasets_B == number
            for all_BT, some_BT in zip(batch, self.rows[number].batch(rows_B[of_dataset_B]), strict=True):
                all_BT[of_dataset_B] = some_BT
        return batch

    def locate(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset and the row in its split of samples [first, last) of the run, both int64 (B,)."""
        datasets_B, samples_B = deal(np.arange(first, last), self._shares)
        rows_B = np.empty_like(samples_B)
        for number in np.unique(datasets_B):
            of_dataset_B = datasets_B == number
            numbers_B = samples_B[of_dataset_B]  # consecutive
            rows_B[of_dataset_B] = self._orders[number].rows(int(numbers_B[0]), int(numbers_B[-1]) + 1)
        return datasets_B, rows_B


def rows_of(split: TokenSplit, layout: RowLayout) -> Rows:
    """Return the rows of a split; raise `UserError` (DATA) when the index of document starts is damaged."""
    if layout.packing == "stream":
        return StreamRows(split, layout)
    from gpt2_flax.data.indexed_rows import IndexedRows  # here, because most runs need no row index

    return IndexedRows(split, layout)


class EpochOrder:
    """The order of a dataset's `n_rows` rows; each epoch has a new order."""

    def __init__(self, n_rows: int, seed: int):
        self._n_rows, self._seed = n_rows, seed
        self._block = ((-1, -1), np.zeros(0, np.int64))

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return the row of each sample in [first, last) of the dataset, int64 (B,)."""
        rows = [np.zeros(0, np.int64)]
        while first < last:
            epoch, index = divmod(first, self._n_rows)
            block, start = divmod(index, _BLOCK)
            rows.append(self._rows_of_block(epoch, block)[start : start + last - first])
            first += len(rows[-1])
        return np.concatenate(rows)

    def _rows_of_block(self, epoch: int, block: int) -> np.ndarray:
        known, rows_B = self._block  # one read and one write: threads may share an order
        if known != (epoch, block):
            index_B = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self._n_rows))
            rows_B = permutation(index_B, self._n_rows, self._seed, epoch)
            self._block = ((epoch, block), rows_B)
        return rows_B


def shares_of_rest(weights: Iterable[float]) -> list[Fraction]:
    """Return for each dataset its share of the samples that the datasets before it leave; the last share is 1.

    Weights 1 and 2 give exact thirds. Denominators stay below 2**20, so that `deal` counts in int64.
    """
    exact = [Fraction(weight) for weight in weights]
    return [(weight / sum(exact[number:])).limit_denominator(2**20) for number, weight in enumerate(exact)]


def deal(samples_B: np.ndarray, shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Return the dataset of each sample of a run, and its number among the samples of that dataset.

    Of the first n samples, each dataset has its share of n, give or take the number of datasets. Each dataset gets its
    samples in order, each sample once. Like `permutation`, this is part of the file format.

    Args:
        samples_B: numbers of samples of the run, int64 (B,), below 2**42.
        shares: the shares that `shares_of_rest` gives.

    Returns:
        Two int64 arrays (B,).
    """
    datasets_B, numbers_B = np.zeros_like(samples_B), samples_B.copy()
    rest = np.arange(len(samples_B))  # places in the batch that no dataset has taken yet
    for number, share in enumerate(shares):
        among_rest = numbers_B[rest]
        taken, taken_after = (n * share.numerator // share.denominator for n in (among_rest, among_rest + 1))
        takes = taken_after > taken
        datasets_B[rest] = number
        numbers_B[rest] = np.where(takes, taken, among_rest - taken)
        rest = rest[~takes]
    return datasets_B, numbers_B


def permutation(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the image of each `index` (int64, any shape) under a bijection of [0, size).

    Each pair (seed, epoch) has its own bijection. The bijections are part of the file format: after a change, a resumed
    run would read other rows.
    """
    half_bits = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    key = mix(mix(np.uint64(seed)) + np.uint64(epoch))
    round_keys = [mix(key + np.uint64(number)) for number in range(_ROUNDS)]
    values = np.asarray(index, np.uint64).reshape(-1).copy()
    todo = np.ones(values.shape, bool)
    while todo.any():  # the network permutes [0, 4 ** half_bits); walk on from what falls outside [0, size)
        left, right = values[todo] >> half_bits, values[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        values[todo] = left << half_bits | right
        todo = values >= size
    return values.astype(np.int64).reshape(np.shape(index))


def mix(x: Any) -> Any:
    """Return the finalizer of SplitMix64 (Steele et al., 2014) of each integer, uint64; modulo 2**64 on purpose."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
