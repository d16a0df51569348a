"""Next-token cross entropy, in chunks of tokens, so that the logits of a batch never exist all at once.

The gradient of a chunk is computed next to its loss, from the same logits: three matrix products, none of them twice.
On a mesh every device chunks the rows that it has, against the part of the vocabulary that `tensor` gives it.

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
from gpt2_flax.parallel.mesh import BATCH_AXES

CHUNK_TOKENS = 1024
"""Most tokens of a device at once: enough rows to keep a GPU's or TPU's matrix units busy, and few enough that their
float32 logits, 83 MiB for a vocabulary of 21,248, are small next to the activations."""


class LossSums(NamedTuple):
    """Sums over the trained-on positions of a batch, float32: divide by `targets` for means."""

    nats: jax.Array
    correct: jax.Array
    targets: jax.Array


def cross_entropy(x_BTD: jax.Array, embedding_VD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> LossSums:
    """Returns the summed loss of predicting `targets_BT` (IGNORE is skipped) from hidden states and the head's matrix.

    `embedding_VD`, float32, may be its `copies`. Products run in the dtype of `x_BTD` and add up in float32, as do the
    softmax, the sums and the gradient of the matrix. Only `nats` has a gradient.
    """
    return _cross_entropy(x_BTD, copies(embedding_VD), targets_BT, vocab_size)


def logits(x_BTD: jax.Array, embedding_VD: jax.Array, vocab_size: int, first: jax.Array | int = 0) -> jax.Array:
    """Returns float32 logits_BTV of the tokens from `first` on, of which `embedding_VD` has the rows.

    The padding rows of the vocabulary get the lowest number, so no probability.
    """
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return jnp.where(first + jnp.arange(embedding_VD.shape[0]) < vocab_size, logits_BTV, jnp.finfo(jnp.float32).min)


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
    local = partial(_chunked, vocab_size=vocab_size, with_gradients=with_gradients)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x_BTD, embedding_RVD, targets_BT, rows=(), tensor=())
    x_spec = P(BATCH_AXES, None, None)
    return jax.shard_map(
        partial(local, rows=BATCH_AXES, tensor="tensor"),
        in_specs=(x_spec, COPIES, P(BATCH_AXES, None)),
        out_specs=(P(), (x_spec, COPIES) if with_gradients else None),
        check_vma=False,  # nothing in it is differentiated
    )(x_BTD, embedding_RVD, targets_BT)


def _chunked(x_BTD, embedding_RVD, targets_BT, *, vocab_size, with_gradients, rows, tensor):
    """`_on_devices` of one device; `rows` and `tensor` name the mesh axes that others are along, if any."""
    embedding_VD = embedding_RVD[0].astype(x_BTD.dtype)
    first = jax.lax.axis_index(tensor) * embedding_VD.shape[0] if tensor else 0

    def chunk(gradient_VD, x_and_targets):
        x_ND, targets_N = x_and_targets
        logits_NV = logits(x_ND[None], embedding_VD, vocab_size, first)[0]
        counted_N = (targets_N != IGNORE).astype(jnp.float32)
        labels_N = targets_N - first
        here_N = (labels_N >= 0) & (labels_N < embedding_VD.shape[0])
        label_logits_N = jnp.take_along_axis(logits_NV, jnp.where(here_N, labels_N, 0)[:, None], -1)[:, 0]
        highest_N = jax.lax.pmax(logits_NV.max(-1), tensor)
        exp_NV = jnp.exp(logits_NV - highest_N[:, None])
        total_N, label_logits_N = jax.lax.psum((exp_NV.sum(-1), jnp.where(here_N, label_logits_N, 0)), tensor)
        nats_N = jnp.log(total_N) - (label_logits_N - highest_N)
        # By value: an argmax would cost a CPU a quarter of the whole step.
        correct_N = label_logits_N >= highest_N
        sums = LossSums((nats_N * counted_N).sum(), (correct_N * counted_N).sum(), counted_N.sum())
        if not with_gradients:
            return None, (sums, None)
        is_label_NV = labels_N[:, None] == jnp.arange(embedding_VD.shape[0])
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


def _split(array_BTD, filling):
    """Returns array_CND: the tokens in as few chunks as CHUNK_TOKENS allows, all equally long with some `filling`."""
    array_ND = array_BTD.reshape(-1, array_BTD.shape[-1])
    n_chunks = -(-array_ND.shape[0] // CHUNK_TOKENS)
    array_ND = jnp.pad(array_ND, ((0, -array_ND.shape[0] % n_chunks), (0, 0)), constant_values=filling)
    return array_ND.reshape(n_chunks, -1, array_ND.shape[-1])
