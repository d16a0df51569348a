"""Next-token cross entropy.

Dimension key: B batch, T sequence, D n_embd, V vocabulary, padded to a multiple of 128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_flax.data.packing import IGNORE


class LossSums(NamedTuple):
    """Sums over the trained-on positions of a batch, float32: divide by `targets` for means."""

    nats: jax.Array
    correct: jax.Array
    targets: jax.Array


def cross_entropy(x_BTD: jax.Array, embedding_VD: jax.Array, targets_BT: jax.Array, vocab_size: int) -> LossSums:
    """Returns the summed loss of predicting `targets_BT` (IGNORE is skipped) from hidden states and the tied embedding.

    The products run in the dtype of `x_BTD`, the softmax and the sums in float32.
    """
    logits_BTV = logits(x_BTD, embedding_VD, vocab_size)
    counted_BT = (targets_BT != IGNORE).astype(jnp.float32)
    labels_BT = jnp.maximum(targets_BT, 0)
    label_logits_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], -1)[..., 0]
    nats_BT = jax.nn.logsumexp(logits_BTV, -1) - label_logits_BT
    # By value: an argmax would cost a CPU a quarter of the whole step.
    correct_BT = label_logits_BT >= jax.lax.stop_gradient(logits_BTV.max(-1))
    return LossSums((nats_BT * counted_BT).sum(), (correct_BT * counted_BT).sum(), counted_BT.sum())


def logits(x_BTD: jax.Array, embedding_VD: jax.Array, vocab_size: int) -> jax.Array:
    """Returns float32 logits_BTV; the padding rows of the vocabulary get the lowest number, so no probability."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    if embedding_VD.shape[0] == vocab_size:
        return logits_BTV
    return jnp.where(jnp.arange(embedding_VD.shape[0]) < vocab_size, logits_BTV, jnp.finfo(jnp.float32).min)
