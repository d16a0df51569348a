"""Token ids of several texts, stored as what they become: one flat array.

Dimension key: B texts, T tokens of all of them.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Returns the smallest type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class Encoded(Sequence[np.ndarray]):
    """The ids of B texts one after the other, `ids_T`, and how many each has, int64 `lengths_B`.

    As a sequence, element i holds the ids of text i. The type of ids is `token_dtype` of the vocabulary.
    """

    def __init__(self, ids_T: np.ndarray, lengths_B: np.ndarray):
        self.ids_T, self.lengths_B = ids_T, lengths_B
        self._bounds = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths_B, dtype=np.int64)))

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], vocab_size: int) -> "Encoded":
        lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = itertools.chain.from_iterable(rows)
        return cls(np.fromiter(flat, token_dtype(vocab_size), int(lengths_B.sum())), lengths_B)

    @classmethod
    def from_arrays(cls, rows: Sequence[np.ndarray], vocab_size: int) -> "Encoded":
        """Takes arrays of any integer type whose ids are all below `vocab_size`."""
        lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
        none = np.zeros(0, np.int32)  # for `concatenate`, which needs an array
        return cls(np.concatenate((none, *rows), dtype=token_dtype(vocab_size), casting="unsafe"), lengths_B)

    def select(self, mask_T: np.ndarray) -> "Encoded":
        """Returns the same texts with only the tokens where the boolean `mask_T` is set."""
        kept = np.concatenate((np.zeros(1, np.int64), np.cumsum(mask_T, dtype=np.int64)))
        return Encoded(self.ids_T[mask_T], np.diff(kept[self._bounds]))

    def __len__(self) -> int:
        return len(self.lengths_B)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.ids_T[self._bounds[index] : self._bounds[index + 1]]
