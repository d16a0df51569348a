"""The rows of one split, and batches of them."""

from fractions import Fraction

from gpt2_flax.data.batches import Batches, rows_of
from gpt2_flax.data.packing import RowLayout


def rows(split, seq_length, packing="stream", across=False):
    return rows_of(split, RowLayout(seq_length, packing, across))


def batches_of(split, seq_length, seed, packing="stream", across=False):
    """The batches of a run on one dataset."""
    return Batches([split], [Fraction(1)], RowLayout(seq_length, packing, across), seed)
