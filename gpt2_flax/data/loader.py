"""Batches as a function of (seed, sample number): nothing to save, nothing to resume, any host can ask for any row.

Sample i of a dataset is row `permutation(i mod n)` of the n rows of epoch `i div n`: a keyed Feistel network with cycle
walking (Black and Rogaway, 2002), which needs no memory at any number of rows. Which dataset a sample of the run
belongs to, and which of its samples it is, `deal` computes from the shares alone, so that each dataset has epochs of
its own.
Dimension key: B rows.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from gpt2_flax.config import Packing
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.packing import Batch, across_documents, rows_of

_ROUNDS = 6
_BLOCK = 2**13  # samples whose rows are looked up at once: a few cost as much


class Loader:
    """Deals the rows of one split in the order of a run (`batch`) or of the stream (`in_order`)."""

    def __init__(
        self,
        split: TokenSplit,
        seq_length: int,
        seed: int,
        packing: Packing = "stream",
        attend_across_documents: bool = False,
    ):
        self.split, self.seq_length, self.seed = split, seq_length, seed
        self._rows, self._across = rows_of(split, seq_length, packing), attend_across_documents
        self.n_rows = self._rows.n_rows
        self._block = ((-1, -1), np.zeros(0, np.int64))

    def batch(self, first: int, last: int) -> Batch:
        """Returns the rows of samples [first, last) of the split; a new epoch has a new order."""
        parts = []
        while first < last:
            epoch, index = divmod(first, self.n_rows)
            block, start = divmod(index, _BLOCK)
            parts.append(self._order(epoch, block)[start : start + last - first])
            first += len(parts[-1])
        return self._batch(np.concatenate(parts) if parts else np.zeros(0, np.int64))

    def in_order(self, first: int, last: int) -> Batch:
        """Returns rows [first, last) of an epoch in the order of the stream; those past its end are padding."""
        return self._batch(np.arange(first, last))

    def row(self, sample: int) -> int:
        """Returns which row of the stream a sample is."""
        epoch, index = divmod(sample, self.n_rows)
        block, place = divmod(index, _BLOCK)
        return int(self._order(epoch, block)[place])

    def starts(self, sample: int) -> np.ndarray:
        """Returns where in the stream each segment of a sample begins, int64, padding left out."""
        return self._rows.starts(self.row(sample))

    def _batch(self, rows_B: np.ndarray) -> Batch:
        batch = self._rows.batch(rows_B)
        return across_documents(batch) if self._across else batch

    def _order(self, epoch: int, block: int) -> np.ndarray:
        """The rows of a block of the samples of an epoch."""
        known, rows_B = self._block  # read and written at once: threads may share a loader
        if known != (epoch, block):
            index_B = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.n_rows))
            rows_B = permutation(index_B, self.n_rows, self.seed, epoch)
            self._block = ((epoch, block), rows_B)
        return rows_B


class MixedLoader:
    """Deals the rows of several splits in fixed shares; those of a single one as `Loader` does."""

    def __init__(
        self,
        splits: Sequence[TokenSplit],
        shares: Sequence[Fraction],
        seq_length: int,
        seed: int,
        packing: Packing = "stream",
        attend_across_documents: bool = False,
    ):
        # Seeds of runs are below 2**32: here no two datasets of any two runs share one, though they may be copies.
        self.loaders = [
            Loader(split, seq_length, seed + (number << 32), packing, attend_across_documents)
            for number, split in enumerate(splits)
        ]
        self.shares = shares

    def batch(self, first: int, last: int) -> Batch:
        """Returns the rows of samples [first, last) of the run."""
        datasets_B, samples_B = deal(np.arange(first, last), self.shares)
        batch = Batch(*(np.empty((last - first, self.loaders[0].seq_length), np.int32) for _ in Batch._fields))
        for number in np.unique(datasets_B):
            rows = datasets_B == number  # whose samples follow one another
            part = self.loaders[number].batch(samples_B[rows][0], samples_B[rows][-1] + 1)
            for whole_BT, part_BT in zip(batch, part, strict=True):
                whole_BT[rows] = part_BT
        return batch


def shares_of_rest(weights: Iterable[float]) -> list[Fraction]:
    """Returns the share that each dataset has of what those before it leave; the last takes it all.

    1 and 2 give the thirds themselves. Denominators stay below 2**20, so that `deal` counts in int64.
    """
    exact = [Fraction(weight) for weight in weights]
    return [(weight / sum(exact[number:])).limit_denominator(2**20) for number, weight in enumerate(exact)]


def deal(samples: np.ndarray, shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the dataset of each sample of a run (int64, one dimension, below 2**42) and its number among its samples.

    `shares` are those of `shares_of_rest`. Of the samples before n each dataset has its share of n give or take the
    number of datasets, and all its samples in order, each once. As `permutation` this is a file format.
    """
    datasets_B, samples_B = np.zeros_like(samples), samples.copy()
    rest = np.arange(len(samples))  # rows that no dataset has taken yet
    for number, share in enumerate(shares):
        among_rest = samples_B[rest]
        taken, taken_after = (n * share.numerator // share.denominator for n in (among_rest, among_rest + 1))
        takes = taken_after > taken
        datasets_B[rest] = number
        samples_B[rest] = np.where(takes, taken, among_rest - taken)
        rest = rest[~takes]
    return datasets_B, samples_B


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
