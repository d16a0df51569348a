"""Dropout of activations, and of attention weights by a hash that every attention kernel computes alike.

Dimension key: B rows, H heads.
"""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def head_seeds(key: jax.Array, n_rows: int, n_heads: int) -> jax.Array:
    """Returns seeds_BH2, uint32: 64 random bits for each head of each row."""
    return jax.random.bits(key, (n_rows, n_heads, 2), jnp.uint32)


def kept(seeds: tuple[jax.Array, jax.Array], queries: jax.Array, keys: jax.Array, length: int, rate: float) -> jax.Array:
    """Returns whether dropout keeps the attention weights of `queries` (int32 positions) for `keys`, bool.

    The arguments broadcast against each other. `seeds` are the two numbers that `head_seeds` drew for the head, and
    `length` is the number of tokens of the row. A weight's fate depends on nothing else: it is the same in blocks of
    any size, on any mesh, and in the backward pass. The hash is lowbias32, https://github.com/skeeto/hash-prospector,
    of the number of the weight in its head, with a half of the seed before and after the first multiplication.
    """
    bits = (queries * length + keys).astype(jnp.uint32) + seeds[0]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) + seeds[1]
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    bits ^= bits >> 16
    return bits < jnp.uint32(round((1 - rate) * 2**32))
