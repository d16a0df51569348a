"""The kernels of `model.flash`, in Pallas for its Triton backend: FlashAttention-2 (arXiv:2307.08691).

JAX 0.11 has deprecated this backend in favor of Mosaic GPU, and 0.12 still has it. Triton compiles one kernel for all
GPUs from compute capability 8.0 on, and uses Hopper's tensor instructions on Hopper. tokamax has Mosaic kernels, a
separate one for each generation of GPUs, but without dropout, and needs Python 3.12.

Dimension key: B rows, T tokens, H heads, K head size; in a program of a kernel, Q queries and S keys.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gpt2_flax.model.dropout import kept, weight_number

_LOG2_E = math.log2(math.e)  # GPUs have an instruction for powers of two
_LOWEST = -1e30  # finite, because the difference of two infinities is NaN


class Tile(NamedTuple):
    """The block that one program computes at once, its warps, and its loads in flight (Triton's stages)."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    d_query: Tile
    d_key_value: Tile


class Spans(NamedTuple):
    """The first token of each token's document, and the token after its last, int32; neither decreases in a row."""

    start_BT: jax.Array
    stop_BT: jax.Array


class Options(NamedTuple):
    rate: float
    length: int
    """Tokens of a row before padding."""
    scale: float
    tiles: Tiles
    interpret: bool

    @property
    def rescale(self) -> float:
        """The factor of the weights that dropout keeps."""
        return 1 / (1 - self.rate)


def tiles_for(length: int, size: int) -> Tiles:
    """Return tiles whose accumulators fit into registers, and whose loads fit into shared memory of sm_80 to sm_90."""
    long = 128 if length % 128 == 0 else 64
    warps = 8 if long == 128 else 4
    if size <= 64:
        return Tiles(Tile(long, 64, warps, 3), Tile(long, 64, warps, 3), Tile(64, long, warps, 3))
    return Tiles(Tile(long, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))


def forward(options: Options, qkv_BT3HK: jax.Array, spans: Spans, seeds_BH2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return out_BTHK and float32 log_sums_BHT, the base-2 logarithm of each query's sum of exponentials."""
    n_rows, length, _, n_heads, size = qkv_BT3HK.shape
    tile = options.tiles.forward
    # The last queries see the most keys, so they start first.
    block, whole = _specs(length, size, tile.queries, lambda i: length // tile.queries - 1 - i)
    return _call(
        partial(_forward_kernel, options),
        "flash_forward",
        tile,
        options.interpret,
        grid=(length // tile.queries, n_heads, n_rows),
        in_specs=[_SEEDS, block.one(0), whole.one(1), whole.one(2), whole.tokens],
        out_specs=[block.head, block.sums],
        out_shape=[
            jax.ShapeDtypeStruct((n_rows, length, n_heads, size), qkv_BT3HK.dtype),
            jax.ShapeDtypeStruct((n_rows, n_heads, length), jnp.float32),
        ],
    )(seeds_BH2, qkv_BT3HK, qkv_BT3HK, qkv_BT3HK, spans.start_BT)


def backward(
    options: Options,
    qkv_BT3HK: jax.Array,
    spans: Spans,
    seeds_BH2: jax.Array,
    out_BTHK: jax.Array,
    log_sums_BHT: jax.Array,
    d_out_BTHK: jax.Array,
) -> jax.Array:
    """Return the gradient d_qkv_BT3HK: one kernel writes the gradient of queries, another of keys and values."""
    n_rows, length, _, n_heads, size = qkv_BT3HK.shape
    d_qkv = jax.ShapeDtypeStruct(qkv_BT3HK.shape, qkv_BT3HK.dtype)
    tile = options.tiles.d_query
    block, whole = _specs(length, size, tile.queries, lambda i: length // tile.queries - 1 - i)
    d_qkv_BT3HK, means_BHT = _call(
        partial(_d_query_kernel, options),
        "flash_d_query",
        tile,
        options.interpret,
        grid=(length // tile.queries, n_heads, n_rows),
        in_specs=[
            *(_SEEDS, block.one(0), whole.one(1), whole.one(2), whole.tokens),
            *(block.head, block.sums, block.head),
        ],
        out_specs=[block.one(0), block.sums],
        out_shape=[d_qkv, jax.ShapeDtypeStruct((n_rows, n_heads, length), jnp.float32)],
    )(seeds_BH2, qkv_BT3HK, qkv_BT3HK, qkv_BT3HK, spans.start_BT, out_BTHK, log_sums_BHT, d_out_BTHK)
    tile = options.tiles.d_key_value
    block, whole = _specs(length, size, tile.keys, lambda j: j)
    return _call(
        partial(_d_key_value_kernel, options),
        "flash_d_key_value",
        tile,
        options.interpret,
        grid=(length // tile.keys, n_heads, n_rows),
        in_specs=[
            *(_SEEDS, whole.one(0), block.one(1), block.one(2), whole.tokens),
            *(whole.sums, whole.sums, whole.head, pl.BlockSpec(memory_space=pl.ANY)),
        ],
        out_specs=block.all,
        out_shape=d_qkv,
        input_output_aliases={8: 0},
    )(seeds_BH2, qkv_BT3HK, qkv_BT3HK, qkv_BT3HK, spans.stop_BT, log_sums_BHT, means_BHT, d_out_BTHK, d_qkv_BT3HK)


def _call(kernel: Callable, name: str, tile: Tile, interpret: bool, **call: Any) -> Callable:
    from jax.experimental.pallas import triton  # only GPUs need it, and a later JAX may lack it

    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(kernel, name=name, compiler_params=params, interpret=interpret, **call)


class _Specs(NamedTuple):
    """Block specs of the arrays for a program of the grid (block, head, row): a block of tokens, or a whole row."""

    one: Callable[[int], pl.BlockSpec]
    """qkv_BT3HK: queries (0), keys (1) or values (2)."""
    all: pl.BlockSpec
    """qkv_BT3HK: all three."""
    head: pl.BlockSpec
    """out_BTHK."""
    sums: pl.BlockSpec
    """log_sums_BHT."""
    tokens: pl.BlockSpec
    """start_BT."""


_SEEDS = pl.BlockSpec((None, None, 2), lambda i, h, b: (b, h, 0))


def _specs(length: int, size: int, tokens: int, number: Callable[[Any], Any]) -> tuple[_Specs, _Specs]:
    """Return the specs of block `number(i)`, which has `tokens` tokens, and the specs of whole rows."""

    def specs(tokens: int, at: Callable[[Any], Any]) -> _Specs:
        return _Specs(
            lambda which: pl.BlockSpec((None, tokens, None, None, size), lambda i, h, b: (b, at(i), which, h, 0)),
            pl.BlockSpec((None, tokens, 3, None, size), lambda i, h, b: (b, at(i), 0, h, 0)),
            pl.BlockSpec((None, tokens, None, size), lambda i, h, b: (b, at(i), h, 0)),
            pl.BlockSpec((None, None, tokens), lambda i, h, b: (b, h, at(i))),
            pl.BlockSpec((None, tokens), lambda i, h, b: (b, at(i))),
        )

    return specs(tokens, number), specs(length, lambda _: 0)


def _forward_kernel(options, seeds_ref, q_ref, k_ref, v_ref, start_ref, out_ref, log_sums_ref):
    queries_Q, start_Q, key_blocks = _of_queries(options.tiles.forward, start_ref)
    q_QK = q_ref[...]

    def block(masked, number, carry):
        out_QK, highest_Q, sum_Q = carry
        keys_S, at = _block(number, options.tiles.forward.keys)
        scores_QS = _times_transposed(q_QK, k_ref[at]) * (options.scale * _LOG2_E)
        if masked:
            scores_QS = jnp.where(_seen(queries_Q[:, None], keys_S, start_Q[:, None]), scores_QS, _LOWEST)
        higher_Q = jnp.maximum(highest_Q, scores_QS.max(1))
        shrink_Q = jnp.exp2(highest_Q - higher_Q)
        weights_QS = jnp.exp2(scores_QS - higher_Q[:, None])
        sum_Q = sum_Q * shrink_Q + weights_QS.sum(1)
        weights_QS = _dropped(options, seeds_ref, queries_Q[:, None], keys_S, weights_QS)
        out_QK = out_QK * shrink_Q[:, None] + _times(weights_QS.astype(q_QK.dtype), v_ref[at])
        return out_QK, higher_Q, sum_Q

    zeros_Q = jnp.zeros(queries_Q.shape, jnp.float32)
    carry = jnp.zeros(q_QK.shape, jnp.float32), zeros_Q + _LOWEST, zeros_Q
    out_QK, highest_Q, sum_Q = _over(key_blocks, block, carry)
    out_ref[...] = (out_QK * (options.rescale / sum_Q)[:, None]).astype(out_ref.dtype)
    log_sums_ref[...] = highest_Q + jnp.log2(sum_Q)


def _d_query_kernel(
    options, seeds_ref, q_ref, k_ref, v_ref, start_ref, out_ref, log_sums_ref, d_out_ref, d_q_ref, means_ref
):
    queries_Q, start_Q, key_blocks = _of_queries(options.tiles.d_query, start_ref)
    q_QK, d_out_QK, log_sums_Q = q_ref[...], d_out_ref[...], log_sums_ref[...]
    # The mean of the gradients of the weights, weighted by the weights.
    means_Q = (d_out_QK.astype(jnp.float32) * out_ref[...].astype(jnp.float32)).sum(1)
    means_ref[...] = means_Q

    def block(masked, number, d_q_QK):
        keys_S, at = _block(number, options.tiles.d_query.keys)
        k_SK = k_ref[at]
        scores_QS = _times_transposed(q_QK, k_SK) * (options.scale * _LOG2_E)
        if masked:
            scores_QS = jnp.where(_seen(queries_Q[:, None], keys_S, start_Q[:, None]), scores_QS, _LOWEST)
        weights_QS = jnp.exp2(scores_QS - log_sums_Q[:, None])
        d_weights_QS = _times_transposed(d_out_QK, v_ref[at])
        d_weights_QS = _dropped(options, seeds_ref, queries_Q[:, None], keys_S, d_weights_QS)
        d_scores_QS = weights_QS * (d_weights_QS * options.rescale - means_Q[:, None])
        return d_q_QK + _times(d_scores_QS.astype(q_QK.dtype), k_SK)

    d_q_QK = _over(key_blocks, block, jnp.zeros(q_QK.shape, jnp.float32))
    d_q_ref[...] = (d_q_QK * options.scale).astype(d_q_ref.dtype)


def _d_key_value_kernel(
    options, seeds_ref, q_ref, k_ref, v_ref, stop_ref, log_sums_ref, means_ref, d_out_ref, _, d_qkv_ref
):
    tile = options.tiles.d_key_value
    keys_S, here = _block(pl.program_id(0), tile.keys)
    k_SK, v_SK, stop_S = k_ref[...], v_ref[...], stop_ref[here]
    first, last = pl.program_id(0) * tile.keys, pl.program_id(0) * tile.keys + tile.keys - 1
    # Blocks of queries up to the last key cross the diagonal; blocks from the first stop on cross a document's end.
    begin, end = first // tile.queries, pl.cdiv(stop_ref[last], tile.queries)
    below = jnp.minimum(pl.cdiv(last + 1, tile.queries), end)
    leaving = jnp.clip(stop_ref[first] // tile.queries, below, end)

    # Keys are the first axis of all arrays, so that no product needs its left side transposed.
    def block(masked, number, carry):
        d_k_SK, d_v_SK = carry
        queries_Q, at = _block(number, tile.queries)
        q_QK, d_out_QK = q_ref[at], d_out_ref[at]
        scores_SQ = _times_transposed(k_SK, q_QK) * (options.scale * _LOG2_E)
        if masked:
            seen_SQ = (queries_Q >= keys_S[:, None]) & (queries_Q < stop_S[:, None])
            scores_SQ = jnp.where(seen_SQ, scores_SQ, _LOWEST)
        weights_SQ = jnp.exp2(scores_SQ - log_sums_ref[at])
        d_weights_SQ = _times_transposed(v_SK, d_out_QK)
        dropped_SQ, d_weights_SQ = (
            _dropped(options, seeds_ref, queries_Q, keys_S[:, None], x_SQ) for x_SQ in (weights_SQ, d_weights_SQ)
        )
        d_scores_SQ = weights_SQ * (d_weights_SQ * options.rescale - means_ref[at])
        d_k_SK += _times(d_scores_SQ.astype(q_QK.dtype), q_QK)
        return d_k_SK, d_v_SK + _times(dropped_SQ.astype(q_QK.dtype), d_out_QK)

    zeros_SK = jnp.zeros(k_SK.shape, jnp.float32)
    d_k_SK, d_v_SK = _over((begin, below, leaving, end), block, (zeros_SK, zeros_SK))
    d_qkv_ref[:, 1] = (d_k_SK * options.scale).astype(d_qkv_ref.dtype)
    d_qkv_ref[:, 2] = (d_v_SK * options.rescale).astype(d_qkv_ref.dtype)


def _of_queries(tile: Tile, start_ref: Any) -> tuple[jax.Array, jax.Array, tuple]:
    """Return queries_Q, start_Q and the blocks of keys for `_over`; program 0 has the last block of queries."""
    number = pl.num_programs(0) - 1 - pl.program_id(0)
    queries_Q, at = _block(number, tile.queries)
    first, last = number * tile.queries, number * tile.queries + tile.queries - 1
    # Blocks of keys up to the last start may lie outside a document, and blocks from the first query on in the future.
    begin, diagonal, end = start_ref[first] // tile.keys, first // tile.keys, pl.cdiv(last + 1, tile.keys)
    inside = jnp.minimum(pl.cdiv(start_ref[last], tile.keys), diagonal)
    return queries_Q, start_ref[at], (begin, inside, diagonal, end)


def _over(blocks: tuple, step: Callable, carry: Any) -> Any:
    """Run `step(masked, number, carry)` for each block of three ranges; only the middle range needs no mask."""
    begin, inner, outer, end = blocks
    for lower, upper, masked in ((begin, inner, True), (inner, outer, False), (outer, end, True)):
        carry = jax.lax.fori_loop(lower, upper, partial(step, masked), carry)
    return carry


def _block(number: Any, size: int) -> tuple[jax.Array, Any]:
    """Return the positions of a block's tokens, int32, and their slice."""
    return number * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0), pl.ds(number * size, size)


def _seen(queries: jax.Array, keys: jax.Array, start: jax.Array) -> jax.Array:
    return (queries >= keys) & (keys >= start)


def _dropped(options: Options, seeds_ref: Any, queries: jax.Array, keys: jax.Array, x: jax.Array) -> jax.Array:
    """Zero the elements that dropout drops, without scaling the others."""
    if not options.rate:
        return x
    numbers = weight_number(queries, keys, options.length)
    return jnp.where(kept((seeds_ref[0], seeds_ref[1]), numbers, options.rate), x, 0.0)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _times_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a @ b.T, float32."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
