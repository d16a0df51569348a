"""The token embedding as look-up and head share it, or a head of its own.

Dimension key: R parts that the rows of a batch are in, B batch, T sequence, D n_embd, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_flax.parallel.mesh import BATCH_AXES

COPIES = P(BATCH_AXES, "tensor", None)
"""The layout of `copies`."""


def copies(embedding_VD: jax.Array) -> jax.Array:
    """Returns embedding_RVD, a copy for each part of the rows, of which only `tensor` splits the vocabulary.

    That is one all-gather over `fsdp`. Going backward, each device adds up in its own copy the gradients of all uses,
    and they are summed between devices once, here: scattered over `fsdp` first, so that `data` sums only a part.
    Without a mesh R is 1. What is a copy already is returned as it is.
    """
    if embedding_VD.ndim == 3:
        return embedding_VD
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return embedding_VD[None]

    def gather(part_VD):
        part_VD = jax.lax.pcast(part_VD, "data", to="varying")
        if mesh.shape["fsdp"] == 1:  # XLA would copy it
            return part_VD[None]
        return jax.lax.all_gather(part_VD, "fsdp", tiled=True)[None]

    return jax.shard_map(gather, in_specs=P(("tensor", "fsdp"), None), out_specs=COPIES)(embedding_VD)


def look_up(embedding_RVD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns x_BTD in `dtype`: to each token its row of `copies(embedding_VD)`."""
    if jax.sharding.get_abstract_mesh().empty:
        return embedding_RVD[0, tokens_BT].astype(dtype)

    def local(part_RVD, tokens_BT):
        rows_BT = tokens_BT - jax.lax.axis_index("tensor") * part_RVD.shape[1]
        here_BT = (rows_BT >= 0) & (rows_BT < part_RVD.shape[1])
        x_BTD = part_RVD[0, jnp.where(here_BT, rows_BT, 0)].astype(dtype)
        return jax.lax.psum(jnp.where(here_BT[..., None], x_BTD, 0), "tensor")  # one of them is not zero

    x_spec = P(BATCH_AXES, None, None)
    return jax.shard_map(local, in_specs=(COPIES, P(BATCH_AXES, None)), out_specs=x_spec)(embedding_RVD, tokens_BT)
