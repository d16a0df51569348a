"""Look-up of token and position embeddings, on one device or on a mesh.

A replica is the group of devices that work on the same rows of a batch: there are R = data * fsdp replicas. On a mesh
of data 2 x fsdp 2 x tensor 2, R is 4; each replica has a quarter of the rows and consists of 2 devices, each with half
of the vocabulary. embedding_RVD holds one whole table for each replica. Without a mesh R is 1.

Dimension key: R replicas, B batch, T sequence, D n_embd, V rows of a table, N tokens in each of C blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_flax.parallel.mesh import BATCH_AXES, current_mesh, platform

REPLICAS = P(BATCH_AXES, "tensor", None)
"""The layout of embedding_RVD."""
_X = P(BATCH_AXES, None, None)
_BLOCK = 128
"""Rows that one product of `sum_by_id` adds up: as many as a matrix unit takes at once."""


def replicate(embedding_VD: jax.Array) -> jax.Array:
    """Return embedding_RVD: the table, gathered over `fsdp` once, for each replica.

    In the backward pass each replica adds up the gradients of all uses in its own table. They are summed between
    replicas once, here: scattered over `fsdp` first, so that `data` sums only a shard.
    """
    mesh = current_mesh()
    if mesh is None:
        return embedding_VD[None]
    whole = mesh.shape["fsdp"] == 1  # all_gather would copy it

    def gather(shard_VD: jax.Array) -> jax.Array:
        shard_VD = jax.lax.pcast(shard_VD, "data", to="varying")
        return (shard_VD if whole else jax.lax.all_gather(shard_VD, "fsdp", tiled=True))[None]

    return jax.shard_map(gather, in_specs=P(("tensor", "fsdp"), None), out_specs=REPLICAS)(embedding_VD)


def embed_tokens(embedding_RVD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return x_BTD in `dtype`: each token's row of a table that `replicate` returned."""
    if current_mesh() is None:
        return _rows(embedding_RVD[0], tokens_BT, dtype)

    def local(shard_RVD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        rows_BT = tokens_BT - jax.lax.axis_index("tensor") * shard_RVD.shape[1]
        here_BT = (rows_BT >= 0) & (rows_BT < shard_RVD.shape[1])
        x_BTD = _rows(shard_RVD[0], jnp.where(here_BT, rows_BT, 0), dtype)
        # Every device but one adds zeros.
        return jax.lax.psum(jnp.where(here_BT[..., None], x_BTD, 0), "tensor")

    return jax.shard_map(local, in_specs=(REPLICAS, P(BATCH_AXES, None)), out_specs=_X)(embedding_RVD, tokens_BT)


def embed_positions(table_VD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Return x_BTD, float32: each position's row of a table that every device has whole."""
    if current_mesh() is None:
        return _rows(table_VD, positions_BT, jnp.float32)

    def local(table_VD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        # The backward pass sums the gradients of all replicas at this cast.
        return _rows(jax.lax.pcast(table_VD, BATCH_AXES, to="varying"), positions_BT, jnp.float32)

    return jax.shard_map(local, in_specs=(P(None, None), P(BATCH_AXES, None)), out_specs=_X)(table_VD, positions_BT)


def _rows(table_VD: jax.Array, ids_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the row of each id, x_BTD in `dtype`; a row's gradient adds up in float32 and in one fixed order."""
    # A GPU's scatter adds in the order in which its threads arrive. On other devices the order of a scatter is fixed,
    # and it is faster.
    return (_gather_sorted if platform() == "gpu" else _gather)(table_VD, ids_BT, dtype)


def _gather(table_VD, ids_BT, dtype):
    return table_VD[ids_BT].astype(dtype)


_gather_sorted = jax.custom_vjp(_gather, nondiff_argnums=(2,))


def _gather_backward(dtype, table_and_ids, d_x_BTD):
    table_VD, ids_BT = table_and_ids  # only the shape of the table is used
    return sum_by_id(d_x_BTD.reshape(-1, table_VD.shape[1]), ids_BT.ravel(), table_VD.shape[0]), None


_gather_sorted.defvjp(lambda *arguments: (_gather(*arguments), arguments[:2]), _gather_backward)


def sum_by_id(x_ND: jax.Array, ids_N: jax.Array, n_ids: int) -> jax.Array:
    """Return sums_VD, float32: for each of `n_ids` ids, the sum of the rows of x_ND that have it.

    Unlike a scatter on a GPU, this sums in a fixed order. Rows are sorted by id and cut into blocks. In each block one
    product adds up the rows of each id, and a second product adds up the blocks of an id. Float32 rows are multiplied
    exactly.
    """
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    ids_N = jnp.pad(ids_N, (0, -ids_N.size % _BLOCK), constant_values=n_ids)
    ids_N, order_N = jax.lax.sort_key_val(ids_N, jnp.arange(ids_N.size))
    ids_CN = ids_N.reshape(-1, _BLOCK)
    x_CND = x_ND.at[order_N].get(mode="fill", fill_value=0).reshape(*ids_CN.shape, -1)
    same_CNN = ids_CN[:, :, None] == ids_CN[:, None]
    sums_CND = exact("CNM,CMD->CND", same_CNN.astype(x_ND.dtype), x_CND)
    # The last id of a block may continue in later blocks, whose first rows then hold the rest of its sum.
    first_C, last_C = ids_CN[:, 0], ids_CN[:, -1]
    continues_CC = jnp.triu(last_C[:, None] == first_C, 1)
    rest_CD = exact("CE,ED->CD", continues_CC.astype(jnp.float32), sums_CND[:, 0])
    # Each id reads its sum at its first row.
    ids_V = jnp.arange(n_ids)
    start_V = jnp.searchsorted(ids_N, ids_V, method="scan_unrolled")  # a loop would start a kernel for each halving
    block_V = start_V // _BLOCK
    rest_VD = jnp.where((last_C[block_V] == ids_V)[:, None], rest_CD[block_V], 0)
    return jnp.where((ids_N[start_V] == ids_V)[:, None], sums_CND.reshape(ids_N.size, -1)[start_V] + rest_VD, 0)
