"""Place numpy batches on the devices of a mesh, ahead of need."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from gpt2_flax.data.packing import Batch
from gpt2_flax.parallel.mesh import BATCH_AXES
from gpt2_flax.parallel.rules import batch_sharding

T = TypeVar("T")


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of shards that the rows of a batch are split into."""
    return mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]


def device_batch(mesh: Mesh, n_rows: int, read: Callable[[int, int], Batch], start: int = 0) -> Batch:
    """Return the global batch of samples [start, start + n_rows), sharded by row.

    Args:
        mesh: devices that hold the batch.
        n_rows: rows of the batch, a multiple of `row_shards(mesh)`.
        read: returns the numpy rows of samples [first, last). Each process reads only the rows of its own devices.
        start: first sample of the batch.
    """
    sharding = batch_sharding(mesh)
    slices = sharding.addressable_devices_indices_map((n_rows,)).values()
    bounds = [index[0].indices(n_rows)[:2] for index in slices if index is not None]
    first, last = min(begin for begin, _ in bounds), max(end for _, end in bounds)

    def place(local):
        def shard(index):
            begin, end, _ = index[0].indices(n_rows)
            return local[begin - first : end - first]

        return jax.make_array_from_callback((n_rows, *local.shape[1:]), sharding, shard)

    return Batch(*map(place, read(start + first, start + last)))


def prefetch(make: Callable[[int], T], items: Iterable[int]) -> Generator[T]:
    """Yield `make(item)` for each item in order; a thread computes up to two items ahead.

    An exception of `make` is raised here, in its turn.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
