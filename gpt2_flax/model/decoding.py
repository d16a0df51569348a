"""GPT-2 for generation: a cache holds keys and values of the tokens so far, and weights lie as products read them.

Rows may hold different numbers of tokens; a token's column in the cache is its position.
Dimension key: B batch, T sequence, S columns of the cache, N = B * T tokens, D input width, F output width, H heads,
K head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.model.block import Block
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.layers import LayerNorm, Linear, gelu
from gpt2_flax.model.loss import logits
from gpt2_flax.parallel.mesh import current_mesh
from gpt2_flax.parallel.rules import constrain_BTD

_FEW_TOKENS = 128


class Cache(NamedTuple):
    """Keys and values of a batch, one array for each layer: a step would copy the slice it reads of a stacked array.

    Keys and values have different layouts. Products so read both in order, and no compiler merges their two writes
    into one scatter: XLA for CPUs, told to return several results from one pass, fails a check of its own there.
    """

    k_BHKS: tuple[jax.Array, ...]
    v_BHSK: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, cfg: ModelConfig, n_rows: int, n_columns: int) -> "Cache":
        shapes = (cfg.head_size, n_columns), (n_columns, cfg.head_size)
        return cls(
            *(tuple(jnp.zeros((n_rows, cfg.n_head, *shape), cfg.dtype) for _ in range(cfg.n_layer)) for shape in shapes)
        )


@partial(
    jax.tree_util.register_dataclass, data_fields=("wte", "wpe", "blocks", "ln_f", "lm_head"), meta_fields=("cfg",)
)
@dataclass(frozen=True)
class Decoder:
    """A `GPT2` without dropout that reads and extends a cache; made by `decoder_of`."""

    cfg: ModelConfig
    wte: nnx.Embed
    wpe: nnx.Embed
    blocks: Sequence["DecodingBlock"]
    ln_f: LayerNorm
    lm_head: nnx.Embed | None

    def __call__(self, tokens_BT: jax.Array, first_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the input of the head, x_BTD, and the cache extended by `tokens_BT`.

        Args:
            tokens_BT: int32 token ids at the positions from `first_B` on.
            first_B: int32 positions. The cache from there on is overwritten or masked.
            cache: Keys and values of all tokens before, with enough columns for the new tokens.
        """
        positions_BT = first_B[:, None] + jnp.arange(tokens_BT.shape[1])
        mask_BTS = jnp.arange(cache.v_BHSK[0].shape[2]) <= positions_BT[:, :, None]
        # A draft may lie behind the last position; its result is never used.
        x_BTD = self.wte(tokens_BT) + self.wpe(jnp.minimum(positions_BT, self.cfg.n_positions - 1))
        x_BTD = constrain_BTD(x_BTD.astype(self.cfg.dtype))
        layers = []
        for block, k_BHKS, v_BHSK in zip(self.blocks, *cache, strict=True):
            x_BTD, *layer = block(x_BTD, k_BHKS, v_BHSK, first_B, mask_BTS)
            layers.append(layer)
        return self.ln_f(x_BTD), Cache(*zip(*layers, strict=True))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits_BTV over `vocab_size` tokens from the first result of `__call__`."""
        head_VD = (self.lm_head or self.wte).embedding[...]
        x_1ND = x_BTD.reshape(1, -1, x_BTD.shape[-1])
        logits_1NV = logits(x_1ND, head_VD, self.cfg.vocab_size)[..., : self.cfg.vocab_size]
        return logits_1NV.reshape(*x_BTD.shape[:2], -1)


@jax.jit
def decoder_of(model: GPT2) -> Decoder:
    """Return a decoder, to be made once for many texts; under a mesh its weights stay in the layout of `model`."""
    cfg = model.cfg
    layout = TransposedLinear.of if current_mesh() is None else lambda linear: linear
    blocks = [DecodingBlock.of(jax.tree.map(itemgetter(layer), model.h), layout) for layer in range(cfg.n_layer)]
    lm_head = None if cfg.tie_word_embeddings else model.lm_head
    return Decoder(cfg, model.wte, model.wpe, tuple(blocks), model.ln_f, lm_head)


class TransposedLinear(NamedTuple):
    """A `Linear` that stores the weights of one output side by side: a CPU reads them in order, a fifth faster.

    For few tokens, a product takes as long as reading its weights takes.
    """

    kernel_FD: jax.Array
    bias: jax.Array
    """F numbers in the shape of the layer's outputs."""

    @classmethod
    def of(cls, linear: Linear) -> "TransposedLinear":
        kernel, bias = linear.kernel[...], linear.bias[...]
        return cls(kernel.reshape(-1, bias.size).T, bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        n_rows, length, *_ = x_BTD.shape
        x_ND = x_BTD.reshape(n_rows * length, -1)
        kernel_FD, bias_F = self.kernel_FD.astype(x_ND.dtype), self.bias.reshape(-1).astype(x_ND.dtype)
        if n_rows * length > _FEW_TOKENS:
            out_NF = jnp.einsum("ND,FD->NF", x_ND, kernel_FD) + bias_F
        else:
            # XLA for CPUs copies the right side of each product; of few tokens and all weights, weights are larger.
            # The bias is added before the transposition, or XLA would swap the sides again.
            out_NF = (kernel_FD @ x_ND.T + bias_F[:, None]).T
        return out_NF.reshape(n_rows, length, *self.bias.shape)


class DecodingBlock(NamedTuple):
    """A `Block` without dropout that attends to a cache."""

    ln_1: LayerNorm
    c_attn: Callable[[jax.Array], jax.Array]
    attn_c_proj: Callable[[jax.Array], jax.Array]
    ln_2: LayerNorm
    c_fc: Callable[[jax.Array], jax.Array]
    mlp_c_proj: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, block: Block, layout: Callable[[Linear], Callable[[jax.Array], jax.Array]]) -> "DecodingBlock":
        """Return the block with its dense layers as `layout` returns them."""
        attn, mlp = block.attn, block.mlp
        return cls(
            *(block.ln_1, layout(attn.c_attn), layout(attn.c_proj)), *(block.ln_2, layout(mlp.c_fc), layout(mlp.c_proj))
        )

    def __call__(
        self, x_BTD: jax.Array, k_BHKS: jax.Array, v_BHSK: jax.Array, first_B: jax.Array, mask_BTS: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return x_BTD after the block, and the layer's keys and values extended by the tokens of `x_BTD`."""
        q_BTHK, k_BTHK, v_BTHK = jnp.unstack(self.c_attn(self.ln_1(x_BTD)), axis=2)
        k_BHKS = _write(k_BHKS, jnp.einsum("BTHK->BHKT", k_BTHK), first_B, 2)
        v_BHSK = _write(v_BHSK, jnp.einsum("BTHK->BHTK", v_BTHK), first_B, 1)
        x_BTD += self.attn_c_proj(attention(q_BTHK, k_BHKS, v_BHSK, mask_BTS))
        x_BTD += self.mlp_c_proj(gelu(self.c_fc(self.ln_2(x_BTD))))
        return constrain_BTD(x_BTD), k_BHKS, v_BHSK


@partial(jax.vmap, in_axes=(0, 0, 0, None))
def _write(array: jax.Array, columns: jax.Array, first: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, columns, first, axis)


def attention(q_BTHK: jax.Array, k_BHKS: jax.Array, v_BHSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Return scaled dot-product attention, out_BTHK in the dtype of `q_BTHK`; the softmax is float32.

    A query sees the keys where `mask_BTS` (bool) is true: at least one in each row. A gradient would keep all
    probabilities, so this is not for training.
    """
    q_BHTK = (q_BTHK * q_BTHK.shape[-1] ** -0.5).swapaxes(1, 2)
    scores_BHTS = jnp.einsum("BHTK,BHKS->BHTS", q_BHTK, k_BHKS, preferred_element_type=jnp.float32)
    # Added, not selected: XLA for CPUs fuses products, sums and exponentials, but not selections.
    scores_BHTS += jnp.where(mask_BTS, 0, jnp.finfo(jnp.float32).min)[:, None]
    weights_BHTS = jax.nn.softmax(scores_BHTS).astype(q_BTHK.dtype)
    return (weights_BHTS @ v_BHSK).swapaxes(1, 2)
