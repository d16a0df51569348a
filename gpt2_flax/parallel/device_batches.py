"""Numpy rows onto the devices of a mesh, ahead of need."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from jax.sharding import Mesh

from gpt2_flax.data.packing import Batch
from gpt2_flax.parallel.mesh import BATCH_AXES
from gpt2_flax.parallel.rules import batch_sharding

T = TypeVar("T")


def row_shards(mesh: Mesh) -> int:
    """Returns how many parts the rows of a batch are split in."""
    return mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]


def device_batch(mesh: Mesh, n_rows: int, rows: Callable[[int, int], Batch]) -> Batch:
    """Returns a global batch of `n_rows` rows, sharded by row; `rows(first, last)` gives numpy rows.

    Each process asks only for the rows that its own devices hold.
    """
    sharding = batch_sharding(mesh)
    bounds = [index[0].indices(n_rows)[:2] for index in sharding.addressable_devices_indices_map((n_rows,)).values()]
    first, last = min(start for start, _ in bounds), max(stop for _, stop in bounds)

    def place(local):
        def piece(index):
            start, stop, _ = index[0].indices(n_rows)
            return local[start - first : stop - first]

        return jax.make_array_from_callback((n_rows, *local.shape[1:]), sharding, piece)

    return Batch(*map(place, rows(first, last)))


def prefetch(make: Callable[[int], T], items: Iterable[int], depth: int = 2) -> Iterator[T]:
    """Yields `make(item)` in order, made by a thread up to `depth` ahead; its exception is raised here, in its turn."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
