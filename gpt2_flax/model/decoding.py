"""GPT-2 for generation: what it knows of the tokens so far stays in a cache, and layers lie as products read them.

Rows may have got different numbers of tokens; a token's column in the cache is its position.
Dimension key: B batch, T sequence, S columns of the cache, N = B * T tokens, D width going in, F width coming out,
H heads, K head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.config.schema import ModelConfig
from gpt2_flax.model.attention import attention
from gpt2_flax.model.block import Attend, Block, normed
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import logits
from gpt2_flax.parallel.rules import constrain_BTD

_FEW_TOKENS = 128


class Cache(NamedTuple):
    """Keys and values of a batch; an array for each layer: of a stacked one, a step would copy the part it reads.

    Their axes differ so that products read both in order, and so that no compiler makes one scatter of writing both:
    XLA for CPUs, told to give several results of one pass, ends with a failed check there.
    """

    k_BHKS: tuple[jax.Array, ...]
    v_BHSK: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, cfg: ModelConfig, n_rows: int, n_columns: int) -> "Cache":
        k_shape, v_shape = (cfg.head_size, n_columns), (n_columns, cfg.head_size)
        return cls(
            *(
                tuple(jnp.zeros((n_rows, cfg.n_head, *shape), cfg.dtype) for _ in range(cfg.n_layer))
                for shape in (k_shape, v_shape)
            )
        )


@partial(
    jax.tree_util.register_dataclass, data_fields=("wte", "wpe", "blocks", "ln_f", "lm_head"), meta_fields=("cfg",)
)
@dataclass(frozen=True)
class Decoder:
    """Computes what the `GPT2` does that it was made of by `decoder_of`, without dropout."""

    cfg: ModelConfig
    wte: nnx.Embed
    wpe: nnx.Embed
    blocks: Sequence[Callable]
    ln_f: nnx.LayerNorm
    lm_head: nnx.Embed | None

    def __call__(self, tokens_BT: jax.Array, first_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns what the head sees, x_BTD, of tokens at the positions from `first_B` on, and the cache with them.

        What the cache holds from these positions on is written anew or not looked at. Columns must be there for all.
        """
        positions_BT = first_B[:, None] + jnp.arange(tokens_BT.shape[1])
        mask_BTS = jnp.arange(cache.v_BHSK[0].shape[2]) <= positions_BT[:, :, None]

        def attend(old_k_BHKS, old_v_BHSK, qkv_BT3HK, _):
            q_BTHK, k_BTHK, v_BTHK = jnp.unstack(qkv_BT3HK, axis=2)
            k_BHKS = _write(old_k_BHKS, jnp.einsum("BTHK->BHKT", k_BTHK), first_B, 2)
            v_BHSK = _write(old_v_BHSK, jnp.einsum("BTHK->BHTK", v_BTHK), first_B, 1)
            return attention(q_BTHK, k_BHKS, v_BHSK, mask_BTS), (k_BHKS, v_BHSK)

        # A draft may lie behind the last position; it is never looked at.
        x_BTD = self.wte(tokens_BT) + self.wpe(jnp.minimum(positions_BT, self.cfg.n_positions - 1))
        x_BTD = constrain_BTD(x_BTD.astype(self.cfg.dtype))
        kept = []
        for block, *layer_cache in zip(self.blocks, cache.k_BHKS, cache.v_BHSK, strict=True):
            x_BTD, keys_and_values = block(x_BTD, partial(attend, *layer_cache), None)
            kept.append(keys_and_values)
        return normed(self.ln_f, x_BTD), Cache(*zip(*kept, strict=True))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns float32 logits_BTV over `vocab_size` tokens of what `__call__` returned."""
        head_VD = (self.lm_head or self.wte).embedding[...]
        x_1ND = x_BTD.reshape(1, -1, x_BTD.shape[-1])
        logits_1NV = logits(x_1ND, head_VD, self.cfg.vocab_size)[..., : self.cfg.vocab_size]
        return logits_1NV.reshape(*x_BTD.shape[:2], -1)


@jax.jit
def decoder_of(model: GPT2) -> Decoder:
    """Takes the layers of `model` apart, to be done once for many texts; under a mesh they stay as they lie there."""
    cfg = model.cfg
    blocks = [jax.tree.map(itemgetter(layer), model.h) for layer in range(cfg.n_layer)]
    if jax.sharding.get_abstract_mesh().empty:
        blocks = map(DecodingBlock.of, blocks)
    lm_head = None if cfg.tie_word_embeddings else model.lm_head
    return Decoder(cfg, model.wte, model.wpe, tuple(blocks), model.ln_f, lm_head)


@partial(jax.vmap, in_axes=(0, 0, 0, None))
def _write(array: jax.Array, columns: jax.Array, first: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, columns, first, axis)


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
        x_ND = x_BTD.reshape(n_rows * length, -1)
        kernel_FD, bias_F = self.kernel_FD.astype(x_ND.dtype), self.bias.reshape(-1).astype(x_ND.dtype)
        if n_rows * length > _FEW_TOKENS:
            out_NF = jnp.einsum("ND,FD->NF", x_ND, kernel_FD) + bias_F
        else:
            # XLA for CPUs packs what is on the right anew for each product: weights, which are larger than few tokens.
            # The bias comes before tokens are first again, or it would swap the sides.
            out_NF = (kernel_FD @ x_ND.T + bias_F[:, None]).T
        return out_NF.reshape(n_rows, length, *self.bias.shape)


class DecodingBlock(NamedTuple):
    """Computes what the `Block` does that it was made of, without dropout, on one device.

    A product has few rows here and takes as long as its weights take to be read.
    """

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
        out_BTHK, kept = attend(self.qkv(normed(self.ln_1, x_BTD)), dropout_key)
        x_BTD += self.attn_out(out_BTHK)
        inner_BTF = nnx.gelu(self.inner(normed(self.ln_2, x_BTD)), approximate=True)
        return x_BTD + self.mlp_out(inner_BTF), kept
