"""A block of GPT-2: attention and MLP, each behind a layer norm and added to the residual stream.

Dimension key: B batch, T sequence, N = B * T tokens, D n_embd, H heads, K head size, F inner width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gpt2_flax.config.schema import ModelConfig
from gpt2_flax.model.dropout import dropout
from gpt2_flax.model.norm import layer_norm
from gpt2_flax.parallel.mesh import platform
from gpt2_flax.parallel.rules import constrain_BTD, tensor_parallel

Attend = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, Any]]
"""(qkv_BT3HK, dropout_key) -> (out_BTHK, whatever the caller wants to keep of the layer)."""


class Attention(nnx.Module):
    """The projections around multi-head attention."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        heads = (cfg.n_head, cfg.head_size)
        linear = partial(nnx.LinearGeneral, bias_init=_bias_init(cfg), dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        self.c_attn = linear(cfg.n_embd, (3, *heads), kernel_init=nnx.initializers.normal(cfg.initializer_range))
        self.c_proj = linear(heads, cfg.n_embd, axis=(-2, -1), kernel_init=_residual_init(cfg))

    def __call__(
        self, norm: nnx.LayerNorm, x_BTD: jax.Array, attend: Attend, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        out_BTHK, kept = attend(_by_token(partial(_norm_and_linear, norm, self.c_attn), x_BTD), dropout_key)
        return _by_token(partial(_linear, self.c_proj), out_BTHK), kept


class Mlp(nnx.Module):
    """Two dense layers around a tanh-approximated GELU (`gelu_new` in transformers)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, bias_init=_bias_init(cfg), dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        normal = nnx.initializers.normal(cfg.initializer_range)
        self.c_fc = linear(cfg.n_embd, 4 * cfg.n_embd, kernel_init=normal)
        self.c_proj = linear(4 * cfg.n_embd, cfg.n_embd, kernel_init=_residual_init(cfg))

    def __call__(self, norm: nnx.LayerNorm, x_BTD: jax.Array) -> jax.Array:
        def mlp(x_ND):
            inner_NF = checkpoint_name(_norm_and_linear(norm, self.c_fc, x_ND), "mlp")
            return _linear(self.c_proj, _gelu(inner_NF))

        return _by_token(mlp, x_BTD)


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.ln_1 = make_norm(cfg, rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.ln_2 = make_norm(cfg, rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, attend: Attend, dropout_key: jax.Array | None) -> tuple[jax.Array, Any]:
        attend_key, attn_key, mlp_key = split_key(dropout_key, 3)
        attn_BTD, kept = self.attn(self.ln_1, x_BTD, attend, attend_key)
        x_BTD += dropout(attn_BTD, self.cfg.resid_pdrop, attn_key)
        x_BTD += dropout(self.mlp(self.ln_2, x_BTD), self.cfg.resid_pdrop, mlp_key)
        return constrain_BTD(x_BTD), kept


# Quick to compute again from what went in, and would else keep arrays of its own.
_gelu = jax.checkpoint(partial(nnx.gelu, approximate=True))


def normed(norm: nnx.LayerNorm, x_BTD: jax.Array) -> jax.Array:
    """Returns the layer norm of each token."""
    return _by_token(partial(_norm, norm), x_BTD)


def _norm(norm: nnx.LayerNorm, x_ND: jax.Array) -> jax.Array:
    return layer_norm(x_ND, norm.scale[...], norm.bias[...], norm.epsilon)


def _norm_and_linear(norm: nnx.LayerNorm, layer: nnx.Linear | nnx.LinearGeneral, x_ND: jax.Array) -> jax.Array:
    """Returns `layer` of the norm of each token; the backward pass computes the norm again, so that nobody saves it."""

    def multiply(x_ND):
        return _multiply(layer, _norm(norm, x_ND))

    # XLA for CPUs sees that the norm comes again and saves it all the same, one percent slower for the detour.
    return _add_bias(layer, (multiply if platform() == "cpu" else jax.checkpoint(multiply))(x_ND))


def _linear(layer: nnx.Linear | nnx.LinearGeneral, x: jax.Array) -> jax.Array:
    """Applies `layer` to x (N, ...) in `layer.dtype`; the gradient of its bias is summed in float32."""
    return _add_bias(layer, _multiply(layer, x))


def _multiply(layer: nnx.Linear | nnx.LinearGeneral, x: jax.Array) -> jax.Array:
    """Returns the product of x (N, ...) and the kernel of `layer`, its axes merged into a matrix.

    XLA for CPUs copies a kernel before a product over several axes; other compilers do not care. Tensor parallelism
    needs the axes, of which it splits the heads.
    """
    kernel, n_features = layer.kernel[...], layer.bias.ndim
    if tensor_parallel():
        return _product(x, kernel, kernel.ndim - n_features)
    return _product(x.reshape(x.shape[0], -1), kernel.reshape(-1, layer.bias.size), 1)


def _add_bias(layer: nnx.Linear | nnx.LinearGeneral, x: jax.Array) -> jax.Array:
    """Returns x + bias, (N, *features); a product on a GPU adds a bias before it writes, if nothing is between them."""
    # The cast comes last, so its gradient comes first: a sum of tokens in bfloat16 loses most of them.
    bias = jnp.broadcast_to(layer.bias[...].reshape(x.shape[1:]), x.shape).astype(layer.dtype)
    return (x + bias).reshape(-1, *layer.bias.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, n_axes: int) -> jax.Array:
    """Multiply x (N, ...) by the first `n_axes` axes of `kernel`, float32, in the dtype of x.

    A gradient of the cast kernel would be rounded to that dtype on each device, and summed between devices in it:
    every addition rounds again. The product adds up in float32 anyway, so here it is returned and summed so.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), n_axes)


def _product_backward(n_axes, x_and_kernel, of_out):
    x, kernel = x_and_kernel
    outward = tuple(range(1, of_out.ndim)), tuple(range(n_axes, kernel.ndim))
    of_x = jnp.tensordot(of_out, kernel.astype(x.dtype), outward)
    add_up = partial(jnp.tensordot, axes=(0, 0), preferred_element_type=jnp.float32)
    # XLA for CPUs fails at products of bfloat16 in float32 with more than one free axis on the right.
    return of_x, jnp.moveaxis(add_up(of_out, x), -1, 0) if n_axes == 1 else add_up(x, of_out)


_product.defvjp(lambda x, kernel, n_axes: (_product(x, kernel, n_axes), (x, kernel)), _product_backward)


def _by_token(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Applies `layer` to x (B, T, ...) as (N, ...): on a CPU XLA's products are twice as fast so, its sums 20 times."""
    out = layer(x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


def make_norm(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(cfg.n_embd, epsilon=cfg.layer_norm_epsilon, rngs=rngs)


def _residual_init(cfg: ModelConfig) -> nnx.Initializer:
    """GPT-2 shrinks the projections that write to the residual stream by sqrt(2 * layers), UER-py does not."""
    shrink = (2 * cfg.n_layer) ** 0.5 if cfg.initializer == "gpt2" else 1.0
    return nnx.initializers.normal(cfg.initializer_range / shrink)


def _bias_init(cfg: ModelConfig) -> nnx.Initializer:
    """GPT-2 starts from biases of 0, UER-py draws them like all else."""
    return nnx.initializers.zeros if cfg.initializer == "gpt2" else nnx.initializers.normal(cfg.initializer_range)


def split_key(key: jax.Array | None, num: int) -> Any:
    return [None] * num if key is None else jax.random.split(key, num)
