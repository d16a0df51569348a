"""Token ids of several texts in one flat array, which is also how a dataset stores them.

Dimension key: B texts, T tokens of all texts.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest dtype that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class RaggedIds:
    """The ids of B texts: element i holds the ids of text i.

    `ids_T` joins the ids of all texts, in the `token_dtype` of the vocabulary; int64 `lengths_B` counts ids per text.
    """

    def __init__(self, ids_T: np.ndarray, lengths_B: np.ndarray):
        self.ids_T, self.lengths_B = ids_T, lengths_B
        self._bounds = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths_B, dtype=np.int64)))

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], vocab_size: int) -> "RaggedIds":
        lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = itertools.chain.from_iterable(rows)
        return cls(np.fromiter(flat, token_dtype(vocab_size), int(lengths_B.sum())), lengths_B)

    @classmethod
    def from_arrays(cls, rows: Sequence[np.ndarray], vocab_size: int) -> "RaggedIds":
        """Join arrays of any integer dtype whose ids are all below `vocab_size`."""
        lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
        none = np.zeros(0, np.int32)  # `concatenate` needs at least one array
        return cls(np.concatenate((none, *rows), dtype=token_dtype(vocab_size), casting="unsafe"), lengths_B)

    def select(self, mask_T: np.ndarray) -> "RaggedIds":
        """Return the same texts with only the tokens where the boolean `mask_T` is True."""
        kept = np.concatenate((np.zeros(1, np.int64), np.cumsum(mask_T, dtype=np.int64)))
        return RaggedIds(self.ids_T[mask_T], np.diff(kept[self._bounds]))

    def __len__(self) -> int:
        return len(self.lengths_B)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids_T[self._bounds[index] : self._bounds[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))
