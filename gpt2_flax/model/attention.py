"""Causal attention within documents, in four implementations.

    xla      plain matrix products, a block of queries at a time
    flash    the project's own flash attention, for NVIDIA GPUs, see `model.flash`
    cudnn    cuDNN's flash attention, for NVIDIA GPUs; no dropout; documents are a number for each pair of tokens
    splash   Pallas splash attention, for TPUs; no dropout

None of them keeps probabilities for the backward pass.
Dimension key: B batch, T queries, S keys, H heads, K head size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gpt2_flax.model.dropout import head_seeds, kept, weight_number
from gpt2_flax.parallel.mesh import BATCH_AXES

Kernel = Literal["xla", "flash", "cudnn", "splash"]

# Queries at a time: fewer skip more of the keys that lie in the future (of 1024 tokens 256 leave 5/8 of the work, 128
# leave 9/16) and need less memory, but make more and smaller products.
QUERY_BLOCK = 256
_INTERPRET = False  # of Pallas kernels, without a TPU: only for tests


def causal_attention(
    kernel: Kernel,
    qkv_BT3HK: jax.Array,
    segments_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns scaled dot-product attention, out_BTHK in the dtype of `qkv_BT3HK`; the softmax is float32.

    A token sees itself and what comes before it in its segment, a run of one number in `segments_BT` (None: all is
    one). The kernel must be one that `attention_choice.choose` gives; "cudnn" and "splash" leave dropout out, the
    others drop the same weights.
    """
    seeds_BH2 = None
    if dropout_rate and dropout_key is not None:
        seeds_BH2 = head_seeds(dropout_key, qkv_BT3HK.shape[0], qkv_BT3HK.shape[3])
    if kernel == "xla":
        return _blockwise(dropout_rate, *jnp.unstack(qkv_BT3HK, axis=2), segments_BT, seeds_BH2)
    return _on_each_device(partial(_KERNELS[kernel], dropout_rate), qkv_BT3HK, segments_BT, seeds_BH2)


def saves_attention(operation: Any, *operands: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`: saves what `causal_attention` has computed, so that it is not run again."""
    # cuDNN's call gives no names to its results.
    return "dot_product_attention" in operation.name or _named(operation, *operands, **parameters)


_named = jax.checkpoint_policies.save_only_these_names("attention")


def attention(q_BTHK: jax.Array, k_BHKS: jax.Array, v_BHSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Returns scaled dot-product attention, out_BTHK in the dtype of `q_BTHK`; the softmax is float32.

    A query sees the keys where `mask_BTS` (bool) is true; each row must have at least one. Not meant for training: a
    gradient would keep all probabilities.
    """
    (q_BHTK,) = _by_head(q_BTHK * q_BTHK.shape[-1] ** -0.5)
    scores_BHTS = _masked(_product("BHTK,BHKS->BHTS", q_BHTK, k_BHKS), mask_BTS)
    weights_BHTS = jax.nn.softmax(scores_BHTS).astype(q_BTHK.dtype)
    return (weights_BHTS @ v_BHSK).swapaxes(1, 2)


def _mask(stop: int, segments_BT: jax.Array | None, start: int = 0) -> jax.Array:
    """Which keys up to `stop` the queries from `start` on see, bool mask_BTS; without segments B is 1."""
    causal_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    if segments_BT is None:
        return causal_TS[None]
    return causal_TS & (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop])


def _scores(q_BHTK: jax.Array, k_BHSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Products of queries that are scaled, float32 scores_BHTS, the lowest number where a key is not seen."""
    return _masked(_product("BHTK,BHSK->BHTS", q_BHTK, k_BHSK), mask_BTS)


def _masked(scores_BHTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    # Added, not selected: XLA for CPUs computes products, sums and exponentials in one go, but no selections.
    return scores_BHTS + jnp.where(mask_BTS, 0, jnp.finfo(jnp.float32).min)[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(rate: float, q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2) -> jax.Array:
    """`causal_attention`, with what is needed for the backward pass kept as in arXiv:2205.14135: sums, no products."""
    return _blockwise_forward(rate, q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2)[0]


def _blockwise_forward(rate: float, q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2) -> tuple[jax.Array, tuple]:
    q_BHTK, k_BHTK, v_BHTK = _by_head(q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTHK, v_BTHK)
    outs, log_sums = [], []
    for start, stop in _blocks(q_BTHK.shape[1]):
        mask_BTS = _mask(stop, segments_BT, start)
        scores_BHTS = _scores(q_BHTK[:, :, start:stop], k_BHTK[:, :, :stop], mask_BTS)
        highest_BHT1 = scores_BHTS.max(-1, keepdims=True)
        weights_BHTS = jnp.exp(scores_BHTS - highest_BHT1)
        sums_BHT1 = weights_BHTS.sum(-1, keepdims=True)
        weights_BHTS = _dropped(weights_BHTS, rate, seeds_BH2, start, q_BTHK.shape[1]).astype(q_BTHK.dtype)
        out_BHTK = _product("BHTS,BHSK->BHTK", weights_BHTS, v_BHTK[:, :, :stop]) / sums_BHT1
        outs.append(out_BHTK.astype(q_BTHK.dtype))
        log_sums.append(highest_BHT1 + jnp.log(sums_BHT1))
    # Named here, where the backward pass begins, for `saves_attention`.
    out_BTHK = checkpoint_name(jnp.concatenate(outs, 2).swapaxes(1, 2), "attention")
    log_sums_BHT1 = checkpoint_name(jnp.concatenate(log_sums, 2), "attention")
    return out_BTHK, (q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2, out_BTHK, log_sums_BHT1)


def _blockwise_backward(rate: float, kept: tuple, d_out_BTHK: jax.Array) -> tuple:
    q_BTHK, k_BTHK, v_BTHK, segments_BT, seeds_BH2, out_BTHK, log_sums_BHT1 = kept
    dtype, scale = q_BTHK.dtype, q_BTHK.shape[-1] ** -0.5
    # Nothing but zeros, yet the compiler does not know: else it would see the scores of the forward pass come again and
    # keep those. Barriers, and so jax.checkpoint, do not hold it back where layers are unrolled on a CPU.
    q_BTHK = q_BTHK * scale + 0 * d_out_BTHK
    q_BHTK, k_BHTK, v_BHTK, d_out_BHTK, out_BHTK = _by_head(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, out_BTHK)
    means_BHT1 = (d_out_BHTK.astype(jnp.float32) * out_BHTK).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], [], []
    for start, stop in _blocks(q_BTHK.shape[1]):
        mask_BTS = _mask(stop, segments_BT, start)
        q_block_BHTK, d_block_BHTK = q_BHTK[:, :, start:stop], d_out_BHTK[:, :, start:stop]
        scores_BHTS = _scores(q_block_BHTK, k_BHTK[:, :, :stop], mask_BTS)
        weights_BHTS = jnp.exp(scores_BHTS - log_sums_BHT1[:, :, start:stop])
        d_weights_BHTS = _product("BHTK,BHSK->BHTS", d_block_BHTK, v_BHTK[:, :, :stop])
        # What dropout did going forward, to the weights and to their gradient.
        dropped_BHTS = _dropped(weights_BHTS, rate, seeds_BH2, start, q_BTHK.shape[1]).astype(dtype)
        d_weights_BHTS = _dropped(d_weights_BHTS, rate, seeds_BH2, start, q_BTHK.shape[1])
        d_scores_BHTS = (weights_BHTS * (d_weights_BHTS - means_BHT1[:, :, start:stop])).astype(dtype)
        d_q.append(_product("BHTS,BHSK->BHTK", d_scores_BHTS, k_BHTK[:, :, :stop]) * scale)
        d_k.append(_product("BHTS,BHTK->BHSK", d_scores_BHTS, q_block_BHTK))
        d_v.append(_product("BHTS,BHTK->BHSK", dropped_BHTS, d_block_BHTK))
    gradients_BHTK = jnp.concatenate(d_q, 2), _added_up(d_k), _added_up(d_v)
    return *(gradient_BTHK.astype(dtype) for gradient_BTHK in _by_head(*gradients_BHTK)), None, None


def _by_head(*arrays_BTHK: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays_BHTK, which products of single heads want; or the other way round."""
    return tuple(array.swapaxes(1, 2) for array in arrays_BTHK)


def _added_up(starts: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum_BHSK of arrays that each begin at the first key and end with their block."""
    stops = [0, *(start.shape[2] for start in starts)]
    pieces = (
        sum(start[:, :, first:stop] for start in starts[number:])
        for number, (first, stop) in enumerate(itertools.pairwise(stops))
    )
    return jnp.concatenate(list(pieces), 2)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where each block of queries starts and stops."""
    for start in range(0, length, QUERY_BLOCK):
        yield start, min(start + QUERY_BLOCK, length)


def _dropped(weights_BHTS: jax.Array, rate: float, seeds_BH2: jax.Array | None, start: int, length: int) -> jax.Array:
    """Drops weights of the queries from `start` on, in rows of `length` tokens, and scales the rest."""
    if seeds_BH2 is None:
        return weights_BHTS
    queries_T1, keys_S = start + jnp.arange(weights_BHTS.shape[2])[:, None], jnp.arange(weights_BHTS.shape[3])
    seeds = seeds_BH2[..., 0, None, None], seeds_BH2[..., 1, None, None]
    return jnp.where(kept(seeds, weight_number(queries_T1, keys_S, length), rate), weights_BHTS / (1 - rate), 0)


def _on_each_device(kernel: Callable, qkv_BT3HK, segments_BT, seeds_BH2) -> jax.Array:
    """Runs `kernel` on the rows and heads that a device has: the compiler cannot split kernels that it did not make."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(qkv_BT3HK, segments_BT, seeds_BH2)
    in_specs = (
        P(BATCH_AXES, None, None, "tensor", None),
        None if segments_BT is None else P(BATCH_AXES, None),
        None if seeds_BH2 is None else P(BATCH_AXES, "tensor", None),
    )
    # Pallas kernels do not say along which axes their results vary, so that is not checked.
    split = jax.shard_map(kernel, in_specs=in_specs, out_specs=P(BATCH_AXES, None, "tensor", None), check_vma=False)
    return split(qkv_BT3HK, segments_BT, seeds_BH2)


def _flash(rate: float, qkv_BT3HK, segments_BT, seeds_BH2) -> jax.Array:
    from gpt2_flax.model.flash import flash_attention  # Pallas is slow to import, and only GPUs need it

    return flash_attention(qkv_BT3HK, segments_BT, rate, seeds_BH2, interpret=_INTERPRET)


def _cudnn(_rate: float, qkv_BT3HK, segments_BT, _seeds_BH2) -> jax.Array:
    # The kernel skips the future by itself; of documents it reads a number for each pair of tokens.
    same_B1TT = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    q_BTHK, k_BTHK, v_BTHK = jnp.unstack(qkv_BT3HK, axis=2)
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=same_B1TT, is_causal=True, implementation="cudnn")


def _splash(_rate: float, qkv_BT3HK, segments_BT, _seeds_BH2) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and only TPUs need it

    _, length, _, heads, size = qkv_BT3HK.shape
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{size}": block for size in sizes}),
        residual_checkpoint_name="attention",
        interpret=_INTERPRET,
    )
    q_BHTK, k_BHTK, v_BHTK = _by_head(*jnp.unstack(qkv_BT3HK, axis=2))
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    return jax.vmap(kernel)(q_BHTK * size**-0.5, k_BHTK, v_BHTK, segments).swapaxes(1, 2)


_KERNELS = {"flash": _flash, "cudnn": _cudnn, "splash": _splash}
