"""Attention and dropout as pure functions.

Dimension key: B batch, T queries, S keys, H heads, K head size.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns scaled dot-product attention, out_BTHK in the dtype of `q_BTHK`; the softmax is float32.

    A query sees the keys where `mask_BTS` (bool) is true; each row must have at least one.
    """
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BSHK)
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    weights_BHTS = jax.nn.softmax(scores_BHTS).astype(q_BTHK.dtype)
    weights_BHTS = dropout(weights_BHTS, dropout_rate, dropout_key)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK)


def document_mask(segments_BT: jax.Array) -> jax.Array:
    """Returns bool mask_BTT: a token sees itself and what comes before it in its own segment."""
    length = segments_BT.shape[1]
    causal_TT = jnp.tril(jnp.ones((length, length), bool))
    return causal_TT & (segments_BT[:, :, None] == segments_BT[:, None, :])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); no key, no dropout."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
