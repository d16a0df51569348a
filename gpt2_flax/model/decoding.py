"""Blocks for generation, where a product has few rows and takes as long as its weights take to be read.

Dimension key: B batch, T sequence, N = B * T tokens, D width going in, F width coming out, H heads, K head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.model.block import Attend, Block, normed


class Product(NamedTuple):
    """A linear layer whose weights of one output lie side by side: a CPU reads them in order, a fifth faster."""

    kernel_FD: jax.Array
    bias: jax.Array
    """Of any shape that has F elements; outputs get this shape."""

    @classmethod
    def of(cls, linear: nnx.Linear | nnx.LinearGeneral) -> "Product":
        kernel, bias = linear.kernel[...], linear.bias[...]
        return cls(kernel.reshape(-1, bias.size).T, bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        n_rows, length, *_ = x_BTD.shape
        out_NF = jnp.einsum("ND,FD->NF", x_BTD.reshape(n_rows * length, -1), self.kernel_FD.astype(x_BTD.dtype))
        return (out_NF + self.bias.reshape(-1).astype(x_BTD.dtype)).reshape(n_rows, length, *self.bias.shape)


class DecodingBlock(NamedTuple):
    """Computes what the `Block` does that it was made of, without dropout, on one device."""

    ln_1: nnx.LayerNorm
    qkv: Product
    attn_out: Product
    ln_2: nnx.LayerNorm
    inner: Product
    mlp_out: Product

    @classmethod
    def of(cls, block: Block) -> "DecodingBlock":
        attn, mlp = (Product.of(block.attn.c_attn), Product.of(block.attn.c_proj)), block.mlp
        return cls(block.ln_1, *attn, block.ln_2, Product.of(mlp.c_fc), Product.of(mlp.c_proj))

    def __call__(self, x_BTD: jax.Array, attend: Attend, dropout_key: None) -> tuple[jax.Array, Any]:
        q_BTHK, k_BTHK, v_BTHK = jnp.unstack(self.qkv(normed(self.ln_1, x_BTD)), axis=2)
        out_BTHK, kept = attend(q_BTHK, k_BTHK, v_BTHK, dropout_key)
        x_BTD += self.attn_out(out_BTHK)
        inner_BTF = nnx.gelu(self.inner(normed(self.ln_2, x_BTD)), approximate=True)
        return x_BTD + self.mlp_out(inner_BTF), kept
