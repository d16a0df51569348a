"""Bin packing: parts of documents into rows, by best fit decreasing (Johnson, 1973).

The longest parts come first, and each goes where it leaves the least space; a row is opened when it fits nowhere. What
can be done with a part depends on its length alone, and what with a row on its space: rows of one space are moved
together, so that the work in Python grows with the square of the row length and not with the number of parts.
Dimension key: N parts.
"""

import numpy as np


def best_fit_decreasing(lengths_N: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the int64 row of each part.

    lengths_N: from 1 to `capacity`, any integer type. Rows are numbered in the order of their longest parts, of equal
    ones the first, so that a reader of rows in order reads the parts nearly in order too. The result is a file format.
    """
    order_N = np.argsort(_small(capacity - lengths_N.astype(np.int64), capacity), kind="stable")
    rows_N, n_rows = _place(np.bincount(lengths_N, minlength=capacity + 1), capacity)
    longest = np.empty(n_rows, np.int64)
    longest[rows_N[::-1]] = order_N[::-1]  # of the parts of a row the one placed first is written last
    renumbered = np.empty(n_rows, np.int64)
    renumbered[np.argsort(longest)] = np.arange(n_rows)
    result_N = np.empty(len(lengths_N), np.int64)
    result_N[order_N] = renumbered[rows_N]
    return result_N


def _place(counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each part, longest first, and the number of rows; there are `counts[n]` parts of length n."""
    open_rows = _OpenRows(capacity)
    placed = [
        rows
        for length in range(capacity, 0, -1)
        if counts[length]
        for rows in open_rows.fill(length, int(counts[length]))
    ]
    return np.concatenate(placed) if placed else np.zeros(0, np.int64), open_rows.n_rows


class _OpenRows:
    """Rows by the space that is left in them."""

    def __init__(self, capacity: int):
        self.capacity, self.n_rows = capacity, 0
        self.counts = np.zeros(capacity + 1, np.int64)
        self.groups: list[list[np.ndarray]] = [[] for _ in self.counts]

    def fill(self, length: int, n_parts: int) -> list[np.ndarray]:
        """Puts in `n_parts` of one length and returns the row of each."""
        placed = []
        # The row with the least space is filled until no more goes in, and is then no longer among these.
        for space in (np.flatnonzero(self.counts[length:]) + length).tolist():
            if not n_parts:
                break
            wanted = -(-n_parts // (space // length))
            for rows in self._take(space, wanted):
                placed.append(self._add(rows, space, length, n_parts))
                n_parts -= len(placed[-1])
        if n_parts:
            n_new = -(-n_parts // (self.capacity // length))
            rows = np.arange(self.n_rows, self.n_rows + n_new)
            self.n_rows += n_new
            placed.append(self._add(rows, self.capacity, length, n_parts))
        return placed

    def _add(self, rows: np.ndarray, space: int, length: int, n_parts: int) -> np.ndarray:
        """The row of each part that goes into these rows: all take as many as fit, but the last what there is."""
        each = space // length
        placed = np.repeat(rows, each)[:n_parts]
        in_last = len(placed) - (len(rows) - 1) * each
        self._give(rows[:-1], space - each * length)
        self._give(rows[-1:], space - in_last * length)
        return placed

    def _take(self, space: int, most: int) -> list[np.ndarray]:
        group, taken = self.groups[space], []
        while group and most:
            rows = group.pop()
            if len(rows) > most:
                group.append(rows[:-most])
                rows = rows[-most:]
            taken.append(rows)
            most -= len(rows)
        self.counts[space] -= sum(map(len, taken))
        return taken

    def _give(self, rows: np.ndarray, space: int) -> None:
        if len(rows):
            self.groups[space].append(rows)
            self.counts[space] += len(rows)


def _small(numbers_N: np.ndarray, largest: int) -> np.ndarray:
    """The same numbers in a type that numpy sorts by counting, where one holds them."""
    return numbers_N.astype(np.uint16) if largest < 2**16 else numbers_N
