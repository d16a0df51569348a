"""The token embedding as look-up and head share it, or a head of its own, and the embedding of positions.

Dimension key: R parts that the rows of a batch are in, B batch, T sequence, D n_embd, V vocabulary, or the rows of any
table; N tokens, or those of one of C blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_flax.parallel.mesh import BATCH_AXES, platform

COPIES = P(BATCH_AXES, "tensor", None)
"""The layout of `copies`."""
_X = P(BATCH_AXES, None, None)
_BLOCK = 128
"""Rows that one product of `sum_by_id` adds up: as many as a matrix unit takes at once."""


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
        return _rows(embedding_RVD[0], tokens_BT, dtype)

    def local(part_RVD, tokens_BT):
        rows_BT = tokens_BT - jax.lax.axis_index("tensor") * part_RVD.shape[1]
        here_BT = (rows_BT >= 0) & (rows_BT < part_RVD.shape[1])
        x_BTD = _rows(part_RVD[0], jnp.where(here_BT, rows_BT, 0), dtype)
        return jax.lax.psum(jnp.where(here_BT[..., None], x_BTD, 0), "tensor")  # one of them is not zero

    return jax.shard_map(local, in_specs=(COPIES, P(BATCH_AXES, None)), out_specs=_X)(embedding_RVD, tokens_BT)


def look_up_whole(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Returns x_BTD, float32: to each id its row of a table that every device has."""
    if jax.sharding.get_abstract_mesh().empty:
        return _rows(table_VD, ids_BT, jnp.float32)

    def local(table_VD, ids_BT):
        # Going backward, here the gradients of the devices are summed.
        return _rows(jax.lax.pcast(table_VD, BATCH_AXES, to="varying"), ids_BT, jnp.float32)

    return jax.shard_map(local, in_specs=(P(None, None), P(BATCH_AXES, None)), out_specs=_X)(table_VD, ids_BT)


def _rows(table_VD: jax.Array, ids_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns x_BTD in `dtype`. The gradient of a row adds up in float32 and, on any device, always in one order."""
    # Only a GPU's scatter adds in the order in which its threads arrive; elsewhere a scatter does, and is faster.
    return (_gather_sorted if platform() == "gpu" else _gather)(table_VD, ids_BT, dtype)


def _gather(table_VD, ids_BT, dtype):
    return table_VD[ids_BT].astype(dtype)


_gather_sorted = jax.custom_vjp(_gather, nondiff_argnums=(2,))


def _gather_backward(dtype, table_and_ids, of_x_BTD):
    table_VD, ids_BT = table_and_ids  # of the table, only the shape is used
    return sum_by_id(of_x_BTD.reshape(-1, table_VD.shape[1]), ids_BT.ravel(), table_VD.shape[0]), None


_gather_sorted.defvjp(lambda *arguments: (_gather(*arguments), arguments[:2]), _gather_backward)


def sum_by_id(x_ND: jax.Array, ids_N: jax.Array, n_ids: int) -> jax.Array:
    """Returns sums_VD, float32: to each of `n_ids` ids the sum of the rows of x_ND that have it.

    Unlike a scatter, always in the same order: the rows are sorted by id and cut into blocks; in each block one product
    adds up the rows of each id, and another product adds up the blocks of an id. Float32 rows are multiplied exactly.
    """
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    ids_N = jnp.pad(ids_N, (0, -ids_N.size % _BLOCK), constant_values=n_ids)
    ids_N, order_N = jax.lax.sort_key_val(ids_N, jnp.arange(ids_N.size))
    ids_CN = ids_N.reshape(-1, _BLOCK)
    x_CND = x_ND.at[order_N].get(mode="fill", fill_value=0).reshape(*ids_CN.shape, -1)
    same_CNN = ids_CN[:, :, None] == ids_CN[:, None]
    sums_CND = exact("CNM,CMD->CND", same_CNN.astype(x_ND.dtype), x_CND)
    # What is left of the last id of a block comes first in the blocks after it.
    first_C, last_C = ids_CN[:, 0], ids_CN[:, -1]
    goes_on_CC = jnp.triu(last_C[:, None] == first_C, 1)
    rest_CD = exact("CE,ED->CD", goes_on_CC.astype(jnp.float32), sums_CND[:, 0])
    # Each id reads its sum where its rows begin.
    ids_V = jnp.arange(n_ids)
    start_V = jnp.searchsorted(ids_N, ids_V, method="scan_unrolled")  # a loop would start a kernel for each halving
    block_V = start_V // _BLOCK
    rest_VD = jnp.where((last_C[block_V] == ids_V)[:, None], rest_CD[block_V], 0)
    return jnp.where((ids_N[start_V] == ids_V)[:, None], sums_CND.reshape(ids_N.size, -1)[start_V] + rest_VD, 0)
