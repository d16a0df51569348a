"""Flash attention with documents and dropout for NVIDIA GPUs: no array of queries times keys ever exists.

A document is a run of one segment number, so two positions describe it for each token: the start and the end of the
token's document. Blocks of keys outside the documents of a block of queries are skipped. Dropout is a hash
(`model.dropout.kept`), computed again in the backward pass. Nothing is added atomically, so the same inputs give the
same bits. `model.flash_triton` has the kernels; another compiler needs the same functions `forward` and `backward`.

Dimension key: B rows, T tokens, H heads, K head size.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from gpt2_flax.model.flash_triton import Options, Spans, Tiles, backward, forward, tiles_for

_ROW_MULTIPLE = 64  # tokens; rows are padded to a multiple of it


def flash_attention(
    qkv_BT3HK: jax.Array,
    segments_BT: jax.Array | None = None,
    rate: float = 0.0,
    seeds_BH2: jax.Array | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return scaled dot-product attention, out_BTHK in the dtype of `qkv_BT3HK`; the softmax is float32.

    Arguments as in `attention.causal_attention`, with dropout by `head_seeds` instead of a key. The kernels read
    queries, keys and values where the projection wrote them, and write their gradients in the same layout.
    """
    n_rows, length, _, n_heads, size = qkv_BT3HK.shape
    if segments_BT is None:
        segments_BT = jnp.zeros((n_rows, length), jnp.int32)
    if seeds_BH2 is None:
        rate, seeds_BH2 = 0.0, jnp.zeros((n_rows, n_heads, 2), jnp.uint32)
    # Padding tokens are a document of their own behind the others. Triton needs powers of two, so features are padded
    # with zeros.
    more_tokens, more_features = -length % _ROW_MULTIPLE, max(16, pl.next_power_of_2(size)) - size
    if tiles is None:
        tiles = tiles_for(length + more_tokens, size + more_features)
    else:
        more_tokens = -length % math.lcm(*(side for tile in tiles for side in tile[:2]))
    qkv_BT3HK = jnp.pad(qkv_BT3HK, ((0, 0), (0, more_tokens), (0, 0), (0, 0), (0, more_features)))
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more_tokens)), constant_values=-1)
    options = Options(rate, length, size**-0.5, tiles, interpret)
    out_BTHK: jax.Array = _flash(options, qkv_BT3HK, _spans(segments_BT), seeds_BH2)
    return out_BTHK[:, :length, :, :size]


def _spans(segments_BT: jax.Array) -> Spans:
    n_rows, length = segments_BT.shape
    places_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (n_rows, length))
    differs_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    edge_B1 = jnp.ones((n_rows, 1), bool)
    starts_BT, ends_BT = jnp.concatenate([edge_B1, differs_BT], 1), jnp.concatenate([differs_BT, edge_B1], 1)
    return Spans(
        jax.lax.cummax(jnp.where(starts_BT, places_BT, 0), axis=1),
        jax.lax.cummin(jnp.where(ends_BT, places_BT + 1, length), axis=1, reverse=True),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options: Options, qkv_BT3HK: jax.Array, spans: Spans, seeds_BH2: jax.Array) -> jax.Array:
    return forward(options, qkv_BT3HK, spans, seeds_BH2)[0]


def _flash_forward(options: Options, qkv_BT3HK: jax.Array, spans: Spans, seeds_BH2: jax.Array) -> tuple:
    # `attention.saves_attention` finds these names, so that rematerialization does not run the kernel again.
    out_BTHK, log_sums_BHT = (
        checkpoint_name(array, "attention") for array in forward(options, qkv_BT3HK, spans, seeds_BH2)
    )
    return out_BTHK, (qkv_BT3HK, spans, seeds_BH2, out_BTHK, log_sums_BHT)


def _flash_backward(options: Options, saved: tuple, d_out_BTHK: jax.Array) -> tuple[jax.Array, None, None]:
    qkv_BT3HK, spans, seeds_BH2, out_BTHK, log_sums_BHT = saved
    return backward(options, qkv_BT3HK, spans, seeds_BH2, out_BTHK, log_sums_BHT, d_out_BTHK), None, None


_flash.defvjp(_flash_forward, _flash_backward)
