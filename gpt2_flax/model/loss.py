"""Next-token cross entropy, in chunks of tokens, so that the logits of a batch never exist all at once.

The gradient of a chunk is computed next to its loss, from the same logits: three matrix products, none of them twice.
On a mesh every device chunks the rows that it has, against the part of the vocabulary that `tensor` gives it.

Training in bfloat16 on a GPU writes logits in float16, because the loss is bound by memory there. Maxima, sums and the
label's logit stay float32. Float16 has 11 bits: against float32 logits a loss moves by 3e-5 at most, and gradients are
as exact. Bfloat16 has 8: a loss moves by 5e-4, and the head's gradient is twice as far from the exact one.

Dimension key: B batch, T sequence, C chunks, N tokens of one, D n_embd, R parts that the rows are in, V vocabulary,
padded to a multiple of 128, or a device's part of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_flax.data.packing import IGNORE
from gpt2_flax.model.embedding import COPIES, copies
from gpt2_flax.parallel.mesh import BATCH_AXES, platform

_HIGHEST_NARROW = float(jnp.finfo(jnp.float16).max)


def chunk_tokens() -> int:
    """Return the most tokens of a device at once.

    Few, so that their logits are small next to the activations: 83 MiB of float32 for a vocabulary of 21,248, on GPUs
    166 MiB of float16. There each chunk reads and writes the matrix's float32 gradient: 4,096 tokens a chunk instead of
    1,024 save 5.4 GB of memory traffic and 320 launches a step of 32 x 1,024 tokens.
    """
    return 4096 if platform() == "gpu" else 1024


class LossSums(NamedTuple):
    """Sums over the trained-on positions of a batch, float32: divide by `targets` for means."""

    nats: jax.Array
    correct: jax.Array
    targets: jax.Array


def cross_entropy(x_BTD: jax.Array, embedding_VD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> LossSums:
    """Returns the summed loss of predicting `targets_BT` (IGNORE is skipped) from hidden states and the head's matrix.

    `embedding_VD`, float32, may be its `copies`. Products run in the dtype of `x_BTD` and add up in float32, as do the
    softmax, the sums and the gradient of the matrix; for logits that are trained on, see above. Only `nats` has a
    gradient.
    """
    return _cross_entropy(x_BTD, copies(embedding_VD), targets_BT, vocab_size)


def logits(x_BTD: jax.Array, embedding_VD: jax.Array, vocab_size: int, first: jax.Array | int = 0) -> jax.Array:
    """Returns float32 logits_BTV of the tokens from `first` on, of which `embedding_VD` has the rows.

    The padding rows of the vocabulary get the lowest number, so no probability.
    """
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return _without_padding(logits_BTV, vocab_size, first)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(x_BTD, embedding_RVD, targets_BT, vocab_size) -> LossSums:
    return _on_devices(x_BTD, embedding_RVD, targets_BT, vocab_size, with_gradients=False)[0]


def _forward(x_BTD, embedding_RVD, targets_BT, vocab_size):
    return _on_devices(x_BTD, embedding_RVD, targets_BT, vocab_size, with_gradients=True)


def _backward(vocab_size, gradients, of_sums):
    return *((of_sums.nats * array).astype(array.dtype) for array in gradients), None


_cross_entropy.defvjp(_forward, _backward)


def _on_devices(x_BTD, embedding_RVD, targets_BT, vocab_size, *, with_gradients):
    """Returns LossSums and the gradients of `nats`, (x_BTD, embedding_RVD) or None, each device working on its rows."""
    narrow = with_gradients and x_BTD.dtype == jnp.bfloat16 and platform() == "gpu"
    local = partial(_chunked, vocab_size=vocab_size, with_gradients=with_gradients, narrow=narrow)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x_BTD, embedding_RVD, targets_BT, rows=(), tensor=())
    x_spec = P(BATCH_AXES, None, None)
    return jax.shard_map(
        partial(local, rows=BATCH_AXES, tensor="tensor"),
        in_specs=(x_spec, COPIES, P(BATCH_AXES, None)),
        out_specs=(P(), (x_spec, COPIES) if with_gradients else None),
        check_vma=False,  # nothing in it is differentiated
    )(x_BTD, embedding_RVD, targets_BT)


def _chunked(x_BTD, embedding_RVD, targets_BT, *, vocab_size, with_gradients, narrow, rows, tensor):
    """`_on_devices` of one device; `rows` and `tensor` name the mesh axes that others are along, if any.

    `narrow` keeps float16 logits instead of float32.
    """
    embedding_VD = embedding_RVD[0].astype(x_BTD.dtype)
    first = jax.lax.axis_index(tensor) * embedding_VD.shape[0] if tensor else 0
    narrow_VD = embedding_VD.astype(jnp.float16) if narrow else None

    def chunk(gradient_VD, x_and_targets):
        x_ND, targets_N = x_and_targets
        counted_N = (targets_N != IGNORE).astype(jnp.float32)
        labels_N = targets_N - first
        here_N = (labels_N >= 0) & (labels_N < embedding_VD.shape[0])
        rows_N = jnp.where(here_N, labels_N, 0)
        is_label_NV = labels_N[:, None] == jnp.arange(embedding_VD.shape[0])
        if narrow:
            logits_NV, label_logits_N = _narrow_logits(x_ND, narrow_VD, rows_N, is_label_NV)
            logits_NV = _without_padding(logits_NV, vocab_size, first)
            start = jnp.finfo(jnp.float32).min, jnp.float32(0)
            highest_of_part_N, total_N = jax.lax.reduce((logits_NV, jnp.ones_like(logits_NV)), start, _joined, (1,))
            highest_N = jax.lax.pmax(highest_of_part_N, tensor)
            exp_NV = jnp.exp(logits_NV - highest_N[:, None])
            total_N *= jnp.exp(highest_of_part_N - highest_N)
        else:
            logits_NV = logits(x_ND[None], embedding_VD, vocab_size, first)[0]
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
        of_logits_NV = (exp_NV / total_N[:, None] - is_label_NV) * counted_N[:, None]
        of_logits_NV = of_logits_NV.astype(x_ND.dtype)
        of_x_ND = jnp.einsum("NV,VD->ND", of_logits_NV, embedding_VD)
        gradient_VD += jnp.einsum("NV,ND->VD", of_logits_NV, x_ND, preferred_element_type=jnp.float32)
        return gradient_VD, (sums, of_x_ND)

    x_CND, targets_CN = _split(x_BTD, 0), _split(targets_BT[..., None], IGNORE)[..., 0]
    gradient_VD = jnp.zeros(embedding_VD.shape, jnp.float32) if with_gradients else None
    # One chunk needs no loop.
    gradient_VD, (sums_C, of_x_CND) = jax.lax.scan(chunk, gradient_VD, (x_CND, targets_CN), unroll=x_CND.shape[0] == 1)
    sums = jax.tree.map(lambda sum_C: jax.lax.psum(sum_C.sum(), rows), sums_C)
    if not with_gradients:
        return sums, None
    of_x_ND = jax.lax.psum(of_x_CND, tensor).reshape(-1, x_BTD.shape[-1])[: targets_BT.size]
    return sums, (of_x_ND.reshape(x_BTD.shape), gradient_VD[None])


def _narrow_logits(x_ND, narrow_VD, rows_N, is_label_NV):
    """Returns logits_NV that memory keeps in float16, and the float32 logits_N of the rows of the labels.

    The label's own logit is float32 in both, so that no loss is negative, and a tie that rounding makes is none.
    """
    # Hidden states come from the last norm: none is beyond float16's 65,504, and others are exact in it down to 6e-5.
    x_ND = x_ND.astype(jnp.float16)
    label_logits_N = jnp.einsum("ND,ND->N", x_ND, narrow_VD[rows_N], preferred_element_type=jnp.float32)
    # The product itself is asked for float16: cuBLAS would write float32 and leave the rounding to another pass.
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, narrow_VD, preferred_element_type=jnp.float16).astype(jnp.float32)
    logits_NV = jnp.clip(logits_NV, -_HIGHEST_NARROW, _HIGHEST_NARROW)  # beyond them it is infinite
    return jnp.where(is_label_NV, label_logits_N[:, None], logits_NV), label_logits_N


def _joined(one, other):
    """Returns highest and total, a sum of exp(logit - highest), of two sets of logits: of all in one pass."""
    (highest, total), (other_highest, other_total) = one, other
    factor = jnp.exp(-jnp.abs(highest - other_highest))
    total = jnp.where(highest >= other_highest, total + other_total * factor, total * factor + other_total)
    return jnp.maximum(highest, other_highest), total


def _without_padding(logits_XV, vocab_size, first):
    return jnp.where(first + jnp.arange(logits_XV.shape[-1]) < vocab_size, logits_XV, jnp.finfo(jnp.float32).min)


def _split(array_BTD, filling):
    """Returns array_CND: the tokens in as few chunks as `chunk_tokens` allows, all equally long with some `filling`."""
    array_ND = array_BTD.reshape(-1, array_BTD.shape[-1])
    n_chunks = -(-array_ND.shape[0] // chunk_tokens())
    array_ND = jnp.pad(array_ND, ((0, -array_ND.shape[0] % n_chunks), (0, 0)), constant_values=filling)
    return array_ND.reshape(n_chunks, -1, array_ND.shape[-1])
