"""The sharding of every array: one ordered table from parameter paths to layouts over the mesh."""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.mesh import BATCH_AXES, current_mesh

# The first match wins. Each dimension has an entry; the first dimension of `h/` is the layer. The token embedding is
# split over the vocabulary only: splitting n_embd too makes XLA replicate activations around the look-up ("Involuntary
# full rematerialization"). Optimizer moments have the layout of their parameters, because their paths end alike.
RULES = (
    (r"(wte|lm_head)/embedding$", P(("tensor", "fsdp"), None)),
    (r"wpe/embedding$", P(None, None)),
    (r"h/ln_[12]/(scale|bias)$", P(None, None)),
    (r"h/attn/c_attn/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"h/attn/c_attn/bias$", P(None, None, "tensor", None)),
    (r"h/attn/c_proj/kernel$", P(None, "tensor", None, "fsdp")),
    (r"h/attn/c_proj/bias$", P(None, None)),
    (r"h/mlp/c_fc/kernel$", P(None, "fsdp", "tensor")),
    (r"h/mlp/c_fc/bias$", P(None, "tensor")),
    (r"h/mlp/c_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"h/mlp/c_proj/bias$", P(None, None)),
    (r"ln_f/(scale|bias)$", P(None)),
)


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return the path of a leaf, such as `h/attn/c_attn/kernel`, without the `value` that Flax adds."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/").removesuffix("/value")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Return the layout of the array at `path`; scalars are replicated.

    Raises:
        UserError: CONFIG, when a dimension does not split evenly over its axes.
        ValueError: when no rule matches.
    """
    if not shape:
        return P()
    spec = next((spec for pattern, spec in RULES if re.search(pattern, path)), None)
    if spec is None or len(spec) != len(shape):
        raise ValueError(f"no rule for {path} of shape {shape}")
    for size, axes in zip(shape, spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        shards = math.prod(mesh.shape[name] for name in names)
        if size % shards:
            what = f"{path} of shape {shape} cannot be split {shards} ways along its dimension of {size}"
            fix = f"lower mesh.{' or mesh.'.join(names)}, or change n_embd or n_head to a multiple of it"
            raise UserError(ExitCode.CONFIG, what, "section [mesh]", fix)
    return spec


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return `tree` with a NamedSharding in place of each array or ShapeDtypeStruct."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: NamedSharding(mesh, spec_of(path_of(key_path), leaf.shape, mesh)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`, other dimensions replicated."""
    return NamedSharding(mesh, P(BATCH_AXES))


def constrain_BTD(x_BTD: jax.Array) -> jax.Array:
    """Pin the residual stream to the one activation layout: rows over `data` and `fsdp`. No-op without a mesh."""
    if current_mesh() is None:
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, P(BATCH_AXES, None, None))


def tensor_parallel() -> bool:
    """Return whether the mesh in force splits heads and inner widths over devices."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape["tensor"] > 1
