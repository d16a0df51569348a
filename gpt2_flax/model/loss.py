"""Next-token cross entropy in chunks of tokens, so that the logits of a batch never exist all at once.

The gradient of a chunk is computed next to its loss, from the same logits: three matrix products, and none is repeated.
On a mesh every device splits its own rows into chunks, and computes logits for its own shard of the vocabulary.

Training in bfloat16 on a GPU writes logits in float16, because memory bandwidth limits the loss there. Maxima, sums and
the label's logit stay float32. Float16 has 11 bits of precision: a loss differs by at most 3e-5 from a loss of float32
logits, and gradients are as exact. Bfloat16 has 8 bits: a loss would differ by 5e-4, and the head's gradient would be
twice as far from the exact gradient.

Dimension key: B batch, T sequence, C chunks, N tokens of a chunk, D n_embd, R replicas (see `model.embedding`),
V vocabulary, padded to a multiple of 128, or a device's shard of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_flax.data.packing import IGNORE
from gpt2_flax.model.embedding import REPLICAS
from gpt2_flax.parallel.mesh import BATCH_AXES, current_mesh, platform

_HIGHEST_NARROW = float(jnp.finfo(jnp.float16).max)


def chunk_tokens() -> int:
    """Return the most tokens in a chunk of one device.

    Chunks are so small that their logits are small next to the activations: for a vocabulary of 21,248, 83 MiB of
    float32, or 166 MiB of float16 on a GPU. On a GPU each chunk reads and writes the float32 gradient of the head:
    4,096 tokens a chunk instead of 1,024 save 5.4 GB of memory traffic and 320 launches in a step of 32 x 1,024 tokens.
    """
    return 4096 if platform() == "gpu" else 1024


class LossSums(NamedTuple):
    """Sums over the trained-on positions of a batch, float32: divide by `targets` for means."""

    nats: jax.Array
    correct: jax.Array
    targets: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_BTD: jax.Array, head_RVD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> LossSums:
    """Return the summed loss of predicting `targets_BT`; only `nats` has a gradient.

    Products run in the dtype of `x_BTD`. They accumulate in float32, as do the softmax, the sums and the gradient of
    the head.

    Args:
        x_BTD: Hidden states.
        head_RVD: The head's matrix as `replicate` returns it, float32.
        targets_BT: int32 ids of the next tokens; IGNORE is skipped.
        vocab_size: Rows of the head before its padding.
    """
    return _on_devices(x_BTD, head_RVD, targets_BT, vocab_size, with_gradients=False)[0]


def _forward(x_BTD, head_RVD, targets_BT, vocab_size):
    return _on_devices(x_BTD, head_RVD, targets_BT, vocab_size, with_gradients=True)


def _backward(vocab_size, gradients, d_sums):
    return *((d_sums.nats * array).astype(array.dtype) for array in gradients), None


cross_entropy.defvjp(_forward, _backward)


def logits(x_BTD: jax.Array, head_VD: jax.Array, vocab_size: int, first: jax.Array | int = 0) -> jax.Array:
    """Return float32 logits_BTV; the padding of the vocabulary gets the lowest number, and so no probability.

    Args:
        x_BTD: Hidden states.
        head_VD: The head's matrix, or a shard of its rows.
        vocab_size: Rows of the whole head before its padding.
        first: Number of the first row of `head_VD`.
    """
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return _without_padding(logits_BTV, vocab_size, first)


def _on_devices(x_BTD, head_RVD, targets_BT, vocab_size, *, with_gradients):
    """Return LossSums and the gradients of `nats` by (x_BTD, head_RVD), or None; each device works on its own rows."""
    narrow = with_gradients and x_BTD.dtype == jnp.bfloat16 and platform() == "gpu"
    local = partial(_chunked, vocab_size=vocab_size, with_gradients=with_gradients, narrow=narrow)
    if current_mesh() is None:
        return local(x_BTD, head_RVD, targets_BT, rows=(), tensor=())
    x_spec = P(BATCH_AXES, None, None)
    return jax.shard_map(
        partial(local, rows=BATCH_AXES, tensor="tensor"),
        in_specs=(x_spec, REPLICAS, P(BATCH_AXES, None)),
        out_specs=(P(), (x_spec, REPLICAS) if with_gradients else None),
        check_vma=False,  # JAX differentiates nothing in it
    )(x_BTD, head_RVD, targets_BT)


def _chunked(x_BTD, head_RVD, targets_BT, *, vocab_size, with_gradients, narrow, rows, tensor):
    """Return the results of `_on_devices` for one device, a chunk of tokens after another.

    `rows` and `tensor` name the mesh axes that split rows and vocabulary; () is no axis. `narrow` keeps logits in
    float16 instead of float32.
    """
    head_VD = head_RVD[0].astype(x_BTD.dtype)
    first = jax.lax.axis_index(tensor) * head_VD.shape[0] if tensor else 0
    narrow_VD = head_VD.astype(jnp.float16) if narrow else None

    def chunk(d_head_VD, x_and_targets):
        x_ND, targets_N = x_and_targets
        counted_N = (targets_N != IGNORE).astype(jnp.float32)
        labels_N = targets_N - first
        here_N = (labels_N >= 0) & (labels_N < head_VD.shape[0])
        rows_N = jnp.where(here_N, labels_N, 0)
        is_label_NV = labels_N[:, None] == jnp.arange(head_VD.shape[0])
        if narrow:
            logits_NV, label_logits_N = _narrow_logits(x_ND, narrow_VD, rows_N, is_label_NV)
            logits_NV = _without_padding(logits_NV, vocab_size, first)
            start = jnp.finfo(jnp.float32).min, jnp.float32(0)
            highest_of_shard_N, total_N = jax.lax.reduce((logits_NV, jnp.ones_like(logits_NV)), start, _joined, (1,))
            highest_N = jax.lax.pmax(highest_of_shard_N, tensor)
            exp_NV = jnp.exp(logits_NV - highest_N[:, None])
            total_N *= jnp.exp(highest_of_shard_N - highest_N)
        else:
            logits_NV = logits(x_ND[None], head_VD, vocab_size, first)[0]
            label_logits_N = jnp.take_along_axis(logits_NV, rows_N[:, None], -1)[:, 0]
            highest_N = jax.lax.pmax(logits_NV.max(-1), tensor)
            exp_NV = jnp.exp(logits_NV - highest_N[:, None])
            total_N = exp_NV.sum(-1)
        total_N, label_logits_N = jax.lax.psum((total_N, jnp.where(here_N, label_logits_N, 0)), tensor)
        nats_N = jnp.log(total_N) - (label_logits_N - highest_N)
        # By value: an argmax would cost a CPU a quarter of the whole step.
        correct_N = label_logits_N >= highest_N
        sums = LossSums((nats_N * counted_N).sum(), (correct_N * counted_N).sum(), counted_N.sum())
        if not with_gradients:
            return None, (sums, None)
        d_logits_NV = (exp_NV / total_N[:, None] - is_label_NV) * counted_N[:, None]
        d_logits_NV = d_logits_NV.astype(x_ND.dtype)
        d_x_ND = jnp.einsum("NV,VD->ND", d_logits_NV, head_VD)
        d_head_VD += jnp.einsum("NV,ND->VD", d_logits_NV, x_ND, preferred_element_type=jnp.float32)
        return d_head_VD, (sums, d_x_ND)

    x_CND, targets_CN = _split(x_BTD, 0), _split(targets_BT[..., None], IGNORE)[..., 0]
    d_head_VD = jnp.zeros(head_VD.shape, jnp.float32) if with_gradients else None
    # One chunk needs no loop.
    d_head_VD, (sums_C, d_x_CND) = jax.lax.scan(chunk, d_head_VD, (x_CND, targets_CN), unroll=x_CND.shape[0] == 1)
    sums = jax.tree.map(lambda sum_C: jax.lax.psum(sum_C.sum(), rows), sums_C)
    if d_head_VD is None:
        return sums, None
    d_x_ND = jax.lax.psum(d_x_CND, tensor).reshape(-1, x_BTD.shape[-1])[: targets_BT.size]
    return sums, (d_x_ND.reshape(x_BTD.shape), d_head_VD[None])


def _narrow_logits(x_ND, narrow_VD, rows_N, is_label_NV):
    """Return logits_NV, which memory keeps in float16, and the float32 label_logits_N of the labels' rows.

    The label's own logit is float32 in both. So no loss is negative, and rounding makes no tie with the label.
    """
    # Hidden states come from the last norm: none exceeds float16's 65,504, and all down to 6e-5 are exact in float16.
    x_ND = x_ND.astype(jnp.float16)
    label_logits_N = jnp.einsum("ND,ND->N", x_ND, narrow_VD[rows_N], preferred_element_type=jnp.float32)
    # The product itself returns float16: cuBLAS would otherwise write float32 and leave the rounding to another pass.
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, narrow_VD, preferred_element_type=jnp.float16).astype(jnp.float32)
    logits_NV = jnp.clip(logits_NV, -_HIGHEST_NARROW, _HIGHEST_NARROW)  # float16 is infinite beyond them
    return jnp.where(is_label_NV, label_logits_N[:, None], logits_NV), label_logits_N


def _joined(one, other):
    """Join two sets of logits, each as its highest logit and its sum of exp(logit - highest), for one-pass sums."""
    (highest, total), (other_highest, other_total) = one, other
    factor = jnp.exp(-jnp.abs(highest - other_highest))
    total = jnp.where(highest >= other_highest, total + other_total * factor, total * factor + other_total)
    return jnp.maximum(highest, other_highest), total


def _without_padding(logits_XV, vocab_size, first):
    return jnp.where(first + jnp.arange(logits_XV.shape[-1]) < vocab_size, logits_XV, jnp.finfo(jnp.float32).min)


def _split(array_BTD, filling):
    """Return array_CND: the tokens in as few equal chunks as `chunk_tokens` allows, the last padded by `filling`."""
    array_ND = array_BTD.reshape(-1, array_BTD.shape[-1])
    n_chunks = -(-array_ND.shape[0] // chunk_tokens())
    array_ND = jnp.pad(array_ND, ((0, -array_ND.shape[0] % n_chunks), (0, 0)), constant_values=filling)
    return array_ND.reshape(n_chunks, -1, array_ND.shape[-1])
