"""The dense layer, the layer norm and the GELU of a block, laid out and rematerialized as XLA runs them fastest.

So `block.py` reads as the mathematics; here, comments give the reason of each detail that is there for a compiler.
Parameters and their gradients are float32 whatever the compute dtype is.

Dimension key: N tokens, D width.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.parallel.mesh import platform
from gpt2_flax.parallel.rules import tensor_parallel

Axes = tuple[int, ...]

# The backward pass computes the GELU again from its input, which is quick, and so keeps no array for it.
gelu = jax.checkpoint(partial(nnx.gelu, approximate=True))


class LayerNorm(nnx.Module):
    """Layer norm (arXiv:1607.06450) over the last axis, in the dtype of the input; all arithmetic is float32."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.epsilon = cfg.layer_norm_epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (cfg.n_embd,)))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (cfg.n_embd,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # XLA for CPUs sums gradients over one axis of tokens 20 times as fast as over two axes.
        x_ND = x.reshape(-1, x.shape[-1])
        normal_ND: jax.Array = layer_norm(x_ND, self.scale[...], self.bias[...], self.epsilon)
        return normal_ND.reshape(x.shape)


class Linear(nnx.Module):
    """A dense layer from the last axes of its input, `inputs`, to the axes `outputs`, computed in `cfg.dtype`."""

    def __init__(self, cfg: ModelConfig, inputs: Axes, outputs: Axes, *, residual: bool = False, rngs: nnx.Rngs):
        """Initialize the layer; `residual` says that its output is added to the residual stream.

        GPT-2 divides the deviation of residual kernels by sqrt(2 * n_layer) and starts biases at 0; UER-py does
        neither.
        """
        gpt2 = cfg.initializer == "gpt2"
        shrink = (2 * cfg.n_layer) ** 0.5 if gpt2 and residual else 1.0
        kernel_init = nnx.initializers.normal(cfg.initializer_range / shrink)
        bias_init = nnx.initializers.zeros if gpt2 else nnx.initializers.normal(cfg.initializer_range)
        kernel = kernel_init(rngs.params(), (math.prod(inputs), math.prod(outputs)))
        self.kernel = nnx.Param(kernel.reshape(*inputs, *outputs))
        self.bias = nnx.Param(bias_init(rngs.params(), (math.prod(outputs),)).reshape(outputs))
        self.dtype = jnp.dtype(cfg.dtype)

    def __call__(self, x: jax.Array, norm: LayerNorm | None = None) -> jax.Array:
        """Return (..., *outputs) for x (..., *inputs).

        With `norm`, apply the layer to `norm(x)`; the backward pass computes the norm again instead of keeping it.
        """
        n_leading = x.ndim - self._n_inputs
        leading = x.shape[:n_leading]
        # XLA for CPUs is twice as fast at products, and 20 times at sums, over one axis of tokens than over two axes.
        x = x.reshape(-1, *x.shape[n_leading:])

        def multiply(x: jax.Array) -> jax.Array:
            return self._multiply(x if norm is None else norm(x))

        # XLA for CPUs merges both computations of the norm in any case, and jax.checkpoint costs it one percent.
        again = norm is not None and platform() != "cpu"
        product = (jax.checkpoint(multiply) if again else multiply)(x)
        # The cast of the bias comes last, so the sum of its gradient over tokens is float32: in bfloat16 it would lose
        # most tokens. Nothing stands between product and sum, so that a GPU adds the bias before it writes the product.
        bias = self.bias[...].reshape(product.shape[1:])
        bias = jnp.broadcast_to(bias, product.shape).astype(self.dtype)
        return (product + bias).reshape(*leading, *self.bias.shape)

    @property
    def _n_inputs(self) -> int:
        return self.kernel.ndim - self.bias.ndim

    def _multiply(self, x: jax.Array) -> jax.Array:
        # XLA for CPUs copies a kernel before a product over several axes, so it gets a matrix. Tensor parallelism needs
        # the axes, because it splits the heads.
        if tensor_parallel():
            return _product(x, self.kernel[...], self._n_inputs)
        return _product(x.reshape(len(x), -1), self.kernel[...].reshape(-1, self.bias.size), 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, n_axes: int) -> jax.Array:
    """Multiply x (N, ...) by the first `n_axes` axes of `kernel`, float32, in the dtype of x.

    JAX's own gradient of the cast kernel would have the dtype of x on each device and in the sum over devices, and
    every addition would round again. The product accumulates in float32 anyway, so this gradient stays float32.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), n_axes)


def _product_backward(n_axes, x_and_kernel, d_out):
    x, kernel = x_and_kernel
    outputs = tuple(range(1, d_out.ndim)), tuple(range(n_axes, kernel.ndim))
    d_x = jnp.tensordot(d_out, kernel.astype(x.dtype), outputs)
    sum_over_tokens = partial(jnp.tensordot, axes=(0, 0), preferred_element_type=jnp.float32)
    # XLA for CPUs fails at products of bfloat16 in float32 with more than one free axis on the right.
    return d_x, jnp.moveaxis(sum_over_tokens(d_out, x), -1, 0) if n_axes == 1 else sum_over_tokens(x, d_out)


_product.defvjp(lambda x, kernel, n_axes: (_product(x, kernel, n_axes), (x, kernel)), _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Return the layer norm of each token, with a backward pass that reads its arrays as few times as it can."""
    x_ND, dtype = x_ND.astype(jnp.float32), x_ND.dtype
    mean_N1, inverse_N1 = _statistics(x_ND, epsilon)
    return ((x_ND - mean_N1) * inverse_N1 * scale_D + bias_D).astype(dtype)


def _norm_forward(x_ND, scale_D, bias_D, epsilon):
    return layer_norm(x_ND, scale_D, bias_D, epsilon), (x_ND, scale_D)


def _norm_backward(epsilon, saved, d_out_ND):
    x_ND, scale_D = saved
    # The sums over tokens must wait for the sums over the width. Without this barrier a GPU would write `normal_ND`
    # to memory for them.
    mean_N1, inverse_N1 = jax.lax.optimization_barrier(_statistics(x_ND.astype(jnp.float32), epsilon))
    normal_ND, d_out_ND = (x_ND.astype(jnp.float32) - mean_N1) * inverse_N1, d_out_ND.astype(jnp.float32)
    d_normal_ND = d_out_ND * scale_D
    level_N1, slope_N1 = d_normal_ND.mean(-1, keepdims=True), (d_normal_ND * normal_ND).mean(-1, keepdims=True)
    d_x_ND = (d_normal_ND - level_N1 - normal_ND * slope_N1) * inverse_N1
    return d_x_ND.astype(x_ND.dtype), (d_out_ND * normal_ND).sum(0), d_out_ND.sum(0)


layer_norm.defvjp(_norm_forward, _norm_backward)


def _statistics(x_ND: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Return each token's mean_N1 and the inverse_N1 of its standard deviation."""
    mean_N1 = x_ND.mean(-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which is off by 1e-4 where a mean is large.
    return mean_N1, jax.lax.rsqrt(((x_ND - mean_N1) ** 2).mean(-1, keepdims=True) + epsilon)
