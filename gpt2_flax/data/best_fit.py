"""Bin packing of document segments into rows, by best fit decreasing (Johnson, 1973).

The longest segments come first. Each goes into the row in which it leaves the least space, or into a new row if it fits
in none. Segments of one length are interchangeable, as are rows with the same space, so rows are handled in groups: the
work in Python grows with the square of the row length and not with the number of segments.
Dimension key: N segments, R rows of a group.
"""

import numpy as np


def best_fit_decreasing(lengths_N: np.ndarray, capacity: int) -> np.ndarray:
    """Return the int64 row of each segment.

    Rows are numbered in the order of their longest segments (of equal ones, the first), so a reader of rows in order
    reads the segments nearly in order too. The result is part of a file format and must not change.

    Args:
        lengths_N: The length of each segment, from 1 to `capacity`; any integer type.
        capacity: The length of a row.
    """
    space_N = capacity - lengths_N.astype(np.int64)
    # numpy sorts 16-bit integers by counting, which is faster.
    order_N = np.argsort(space_N.astype(np.uint16) if capacity < 2**16 else space_N, kind="stable")
    rows_N, n_rows = _place(np.bincount(lengths_N, minlength=capacity + 1).tolist(), capacity)
    longest = np.empty(n_rows, np.int64)
    longest[rows_N[::-1]] = order_N[::-1]  # the segment that was placed first in its row is written last
    renumbered = np.empty(n_rows, np.int64)
    renumbered[np.argsort(longest)] = np.arange(n_rows)
    result_N = np.empty(len(lengths_N), np.int64)
    result_N[order_N] = renumbered[rows_N]
    return result_N


def _place(counts: list[int], capacity: int) -> tuple[np.ndarray, int]:
    """Return the row of each segment, longest first, and the number of rows; `counts[n]` segments have length n."""
    groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # arrays of rows, by the space left in the rows
    has_rows = np.zeros(capacity + 1, bool)
    placed, n_rows = [np.zeros(0, np.int64)], 0

    def fill(rows_R: np.ndarray, space: int, length: int, n_segments: int) -> int:
        """Put as many segments as fit into each row, the remaining ones into the last; return how many are left."""
        each = space // length
        placed.append(np.repeat(rows_R, each)[:n_segments])
        in_last = len(placed[-1]) - (len(rows_R) - 1) * each
        for some_R, left in ((rows_R[:-1], space - each * length), (rows_R[-1:], space - in_last * length)):
            if len(some_R):
                groups[left].append(some_R)
                has_rows[left] = True
        return n_segments - len(placed[-1])

    for length in range(capacity, 0, -1):
        n_segments = counts[length]
        if not n_segments:
            continue
        for space in (np.flatnonzero(has_rows[length:]) + length).tolist():
            while n_segments and groups[space]:
                rows_R, wanted = groups[space].pop(), -(-n_segments // (space // length))
                if len(rows_R) > wanted:
                    groups[space].append(rows_R[:-wanted])
                    rows_R = rows_R[-wanted:]
                n_segments = fill(rows_R, space, length, n_segments)
            has_rows[space] = bool(groups[space])
            if not n_segments:
                break
        if n_segments:
            n_new = -(-n_segments // (capacity // length))
            fill(np.arange(n_rows, n_rows + n_new), capacity, length, n_segments)
            n_rows += n_new
    return np.concatenate(placed), n_rows
