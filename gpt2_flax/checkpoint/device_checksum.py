"""Compute a checksum of every array of a tree on the devices that hold the array, without reading a file.

The checksum of an array is two sums modulo 2**32. The first sum adds its 32-bit words, each times an odd weight of its
position. The second sum adds the words with their halves exchanged, times other odd weights. Addition commutes, so the
sums are the same on any mesh. With odd weights, any change of one word changes both sums. Exchanging two words that
differ only in the top bit does not change the first sum, but changes the second.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gpt2_flax.parallel.rules import path_of

_SEEDS = (0x9E3779B1, 0x85EBCA77)  # one for each sum; odd, with irregular bits


def checksums(tree: Any) -> dict[str, str]:
    """Return the checksum of each array by path, 16 hexadecimal digits. All processes of a run must call this.

    Arrays have any shape and any dtype of at most 32 bits. The computation takes one pass over memory.
    """
    arrays = {path_of(path): array for path, array in jax.tree_util.tree_leaves_with_path(tree)}
    sums = jax.device_get(_checksums(arrays))
    return {path: f"{int(first):08x}{int(second):08x}" for path, (first, second) in sums.items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {path: _checksum(array) for path, array in arrays.items()}


def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two sums of an array, uint32 ()."""
    words = _words(x)
    sums = (words, words << 16 | words >> 16)
    for axis in reversed(range(x.ndim)):
        first, second = (_odd(x.shape[axis], seed * (2 * axis + 3)) for seed in _SEEDS)
        # One reduction for both sums: two reductions take eight times as long in XLA for CPUs.
        zeros = (jnp.uint32(0), jnp.uint32(0))
        weighted = (sums[0] * first, sums[1] * second)
        sums = jax.lax.reduce(weighted, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), (axis,))
    return sums


def _words(x: jax.Array) -> jax.Array:
    """Return the bits of each element, uint32 of the same shape."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _odd(n: int, seed: int) -> jax.Array:
    """Return odd weights of n positions, uint32 (n,): the finalizer of MurmurHash3 with the lowest bit set."""
    x = jax.lax.iota(jnp.uint32, n) + jnp.uint32(seed % 2**32)
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16 | 1
