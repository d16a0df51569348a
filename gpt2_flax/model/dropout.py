"""Dropout decided by a hash: it costs little, stores no mask and is the same on every mesh.

Dimension key: B rows, H heads.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.checkpoint, static_argnums=1)  # computes the quick hash again in the backward pass, and stores no mask
def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element of x (B, ...) with probability `rate`, and scale the others by 1 / (1 - rate).

    Without a key, return x.
    """
    if key is None or rate == 0.0:
        return x
    row_seeds = jnp.expand_dims(jax.random.bits(key, (2, x.shape[0]), jnp.uint32), range(2, x.ndim + 1))
    numbers = jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32).reshape(x.shape[1:])
    return jnp.where(kept(row_seeds, numbers, rate), x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, num: int) -> Sequence[jax.Array | None] | jax.Array:
    """Return `num` new keys, or `num` times None when dropout is off."""
    return [None] * num if key is None else jax.random.split(key, num)


def head_seeds(key: jax.Array, n_rows: int, n_heads: int) -> jax.Array:
    """Return seeds_BH2, uint32: 64 random bits for the attention weights of each head of each row."""
    return jax.random.bits(key, (n_rows, n_heads, 2), jnp.uint32)


def weight_number(queries: jax.Array, keys: jax.Array, length: int) -> jax.Array:
    """Return each attention weight's number for `kept`, uint32, from int32 positions in a row of `length` tokens."""
    return (queries * length + keys).astype(jnp.uint32)


def kept(seeds: jax.Array | tuple[jax.Array, jax.Array], numbers: jax.Array, rate: float) -> jax.Array:
    """Return whether dropout keeps the elements with these numbers, bool.

    An element is kept or dropped by its two seeds and its number alone, all uint32. The choice is therefore the same in
    blocks of any size, on any mesh, and in the backward pass. The hash is lowbias32 of the number,
    https://github.com/skeeto/hash-prospector; one seed is added before and one after the first multiplication.
    """
    bits = numbers + seeds[0]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) + seeds[1]
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    bits ^= bits >> 16
    return bits < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))
