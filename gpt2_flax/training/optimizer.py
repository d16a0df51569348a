"""The optimizer, AdamW (Loshchilov and Hutter, arXiv:1711.05101) or Muon, and its learning rate schedule.

Dimension key: L layers, D n_embd, Q query, key and value, H heads, K head size, F inner width of the MLP.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_flax.config.schema import Config, OptimizerConfig
from gpt2_flax.parallel.mesh import AXES, current_mesh
from gpt2_flax.parallel.rules import path_of, spec_of

_MATRIX_AXES = {
    "h/attn/c_attn/kernel": "LDQHK",
    "h/attn/c_proj/kernel": "LHKD",
    "h/mlp/c_fc/kernel": "LDF",
    "h/mlp/c_proj/kernel": "LFD",
}
"""The axes of each kernel. For Muon each index of L and Q is a matrix of D rows; other axes are columns."""

POLAR_EXPRESS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
"""Factors of x, x³ and x⁵ in the polynomials that together bring singular values from [0.01, 1] nearest to 1.

Amsel et al., arXiv:2505.16932, describe how to compute the factors.
"""
_LARGEST_SINGULAR_VALUE = 1 / 1.02  # below 1, because rounding could lift it above, where the polynomials explode
_MUON_MOMENTUM = 0.95
BIAS_WARMUP = 200
"""With Muon, the steps in which biases and position embeddings, which move all tokens, come to their full rate."""


def learning_rate(config: Config) -> optax.Schedule:
    """Return the learning rate of each optimizer step: a warm-up from 0, then the decay that the config names.

    With a warm-up, the first step has rate 0. The last of `training.total_steps` has almost the lowest rate. `wsd`
    (warm-up, stable, decay) comes from arXiv:2404.06395, and `inverse_sqrt` from arXiv:1706.03762.
    """
    optimizer, warmup, total = config.optimizer, config.warmup_steps, config.training.total_steps
    peak, lowest, steps = optimizer.learning_rate, optimizer.min_learning_rate_ratio, max(1, total - warmup)
    constant = optax.constant_schedule(peak)
    after = {
        "linear": lambda: optax.linear_schedule(peak, peak * lowest, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, lowest),
        "constant": lambda: constant,
        "wsd": lambda: optax.join_schedules(
            [constant, optax.linear_schedule(peak, peak * lowest, config.decay_steps)], [steps - config.decay_steps]
        ),
        "inverse_sqrt": lambda: lambda count: peak * jnp.sqrt(warmup / (warmup + count)),
    }[optimizer.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW, the AdamW of UER-py, or Muon for matrices and AdamW for the rest."""
    optimizer, rate = config.optimizer, learning_rate(config)

    def decayed(params):
        return _by_path(params, ("/kernel", "/embedding") if optimizer.decay_embeddings else ("/kernel",))

    if optimizer.name == "muon":
        clip = optax.stateless(lambda grads, _: optax.tree.scale(_clipping(grads, optimizer.max_grad_norm), grads))
        direction = optax.partition({"muon": _muon(config.model.dtype), "adam": _adam(optimizer)}, _label)
        scale = _scale_by_rate(rate)
    else:
        clip, direction = optax.identity(), _adam(optimizer, optimizer.max_grad_norm)
        scale = optax.scale_by_learning_rate(rate)
    if optimizer.name == "adamw_uer":
        # Decay after the step equals decay before it, with a step that is smaller by the decay.
        less = optax.scale_by_schedule(lambda count: 1 - optimizer.weight_decay * rate(count))
        direction = optax.chain(direction, optax.masked(less, decayed))
    decay = optax.add_decayed_weights(optimizer.weight_decay, decayed)
    # Nested like `optax.adamw`: the paths of the moments in checkpoints follow from the places in these chains.
    return optax.chain(clip, optax.chain(direction, decay, scale))


def _scale_by_rate(rate: optax.Schedule) -> optax.GradientTransformation:
    """Return `optax.scale_by_learning_rate`, with a warm-up of `BIAS_WARMUP` steps for biases and positions."""

    def update(updates, state, params=None):
        step = -jnp.asarray(rate(state.count))
        late = step * jnp.minimum(1.0, (state.count + 1) / BIAS_WARMUP)
        is_late = _by_path(updates, ("/bias", "wpe/embedding"))
        updates = jax.tree.map(lambda update, is_late: (late if is_late else step) * update, updates, is_late)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(optax.scale_by_learning_rate(rate).init, update)


def _clipping(grads: optax.Updates, max_norm: float) -> jax.Array | float:
    """Return the factor that brings the global norm of the gradients down to `max_norm`, or 1; 0 clips nothing."""
    return max_norm / jnp.maximum(optax.tree.norm(grads), max_norm) if max_norm else 1.0


def _adam(optimizer: OptimizerConfig, max_grad_norm: float = 0.0) -> optax.GradientTransformation:
    """Return clipping and Adam with the state of `optax.scale_by_adam`; the Adam of UER-py has no bias correction.

    Each moment and the update are computed from the gradient and the old moments alone, never from each other. So XLA
    compiles them into one pass over memory, which decides the speed on a CPU.
    """
    b1, b2, eps = optimizer.b1, optimizer.b2, optimizer.eps

    def update(updates, state, params=None):
        grads, clipping, count = updates, _clipping(updates, max_grad_norm), state.count + 1
        corrections = [1.0 if optimizer.name == "adamw_uer" else 1 / (1 - b**count) for b in (b1, b2)]

        def moment(correction):
            old, new = b1 * correction, (1 - b1) * clipping * correction
            return lambda grad, mu: old * mu + new * grad

        def square(correction):
            old, new = b2 * correction, clipping * jnp.sqrt((1 - b2) * correction)
            return lambda grad, nu: old * nu + jnp.square(new * grad)

        mean, mean_square = moment(corrections[0]), square(corrections[1])
        updates = jax.tree.map(
            lambda grad, mu, nu: mean(grad, mu) / (jnp.sqrt(mean_square(grad, nu)) + eps), grads, state.mu, state.nu
        )
        mu = jax.tree.map(moment(1.0), grads, state.mu)
        nu = jax.tree.map(square(1.0), grads, state.nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _muon(dtype: str) -> optax.GradientTransformation:
    """Return Muon: Nesterov momentum, then approximately the nearest orthogonal matrix, computed in `dtype`.

    The result for a matrix with sides m <= n has the spectral norm sqrt(n / m). So one learning rate fits all widths
    (Yang et al., arXiv:2310.17813), and it suits Adam for embeddings, biases and norms too.
    """

    def orthogonalise(key_path, update):
        path = path_of(key_path)
        of_layers = partial(_orthogonal, axes=_MATRIX_AXES[path], dtype=dtype)
        return _dealt_out(of_layers, update, path).astype(update.dtype)

    stateless = optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(orthogonalise, updates))
    return optax.chain(optax.trace(_MUON_MOMENTUM, nesterov=True), stateless)


def _dealt_out(function: Callable[[jax.Array], jax.Array], x: jax.Array, path: str) -> jax.Array:
    """Apply `function` to the kernel at `path`, layer by layer, and let each device compute some of the layers.

    Each device exchanges its slice of all layers for some whole layers, and back. Layers of zeros make the split even.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(x)
    spec, n_layers = spec_of(path, x.shape, mesh), x.shape[0]
    split = [(name, axis) for axis, name in enumerate(spec) if name is not None]
    copied = tuple(name for name in AXES if name not in spec)

    def of_device(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -n_layers % mesh.size), *[(0, 0)] * (x.ndim - 1)])
        n_of_copy = x.shape[0] // math.prod(mesh.shape[name] for name in copied)
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(copied) * n_of_copy, n_of_copy)
        for name, axis in split:
            x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=axis, tiled=True)
        x = function(x)
        for name, axis in reversed(split):
            x = jax.lax.all_to_all(x, name, split_axis=axis, concat_axis=0, tiled=True)
        return jax.lax.all_gather(x, copied, tiled=True)[:n_layers]

    return jax.shard_map(of_device, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _orthogonal(x: jax.Array, axes: str, dtype: str) -> jax.Array:
    """Return the matrices of `x` with all singular values near sqrt(n / m), for matrices with sides m <= n.

    The polynomials are X times polynomials in X Xᵀ, so they need only (D, D) products.
    """
    stack, others = "".join(axis for axis in axes if axis in "LQ"), axes.replace("D", "E")
    of_matrix = tuple(index for index, axis in enumerate(axes) if axis not in stack)
    norm = jnp.sqrt(jnp.square(x).sum(of_matrix, keepdims=True))  # at least the largest singular value
    x = (x * (_LARGEST_SINGULAR_VALUE / (norm + 1e-8))).astype(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = jnp.einsum(f"{axes},{others}->{stack}DE", x, x)
        x = a * x + jnp.einsum(f"{stack}DE,{others}->{axes}", b * gram + c * gram @ gram, x)
    size, side = math.prod(x.shape[index] for index in of_matrix), x.shape[axes.index("D")]
    return x * (size**0.5 / side)  # D is the shorter side, so the longer side is size / side


def _label(params: Any) -> Any:
    return jax.tree.map(lambda matrix: "muon" if matrix else "adam", _by_path(params, ("/kernel",)))


def _by_path(params: Any, endings: tuple[str, ...]) -> Any:
    """Return a tree of bools: whether the path of each parameter has one of the endings."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_of(key_path).endswith(endings), params)
