"""Layer norm, with a backward pass that reads what it needs as few times as it can.

Dimension key: N tokens, D width.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Returns the layer norm (arXiv:1607.06450) of each token in the dtype of `x_ND`; all arithmetic is float32."""
    x_ND, dtype = x_ND.astype(jnp.float32), x_ND.dtype
    mean_N1, inverse_N1 = _statistics(x_ND, epsilon)
    return ((x_ND - mean_N1) * inverse_N1 * scale_D + bias_D).astype(dtype)


def _forward(x_ND, scale_D, bias_D, epsilon):
    return layer_norm(x_ND, scale_D, bias_D, epsilon), (x_ND, scale_D)


def _backward(epsilon, saved, d_out_ND):
    x_ND, scale_D = saved
    # Behind a barrier, or a GPU would write `normal_ND` for the sums over tokens, which may not begin before those over
    # the width end.
    mean_N1, inverse_N1 = jax.lax.optimization_barrier(_statistics(x_ND.astype(jnp.float32), epsilon))
    normal_ND, d_out_ND = (x_ND.astype(jnp.float32) - mean_N1) * inverse_N1, d_out_ND.astype(jnp.float32)
    d_normal_ND = d_out_ND * scale_D
    level_N1, slope_N1 = d_normal_ND.mean(-1, keepdims=True), (d_normal_ND * normal_ND).mean(-1, keepdims=True)
    d_x_ND = (d_normal_ND - level_N1 - normal_ND * slope_N1) * inverse_N1
    return d_x_ND.astype(x_ND.dtype), (d_out_ND * normal_ND).sum(0), d_out_ND.sum(0)


layer_norm.defvjp(_forward, _backward)


def _statistics(x_ND: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Returns the mean_N1 of each token and the inverse_N1 of its standard deviation."""
    mean_N1 = x_ND.mean(-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which is off by 1e-4 where a mean is large.
    return mean_N1, jax.lax.rsqrt(((x_ND - mean_N1) ** 2).mean(-1, keepdims=True) + epsilon)
