"""Causal attention as plain matrix products, one block of queries at a time, for any device.

As in arXiv:2205.14135, the backward pass gets one log-sum for each query instead of the probabilities, which it
computes again. Dimension key: B batch, T queries, S keys, H heads, K head size.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt2_flax.model.dropout import kept, weight_number

# Queries in a block. A smaller block skips more of the keys in the future (of 1024 tokens, 256 leave 5/8 of the work
# and 128 leave 9/16) and needs less memory, but makes more and smaller products.
QUERY_BLOCK = 256
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(
    rate: float,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    seeds_BH2: jax.Array | None,
) -> jax.Array:
    """Return out_BTHK; arguments as in `attention.causal_attention`, with dropout by `head_seeds` instead of a key."""
    return _forward(rate, q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2)[0]


def _forward(rate: float, q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2) -> tuple[jax.Array, tuple]:
    q_BHTK, k_BHTK, v_BHTK = _by_head(q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTHK, v_BTHK)
    outs, log_sums = [], []
    for start, stop in _blocks(q_BTHK.shape[1]):
        scores_BHTS = _scores(q_BHTK[:, :, start:stop], k_BHTK[:, :, :stop], segments_BT, start)
        highest_BHT1 = scores_BHTS.max(-1, keepdims=True)
        weights_BHTS = jnp.exp(scores_BHTS - highest_BHT1)
        sums_BHT1 = weights_BHTS.sum(-1, keepdims=True)
        weights_BHTS = _dropped(weights_BHTS, rate, seeds_BH2, start, q_BTHK.shape[1]).astype(q_BTHK.dtype)
        out_BHTK = _product("BHTS,BHSK->BHTK", weights_BHTS, v_BHTK[:, :, :stop]) / sums_BHT1
        outs.append(out_BHTK.astype(q_BTHK.dtype))
        log_sums.append(highest_BHT1 + jnp.log(sums_BHT1))
    # `attention.saves_attention` finds the inputs of the backward pass by this name.
    out_BTHK = checkpoint_name(jnp.concatenate(outs, 2).swapaxes(1, 2), "attention")
    log_sums_BHT1 = checkpoint_name(jnp.concatenate(log_sums, 2), "attention")
    return out_BTHK, (q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2, out_BTHK, log_sums_BHT1)


def _backward(rate: float, saved: tuple, d_out_BTHK: jax.Array) -> tuple:
    q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2, out_BTHK, log_sums_BHT1 = saved
    dtype, scale = q_BTHK.dtype, q_BTHK.shape[-1] ** -0.5
    # The compiler cannot know that 0 * d_out is zero. Without it, XLA would see that the scores below equal the scores
    # of the forward pass, and would keep those. Barriers, and so jax.checkpoint, do not prevent that where a CPU runs
    # unrolled layers.
    q_BTHK = q_BTHK * scale + 0 * d_out_BTHK
    q_BHTK, k_BHTK, v_BHTK, d_out_BHTK, out_BHTK = _by_head(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, out_BTHK)
    means_BHT1 = (d_out_BHTK.astype(jnp.float32) * out_BHTK).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], [], []
    for start, stop in _blocks(q_BTHK.shape[1]):
        q_block_BHTK, d_block_BHTK = q_BHTK[:, :, start:stop], d_out_BHTK[:, :, start:stop]
        scores_BHTS = _scores(q_block_BHTK, k_BHTK[:, :, :stop], segments_BT, start)
        weights_BHTS = jnp.exp(scores_BHTS - log_sums_BHT1[:, :, start:stop])
        d_weights_BHTS = _product("BHTK,BHSK->BHTS", d_block_BHTK, v_BHTK[:, :, :stop])
        # The dropout of the forward pass, for the weights and for their gradient.
        dropped_BHTS = _dropped(weights_BHTS, rate, seeds_BH2, start, q_BTHK.shape[1]).astype(dtype)
        d_weights_BHTS = _dropped(d_weights_BHTS, rate, seeds_BH2, start, q_BTHK.shape[1])
        d_scores_BHTS = (weights_BHTS * (d_weights_BHTS - means_BHT1[:, :, start:stop])).astype(dtype)
        d_q.append(_product("BHTS,BHSK->BHTK", d_scores_BHTS, k_BHTK[:, :, :stop]) * scale)
        d_k.append(_product("BHTS,BHTK->BHSK", d_scores_BHTS, q_block_BHTK))
        d_v.append(_product("BHTS,BHTK->BHSK", dropped_BHTS, d_block_BHTK))
    gradients_BHTK = jnp.concatenate(d_q, 2), _sum_over_blocks(d_k), _sum_over_blocks(d_v)
    return *(gradient_BTHK.astype(dtype) for gradient_BTHK in _by_head(*gradients_BHTK)), None, None


blockwise_attention.defvjp(_forward, _backward)


def _by_head(*arrays_BTHK: jax.Array) -> tuple[jax.Array, ...]:
    """Return arrays_BHTK, whose heads products run one by one; also its own inverse."""
    return tuple(array.swapaxes(1, 2) for array in arrays_BTHK)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the start and the stop of each block of queries."""
    for start in range(0, length, QUERY_BLOCK):
        yield start, min(start + QUERY_BLOCK, length)


def _scores(q_BHTK: jax.Array, k_BHSK: jax.Array, segments_BT: jax.Array | None, start: int) -> jax.Array:
    """Return float32 scores_BHTS of scaled queries from `start` on; a key that is not seen gets the lowest number."""
    stop = k_BHSK.shape[2]
    mask_BTS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    if segments_BT is None:
        mask_BTS = mask_BTS[None]
    else:
        mask_BTS = mask_BTS & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])
    scores_BHTS = _product("BHTK,BHSK->BHTS", q_BHTK, k_BHSK)
    # Added, not selected: XLA for CPUs fuses products, sums and exponentials, but not selections.
    return scores_BHTS + jnp.where(mask_BTS, 0, jnp.finfo(jnp.float32).min)[:, None]


def _dropped(weights_BHTS: jax.Array, rate: float, seeds_BH2: jax.Array | None, start: int, length: int) -> jax.Array:
    """Drop weights of the queries from `start` on, in rows of `length` tokens, and scale the others."""
    if seeds_BH2 is None:
        return weights_BHTS
    queries_T1, keys_S = start + jnp.arange(weights_BHTS.shape[2])[:, None], jnp.arange(weights_BHTS.shape[3])
    seeds = seeds_BH2[..., 0, None, None], seeds_BH2[..., 1, None, None]
    return jnp.where(kept(seeds, weight_number(queries_T1, keys_S, length), rate), weights_BHTS / (1 - rate), 0)


def _sum_over_blocks(gradients: Sequence[jax.Array]) -> jax.Array:
    """Return the sum_BHSK of each block's gradient, which covers the keys from the first up to the block's last."""
    stops = [0, *(gradient.shape[2] for gradient in gradients)]
    sums = (
        sum(gradient[:, :, start:stop] for gradient in gradients[block:])
        for block, (start, stop) in enumerate(itertools.pairwise(stops))
    )
    return jnp.concatenate(list(sums), 2)
