"""Growth: the first steps of a run train fewer layers on shorter rows, and so cost less.

Before it grows, a model consists of its first n layers. The layers above are the identity, because their residual
projections are zero, so a checkpoint is a model of full depth at any step. When the model grows, layer i becomes a copy
of layer i mod n, together with its moments (Gong et al., ICML 2019; Du et al., arXiv:2405.15319). `data.packing` cuts
the rows; shorter rows first come from Li et al., arXiv:2108.06084.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gpt2_flax.parallel.rules import path_of

Tree = TypeVar("Tree")


def first_layers(tree: Any, smaller: Tree) -> Tree:
    """Return the arrays of a model, or of a state with one, in the form of `smaller`, which has fewer layers."""
    leaves = [
        leaf[: like.shape[0]] if _has_layers(key_path) else leaf
        for (key_path, leaf), like in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(smaller), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(smaller), leaves)


def with_first_layers(tree: Tree, smaller: Any) -> Tree:
    """Return `tree` with the arrays of `smaller`; its other layers stay. The inverse of `first_layers`."""
    news = iter(jax.tree.leaves(smaller))

    def replaced(key_path: Any, old: jax.Array) -> jax.Array:
        new = next(news)
        return old.at[: new.shape[0]].set(new) if _has_layers(key_path) else new

    return jax.tree_util.tree_map_with_path(replaced, tree)


def stacked(tree: Tree, n_layers: int) -> Tree:
    """Return `tree` with copies of its first `n_layers` layers in place of the others."""

    def repeated(key_path: Any, x: jax.Array) -> jax.Array:
        return x[jnp.arange(x.shape[0]) % n_layers] if _has_layers(key_path) else x

    return jax.tree_util.tree_map_with_path(repeated, tree)


def identity_above(model: Tree, n_layers: int) -> Tree:
    """Return `model` with layers above the first `n_layers` that add nothing to the residual stream."""

    def silenced(key_path: Any, x: jax.Array) -> jax.Array:
        return x.at[n_layers:].set(0) if _has_layers(key_path) and "/c_proj/" in path_of(key_path) else x

    return jax.tree_util.tree_map_with_path(silenced, model)


def _has_layers(key_path: Any) -> bool:
    return "/h/" in f"/{path_of(key_path)}"
