"""End tokens inserted into training rows, so that a model continues a prompt that ends with one.

`BertTokenizer` of `transformers` turns a prompt into `[CLS] prompt [SEP]`. [SEP] is also the eos that ends each
document, so a model that saw it nowhere else begins a new document behind it. With `data.prompt_separator`, that share
of the segments gets an eos inside. For tokens t[0..n-1] and targets y[0..n-1] of a segment, and a place p,

    tokens     t[0] ... t[p-1]  eos     t[p] ... t[n-2]
    targets    y[0] ... y[p-1]  y[p-1]  y[p] ... y[n-2]

The inserted eos is no target, and y[p-1] is learned both before and behind it. Segments and positions stay as they are:
the segment loses its last token with its target.
Dimension key: B rows, T sequence, R segments of all rows (the padding of a row counts as one), C chosen segments,
N positions in chosen segments.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from gpt2_flax.data.batches import Batches, mix
from gpt2_flax.data.dataset import TokenSplit
from gpt2_flax.data.flat_files import ranges
from gpt2_flax.data.packing import IGNORE, Batch, RowLayout

# The order of rows is drawn from seeds below 2**63. This bit gives the end tokens random numbers of their own.
_DOMAIN = 1 << 63


class PromptSeparator(NamedTuple):
    """Which segments get an eos, and where."""

    share: float
    """Share of the segments, from 0 to 1; each segment is chosen by itself."""
    seed: int
    """Seed of the choice and the places, below 2**32."""
    bos_id: int
    eos_id: int

    def inserted(self, batch: Batch, samples_B: np.ndarray) -> Batch:
        """Return the batch with an eos inserted into each chosen segment that has a place for it.

        The choice and the place depend only on the seed, the number of the sample in the run and the number of the
        segment in its row. Like the order of rows, they are part of the file format.

        Args:
            batch: rows of the samples.
            samples_B: numbers of the samples in the run, int64 (B,).
        """
        tokens_T, targets_T = batch.tokens_BT.flatten(), batch.targets_BT.flatten()  # copies
        firsts_C, ends_C, keys_C = self._chosen(batch.segments_BT, samples_B)
        # The position before a place must have a target: this excludes padding, and the border of two documents that
        # share a segment. Directly behind a bos, the prompt would be empty. Directly before the eos of a document, the
        # model would learn that a prompt is all of its document.
        before_N = ranges(firsts_C, ends_C - firsts_C - 1)
        target_N = targets_T[before_N]
        is_place_N = (target_N != IGNORE) & (target_N != self.eos_id) & (tokens_T[before_N] != self.bos_id)
        before_N = before_N[is_place_N]
        low_C, high_C = np.searchsorted(before_N, (firsts_C, ends_C))
        counts_C = (high_C - low_C).astype(np.uint64)
        picks_C = (mix(keys_C) >> np.uint64(32)) * counts_C >> np.uint64(32)  # even in [0, count)
        filled_C = counts_C > 0
        places_C = before_N[(low_C + picks_C.astype(np.int64))[filled_C]] + 1
        moved_N = ranges(places_C, ends_C[filled_C] - places_C)
        for ids_T in (tokens_T, targets_T):
            ids_T[moved_N] = ids_T[moved_N - 1]
        tokens_T[places_C] = self.eos_id
        shape = batch.tokens_BT.shape
        return batch._replace(tokens_BT=tokens_T.reshape(shape), targets_BT=targets_T.reshape(shape))

    def _chosen(self, segments_BT: np.ndarray, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where each chosen segment begins and ends in all rows together, int64, and its key, uint64."""
        segments_T, seq_length = segments_BT.reshape(-1), segments_BT.shape[1]
        begins_T = np.empty(segments_T.shape, bool)
        np.not_equal(segments_T[1:], segments_T[:-1], out=begins_T[1:])
        begins_T[::seq_length] = True
        firsts_R = np.flatnonzero(begins_T)
        ends_R = np.append(firsts_R[1:], len(segments_T))
        keys_B = mix(mix(_DOMAIN + self.seed) + samples_B.astype(np.uint64))
        keys_R = mix(keys_B[firsts_R // seq_length] + segments_T[firsts_R].astype(np.uint64))
        chosen_R = (keys_R >> np.uint64(11)) * 2.0**-53 < self.share
        return firsts_R[chosen_R], ends_R[chosen_R], keys_R[chosen_R]


class SeparatedBatches(Batches):
    """Batches with inserted end tokens; further arguments as `Batches`."""

    def __init__(
        self,
        splits: Sequence[TokenSplit],
        shares: Sequence[Fraction],
        layout: RowLayout,
        seed: int,
        separator: PromptSeparator,
    ):
        super().__init__(splits, shares, layout, seed)
        self._separator = separator

    def batch(self, first: int, last: int) -> Batch:
        return self._separator.inserted(super().batch(first, last), np.arange(first, last))
