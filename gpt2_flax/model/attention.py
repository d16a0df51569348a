"""Causal attention within documents, in four implementations.

    xla      plain matrix products, a block of queries at a time, see `model.blockwise`
    flash    the project's own flash attention, for NVIDIA GPUs, see `model.flash`
    cudnn    cuDNN's flash attention, for NVIDIA GPUs; no dropout; its mask of documents has a number for each pair
    splash   Pallas splash attention, for TPUs; no dropout

None of them keeps probabilities for the backward pass.
Dimension key: B batch, T tokens, H heads, K head size.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_flax.model.blockwise import blockwise_attention
from gpt2_flax.model.dropout import head_seeds
from gpt2_flax.parallel.mesh import BATCH_AXES, current_mesh

Kernel = Literal["xla", "flash", "cudnn", "splash"]

INTERPRET = False  # for tests: run Pallas kernels without their device


def causal_attention(
    kernel: Kernel,
    qkv_BT3HK: jax.Array,
    segments_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Return scaled dot-product attention, out_BTHK in the dtype of `qkv_BT3HK`; the softmax is float32.

    A token sees itself and the tokens before it in its segment.

    Args:
        kernel: An implementation that `choose_attention` returns for the device.
        qkv_BT3HK: Queries, keys and values.
        segments_BT: Segment numbers; a segment is a run of one number. None: each row is one segment.
        dropout_rate: Share of attention weights to drop. "cudnn" and "splash" ignore it; the others drop the same
            weights.
        dropout_key: None turns dropout off.
    """
    seeds_BH2 = None
    if dropout_rate and dropout_key is not None:
        seeds_BH2 = head_seeds(dropout_key, qkv_BT3HK.shape[0], qkv_BT3HK.shape[3])
    if kernel == "xla":
        return blockwise_attention(dropout_rate, *jnp.unstack(qkv_BT3HK, axis=2), segments_BT, seeds_BH2)
    local = partial(_KERNELS[kernel], dropout_rate)
    if current_mesh() is not None:
        # The compiler cannot split kernels that it did not make, so each device runs one on its own rows and heads.
        in_specs = (
            P(BATCH_AXES, None, None, "tensor", None),
            None if segments_BT is None else P(BATCH_AXES, None),
            None if seeds_BH2 is None else P(BATCH_AXES, "tensor", None),
        )
        # Pallas kernels do not say along which axes their results vary, so that is not checked.
        local = jax.shard_map(local, in_specs=in_specs, out_specs=P(BATCH_AXES, None, "tensor", None), check_vma=False)
    return local(qkv_BT3HK, segments_BT, seeds_BH2)


def saves_attention(operation: Any, *operands: Any, **parameters: Any) -> bool:
    """Return whether `jax.checkpoint` keeps a result, as its policy: the results of `causal_attention` are kept."""
    # cuDNN's call gives no names to its results.
    return "dot_product_attention" in operation.name or _named(operation, *operands, **parameters)


_named = jax.checkpoint_policies.save_only_these_names("attention")


def _flash(rate: float, qkv_BT3HK, segments_BT, seeds_BH2) -> jax.Array:
    from gpt2_flax.model.flash import flash_attention  # Pallas is slow to import, and only GPUs need it

    return flash_attention(qkv_BT3HK, segments_BT, rate, seeds_BH2, interpret=INTERPRET)


def _cudnn(_rate: float, qkv_BT3HK, segments_BT, _seeds_BH2) -> jax.Array:
    # The kernel skips the future by itself, but reads its mask of documents for each pair of tokens.
    same_B1TT = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    q_BTHK, k_BTHK, v_BTHK = jnp.unstack(qkv_BT3HK, axis=2)
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=same_B1TT, is_causal=True, implementation="cudnn")


def _splash(_rate: float, qkv_BT3HK, segments_BT, _seeds_BH2) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and only TPUs need it

    _, length, _, heads, size = qkv_BT3HK.shape
    block = next(size for size in (512, 256, 128) if length % size == 0)
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        residual_checkpoint_name="attention",
        interpret=INTERPRET,
    )
    q_BHTK, k_BHTK, v_BHTK = (array.swapaxes(1, 2) for array in jnp.unstack(qkv_BT3HK, axis=2))
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    out_BHTK = jax.vmap(kernel)(q_BHTK * size**-0.5, k_BHTK, v_BHTK, segments)
    return out_BHTK.swapaxes(1, 2)  # pyright: ignore[reportAttributeAccessIssue]  # a tuple only if asked for residuals


_KERNELS = {"flash": _flash, "cudnn": _cudnn, "splash": _splash}
